"""What shape rules are written with: sizes that may vary, and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantflow.ir.op_table import MAX_ELEMENTS, MAX_RANK, Row

Size = int | None
Dims = tuple[Size, ...]


@dataclass(frozen=True)
class Shape:
    """A tensor, by its sizes; `dims` None: of unknown rank.

    `most`: as many elements it may have, where `dims` does not say.
    """

    dims: Dims | None = None
    most: int = 0

    @property
    def elements(self) -> int:
        """How many it has at least, unless it is empty: what varies counts as 1. Where `most` is known, at most."""
        return max(self.most, math.prod(size for size in self.dims or () if size is not None and size > 0))


#: A tensor of any shape, or a value that may be anything.
ANY = Shape()


class Computed:
    """A number that the program computes."""


COMPUTED = Computed()
#: What a rule is given: arguments by name, with tensors as shapes and numbers that are computed as COMPUTED.
Given = Mapping[str, Any]


def check_size(shape: Shape) -> None:
    """Raises:
    ValueError: it has too many dimensions or elements, or a negative size.
    """
    dims = shape.dims or ()
    if len(dims) > MAX_RANK:
        raise ValueError(f"gives a tensor of {len(dims)} dimensions; {MAX_RANK} are possible")
    if any(size is not None and size < 0 for size in dims):
        raise ValueError(f"gives a tensor of shape {dims}")
    if shape.elements > MAX_ELEMENTS:
        size = f"more than 2^40 elements ({shape.elements})" if shape.elements >> 40 else f"{shape.elements} elements"
        raise ValueError(f"a tensor of {size}; {MAX_ELEMENTS} are possible")


def first_of(row: Row, given: Given) -> Dims | None:
    """The sizes of the first tensor."""
    value = given.get(row.arguments[0].name)
    return value.dims if isinstance(value, Shape) else () if isinstance(value, (int, float)) else None


def sizes_of(value: Any) -> list[Size] | None:
    """A list of sizes, or one size as a list; None: it is not known."""
    if isinstance(value, (list, tuple)):
        return [item if isinstance(item, int) else None for item in value]
    return [value] if isinstance(value, int) else None


def spread(value: Any, count: int, default: int) -> list[Size]:
    """One number for each of `count` dimensions."""
    sizes = sizes_of(value)
    if sizes is None:
        return [default if value is None else None] * count
    if not sizes:
        return [default] * count
    if len(sizes) == 1:
        return sizes * count
    if len(sizes) != count:
        raise ValueError(f"{sizes} is not one number for each of {count} dimensions")
    return sizes


def axis_of(given: Given, name: str, rank: int, default: int = 0) -> int | None:
    """A dimension that is known; None: it is computed."""
    axis = given.get(name, default)
    return axis % max(rank, 1) if isinstance(axis, int) else None


def along(row: Row, given: Given, verb: str) -> tuple[Dims, int] | None:
    """The first operand's sizes and the dimension `dim` of it; None: one of the two is not known.

    Raises:
        ValueError: the operand is a number, which has no dimensions.
    """
    dims = first_of(row, given)
    axis = None if dims is None else axis_of(given, "dim", len(dims))
    if dims is None or axis is None:
        return None
    if not dims:
        raise ValueError(f"{verb} a number")
    return dims, axis


def broadcast(shapes: Sequence[Dims]) -> Dims:
    """The shape that several have together."""
    rank = max((len(dims) for dims in shapes), default=0)
    out: list[Size] = []
    for i in range(rank):
        sizes = {dims[len(dims) - rank + i] for dims in shapes if len(dims) - rank + i >= 0}
        known = {size for size in sizes if size is not None and size != 1}
        if len(known) > 1:
            raise ValueError(f"gets shapes {', '.join(map(str, shapes))}, which do not broadcast")
        out.append(known.pop() if known else None if None in sizes else 1)
    return tuple(out)


def product_of(sizes: Sequence[Size]) -> Size:
    """None where a size is not known."""
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def changed(dims: Dims, axis: int, size: Size) -> Dims:
    """The same with another size along one dimension."""
    return (*dims[:axis], size, *dims[axis + 1 :])


def without(dims: Dims, axes: set[int]) -> Dims:
    """The same without some dimensions."""
    return tuple(size for i, size in enumerate(dims) if i not in axes)
