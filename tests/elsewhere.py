"""A device that no machine lacks: its tensors live on the CPU, say that they are on "xla", and refuse to meet others.

Inside `elsewhere()` a computation that mixes devices fails as it does on a card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

PLACE = torch.device("xla", 0)
aten = torch.ops.aten
#: Ops that read tensors of two devices on a card, too.
_MIXING = ("to", "_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "index_put")


class Elsewhere(torch.Tensor):
    """A tensor that is not here."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", dispatch_device=True,
        )  # fmt: skip
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return PLACE

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    # What PyTorch does in C++, on the guard of a device that is not there.
    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __getitem__(self, index: Any) -> Any:
        return Elsewhere(self.held[tree_map_only(Elsewhere, lambda x: x.held, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        assert not isinstance(value, torch.Tensor) or isinstance(value, Elsewhere) or not value.dim()
        self.held[index] = value.held if isinstance(value, Elsewhere) else value

    def __invert__(self) -> Any:
        return Elsewhere(~self.held)

    def contiguous(self, **how: Any) -> Any:
        return Elsewhere(self.held.contiguous(**how))

    def nonzero(self) -> Any:
        return Elsewhere(self.held.nonzero())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return PLACE
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, Elsewhere)]
    name = func._schema.name.removeprefix("aten::")
    here = [x for x in given if not isinstance(x, Elsewhere) and x.dim()]
    if there and here and name not in _MIXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {PLACE} and cpu")
    wanted = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
    goes_there = bool(there) if wanted is None else wanted.type == PLACE.type
    if name in ("copy_", "index", "index_put_", "_index_put_impl_", "index_put"):
        goes_there = isinstance(args[0], Elsewhere)
    if name in ("_local_scalar_dense", "item"):
        return func(*tree_map_only(Elsewhere, lambda x: x.held, args))
    inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda x: x.held, (args, kwargs))
    if wanted is not None:
        inner_args, inner_kwargs = tree_map_only(
            torch.device, lambda _: torch.device("cpu"), (inner_args, inner_kwargs)
        )
    found = func(*inner_args, **inner_kwargs)
    if not goes_there:
        return found
    owners = {id(x.held): x for x in there}
    return tree_map_only(torch.Tensor, lambda x: owners[id(x)] if id(x) in owners else Elsewhere(x), found)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def here_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called as if there were no such device."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return called


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside, there is a device of that name."""
    with _Mode():
        yield PLACE
