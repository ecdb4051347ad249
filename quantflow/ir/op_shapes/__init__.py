"""The shape rules of the table: what an op gives for shapes whose sizes may vary, and what it refuses.

A size is a whole number, or None where it varies or is not known before the program runs; a shape of None is not known
at all. A rule raises ValueError for what PyTorch would refuse whatever the unknown sizes are.
"""

from __future__ import annotations

from typing import Any

from quantflow.ir.op_shapes import bounds, computes, moves, windows
from quantflow.ir.op_shapes.computes import matmul
from quantflow.ir.op_shapes.parts import ANY, COMPUTED, Dims, Given, Shape, Size, broadcast, check_size
from quantflow.ir.op_shapes.windows import convolved
from quantflow.ir.op_table import Row

__all__ = ["ANY", "COMPUTED", "Dims", "Shape", "Size", "broadcast", "check_size", "convolved", "matmul", "result"]
_RULES = computes.RULES | moves.RULES | windows.RULES | bounds.RULES


def result(row: Row, given: Given) -> Any:
    """What the op gives: a shape, a list of shapes, a size, or None for what may be anything.

    Raises:
        ValueError: these arguments can't be computed; says why.
    """
    _check_kinds(row, given)
    _check_axes(row, given)
    found = _RULES[row.shape](row, given)
    for shape in found if isinstance(found, list) else [found]:
        if isinstance(shape, Shape):
            check_size(shape)
    return found


def _check_kinds(row: Row, given: Given) -> None:
    """What is computed is a tensor where a number is expected, or the other way round."""
    for argument in row.arguments:
        value = given.get(argument.name)
        if isinstance(value, Shape) and not argument.is_list and argument.kind not in ("Tensor", "Operand"):
            if argument.kind != "int" or value.dims not in (None, (), (1,)):
                raise ValueError(f"argument {argument.name!r} is a tensor, must be a {argument.kind}")
        elif isinstance(value, (int, float)) and argument.kind == "Tensor":
            raise ValueError(f"argument {argument.name!r} is a number, must be a tensor")


def _of_highest_rank(parts: list[Any]) -> Any:
    """The tensor whose dimensions a list's op names: PyTorch passes over empty vectors among others."""
    if not parts or any(not isinstance(part, Shape) or part.dims is None for part in parts):
        return ANY
    return max(parts, key=lambda part: len(part.dims))


def _check_axes(row: Row, given: Given) -> None:
    for argument in row.arguments:
        if not argument.axis_of or given.get(argument.name) is None:
            continue
        of = given.get(argument.axis_of)
        shape = _of_highest_rank(of) if isinstance(of, list) else of
        if not isinstance(shape, Shape) or shape.dims is None:
            continue
        rank = max(1, len(shape.dims) + argument.extra)  # PyTorch takes a number for a vector of one
        value = given[argument.name]
        axes = value if isinstance(value, (list, tuple)) else [value]
        seen = set()
        for axis in axes:
            if not isinstance(axis, int):
                continue
            if not -rank <= axis < rank:
                raise ValueError(f"argument {argument.name!r} names dimension {axis} of {rank}")
            if argument.is_once and axis % rank in seen:
                raise ValueError(f"argument {argument.name!r} names dimension {axis} twice")
            seen.add(axis % rank)
