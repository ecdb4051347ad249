"""What torch functions that move elements mean for `Coded` tensors: the same function on the codes.

A view of codes is a view: a change in place of either reaches the other, as numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from quantflow.stages.imperative.functions import Args, Keywords, T, named, rule
from quantflow.stages.imperative.tensors import Coded

_VIEWS = (
    T.view, T.reshape, T.flatten, torch.flatten, torch.reshape, T.permute, torch.permute, T.transpose, torch.transpose,
    T.t, torch.t, T.unflatten, T.squeeze, torch.squeeze, T.unsqueeze, torch.unsqueeze, T.narrow, torch.narrow,
    T.chunk, torch.chunk, T.split, torch.split, T.unbind, torch.unbind, T.select, torch.select, T.expand, T.__getitem__,
    T.swapaxes, torch.swapaxes, T.movedim, torch.movedim, T.mT.__get__, T.expand_as, T.view_as, torch.unflatten,
)  # fmt: skip
_COPIES = (
    F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, T.roll, torch.roll, T.flip, torch.flip, T.repeat,
    torch.pixel_shuffle, torch.pixel_unshuffle, torch.channel_shuffle,
)  # fmt: skip
#: Codes may lie channels-last where float32 numbers would not, and a view insists on their order.
_INSTEAD = {T.view: T.reshape, T.view_as: T.reshape_as}


@rule(*_VIEWS)
def _view(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    return _moved(func, args, kwargs, is_view=True)


@rule(*_COPIES)
def _copy(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    return _moved(func, args, kwargs, is_view=False)


def _moved(func: Callable[..., Any], args: Args, kwargs: Keywords, *, is_view: bool) -> Any:
    x = args[0]
    if type(x) is not Coded or (codes := x.current()) is None or _is_dtype(args, kwargs):
        return NotImplemented
    if any(isinstance(each, T) for each in (*args[1:], *kwargs.values()) if each is not x):
        return NotImplemented
    function = _INSTEAD.get(func, func)
    try:
        result = function(codes, *args[1:], **kwargs)
    except (RuntimeError, NotImplementedError):  # nothing for codes, or not for these arguments: as float has it
        return NotImplemented

    def coded(moved: T, view: Callable[..., T]) -> Coded:
        made = Coded.of(x.engine, moved, x.root, _behind(x, moved))
        made.view_of = (x, view, args[1:], kwargs) if is_view else None
        return made

    if isinstance(result, T):
        return coded(result, function)
    parts = [coded(each, functools.partial(_part, function, at)) for at, each in enumerate(result)]
    return type(result)(parts) if isinstance(result, (list, tuple)) else NotImplemented


def _part(function: Callable[..., Any], at: int, *args: Any, **kwargs: Any) -> T:
    made: T = function(*args, **kwargs)[at]
    return made


def _is_dtype(args: Args, kwargs: Keywords) -> bool:
    return any(isinstance(each, torch.dtype) for each in (*args[1:], *kwargs.values()))


def _behind(x: Coded, moved: T) -> Any:
    """The graph's value that a moved tensor is, if only one can be."""
    if x.node is None:
        return None
    if tuple(moved.shape) == tuple(x.codes.shape) and not x.engine.moves.get(x.node.name):  # type: ignore[union-attr]
        return x.node
    fitting = [node for node in x.engine.moves.get(x.node.name, ()) if _may_have(node, tuple(moved.shape))]
    return fitting[0] if len(fitting) == 1 else None


def _may_have(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether a value of the graph may have that shape."""
    known = node.meta.get("shape")
    if known is None or len(known) != len(shape):
        return False
    return all(a == b or not isinstance(a, int) for a, b in zip(known, shape, strict=True))


@rule(F.pad)
def _pad(_func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    given = {"mode": "constant", "value": None} | named(("input", "pad", "mode", "value"), args, kwargs)
    x = given["input"]
    if type(x) is not Coded or given["mode"] != "constant" or given["value"] not in (None, 0):
        return NotImplemented
    if (codes := x.current()) is None:
        return NotImplemented
    padded = x.engine.padded(codes, x.root, given["pad"])
    return Coded.of(x.engine, padded, x.root, _behind(x, padded))


@rule(T.contiguous, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
      torch.dropout, T.to, T.float, T.type_as, T.detach, T.clone, torch.clone)  # fmt: skip
def _same(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    """What gives the same numbers: the tensor itself, or one that a change in place of the other leaves alone."""
    x = args[0]
    if type(x) is not Coded:
        return NotImplemented
    name = func.__name__
    if "dropout" in name and named(("input", "p", "training"), args, kwargs).get("training", True):
        return NotImplemented
    if name in ("to", "type_as"):
        wanted = [a for a in (*args[1:], *kwargs.values()) if a is not None and a is not False]
        same = (torch.float32, x.device, str(x.device))
        if not all((isinstance(a, T) and a.dtype is torch.float32 and a.device == x.device) or
                   (not isinstance(a, T) and a in same) for a in wanted):  # fmt: skip
            return NotImplemented
        return x
    if name in ("clone", "detach"):
        if (codes := x.current()) is None:
            return NotImplemented
        made = Coded.of(x.engine, codes, x.root, x.node)
        made.view_of = (x, T.detach, (), {}) if name == "detach" else None
        return made
    return x
