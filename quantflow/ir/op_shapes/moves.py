"""Rules of ops that move elements, repeat them, take some or join several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from quantflow.ir.op_shapes.parts import (
    ANY,
    COMPUTED,
    Dims,
    Given,
    Shape,
    Size,
    along,
    axis_of,
    broadcast,
    changed,
    check_size,
    first_of,
    product_of,
    sizes_of,
    without,
)
from quantflow.ir.op_table import MAX_ELEMENTS, MAX_ITEMS, Row


def _permute(row: Row, given: Given) -> Any:
    dims, order = first_of(row, given), sizes_of(given["dims"])
    if dims is None or order is None:
        return ANY
    if len(order) != len(dims):
        raise ValueError(f"orders {len(order)} dimensions of a tensor of {len(dims)}")
    if None in order:
        return Shape((None,) * len(dims))
    return Shape(tuple(dims[axis] for axis in order if axis is not None))


def _transpose(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    if dims is None:
        return ANY
    names = [argument.name for argument in row.arguments[1:3]]
    a, b = (axis_of(given, name, len(dims)) for name in names)
    if a is None or b is None:
        return Shape((None,) * len(dims))
    if not dims:
        return Shape(())
    swapped = list(dims)
    swapped[a], swapped[b] = dims[b], dims[a]
    return Shape(tuple(swapped))


def _t(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    if dims is not None and len(dims) > 2:
        raise ValueError(f"takes a matrix, gets {len(dims)} dimensions")
    return ANY if dims is None else Shape(dims[::-1])


def _mt(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    return ANY if dims is None or len(dims) < 2 else Shape((*dims[:-2], dims[-1], dims[-2]))


def _reshape(row: Row, given: Given) -> Any:
    name = row.arguments[1].name
    if row.arguments[1].kind != "int":  # view.dtype
        return ANY
    dims, wanted = first_of(row, given), sizes_of(given[name])
    return ANY if wanted is None else Shape(_filled(wanted, None if dims is None else product_of(dims)))


def _filled(wanted: Sequence[Size], total: Size) -> Dims:
    """Sizes with the open one, -1, found from how many elements there are."""
    if wanted.count(-1) > 1:
        raise ValueError("leaves more than one size open")
    known = product_of([size for size in wanted if size != -1])
    if -1 in wanted:
        if known == 0 and total is not None:
            raise ValueError("leaves a size open beside a size of 0")
        open_size = None if known in (None, 0) or total is None else total // known  # type: ignore[operator]
        if open_size is not None and known is not None and open_size * known != total:
            raise ValueError(f"asks for shape {list(wanted)} of {total} elements")
        return tuple(open_size if size == -1 else size for size in wanted)
    if known is not None and total is not None and known != total:
        raise ValueError(f"asks for shape {list(wanted)} of {total} elements")
    return tuple(wanted)


def _flatten(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    if dims is None:
        return ANY
    if not dims:
        return Shape((1,))
    first, last = axis_of(given, "start_dim", len(dims)), axis_of(given, "end_dim", len(dims), -1)
    if first is None or last is None:
        return ANY
    if first > last:
        raise ValueError(f"flattens from dimension {first} to {last}")
    return Shape((*dims[:first], product_of(dims[first : last + 1]), *dims[last + 1 :]))


def _unflatten(row: Row, given: Given) -> Any:
    dims, sizes = first_of(row, given), sizes_of(given["sizes"])
    axis = None if dims is None else axis_of(given, "dim", len(dims))
    if dims is None or sizes is None or axis is None or not dims:
        return ANY
    return Shape((*dims[:axis], *_filled(sizes, dims[axis]), *dims[axis + 1 :]))


def _squeeze(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    if dims is None:
        return ANY
    named = sizes_of(given["dim"]) if "dim" in given else list(range(len(dims)))
    if named is None or None in named:
        return ANY
    axes = {axis % max(1, len(dims)) for axis in named if axis is not None}
    if any(dims[axis] is None for axis in axes if axis < len(dims)):
        return ANY
    return Shape(without(dims, {axis for axis in axes if axis < len(dims) and dims[axis] == 1}))


def _unsqueeze(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    axis = None if dims is None else axis_of(given, "dim", len(dims) + 1)
    return ANY if dims is None or axis is None else Shape((*dims[:axis], 1, *dims[axis:]))


def _expand(row: Row, given: Given) -> Any:
    dims, wanted = first_of(row, given), sizes_of(given["size"])
    if wanted is None:
        return ANY
    if dims is None:
        return Shape(tuple(None if size == -1 else size for size in wanted))
    lead = len(wanted) - len(dims)
    if lead < 0:
        raise ValueError(f"expands {len(dims)} dimensions to {len(wanted)}")
    out: list[Size] = []
    for i, size in enumerate(wanted):
        own = dims[i - lead] if i >= lead else 1
        if size == -1:
            if i < lead:
                raise ValueError("leaves the size of a new dimension open")
            size = own
        elif own is not None and own != 1 and size is not None and size != own:
            raise ValueError(f"expands a dimension of {own} to {size}")
        out.append(size)
    return Shape(tuple(out))


def _repeat(row: Row, given: Given) -> Any:
    dims, times = first_of(row, given), sizes_of(given["repeats"])
    if dims is None or times is None:
        return ANY
    if len(times) < len(dims):
        raise ValueError(f"repeats {len(times)} dimensions of {len(dims)}")
    return Shape(_times(dims, times))


def _tile(row: Row, given: Given) -> Any:
    dims, times = first_of(row, given), sizes_of(given["dims"])
    return ANY if dims is None or times is None else Shape(_times(dims, times))


def _times(dims: Dims, times: Sequence[Size]) -> Dims:
    rank = max(len(dims), len(times))
    left = [1] * (rank - len(dims)) + list(dims)
    right = [1] * (rank - len(times)) + list(times)
    # A number of times that is known counts although the size is not.
    return tuple(
        product_of([a, b]) if a is not None or b in (None, 0, 1) else b for a, b in zip(left, right, strict=True)
    )


def _repeat_interleave(row: Row, given: Given) -> Any:
    dims, times = first_of(row, given), given.get("repeats")
    if dims is None or not isinstance(times, int):
        return ANY
    if given.get("dim") is None:
        return Shape((product_of([*dims, times]),))
    axis = axis_of(given, "dim", len(dims))
    return ANY if axis is None or axis >= len(dims) else Shape(changed(dims, axis, product_of([dims[axis], times])))


def _cat(_row: Row, given: Given) -> Any:
    parts = given["tensors"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return ANY
    if not parts:
        raise ValueError("joins no tensors")
    shapes = [p.dims for p in parts if p.dims != (0,)]  # PyTorch passes over empty vectors
    if not shapes:
        return Shape((0,))
    rank = len(shapes[0])
    axis = axis_of(given, "dim", rank)
    if axis is None:
        return ANY
    if any(len(dims) != rank for dims in shapes if dims != (None,)) or not rank:
        raise ValueError(f"joins shapes {', '.join(map(str, shapes))}")
    shapes = [dims for dims in shapes if len(dims) == rank]
    rest = broadcast([changed(dims, axis, 1) for dims in shapes])
    for dims in shapes:
        for i, (size, other) in enumerate(zip(dims, rest, strict=True)):
            if i != axis and None not in (size, other) and size != other:
                raise ValueError(f"joins shapes {', '.join(map(str, shapes))}")
    sizes = [dims[axis] for dims in shapes]
    return Shape(changed(rest, axis, None if None in sizes else sum(s for s in sizes if s is not None)))


def _stack(_row: Row, given: Given) -> Any:
    parts = given["tensors"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return ANY
    if not parts:
        raise ValueError("stacks no tensors")
    first = parts[0].dims
    for part in parts:
        same = len(part.dims) == len(first) and all(
            None in (a, b) or a == b for a, b in zip(part.dims, first, strict=True)
        )
        if not same:
            raise ValueError(f"stacks shapes {', '.join(str(p.dims) for p in parts)}")
    axis = axis_of(given, "dim", len(first) + 1)
    return ANY if axis is None else Shape((*first[:axis], len(parts), *first[axis:]))


def _slice(row: Row, given: Given) -> Any:
    known = along(row, given, "slices")
    if known is None:
        return ANY
    dims, axis = known
    start, end, step, size = given.get("start"), given.get("end"), given.get("step", 1), dims[axis]
    if isinstance(step, int) and step < 1:
        raise ValueError(f"slices with step {step}")
    if size is None or not isinstance(step, int):
        return Shape(changed(dims, axis, None))
    if COMPUTED in (start, end):
        return Shape(changed(dims, axis, None))
    first, last, _ = slice(start, end).indices(size)
    return Shape(changed(dims, axis, max(0, -((first - last) // step))))


def _narrow(row: Row, given: Given) -> Any:
    known = along(row, given, "narrows")
    if known is None:
        return ANY
    dims, axis = known
    length, size = given["length"], dims[axis]
    if isinstance(length, int) and size is not None and length > size:
        raise ValueError(f"takes {length} of {size}")
    return Shape(changed(dims, axis, length if isinstance(length, int) else None))


def _select(row: Row, given: Given) -> Any:
    known = along(row, given, "selects from")
    if known is None:
        return ANY
    dims, axis = known
    index, size = given["index"], dims[axis]
    if isinstance(index, int) and size is not None and not -size <= index < size:
        raise ValueError(f"takes number {index} of {size}")
    return Shape(without(dims, {axis}))


def _split(row: Row, given: Given) -> Any:
    known = along(row, given, "splits")
    if known is None:
        return None
    dims, axis = known
    value, size = given[row.arguments[1].name], dims[axis]
    if isinstance(value, (list, tuple)):
        sizes = sizes_of(value) or []
        if size is not None and None not in sizes and sum(s for s in sizes if s is not None) != size:
            raise ValueError(f"splits {size} into {sizes}")
        return [Shape(changed(dims, axis, s)) for s in sizes]
    if not isinstance(value, int) or size is None:
        return None
    if value == 0 and size:
        raise ValueError("splits into parts of no size")
    return _parts(dims, axis, size, value)


def _parts(dims: Dims, axis: int, size: int, each: int) -> Any:
    count = max(1, -(-size // each)) if each else 1
    if count > MAX_ITEMS:
        raise ValueError(f"splits into {count} parts; {MAX_ITEMS} are possible")
    return [Shape(changed(dims, axis, min(each, size - i * each))) for i in range(count)]


def _chunk(row: Row, given: Given) -> Any:
    known = along(row, given, "splits")
    if known is None:
        return None
    dims, axis = known
    count, size = given["chunks"], dims[axis]
    if not isinstance(count, int) or size is None:
        return None
    return _parts(dims, axis, size, max(1, -(-size // count))) if size else None


def _unbind(row: Row, given: Given) -> Any:
    known = along(row, given, "takes apart")
    if known is None:
        return None
    dims, axis = known
    size = dims[axis]
    if size is not None and size > MAX_ITEMS:
        raise ValueError(f"takes {size} parts apart; {MAX_ITEMS} are possible")
    return None if size is None else [Shape(without(dims, {axis}))] * size


def _meshgrid(_row: Row, given: Given) -> Any:
    parts = given["tensors"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return None
    grid = Shape(tuple(product_of(part.dims) for part in parts))
    check_size(grid)
    return [ANY if given.get("indexing") == "xy" else grid] * len(parts)


def _broadcast_all(_row: Row, given: Given) -> Any:
    parts = given["tensors"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return None
    return [Shape(broadcast([part.dims for part in parts]))] * len(parts)


def _pixel(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    factor = given[row.arguments[1].name]
    if dims is None or not isinstance(factor, int):
        return ANY
    if len(dims) < 3:
        raise ValueError(f"takes an image, gets {len(dims)} dimensions")
    *lead, channels, height, width = dims
    if row.target.startswith("pixel_shuffle"):
        if channels is not None and channels % factor**2:
            raise ValueError(f"spreads {channels} channels over {factor} x {factor} pixels")
        size = None if channels is None else channels // factor**2
        return Shape((*lead, size, product_of([height, factor]), product_of([width, factor])))
    for side in (height, width):
        if side is not None and side % factor:
            raise ValueError(f"cuts a side of {side} by {factor}")
    sides = [None if side is None else side // factor for side in (height, width)]
    return Shape((*lead, product_of([channels, factor**2]), *sides))


def _pad(row: Row, given: Given) -> Any:
    dims, pads = first_of(row, given), sizes_of(given[row.arguments[1].name])
    if dims is None or pads is None:
        return ANY
    if len(pads) % 2 or len(pads) > 2 * len(dims):
        raise ValueError(f"pads {len(dims)} dimensions by {len(pads)} numbers")
    out = list(dims)
    for i in range(len(pads) // 2):
        at = len(dims) - 1 - i
        before, after, size = pads[2 * i], pads[2 * i + 1], dims[at]
        known = [p for p in (before, after) if p is not None]
        if size is None or len(known) < 2:
            out[at] = max([*known, 0]) or None  # what is added is there whatever the size
            continue
        out[at] = size + sum(known)
        if out[at] < 0:
            raise ValueError(f"takes {-sum(known)} away from {size}")
    return Shape(tuple(out))


def _unfold(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    axis_name, size_name, step_name = (argument.name for argument in row.arguments[1:4])
    axis = None if dims is None else axis_of(given, axis_name, len(dims))
    size, step = given[size_name], given[step_name]
    if dims is None or axis is None or not dims or not isinstance(size, int) or not isinstance(step, int):
        return ANY
    if size < 0 or step < 1:
        raise ValueError(f"takes windows of {size} by steps of {step}")
    found = dims[axis]
    if found is not None and size > found:
        raise ValueError(f"takes windows of {size} from {found}")
    return Shape((*changed(dims, axis, None if found is None else (found - size) // step + 1), size))


def _diag_embed(row: Row, given: Given) -> Any:
    dims, offset = first_of(row, given), given.get("offset", 0)
    if dims is None or not dims or not isinstance(offset, int):
        return ANY
    side = None if dims[-1] is None else dims[-1] + abs(offset)
    check_size(Shape((*dims[:-1], side, side)))
    return Shape((None,) * (len(dims) + 1))


def _index_select(row: Row, given: Given) -> Any:
    dims, index = first_of(row, given), given["index"]
    axis = None if dims is None else axis_of(given, "dim", len(dims))
    if dims is None or axis is None or not dims or not isinstance(index, Shape) or index.dims is None:
        return ANY
    return Shape(changed(dims, axis, product_of(index.dims)))


def _index(row: Row, given: Given) -> Any:
    dims, places = first_of(row, given), given["indices"]
    if dims is None or not isinstance(places, list):
        return ANY
    if len(places) > len(dims):
        raise ValueError(f"indexes {len(places)} of {len(dims)} dimensions")
    named = [p for p in places if p is not None]
    if any(not isinstance(p, Shape) or p.dims is None for p in named):
        return ANY
    # How many elements there are, in no known order: masks of bools take another number.
    across = math.prod(s for s in _broadcast_or_none([p.dims for p in named]) if s)
    kept = [*places, *[None] * (len(dims) - len(places))]
    rest = math.prod(size for size, place in zip(dims, kept, strict=True) if place is None and size)
    if across * rest > MAX_ELEMENTS:
        raise ValueError(f"gives a tensor of {across * rest} elements; {MAX_ELEMENTS} are possible")
    return ANY


def _broadcast_or_none(shapes: Sequence[Dims]) -> Dims:
    try:
        return broadcast(shapes)
    except ValueError:  # masks of several dimensions
        return ()


RULES: dict[str, Callable[[Row, Given], Any]] = {
    "permute": _permute, "transpose": _transpose, "t": _t, "mt": _mt, "reshape": _reshape, "flatten": _flatten,
    "unflatten": _unflatten, "squeeze": _squeeze, "unsqueeze": _unsqueeze, "expand": _expand, "repeat": _repeat,
    "tile": _tile, "repeat_interleave": _repeat_interleave, "cat": _cat, "stack": _stack, "slice": _slice,
    "narrow": _narrow, "select": _select, "split": _split, "chunk": _chunk, "unbind": _unbind, "meshgrid": _meshgrid,
    "broadcast_all": _broadcast_all, "pixel_shuffle": _pixel, "pixel_unshuffle": _pixel, "pad": _pad,
    "index_select": _index_select, "index": _index, "unfold": _unfold, "diag_embed": _diag_embed,
}  # fmt: skip
