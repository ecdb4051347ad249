"""What a module's own code asks for, call by call, and which unit of the plan that is.

A unit may be several calls of the user's: a convolution, its BatchNorm, an addition, an activation. The first one makes
a `Pending`; each that comes next as expected completes it, and the last one computes the whole unit at once. Anything
else gets the float result of what was called so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from quantflow.ir.activations import Epilogue
from quantflow.ir.graph import arguments
from quantflow.ir.passes.transposed_convolutions import Phases
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.units import CORE
from quantflow.stages.imperative.tensors import Coded

if TYPE_CHECKING:
    from quantflow.stages.imperative.engines import Engine

BATCH_NORM, ADD = "batch_norm", "add"


@dataclass(eq=False)
class UnitCall:
    """A planned int8 unit as the user's code calls it.

    Attributes:
        operands: the graph's values that it reads, in order; a residual comes last.
        expects: what must be called on the result, in order, until the unit is complete: BATCH_NORM, ADD or an
            activation.
        node: the graph's value that the complete unit gives.
        root: whose scale and zero point its codes have; empty: it gives float32.
        is_held_transposed: of a linear: the module multiplies by its weight as it lies, x @ W.
        geometry: of a convolution: (stride, padding, dilation, groups), and output_padding behind them if transposed.
        accepted: (shape of the input, geometry as it was passed) of the calls that were found to be this one.
    """

    engine: Engine
    planned: PlannedUnit
    operands: tuple[str, ...]
    expects: tuple[str | Epilogue, ...]
    node: fx.Node
    root: str
    phases: Phases | None = None
    is_held_transposed: bool = False
    geometry: tuple[Any, ...] = ()
    accepted: set[Any] = field(default_factory=set)
    shapes: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnitCall:
        return self

    def accepts(self, sizes: tuple[int, ...], geometry: tuple[Any, ...]) -> bool:
        """Whether a float32 input of these sizes was taken before."""
        try:
            return (sizes, geometry) in self.accepted
        except TypeError:  # lists
            return False

    @property
    def name(self) -> str:
        return self.planned.unit.name

    @property
    def output(self) -> str:
        """The graph's name of what the unit computes."""
        return self.planned.unit.output.name


@dataclass(eq=False, slots=True)
class Pending:
    """A unit that was called in part.

    Attributes:
        operands: value name → how the engine holds it.
        done: how much of `call.expects` came.
        replay: the calls so far, on float tensors, each on the result of the one before.
        shape: of the result.
    """

    call: UnitCall
    operands: dict[str, torch.Tensor]
    done: int
    replay: tuple[Callable[..., torch.Tensor], ...]
    shape: tuple[int, ...]
    device: torch.device

    @property
    def next(self) -> str | Epilogue:
        """What must be called for the unit to go on."""
        return self.call.expects[self.done]

    def replayed(self) -> torch.Tensor:
        """The float32 result of the calls so far, also where the user's code asks for lower precision."""
        kind = self.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            first, *others = self.replay
            value = first()
            for step in others:
                value = step(value)
            return value

    def went_on(self, *steps: Callable[[torch.Tensor], torch.Tensor]) -> Pending:
        """With the next expected calls done, each given as what it does to float tensors."""
        return Pending(
            self.call, self.operands, self.done + len(steps), (*self.replay, *steps), self.shape, self.device
        )

    def advanced(self, step: Callable[[torch.Tensor], torch.Tensor], **operands: torch.Tensor) -> torch.Tensor:
        """The result of the expected call: what the complete unit gives, or what waits on."""
        done = self.went_on(step)
        if operands:
            done.operands = {**self.operands, **operands}
        return done.completed()

    def completed(self) -> torch.Tensor:
        """Itself as a tensor, computed if nothing more is expected."""
        if self.done < len(self.call.expects):
            return Coded.waiting(self)
        return self.call.engine.complete(self)


@dataclass(eq=False)
class Site:
    """All calls of one weight, in the order in which the captured forward makes them."""

    engine: Engine
    calls: list[UnitCall]

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self

    def call(self) -> UnitCall | None:
        """The unit of the call that is made now."""
        if len(self.calls) == 1:
            return self.calls[0]
        at = self.engine.count(self)
        return self.calls[at] if at is not None and at < len(self.calls) else None


def calls_of(engine: Engine, planned: PlannedUnit, codes: Mapping[str, str], folds: bool) -> UnitCall:
    """
    Args:
        codes: value → whose scale and zero point it has.
        folds: whether its BatchNorm is still called.
    """
    unit, node = planned.unit, planned.unit.output
    operands = [value.name for value in unit.inputs]
    expects: list[str | Epilogue] = []
    if folds:
        expects.append(BATCH_NORM)
    if unit.residual is not None:
        operands.append(unit.residual.name)
        expects.append(ADD)
    if unit.epilogue is not None:
        expects.append(one_of(unit.epilogue))
    phases: Phases | None = unit.anchor.meta.get("transposed")
    for _ in phases.moves() if phases is not None else ():
        (node,) = node.users
    root = codes[unit.output.name] if planned.writes_codes else ""
    geometry: tuple[Any, ...] = ()
    if phases is not None:
        geometry = (phases.stride, phases.padding, phases.dilation, phases.groups, phases.output_padding)
    elif unit.kind == CORE and unit.op != "linear":
        given, dims = arguments(unit.anchor), int(unit.op[-2])
        geometry = (*(spread(given[key], dims) for key in ("stride", "padding", "dilation")), given["groups"])
    return UnitCall(engine, planned, tuple(operands), tuple(expects), node, root, phases, geometry=geometry)


_EPILOGUES: dict[Epilogue, Epilogue] = {}


def one_of(epilogue: Epilogue) -> Epilogue:
    """The one object that stands for all equal ones, which are compared in every call."""
    return _EPILOGUES.setdefault(epilogue, epilogue)


def spread(value: Any, dims: int) -> tuple[int, ...]:
    """A number for every dimension."""
    values: Sequence[Any] = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (list(values) * dims if len(values) == 1 else values))
