"""What the stages make of a source: up to the integer program, and up to what runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantflow.algorithms import NO_OUTLIERS, Applied, Outliers
from quantflow.analysis.joins import Join
from quantflow.host.place import CPU
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan
from quantflow.ir.program import Program
from quantflow.quantized import Quantized, QuantizedModel, QuantizedModule, QuantizedScript
from quantflow.schema import Recipe
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.compile import Compiled
from quantflow.stages.imperative import run_module
from quantflow.stages.prepare import Prepared
from quantflow.stages.record import Record
from quantflow.stages.warmup import Warmup


@dataclass(frozen=True)
class Observable:
    """What calibration observes, and what led to it.

    Attributes:
        module: imperative mode: the user's own code with what algorithms did to it.
        algorithms: those that rewrote the graph.
        place: where what is not int8 is computed.
    """

    prepared: Prepared
    module: nn.Module | None
    algorithms: tuple[Applied, ...] = ()
    outliers: Outliers = NO_OUTLIERS
    place: torch.device = CPU

    def at_its_place(self) -> Prepared:
        """What is observed, where it is computed."""
        return self.prepared.at(self.place)


@dataclass(frozen=True)
class Converted:
    """Plan, table and program of one model, and the algorithms behind its numbers."""

    plan: Plan
    table: CalibrationTable
    program: Program
    algorithms: tuple[Applied, ...] = ()


@dataclass(frozen=True)
class Built:
    """The int8 side: every product of the stages up to warm-up, which only the first worker goes through.

    `place`: where what is not int8 was computed.
    """

    graph: Graph
    plan: Plan
    table: CalibrationTable
    program: Program
    compiled: Compiled
    warmup: Warmup | None
    module: nn.Module | None
    algorithms: tuple[Applied, ...] = ()
    outliers: Outliers = NO_OUTLIERS
    joins: tuple[Join, ...] = ()
    place: torch.device = CPU

    def call(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """What the user will run: the swapped module in imperative mode, else the compiled program."""
        return run_module(self.module, args, kwargs) if self.module is not None else self.compiled(*args, **kwargs)

    def call_at(self, place: torch.device) -> Callable[..., Any]:
        """`call`, for inputs on a device: a module of the user's own is copied there."""
        if self.module is None or place == CPU:
            return self.call
        module = copy.deepcopy(self.module).to(place)
        return lambda *args, **kwargs: run_module(module, args, kwargs)

    def verified(self) -> Warmup:
        """What warm-up found."""
        assert self.warmup is not None, "the first worker warms up"
        return self.warmup

    def model(self, record: Record) -> Quantized:
        """The public result for the mode."""
        if self.module is not None:
            return QuantizedModule(self.module, self.compiled, record)
        if Recipe.from_dict(record.recipe).mode.kind == "torchscript":
            return QuantizedScript.adopt(self.compiled, record)
        return QuantizedModel(self.compiled, record)
