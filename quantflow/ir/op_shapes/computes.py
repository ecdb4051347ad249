"""Rules of arithmetic, reductions, products and of tensors that are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from quantflow.ir.op_shapes.parts import (
    ANY,
    Dims,
    Given,
    Shape,
    Size,
    axis_of,
    broadcast,
    changed,
    check_size,
    first_of,
    sizes_of,
    without,
)
from quantflow.ir.op_table import MAX_ELEMENTS, Row


def _same(row: Row, given: Given) -> Any:
    return Shape(first_of(row, given))


def _all_broadcast(row: Row, given: Given) -> Any:
    shapes: list[Dims] = []
    for argument in row.arguments:
        value = given.get(argument.name)
        if argument.kind not in ("Tensor", "Operand") or value is None or isinstance(value, (int, float)):
            continue
        if not isinstance(value, Shape) or value.dims is None:
            return ANY
        shapes.append(value.dims)
    return Shape(broadcast(shapes))


def _as_other(_row: Row, given: Given) -> Any:
    other = given.get("other")
    return Shape(other.dims) if isinstance(other, Shape) else ANY


def _as_index(_row: Row, given: Given) -> Any:
    index = given.get("index")
    return Shape(index.dims) if isinstance(index, Shape) else ANY


def _scalar(_row: Row, _given: Given) -> Any:
    return Shape(())


def _reduce(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    if dims is None:
        return ANY
    value = given.get("dim")
    if value is None or value == [] or value == ():
        axes = set(range(len(dims)))
    else:
        named = sizes_of(value)
        if named is None or None in named:
            return ANY
        axes = {axis % max(1, len(dims)) for axis in named if axis is not None}
    if given.get("keepdim"):
        return Shape(tuple(1 if i in axes else size for i, size in enumerate(dims)))
    return Shape(without(dims, axes))


def _largest(row: Row, given: Given) -> Any:
    if row.target.endswith(".other"):
        return _all_broadcast(row, given)
    return [_reduce(row, given)] * 2


def _pair(row: Row, given: Given) -> Any:
    return [Shape(first_of(row, given))] * 2


def _topk(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    axis = None if dims is None else axis_of(given, "dim", len(dims), -1)
    if dims is None or axis is None or not dims:
        return [ANY, ANY]
    k, size = given["k"], dims[axis]
    if isinstance(k, int) and size is not None and k > size:
        raise ValueError(f"takes the {k} largest of {size}")
    return [Shape(changed(dims, axis, k))] * 2


def _linear(row: Row, given: Given) -> Any:
    dims, weight, bias = first_of(row, given), given["weight"], given.get("bias")
    if dims is None or not isinstance(weight, Shape) or weight.dims is None or len(weight.dims) != 2:
        return ANY
    if not dims:
        raise ValueError("multiplies a number")
    if None not in (dims[-1], weight.dims[1]) and dims[-1] != weight.dims[1]:
        raise ValueError(f"takes {weight.dims[1]} features, gets {dims[-1]}")
    out = (*dims[:-1], weight.dims[0])
    if isinstance(bias, Shape) and bias.dims is not None and broadcast([out, bias.dims])[-1] != out[-1]:
        raise ValueError(f"adds a bias of shape {bias.dims} to {out}")
    return Shape(out)


def matmul(a: Dims, b: Dims) -> Dims:
    """The shape of a product.

    Raises:
        ValueError: the inner sizes differ, or the others do not broadcast.
    """
    if not a or not b:
        raise ValueError("multiplies a number")
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    if None not in (left[-1], right[-2]) and left[-1] != right[-2]:
        raise ValueError(f"multiplies {a} by {b}")
    rows = () if len(a) == 1 else (left[-2],)
    columns = () if len(b) == 1 else (right[-1],)
    return (*broadcast([left[:-2], right[:-2]]), *rows, *columns)


def _matmul(row: Row, given: Given) -> Any:
    names = [argument.name for argument in row.arguments[:2]]
    a, b = (given[name] for name in names)
    if not isinstance(a, Shape) or not isinstance(b, Shape) or a.dims is None or b.dims is None:
        return ANY
    ranks = {"bmm": (3, 3), "mm": (2, 2), "mv": (2, 1)}.get(row.target.partition(".")[0])
    if ranks is not None and (len(a.dims), len(b.dims)) != ranks:
        raise ValueError(f"takes {ranks[0]} and {ranks[1]} dimensions, gets {len(a.dims)} and {len(b.dims)}")
    return Shape(matmul(a.dims, b.dims))


def _added_product(_row: Row, given: Given) -> Any:
    a, b = (given.get(x) for x in (("mat1", "mat2") if "mat1" in given else ("batch1", "batch2")))
    if not isinstance(a, Shape) or not isinstance(b, Shape) or a.dims is None or b.dims is None:
        return ANY
    return Shape(matmul(a.dims, b.dims))


def _outer(row: Row, given: Given) -> Any:
    parts = [given[argument.name] for argument in row.arguments if argument.kind == "Tensor"][-2:]
    if any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return ANY
    if any(len(p.dims) != 1 for p in parts):
        raise ValueError("takes two vectors")
    return Shape(tuple(p.dims[0] for p in parts))


def _einsum(_row: Row, given: Given) -> Any:
    equation, parts = given["equation"], given["tensors"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return ANY
    text = equation.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    if "." in text or len(inputs.split(",")) != len(parts):
        return ANY
    sizes: dict[str, Size] = {}
    for letters, part in zip(inputs.split(","), parts, strict=True):
        if len(letters) != len(part.dims):
            raise ValueError(f"reads {part.dims} as '{letters}'")
        for letter, size in zip(letters, part.dims, strict=True):
            if sizes.get(letter) in (None, 1):
                sizes[letter] = size
    named = output if arrow else "".join(sorted(c for c in sizes if inputs.count(c) == 1))
    if any(letter not in sizes for letter in named):
        raise ValueError(f"gives '{named}' of '{inputs}'")
    return Shape(tuple(sizes[letter] for letter in named))


def _tensordot(_row: Row, given: Given) -> Any:
    a, b = given["self"], given["other"]
    if not isinstance(a, Shape) or not isinstance(b, Shape) or a.dims is None or b.dims is None:
        return ANY
    kept: list[Size] = []
    for dims, axes in ((a.dims, sizes_of(given["dims_self"])), (b.dims, sizes_of(given["dims_other"]))):
        if axes is None or None in axes:
            return ANY
        kept += without(dims, {axis % max(1, len(dims)) for axis in axes if axis is not None})
    return Shape(tuple(kept))


def _cdist(_row: Row, given: Given) -> Any:
    a, b = given["x1"], given["x2"]
    if not isinstance(a, Shape) or not isinstance(b, Shape) or a.dims is None or b.dims is None:
        return ANY
    if min(len(a.dims), len(b.dims)) < 2:
        raise ValueError("takes matrices")
    return Shape((*broadcast([a.dims[:-2], b.dims[:-2]]), a.dims[-2], b.dims[-2]))


def _embedding(_row: Row, given: Given) -> Any:
    table, index = given["weight"], given["indices"]
    if not isinstance(table, Shape) or not isinstance(index, Shape) or table.dims is None or index.dims is None:
        return ANY
    if len(table.dims) != 2:
        raise ValueError(f"takes a table of rows, gets {len(table.dims)} dimensions")
    return Shape((*index.dims, table.dims[1]))


def _made(_row: Row, given: Given) -> Any:
    sizes = sizes_of(given["size"])
    return ANY if sizes is None else Shape(tuple(sizes))


def _arange(_row: Row, given: Given) -> Any:
    start, end, step = given.get("start", 0), given["end"], given.get("step", 1)
    if any(not isinstance(x, (int, float)) for x in (start, end, step)):
        return Shape((None,))
    if not all(map(math.isfinite, (start, end, step))) or step == 0 or (end - start) / step < 0:
        raise ValueError(f"counts from {start} to {end} by {step}")
    count = (end - start) / step
    if count > MAX_ELEMENTS:
        raise ValueError(f"gives a tensor of {count:.0f} elements; {MAX_ELEMENTS} are possible")
    return Shape((math.ceil(count),))


def _count(row: Row, given: Given) -> Any:
    name = "steps" if "steps" in given else row.arguments[0].name
    return Shape((given[name] if isinstance(given[name], int) else None,))


def _eye(_row: Row, given: Given) -> Any:
    n, m = given["n"], given.get("m", given["n"])
    return Shape((n if isinstance(n, int) else None, m if isinstance(m, int) else None))


def _triangle(_row: Row, given: Given) -> Any:
    both = (given["row"], given["col"])
    known = [size for size in both if isinstance(size, int)]
    check_size(Shape(tuple(known)))
    return Shape((2, None))


def _attention(_row: Row, given: Given) -> Any:
    q, k, v = (given[name] for name in ("query", "key", "value"))
    shapes = [x.dims if isinstance(x, Shape) else None for x in (q, k, v)]
    if any(dims is None for dims in shapes):
        return ANY
    a, b, c = shapes
    if min(map(len, (a, b, c))) < 2:  # type: ignore[arg-type]
        raise ValueError("takes (…, length, width)")
    if None not in (a[-1], b[-1]) and a[-1] != b[-1]:  # type: ignore[index]
        raise ValueError(f"compares queries of width {a[-1]} with keys of width {b[-1]}")  # type: ignore[index]
    if None not in (b[-2], c[-2]) and b[-2] != c[-2]:  # type: ignore[index]
        raise ValueError(f"has {b[-2]} keys and {c[-2]} values")  # type: ignore[index]
    if given.get("enable_gqa"):
        return Shape((*a[:-1], c[-1]))  # type: ignore[index]
    return Shape((*broadcast([a[:-2], b[:-2], c[:-2]]), a[-2], c[-1]))  # type: ignore[index]


def _one_hot(row: Row, given: Given) -> Any:
    dims, classes = first_of(row, given), given["num_classes"]
    return ANY if dims is None else Shape((*dims, classes if isinstance(classes, int) else None))


def _fft(row: Row, given: Given) -> Any:
    dims, n = first_of(row, given), given.get("n")
    axis = None if dims is None else axis_of(given, "dim", len(dims), -1)
    if dims is None or axis is None or not dims:
        return ANY
    check_size(Shape(changed(dims, axis, n if isinstance(n, int) else dims[axis])))
    return Shape(changed(dims, axis, None))


def _size(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    if not row.target.startswith("sym_size") or dims is None:
        return None
    axis = axis_of(given, "dim", len(dims))
    if not dims:
        raise ValueError("asks for a size of a number")
    return None if axis is None else dims[axis]


RULES: dict[str, Callable[[Row, Given], Any]] = {
    "same": _same, "broadcast": _all_broadcast, "as_other": _as_other, "as_index": _as_index, "scalar": _scalar,
    "reduce": _reduce, "largest": _largest, "pair": _pair, "topk": _topk, "linear": _linear, "matmul": _matmul,
    "addmm": _added_product, "baddbmm": _added_product, "outer": _outer, "einsum": _einsum, "tensordot": _tensordot,
    "cdist": _cdist, "embedding": _embedding, "made": _made, "arange": _arange, "window": _count, "linspace": _count,
    "eye": _eye, "triangle": _triangle, "attention": _attention, "one_hot": _one_hot, "fft": _fft, "size": _size,
}  # fmt: skip
