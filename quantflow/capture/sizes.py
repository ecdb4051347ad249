"""Which sizes vary: found from batches that differ, or as the user says; and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.errors import Problem, RecipeError
from quantflow.ir.batch import Batch
from quantflow.ir.calls import BATCH

#: Names of dimensions by how many a floating-point tensor has.
_IMAGE = {4: {2: "height", 3: "width"}, 5: {2: "depth", 3: "height", 4: "width"}}
#: Batches of other sizes that a capture is held against.
MOST_OTHERS = 2


@dataclass(frozen=True)
class Sizes:
    """The dimensions that vary beside the number of samples.

    Attributes:
        names: (tensor's position, dimension) → its name, "" where the user gave none.
        others: batches whose sizes differ from the example's.
    """

    names: Mapping[tuple[int, int], str]
    others: tuple[Batch, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names)


FIXED = Sizes({})


def find_sizes(setting: Any, batches: Sequence[Batch], tensors: Sequence[str]) -> Sizes:
    """What varies, and batches that show it.

    Args:
        setting: "auto", "none", or {input: {dimension: name}}.
        batches: the calibration data; its first batch is the example.
        tensors: the names of a call's tensors.

    Raises:
        RecipeError: the setting names an input or a dimension that is not there.
    """
    if setting == "none":
        return FIXED
    example = batches[0]
    shapes = [x.shape for x in example.tensors]
    if setting == "auto":
        others = _differing(shapes, batches)
        varying = {
            (at, dim): ""
            for batch in others
            for at, (a, b) in enumerate(zip(shapes, (x.shape for x in batch.tensors), strict=True))
            for dim in _dims(a, b, example.size, batch.size)
        }
        return Sizes(dict(sorted(varying.items())), tuple(others[:MOST_OTHERS]))
    named = _named(setting, shapes, tensors)
    found = find_sizes("auto", batches, tensors)
    # What the data do not show to vary is shown by a batch cut there.
    unseen = {at: name for at, name in named.items() if at not in found.names}
    shown = (*found.others[: MOST_OTHERS - 1], shorter(example, unseen)) if unseen else found.others
    return Sizes({**found.names, **named}, shown)


def _differing(shapes: Sequence[torch.Size], batches: Iterable[Batch]) -> list[Batch]:
    """A batch for each set of sizes but the example's, those that differ in most dimensions first."""
    seen: dict[tuple[Any, ...], tuple[int, Batch]] = {}
    for batch in batches:
        own = [x.shape for x in batch.tensors]
        if len(own) != len(shapes) or any(len(a) != len(b) for a, b in zip(shapes, own, strict=True)):
            continue  # another structure, which binding refuses by name
        differs = sum(a != b for x, y in zip(shapes, own, strict=True) for a, b in zip(x[1:], y[1:], strict=True))
        key = tuple(tuple(shape[1:]) for shape in own)
        if differs and key not in seen:
            seen[key] = (differs, batch)
    return [batch for _, batch in sorted(seen.values(), key=lambda pair: -pair[0])]


def _dims(a: torch.Size, b: torch.Size, size: int, other: int) -> list[int]:
    """Dimensions in which two shapes differ, but for one that counts samples."""
    return [
        dim
        for dim, (x, y) in enumerate(zip(a, b, strict=True))
        if x != y and not (dim == 0 and (x, y) == (size, other))
    ]


def _named(
    setting: Mapping[str, Any], shapes: Sequence[torch.Size], tensors: Sequence[str]
) -> dict[tuple[int, int], str]:
    named: dict[tuple[int, int], str] = {}
    problems = []
    for name, dims in setting.items():
        if name not in tensors:
            problems.append(Problem(f"dynamic.{name}", f"there is no such input; the model takes {', '.join(tensors)}"))
            continue
        at = list(tensors).index(name)
        for dim, size in dims.items():
            if not -len(shapes[at]) <= int(dim) < len(shapes[at]):
                message = f"'{name}' has {len(shapes[at])} dimensions, counted from 0; found {dim}"
                problems.append(Problem(f"dynamic.{name}", message))
            elif size != BATCH:
                named[at, int(dim) % len(shapes[at])] = str(size)
    if problems:
        raise RecipeError("dynamic", problems)
    return named


def shorter(batch: Batch, named: Mapping[tuple[int, int], str]) -> Batch:
    """The batch cut to about two thirds along the dimensions that may vary; even sizes stay even, and 1 becomes 2."""

    def cut(at: int, x: torch.Tensor) -> torch.Tensor:
        for dim in (dim for tensor, dim in named if tensor == at):
            if (size := x.shape[dim]) == 1:
                x = torch.cat([x, x], dim)
                continue
            step = next((s for s in (32, 16, 8, 4, 2) if size % s == 0 and size > s), 1)
            kept = min(-(-2 * size // (3 * step)) * step, size - step) if size > step else size - 1
            x = x.narrow(dim, 0, kept)
        return x

    return batch.replaced([cut(at, x) for at, x in enumerate(batch.tensors)])


def larger(batch: Batch, named: Iterable[tuple[int, int]]) -> Batch:
    """The batch repeated once along the dimensions that may vary."""

    def grown(at: int, x: torch.Tensor) -> torch.Tensor:
        for dim in (dim for tensor, dim in named if tensor == at):
            x = torch.cat([x, x], dim)
        return x

    return batch.replaced([grown(at, x) for at, x in enumerate(batch.tensors)])


def default_name(x: torch.Tensor, dim: int, taken: Iterable[str]) -> str:
    """ "height", "length_2": what a size is called that nobody named."""
    name = _IMAGE.get(x.dim(), {}).get(dim, "length") if x.is_floating_point() else "length"
    known = set(taken)
    return name if name not in known else next(n for i in range(2, 10**6) if (n := f"{name}_{i}") not in known)
