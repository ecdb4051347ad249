"""Rules of convolutions, pools and what samples images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from quantflow.ir.op_shapes.parts import (
    ANY,
    Dims,
    Given,
    Shape,
    Size,
    first_of,
    product_of,
    sizes_of,
    spread,
)
from quantflow.ir.op_table import MAX_ELEMENTS, Row

_DIMENSIONS = re.compile(r"(\d)d")


def _conv(row: Row, given: Given) -> Any:
    dims, weight = first_of(row, given), given["weight"]
    if dims is None or not isinstance(weight, Shape) or weight.dims is None:
        return ANY
    spatial = len(weight.dims) - 2
    return Shape(_convolved(dims, weight.dims, spatial, given, row.target.endswith(".padding")))


def convolved(dims: Dims, weight: Dims, attrs: Mapping[str, Any]) -> Dims:
    """The shape that a convolution gives.

    Raises:
        ValueError: it does not fit its input.
    """
    return _convolved(dims, weight, len(weight) - 2, attrs, False)


def _convolved(dims: Dims, weight: Dims, spatial: int, given: Mapping[str, Any], by_name: bool) -> Dims:
    if len(dims) not in (spatial + 1, spatial + 2) or spatial < 1:
        raise ValueError(f"takes {spatial + 2} dimensions, gets {len(dims)}")
    groups = given.get("groups", 1)
    channels = dims[-spatial - 1]
    if isinstance(groups, int) and weight[1] is not None and channels is not None and channels != weight[1] * groups:
        raise ValueError(f"takes {weight[1] * groups} channels, gets {channels}")
    stride, dilation = spread(given.get("stride"), spatial, 1), spread(given.get("dilation"), spatial, 1)
    out: list[Size] = [*dims[: -spatial - 1], weight[0]]
    if by_name:
        return (*out, *[None] * spatial)
    padding = spread(given.get("padding"), spatial, 0)
    for i in range(spatial):
        size, kernel = dims[len(dims) - spatial + i], weight[i + 2]
        s, p, d = stride[i], padding[i], dilation[i]
        if size is None or kernel is None or s is None or p is None or d is None:
            # What padding alone adds is there whatever the size.
            out.append(None if p is None or s is None or 2 * p // s < (1 << 16) else 2 * p // s)
            continue
        room = size + 2 * p - d * (kernel - 1) - 1
        if room < 0:
            raise ValueError(f"has a kernel that reaches over {d * (kernel - 1) + 1}, its input has {size + 2 * p}")
        out.append(room // s + 1)
    return tuple(out)


def _conv_transpose(row: Row, given: Given) -> Any:
    dims, weight = first_of(row, given), given["weight"]
    if dims is None or not isinstance(weight, Shape) or weight.dims is None:
        return ANY
    spatial = len(weight.dims) - 2
    if len(dims) not in (spatial + 1, spatial + 2) or spatial < 1:
        raise ValueError(f"takes {spatial + 2} dimensions, gets {len(dims)}")
    out: list[Size] = [*dims[: -spatial - 1], product_of([weight.dims[1], given.get("groups", 1)])]
    each = [spread(given.get(name), spatial, default) for name, default in
            (("stride", 1), ("dilation", 1), ("padding", 0), ("output_padding", 0))]  # fmt: skip
    for i in range(spatial):
        size, kernel = dims[len(dims) - spatial + i], weight.dims[i + 2]
        s, d, p, more = (values[i] for values in each)
        if size is None or kernel is None or s is None or d is None or p is None or more is None:
            out.append(None)
        else:
            out.append((size - 1) * s - 2 * p + d * (kernel - 1) + more + 1)
    return Shape(tuple(out))


def _pool(row: Row, given: Given) -> Any:
    dims, spatial = first_of(row, given), _spatial(row)
    if dims is None:
        return ANY
    if len(dims) not in (spatial + 1, spatial + 2):
        raise ValueError(f"pools over {spatial} dimensions, gets {len(dims)}")
    kernel = spread(given["kernel_size"], spatial, 1)
    value = given.get("stride")
    stride = kernel if value in (None, [], ()) else spread(value, spatial, 1)
    padding, dilation = spread(given.get("padding"), spatial, 0), spread(given.get("dilation"), spatial, 1)
    if given.get("divisor_override") == 0:
        raise ValueError("divides by 0")
    out: list[Size] = list(dims[:-spatial])
    for i in range(spatial):
        size, k, s, p, d = dims[len(dims) - spatial + i], kernel[i], stride[i], padding[i], dilation[i]
        if k is not None and p is not None and p > k // 2:
            raise ValueError(f"pads by {p}; at most half of its window of {k}")
        if size is None or k is None or s is None or p is None or d is None:
            out.append(None)
            continue
        room = size + 2 * p - d * (k - 1) - 1
        if room < 0:
            raise ValueError(f"has a window that reaches over {d * (k - 1) + 1}, its input has {size + 2 * p}")
        count = (-(-room // s) if given.get("ceil_mode") else room // s) + 1
        out.append(count - 1 if given.get("ceil_mode") and (count - 1) * s >= size + p else count)
    return Shape(tuple(out))


def _adaptive(row: Row, given: Given) -> Any:
    dims, spatial = first_of(row, given), _spatial(row)
    if dims is None:
        return ANY
    if len(dims) not in (spatial + 1, spatial + 2):
        raise ValueError(f"pools over {spatial} dimensions, gets {len(dims)}")
    value = given["output_size"]
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(sizes) not in (1, spatial):
        raise ValueError(f"asks for {len(sizes)} sizes of {spatial}")
    return Shape((*dims[:-spatial], *(sizes * spatial if len(sizes) == 1 else sizes)))


def _upsample(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    spatial = _spatial(row)
    if dims is None:
        return ANY
    if len(dims) != spatial + 2:
        raise ValueError(f"takes {spatial + 2} dimensions, gets {len(dims)}")
    factors, sizes = given.get("scale_factors"), given.get("output_size")
    if row.target.endswith(".vec") and (factors is None) == (sizes is None):
        raise ValueError("takes either a size or a scale factor")
    if isinstance(sizes, (list, tuple)):
        if len(sizes) != spatial:
            raise ValueError(f"asks for {len(sizes)} sizes of {spatial}")
        return Shape((*dims[:2], *(size if isinstance(size, int) else None for size in sizes)))
    if isinstance(factors, (list, tuple)):
        if len(factors) != spatial:
            raise ValueError(f"asks for {len(factors)} scale factors of {spatial}")
        out: list[Size] = []
        for size, factor in zip(dims[2:], factors, strict=True):
            known = isinstance(factor, (int, float))
            if known and not 0 < factor < MAX_ELEMENTS:
                raise ValueError(f"has a scale factor of {factor}")
            out.append(math.floor(size * factor) if known and size is not None else None)
        return Shape((*dims[:2], *out))
    return Shape((*dims[:2], *[None] * spatial))


def _spatial(row: Row) -> int:
    """Over how many dimensions an op works, by the number in its name."""
    found = _DIMENSIONS.search(row.target)
    assert found is not None, row.target
    return int(found[1])


def _affine_grid(_row: Row, given: Given) -> Any:
    sizes = sizes_of(given["size"])
    if sizes is None:
        return ANY
    if len(sizes) not in (4, 5):
        raise ValueError(f"makes a grid for {len(sizes)} dimensions; 4 or 5 are possible")
    return Shape((sizes[0], *sizes[2:], len(sizes) - 2))


def _grid(row: Row, given: Given) -> Any:
    dims, grid = first_of(row, given), given["grid"]
    if dims is None or not isinstance(grid, Shape) or grid.dims is None:
        return ANY
    if len(dims) not in (4, 5) or len(grid.dims) != len(dims):
        raise ValueError(f"samples {len(dims)} dimensions by a grid of {len(grid.dims)}")
    return Shape((*dims[:2], *grid.dims[1:-1]))


def _sized(row: Row, given: Given) -> Any:
    dims, sizes = first_of(row, given), sizes_of(given["output_size"])
    spatial = _spatial(row)
    if dims is None or sizes is None:
        return ANY
    if len(dims) not in (spatial + 1, spatial + 2) or len(sizes) != spatial:
        raise ValueError(f"takes {spatial} sizes, gets {len(sizes)} for {len(dims)} dimensions")
    return Shape((*dims[:-spatial], *sizes))


def _im2col(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    names = (("kernel_size", 1), ("dilation", 1), ("padding", 0), ("stride", 1))
    if dims is None or len(dims) not in (3, 4):
        return ANY
    kernel, dilation, padding, stride = (spread(given[name], 2, default) for name, default in names)
    channels = product_of([dims[-3], *kernel])
    places: list[Size] = []
    for size, k, d, p, s in zip(dims[-2:], kernel, dilation, padding, stride, strict=True):
        if size is None or k is None or d is None or p is None or s is None:
            places.append(None)
            continue
        room = size + 2 * p - d * (k - 1) - 1
        if room < 0:
            raise ValueError(f"has a window that reaches over {d * (k - 1) + 1}, its input has {size + 2 * p}")
        places.append(room // s + 1)
    return Shape((*dims[:-3], channels, product_of(places)))


def _col2im(row: Row, given: Given) -> Any:
    dims, sizes, kernel = first_of(row, given), sizes_of(given["output_size"]), sizes_of(given["kernel_size"])
    if dims is None or sizes is None or kernel is None or len(sizes) != 2 or len(dims) not in (2, 3):
        return ANY
    area = product_of(spread(given["kernel_size"], 2, 1))
    if area == 0:
        raise ValueError("has a window of no size")
    channels = None if dims[-2] is None or area is None else dims[-2] // area
    return Shape((*dims[:-2], channels, *sizes))


RULES: dict[str, Callable[[Row, Given], Any]] = {
    "conv": _conv, "conv_transpose": _conv_transpose, "pool": _pool, "adaptive": _adaptive, "upsample": _upsample,
    "affine_grid": _affine_grid, "grid": _grid, "sized": _sized, "im2col": _im2col, "col2im": _col2im,
}  # fmt: skip
