"""A Sequential's layers, each with the modules behind it that its kernel computes too, in one step.

A convolution, its BatchNorm and its activation are three modules and one unit. Calling the modules one by one costs
more than a small layer's kernel, so it is done only where somebody could see it: a hook, a debugger, a tracer, a mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as calling

from quantflow.ir.activations import Epilogue
from quantflow.stages.imperative.calls import BATCH_NORM, Pending, UnitCall
from quantflow.stages.imperative.functions import asked
from quantflow.stages.imperative.joins import BLOCKS, joined

T = torch.Tensor
#: The class of a swapped layer → its call: (module, input) → what waits, or None where it is not the captured one.
STARTS: dict[type[nn.Module], Callable[[Any, Any], Pending | None]] = {}
#: The class of a BatchNorm that was folded → what it was.
NORMS: dict[type[nn.Module], type[nn.Module]] = {}
_RELU = asked(F.relu)[0]
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Epilogue | None]] = {
    nn.ReLU: lambda _: _RELU,
    nn.ReLU6: lambda m: asked(F.hardtanh, (m.min_val, m.max_val))[0],
    nn.Hardtanh: lambda m: asked(F.hardtanh, (m.min_val, m.max_val))[0],
    nn.Hardswish: lambda _: asked(F.hardswish)[0],
    nn.SiLU: lambda _: asked(F.silu)[0],
    nn.GELU: lambda m: asked(F.gelu, (), (("approximate", m.approximate),))[0],
}


def has_chains(module: nn.Module) -> bool:
    """Whether it is a Sequential, by its forward, of which an int8 layer and what is fused with it are neighbours."""
    if getattr(type(module), "forward", None) is not nn.Sequential.forward:
        return False
    kinds = [type(child) for child in module.children()]
    return any(
        (a in STARTS and (b in NORMS or b in _ACTIVATIONS)) or a in BLOCKS or b in BLOCKS for a, b in pairwise(kinds)
    )


@cache
def chained_class(base: type[nn.Module], members: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    """A Sequential's class, with a forward that computes the same in fewer calls; it shows as what it was.

    Args:
        members: what else it gets.
    """

    def forward(self: Any, input: Any) -> Any:
        return base.forward(self, input) if is_watched() else joined(self, input, lambda x: stepped(self, x))

    def stepped(self: Any, input: Any) -> Any:
        modules, at = list(self._modules.values()), 0
        while at < len(modules):
            module, at = modules[at], at + 1
            start = STARTS.get(type(module))
            pending = start(module, input) if start is not None and _is_plain(module) else None
            if pending is None:
                input = module(input)
                continue
            steps: list[Callable[[T], T]] = []
            for module, expected in zip(modules[at:], pending.call.expects, strict=False):
                step = _step(module, expected, pending.call)
                if step is None:
                    break
                steps.append(step)
                at += 1
            input = pending.went_on(*steps).completed()
        return input

    return _shown_as(base, forward, members)


def _shown_as(base: type[nn.Module], forward: Any, members: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    made = {**dict(members), "forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    kind = type(base.__name__, (base,), made)
    BLOCKS[kind] = base
    return kind


@cache
def block_class(base: type[nn.Module], members: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    """A known block's class, with a forward that computes the same in one call; it shows as what it was."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or is_watched():
            return base.forward(self, *args, **kwargs)
        return joined(self, args[0], lambda x: base.forward(self, x))

    return _shown_as(base, forward, members)


def is_watched() -> bool:
    """Whether somebody sees the calls of all modules: a compiler, a tracer, a debugger, a mode, global hooks."""
    return bool(
        torch.compiler.is_compiling()
        or sys.gettrace() is not None
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or calling._has_any_global_hook()  # type: ignore[no-untyped-call]
        or (_monitoring is not None and _monitoring.get_tool(_monitoring.DEBUGGER_ID) is not None)
    )


#: How debuggers watch from Python 3.12 on.
_monitoring: Any = getattr(sys, "monitoring", None)


def _is_plain(module: Any) -> bool:
    """Whether calling the module is running the forward of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _step(module: Any, expected: str | Epilogue, call: UnitCall) -> Callable[[T], T] | None:
    """The module's forward on float32, if that is what the unit expects next."""
    kind = type(module)
    if expected is BATCH_NORM:
        base = NORMS.get(kind)
        if base is None or module.training or not _is_plain(module):
            return None
        is_its_own = getattr(module._buffers.get("running_mean"), "folded_into", None) is call
        return partial(base.forward, module) if is_its_own else None
    of = _ACTIVATIONS.get(kind)
    return module.forward if of is not None and of(module) is expected and _is_plain(module) else None
