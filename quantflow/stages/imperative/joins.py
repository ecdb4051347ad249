"""Blocks whose code is known, computed in one call of the runtime where nobody looks inside.

A Sequential, a residual block of torchvision: what its forward computes of a tensor follows from its modules alone. It
runs step by step once for each size of input, and what its int8 units read and gave is noted. If that is one run of the
program's nodes from the input to the output, and they give the same codes to the bit in one call, that call stands for
the block from then on, as long as nothing about its modules changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from operator import call, is_, itemgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from quantflow.stages.imperative.tensors import Coded, Weight

if TYPE_CHECKING:
    from quantflow.stages.imperative.calls import UnitCall
    from quantflow.stages.imperative.engines import Engine

#: Forwards (module, class) that compute of their input and their submodules alone, without branches on numbers.
_BLOCKS = {
    ("torchvision.models.resnet", "BasicBlock"),
    ("torchvision.models.resnet", "Bottleneck"),
    ("torchvision.models.mobilenetv2", "InvertedResidual"),
    ("torchvision.models.mobilenetv3", "InvertedResidual"),
    ("torchvision.models.efficientnet", "MBConv"),
    ("torchvision.models.regnet", "ResBottleneckBlock"),
    ("torchvision.ops.misc", "SqueezeExcitation"),
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
}
LEAVES = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU,
    nn.GELU, nn.Sigmoid, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
#: Classes of swapped layers and folded BatchNorms.
LAYERS: set[type[nn.Module]] = set()
#: Classes of blocks that look here first → what they were.
BLOCKS: dict[type[nn.Module], type[nn.Module]] = {}
_SIZES_PER_BLOCK = 16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What every module has beside its settings: what a forward does not depend on, or is looked at otherwise.
_INERT = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}
_END = object()


class Noted:
    """Units that were computed in one call: what they read, by the graph's names, and the last one's result."""

    __slots__ = ("operands", "units", "value")

    def __init__(self, units: tuple[UnitCall, ...], operands: dict[str, torch.Tensor], value: torch.Tensor) -> None:
        self.units, self.operands, self.value = units, operands, value


class Notes:
    """What was computed.

    Attributes:
        coded: (a tensor, its codes) of those that came as float32.
    """

    __slots__ = ("calls", "coded")

    def __init__(self) -> None:
        self.calls: list[Noted] = []
        self.coded: list[tuple[torch.Tensor, torch.Tensor]] = []


class Join:
    """A block's units as one call.

    Attributes:
        units: in the order in which the block's code calls them.
        reads: the graph's value that the block's input is to them.
        run: the call; None: it has no kernel for this input.
    """

    __slots__ = ("engine", "reads", "run", "units")

    def __init__(
        self,
        engine: Engine,
        units: tuple[UnitCall, ...],
        reads: str,
        run: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self.engine, self.units, self.reads, self.run = engine, units, reads, run


class State:
    """A module's parts as they are. Compared in every call, so without a loop of Python's own."""

    def __init__(self, module: nn.Module) -> None:
        inside = list(module.modules())
        # Hooks on the block itself are called by whoever calls it.
        self._hooks = [getattr(each, name) for each in inside if each is not module for name in _HOOKS]
        self._members = [each.__dict__ for each in inside]
        self._sizes = list(map(len, self._members))
        self._settings = [itemgetter(*(name for name in each.__dict__ if name not in _INERT)) for each in inside]
        held = [d for each in inside for d in (each._parameters, each._buffers, each._modules)]
        self._held = [*filter(None, held)]
        self._are_empty = [d for d in held if not d]
        self._kept = list(self._state())

    def _state(self) -> Iterator[Any]:
        settings = chain.from_iterable(map(call, self._settings, self._members))
        return chain(settings, chain.from_iterable(map(dict.values, self._held)), (_END,))

    def is_current(self) -> bool:
        """Whether its modules are what they were, and nobody looks inside."""
        for _ in chain.from_iterable(self._hooks):
            return False
        for _ in chain.from_iterable(self._are_empty):
            return False
        try:
            return all(map(is_, self._state(), self._kept)) and list(map(len, self._members)) == self._sizes
        except KeyError:
            return False


class _Block(State):
    """What is known about a block as its modules are.

    Attributes:
        engine: of its layers; None: there is something in it that is not known.
        joins: what comes in → the call, or None where the block is no such run.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.engine = _engine_of(module)
        self.joins: dict[Any, Join | None] = {}


_known: WeakKeyDictionary[nn.Module, _Block] = WeakKeyDictionary()


def is_block(module: nn.Module) -> bool:
    """Whether its class is a block of torchvision's, with that class's forward."""
    kind = type(module)
    forward = getattr(kind, "forward", None)
    name = (kind.__module__, kind.__qualname__)
    return name in _BLOCKS and (forward.__module__, forward.__qualname__) == (name[0], f"{name[1]}.forward")


def joined(module: nn.Module, x: Any, stepped: Callable[[Any], Any]) -> Any:
    """The block's result on x: by one call, or by `stepped`, its forward."""
    if type(x) is Coded:
        if x.current() is None:
            return stepped(x)
        key: Any = (x.sizes, x.node)
    elif isinstance(x, torch.Tensor) and x.dtype is torch.float32 and not x.requires_grad:
        key = tuple(x.shape)
    else:
        return stepped(x)
    block = _known.get(module)
    if block is not None and block.joins.get(key, _END) is None:
        return stepped(x)
    if block is None or not block.is_current():
        block = _known[module] = _Block(module)
        if not block.is_current():  # somebody looks on
            return stepped(x)
    if block.engine is None:
        return stepped(x)
    if key not in block.joins:
        return _noted(block, block.engine, key, x, stepped)
    join = block.joins[key]
    assert join is not None
    if type(x) is Coded and x.engine is not join.engine:
        return stepped(x)
    result = join.engine.joined(join, x)
    return stepped(x) if result is None else result


def _engine_of(module: nn.Module) -> Engine | None:
    """Of the layers in a block; None: what it computes does not follow from what is known here."""
    engine: Engine | None = None
    for each in module.modules():
        kind = type(each)
        is_sequential = kind.forward is nn.Sequential.forward
        is_known = kind in LEAVES or kind in LAYERS or kind in BLOCKS or is_sequential
        if not is_known or each.training or kind.__call__ is not nn.Module.__call__ or "forward" in each.__dict__:
            return None
        weight = each._parameters.get("weight")
        if type(weight) is Weight:
            if len(weight.site.calls) != 1:
                return None
            engine = weight.site.engine
    return engine


def _noted(block: _Block, engine: Engine, key: Any, x: Any, stepped: Callable[[Any], Any]) -> Any:
    """Step by step, with a look at what was computed."""
    before = version_of(x)
    with engine.noting() as notes:
        result = stepped(x)
    if len(block.joins) >= _SIZES_PER_BLOCK:
        block.joins.clear()
    block.joins[key] = _join(engine, x, result, notes) if version_of(x) == before else None
    return result


def version_of(x: Any) -> tuple[Any, ...]:
    """What a change in place changes."""
    return (id(x.codes), x.node, x.pending) if type(x) is Coded else (0 if x.is_inference() else x._version,)


def _join(engine: Engine, x: Any, result: Any, notes: Notes) -> Join | None:
    """The notes as one call that gives the same to the bit."""
    units = tuple(unit for note in notes.calls for unit in note.units)
    inside = {unit.output for unit in units}
    if len(units) < 2 or len(inside) < len(units) or any(unit.phases is not None for unit in units):
        return None
    made: dict[str, torch.Tensor] = {}
    outside: dict[str, torch.Tensor] = {}
    for note in notes.calls:
        for name, held in note.operands.items():
            if name in inside and made.get(name) is not held:
                return None
            if name not in inside and outside.setdefault(name, held) is not held:
                return None
        made[note.units[-1].output] = note.value
    last = notes.calls[-1].value
    is_last = result._is_untouched() and result.codes is last if type(result) is Coded else result is last
    if len(outside) != 1 or not is_last:
        return None
    ((reads, held),) = outside.items()
    given = [(x, x.codes)] if type(x) is Coded else notes.coded
    is_of_x = any(each is x and codes is held for each, codes in given)
    run = engine.run_of(units, reads) if is_of_x else None
    again = None if run is None else run(held)
    if run is None or again is None or again.dtype is not last.dtype or not torch.equal(again, last):
        return None
    return Join(engine, units, reads, run)
