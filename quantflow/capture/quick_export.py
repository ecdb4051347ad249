"""What torch.export spends without need: forms of batch norms and joins, notes for its own later use.

While it traces, each op is computed on tensors without numbers. torch works out a batch norm's result there by its
formula, in some twenty ops on sizes that vary, and a join's by comparing all sizes of all operands: more than half of a
DenseNet's capture. Where all operands are contiguous the form of the result follows from theirs.

With each node it notes the lines of code that led there, and the memory layout of its value once more; and it compiles
each of several forms of the program's code, none of which is run. A third of the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_impls import get_fast_op_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import proxy_tensor

try:
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazily_compiled
except ImportError:  # a torch that has it elsewhere compiles each of its graphs at once
    lazily_compiled = contextlib.nullcontext  # type: ignore[assignment]

_BATCH_NORM, _CAT = torch.ops.aten._native_batch_norm_legit_no_training.default, torch.ops.aten.cat.default


@contextlib.contextmanager
def quick_export(*, places: bool) -> Iterator[None]:
    """torch.export inside gives the same graph in less time; what this changes in torch and Python is put back.

    Args:
        places: keep the line of code with each node, which takes time.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quick_forms())
        stack.enter_context(lazily_compiled(True))
        stack.enter_context(_instead(proxy_tensor, "_extract_tensor_metadata", _nothing))
        if (track := getattr(proxy_tensor, "track_tensor_tree", None)) is not None:
            stack.enter_context(_instead(proxy_tensor, "track_tensor_tree", _unseen(track)))
        if not places:
            stack.enter_context(_instead(fx.config, "do_not_emit_stack_traces", True))
        yield


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value`; a torch that has nothing by that name keeps its own ways."""
    missing = object()
    before = getattr(owner, name, missing)
    if before is missing:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a value's layout, which the value itself tells."""


def _unseen(track: Any) -> Any:
    """What notes the node of a value, without the modes that look for calls of the user's code."""

    def tracked(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return track(*args, **kwargs)

    return tracked


@contextlib.contextmanager
def _quick_forms() -> Iterator[None]:
    table = get_fast_op_impls()
    added = {op: form for op, form in ((_BATCH_NORM, _batch_norm), (_CAT, _cat)) if op not in table}
    table.update(added)
    try:
        yield
    finally:
        for op in added:
            table.pop(op, None)


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
