"""What the writers of single ops share: arguments by name, dimensions, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from quantflow.exchange.onnx_writer import Writer
from quantflow.ir.program import Ref

#: Every argument by its name in the op's schema, defaults included.
Given = Mapping[str, Any]
#: Writes one op; gives the name of its result, or the names of several.
Write = Callable[[Writer, Given], Any]


def positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def spread(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def channels(x: torch.Tensor, rank: int) -> torch.Tensor:
    """A vector in the place of dimension 1 of `rank` ones."""
    return x.reshape(-1, *[1] * (rank - 2))


def scalar(w: Writer, size: Any, dtype: torch.dtype) -> str:
    """A size or number as a tensor without dimensions."""
    if isinstance(size, (int, float)):
        return w.number(size, dtype)
    return w.cast(w.add("Squeeze", [w.size(size)]), torch.int64, dtype)


def out(w: Writer) -> Ref:
    """The node's own result."""
    return Ref(w.at.output)
