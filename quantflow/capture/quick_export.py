"""What torch.export spends without need: the forms of batch norms and joins, and Python's collector.

While it traces, each op is computed on tensors without numbers. torch works out a batch norm's result there by its
formula, in some twenty ops on sizes that vary, and a join's by comparing all sizes of all operands: more than half of a
DenseNet's capture. Where all operands are contiguous the form of the result follows from theirs.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_impls import get_fast_op_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_BATCH_NORM, _CAT = torch.ops.aten._native_batch_norm_legit_no_training.default, torch.ops.aten.cat.default


@contextlib.contextmanager
def quick_export() -> Iterator[None]:
    """torch.export inside gives the same graph in less time; what this changes in torch and Python is put back."""
    table, collects = get_fast_op_impls(), gc.isenabled()
    added = {op: form for op, form in ((_BATCH_NORM, _batch_norm), (_CAT, _cat)) if op not in table}
    gc.disable()  # it would go through the objects of all imported libraries over and over, and free few
    table.update(added)
    try:
        yield
    finally:
        for op in added:
            table.pop(op, None)
        if collects:
            gc.enable()


def _batch_norm(mode: FakeTensorMode, x: FakeTensor, *args: Any, **kwargs: Any) -> Any:
    """y in the form of x, and two tensors without elements."""
    if not x.is_contiguous():
        return _by_formula(mode, _BATCH_NORM, x, *args, **kwargs)
    return _contiguous(mode, x, x.shape), _contiguous(mode, x, (0,)), _contiguous(mode, x, (0,))


def _cat(mode: FakeTensorMode, tensors: Sequence[FakeTensor], dim: int = 0) -> Any:
    """The first operand's sizes, but for the one along `dim`, which is the sum of all."""
    first = tensors[0]
    rank = first.dim()
    at = dim + rank if dim < 0 else dim
    alike = 0 <= at < rank > 1 and all(
        x.dim() == rank
        and x.dtype is first.dtype
        and x.device == first.device
        and x.is_contiguous()
        and all(_same_size(a, b) for i, (a, b) in enumerate(zip(x.shape, first.shape, strict=True)) if i != at)
        for x in tensors
    )
    if not alike:
        return _by_formula(mode, _CAT, tensors, dim)
    shape = list(first.shape)
    shape[at] = sum(x.shape[at] for x in tensors)
    return _contiguous(mode, first, shape)


def _same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether they are one number or one expression, which asks nothing of the sizes that vary."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b


def _contiguous(mode: FakeTensorMode, like: FakeTensor, shape: Sequence[Any]) -> FakeTensor:
    return FakeTensor(mode, torch.empty(shape, dtype=like.dtype, device="meta"), like.device)


def _by_formula(mode: FakeTensorMode, op: Any, *args: Any, **kwargs: Any) -> Any:
    """As torch does it."""
    table = get_fast_op_impls()
    ours = table.pop(op)
    try:
        with mode:
            return op(*args, **kwargs)
    finally:
        table[op] = ours
