"""Which values cross between the native library and torch, and in which form."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.ir.program import Node, Program
from quantflow.runtimes import native_library as lib

#: Ops that make a list of tensors; whoever takes it apart must run on the same side.
_LISTS = ("split", "split_with_sizes", "chunk", "unbind")


def keep_lists_together(program: Program, in_torch: dict[int, str]) -> None:
    """Where a list or tuple of tensors would have to cross from one side to the other, all that handles it runs in
    torch."""
    made_by = {node.output: index for index, node in enumerate(program.nodes)}
    for index, node in enumerate(program.nodes):
        if node.target == "getitem" and made_by.get(next(node.refs(), "")) in in_torch:
            in_torch.setdefault(index, "a part of what torch computed")
    users: dict[str, list[int]] = {}
    for index, node in enumerate(program.nodes):
        for name in node.refs():
            users.setdefault(name, []).append(index)
    outputs = set(program.output_names())
    for index, node in enumerate(program.nodes):
        if not is_list(node):
            continue
        group = [index, *users.get(node.output, ())]
        cut = any(i in in_torch for i in range(index, max(group) + 1)) or node.output in outputs
        if cut or any(program.nodes[i].target != "getitem" for i in group[1:]):
            for i in group:
                if i == index or program.nodes[i].target == "getitem":
                    in_torch.setdefault(i, "a list of tensors can't cross to or from torch")


def is_list(node: Node) -> bool:
    return node.op in ("shape", "aten") and node.target.partition(".")[0] in _LISTS


def why_foreign(value: Any) -> str:
    """Why the library can't take a value; empty if it can."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in lib.DTYPES:
            return f"reads a tensor of {_short(value.dtype)}, for which there is no native kernel"
        if value.dim() > lib.MAX_RANK:
            return f"reads a tensor of {value.dim()} dimensions; native kernels take up to {lib.MAX_RANK}"
        return ""
    # A flag is no size: it would come back as a number.
    return "" if type(value) is int else f"reads a {type(value).__name__}, which can't cross from torch"


def foreign_dtype(node: Node) -> torch.dtype | None:
    """A dtype without kernels that the node is told to compute in."""
    named = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return next((dtype for dtype in named if dtype not in lib.DTYPES), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_dense(x: torch.Tensor) -> bool:
    """Whether its memory holds its numbers, contiguous or channels-last."""
    return not x.is_neg() and (x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous()))


def dense(value: torch.Tensor | int) -> torch.Tensor | int:
    """A value as the library takes it: dense, or a whole number."""
    if isinstance(value, int) or is_dense(value):
        return value
    return value.resolve_neg().contiguous()


def strides_of(form: lib.Form) -> tuple[int, ...]:
    """Of an output in its form."""
    shape = list(form.dims[: form.rank])
    order = [0, *range(2, form.rank), 1] if form.is_channels_last else list(range(form.rank))
    strides, step = [1] * form.rank, 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def same(a: Any, b: Any) -> bool:
    """Whether two outputs agree as far as the order of float sums allows."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return bool(torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True))


def has_rows(value: Any, batch: int) -> bool:
    """Whether it is a tensor of a row per sample."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch
