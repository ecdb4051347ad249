"""What every step of one run is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantflow.algorithms import Material
from quantflow.algorithms.kept import NOTHING_KEPT, KeptAlgorithms
from quantflow.executor.source import Source
from quantflow.host.place import CPU
from quantflow.host.workers import Workers
from quantflow.ir.float_passes import FloatPasses
from quantflow.ir.graph import Graph
from quantflow.report import Progress
from quantflow.runtimes import AbstractRunner, Choice, choose_runtime
from quantflow.schema import Recipe
from quantflow.store.run_folder import Work

#: This process computes everything by itself.
ONLY = Workers()


@dataclass(frozen=True)
class Run:
    """One run: what was asked, on what, where; who is told of its progress, what is kept of it, who shares the work.

    Attributes:
        place: where torch computes what is not int8; the CPU until `placed` has tried the device.
        passes: what runs the float graph, for all stages.
    """

    recipe: Recipe
    source: Source
    choice: Choice
    progress: Progress
    work: Work | None = None
    workers: Workers = ONLY
    overrides: Sequence[str] = ()
    place: torch.device = CPU
    passes: FloatPasses = field(default_factory=FloatPasses)

    @classmethod
    def of(cls, recipe: Recipe, source: Source, progress: Progress, **others: Any) -> Run:
        """A run on the runtime and device that the recipe asks for.

        Raises:
            UnavailableError: this machine does not have them.
        """
        choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind, recipe.policy.float)
        return cls(recipe, source, choice, progress, **others)

    @property
    def swapped(self) -> nn.Module | None:
        """The module that stays the user's own code in imperative mode; None: the captured graph is what runs."""
        module = self.source.model.module
        return module if self.recipe.mode.kind == "imperative" and isinstance(module, nn.Module) else None

    def int8_place(self, runner: AbstractRunner) -> torch.device:
        """Where the int8 model is given its inputs when it is measured: where float's lie, if it takes them there."""
        return self.place if self.place.type in runner.takes else CPU

    @property
    def stands_for(self) -> torch.dtype:
        """The dtype of the model that was given, of which a float32 copy is quantized."""
        original = self.source.model.original
        dtypes = [] if original is None else [p.dtype for p in original.parameters() if p.is_floating_point()]
        return next((dtype for dtype in dtypes if dtype is not torch.float32), torch.float32)

    def material(self, graph: Graph) -> Material:
        """What accuracy algorithms look at."""
        batches, seed = self.source.data.calibration, self.recipe.seed
        return Material(batches, graph.batch_is_dynamic, seed, place=self.place, passes=self.passes)

    def kept_algorithms(self) -> KeptAlgorithms:
        """What an interrupted run's algorithms have finished. Every worker reads it; the first one writes."""
        if self.work is None or not (self.workers.is_first or self.recipe.resume):
            return NOTHING_KEPT
        where = [self.choice.runtime.name, self.choice.device, self.place.type]
        inputs = json.dumps([*where, self.source.data.identity], sort_keys=True)
        return KeptAlgorithms(self.work, inputs, writes=self.workers.is_first)

    def checkpoint(self) -> Path | None:
        """Where this worker keeps the state of its calibration."""
        return None if self.work is None else self.work.checkpoint(self.workers.rank, self.workers.count)
