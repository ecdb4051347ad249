"""What every activation observer can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from quantflow.schema import ActivationSpec


#: Values per pass: the second look at a chunk finds it in the cache, which makes large tensors 5 times faster.
CHUNK = 2**20


@dataclass(frozen=True)
class Sketch:
    """What an observer takes in of one tensor, on the tensor's device: many are fetched at once.

    Attributes:
        extremes: float32 (2,): minimum and maximum; NaN in both where there is one.
        counts: int32, the bins of `distribution`; None for observers that only look at the extremes.
    """

    extremes: torch.Tensor
    counts: torch.Tensor | None = None


class AbstractObserver(ABC):
    """Watches one value over many batches and proposes the range that its codes should span.

    An observer of one half of the data, merged with an observer of the other half, is equal (`==`, which
    compares the whole state) to an observer of all of it.

    Args:
        spec: the activation's part of the QConfig; observers differ in which of its fields they use.
    """

    def __init__(self, spec: ActivationSpec) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """No number was observed yet."""

    @abstractmethod
    def observe(self, x: torch.Tensor) -> None:
        """Take in a floating-point tensor of any shape and memory layout; an empty one changes nothing.

        Raises:
            ValueError: "NaN" or "Inf" when x holds one; the observer is then unchanged.
        """

    def sketch(self, x: torch.Tensor) -> Sketch:
        """What `take` needs of a non-empty tensor, computed where it lies and without waiting for it."""
        return Sketch(extremes_of(flat(x)))

    @abstractmethod
    def take(self, low: float, high: float, counts: torch.Tensor | None) -> None:
        """Take in a tensor by its `sketch`, as `observe` the tensor itself; counts on the CPU."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """A new observer of what `self` saw followed by what `other` saw; neither is changed.

        Raises:
            ValueError: if the two are of different kinds or specs.
        """

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """(low, high), low <= high, for `activation_qparams`.

        Raises:
            ValueError: if nothing was observed.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Everything measured, as contiguous CPU tensors."""

    @abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace what was measured by a `state()`.

        Raises:
            ValueError: if the tensors are not a state of this kind of observer.
        """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or self.spec != other.spec:
            return False
        mine, theirs = self.state(), other.state()
        return all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # it changes with every batch

    def __repr__(self) -> str:
        text = "empty" if self.is_empty else "[{:.6g}, {:.6g}]".format(*self.range())
        return f"{type(self).__name__}({text})"

    def _require_mergeable(self, other: AbstractObserver) -> None:
        if type(self) is not type(other) or self.spec != other.spec:
            raise ValueError(
                f"can't merge {type(self).__name__}({self.spec}) with {type(other).__name__}({other.spec}): "
                "both must be of one kind and one spec"
            )

    def _require_observed(self) -> None:
        if self.is_empty:
            raise ValueError("nothing was observed, so there is no range")


def flat(x: torch.Tensor) -> torch.Tensor:
    """x as one float32 row in the order of its memory: no copy for any dense layout, channels-last included."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.detach().permute(order).reshape(-1).to(torch.float32)


def extremes(row: torch.Tensor) -> tuple[float, float]:
    """(min, max) of a non-empty float32 row.

    Raises:
        ValueError: "NaN" or "Inf" when it holds one.
    """
    low, high = extremes_of(row).tolist()
    require_finite(low, high)
    return low, high


def extremes_of(row: torch.Tensor) -> torch.Tensor:
    """[min, max] of a non-empty float32 row where it lies, (2,); NaN where it holds one."""
    if not row.is_cpu:
        return torch.stack(torch.aminmax(row))
    both = torch.stack([torch.stack(torch.aminmax(chunk)) for chunk in torch.split(row, CHUNK)])
    return torch.stack((both[:, 0].amin(), both[:, 1].amax()))


def require_finite(low: float, high: float) -> None:
    """Raises ValueError: "NaN" or "Inf" where the extremes hold one."""
    if low != low:
        raise ValueError("NaN")
    if low == -float("inf") or high == float("inf"):
        raise ValueError("Inf")


def require_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[torch.dtype, list[int]]]) -> None:
    """Check names, dtypes and shapes of a state (-1 in a shape: any length).

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    if state.keys() != expected.keys():
        raise ValueError(f"state holds {sorted(state)}, expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        found = list(state[name].shape)
        wanted = [size if size >= 0 else found[axis] for axis, size in enumerate(shape) if axis < len(found)]
        if state[name].dtype != dtype or found != wanted or len(found) != len(shape):
            raise ValueError(f"{name} is {state[name].dtype} {found}, expected {dtype} {shape}")
