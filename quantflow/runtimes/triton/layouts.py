"""Ops that only move numbers, as what they make of sizes and strides: no number moves until somebody needs it to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

#: Ops that only move numbers, on codes as on what they stand for.
MOVES = ("transpose.int", "permute.default", "reshape.default", "view.default", "select.int", "squeeze.dim",
         "unsqueeze.default", "flatten.using_ints", "slice.Tensor", "contiguous.default")  # fmt: skip
#: Dimensions, each as the (size, stride) of its parts, the outermost first; one of a single element has none.
Dims = list[list[tuple[int, int]]]
#: (op, its arguments behind the tensor).
Move = tuple[str, Sequence[Any]]


def dims_of(sizes: Sequence[int], strides: Sequence[int]) -> Dims:
    """The dimensions of a tensor."""
    return [[(size, stride)] if size != 1 else [] for size, stride in zip(sizes, strides, strict=True)]


def sizes_of(dims: Dims) -> list[int]:
    """The number of elements of each dimension."""
    return [math.prod(size for size, _ in dim) for dim in dims]


def moved(dims: Dims, moves: Sequence[Move]) -> tuple[Dims, int] | None:
    """(dimensions behind the moves, the first element's offset); None: strides can't say what they do."""
    offset = 0
    for op, args in moves:
        found: Dims | None = list(dims)
        match op, *args:
            case "transpose.int", int(a), int(b):
                found[a], found[b] = found[b], found[a]  # type: ignore[index]
            case "permute.default", order:
                found = [dims[d] for d in order]
            case (("reshape.default" | "view.default"), shape):
                found = _reshaped(dims, shape)
            case "unsqueeze.default", int(d):
                found.insert(d % (len(dims) + 1), [])  # type: ignore[union-attr]
            case "squeeze.dim", int(d):
                if not dims[d]:
                    found.pop(d)  # type: ignore[union-attr]
            case "select.int", int(d), int(index):
                size = math.prod(n for n, _ in dims[d])
                rest = index % size
                for n, stride in reversed(dims[d]):
                    offset += rest % n * stride
                    rest //= n
                found.pop(d)  # type: ignore[union-attr]
            case "flatten.using_ints", *bounds:
                first, last = (*bounds, *(0, -1)[len(bounds) :])
                first, last = first % max(1, len(dims)), last % max(1, len(dims))
                found = [*dims[:first], [part for dim in dims[first : last + 1] for part in dim], *dims[last + 1 :]]
            case ("contiguous.default",):
                pass
            case _:
                return None
        if found is None:
            return None
        dims = found
    return dims, offset


def _reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """None: a new dimension begins inside a part that it does not divide."""
    parts = [part for dim in dims for part in dim]
    total = math.prod(size for size, _ in parts)
    known = math.prod(size for size in shape if size != -1)
    if not known or total % known:
        return None
    found: Dims = []
    for wanted in shape:
        left = total // known if wanted == -1 else wanted
        dim: list[tuple[int, int]] = []
        while left > 1:
            size, stride = parts.pop(0)
            if left % size == 0:
                dim.append((size, stride))
                left //= size
            elif size % left == 0:
                rest = size // left
                dim.append((left, stride * rest))
                parts.insert(0, (rest, stride))
                left = 1
            else:
                return None
        found.append(dim)
    return found


def strides_of(dims: Dims) -> list[int] | None:
    """One stride per dimension; None: a dimension's parts do not lie behind each other."""
    strides = []
    for dim in dims:
        for (_, outer), (size, inner) in pairwise(dim):
            if outer != inner * size:
                return None
        strides.append(dim[-1][1] if dim else 0)
    return strides


def placed(sizes: Sequence[int], moves: Sequence[Move]) -> tuple[list[int], list[int]] | None:
    """Where to write a tensor so that it lies dense once the moves are behind it.

    Returns:
        (the sizes behind the moves, the stride at which each dimension of the tensor is written); None: moves leave
        elements out, or take a dimension apart.
    """
    # Each element's place in a dense tensor tells which dimension a part comes from.
    dense = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    behind = moved(dims_of(sizes, dense), moves)
    if behind is None or math.prod(sizes_of(behind[0])) != math.prod(sizes):
        return None
    parts = [part for dim in behind[0] for part in dim]
    place = {part: math.prod(size for size, _ in parts[at + 1 :]) for at, part in enumerate(parts)}
    found = [0 if size == 1 else place.get((size, stride)) for size, stride in zip(sizes, dense, strict=True)]
    strides = [stride for stride in found if stride is not None]
    return (sizes_of(behind[0]), strides) if len(strides) == len(sizes) else None
