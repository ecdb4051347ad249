"""Small models that quantize badly in known ways, taken up to the point where algorithms act."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.algorithms import Material
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.plan import Plan
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.schema import PRESETS, QConfig
from quantflow.stages.calibrate import CalibrationTable, calibrate
from quantflow.stages.convert import convert
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import Prepared, prepare
from quantflow.stages.refined import Refined, unrefined


class Depthwise(nn.Module):
    """Expansion, depthwise, projection twice with a residual, a dead channel, a BatchNorm behind a ReLU, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 6, 1)
        self.expand = nn.Conv2d(6, 6, 1)
        self.late = nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.project(torch.relu(self.depthwise(x)))
        x = x + self.back(self.late(torch.relu(self.expand(x))))
        return self.head(torch.relu(x).mean((2, 3)))


@functools.cache
def _depthwise() -> nn.Module:
    torch.manual_seed(0)
    model = Depthwise()
    with torch.no_grad():
        for norm in (model.norm, model.late):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        model.norm.weight[3] = model.norm.bias[3] = 0  # a channel of zeros, as real networks have
        model.depthwise.weight[5] = 0
    return model.eval()


@pytest.fixture
def depthwise() -> nn.Module:
    return _depthwise()


@pytest.fixture
def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch((torch.randn(4, 3, 9, 9, generator=generator),)) for _ in range(8)]


@dataclass(frozen=True)
class Ready:
    """A model that algorithms can start from."""

    graph: Graph
    plan: Plan
    prepared: Prepared
    table: CalibrationTable
    refined: Refined
    material: Material

    def db(self, refined: Refined) -> float:
        """SQNR of the integer program in the reference runtime, over all batches."""
        run = ReferenceRunner(convert(self.prepared, self.table, refined))
        pairs = [(interpret(self.graph, b.args), run(b.args)) for b in self.material.batches]
        return sqnr_db(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))


Prepare = Callable[..., Ready]


@pytest.fixture
def ready() -> Prepare:
    """ready(model, batches, qconfig="sym_int8", layers=None) → Ready."""

    def make(
        model: nn.Module | Graph, batches: Sequence[Batch], qconfig: str | QConfig = "sym_int8", layers: Any = None
    ) -> Ready:
        graph = model if isinstance(model, Graph) else fold_batch_norms(capture_export(model, batches[0]))
        plan = make_plan(graph, PRESETS[qconfig] if isinstance(qconfig, str) else qconfig, layers)
        prepared = prepare(graph, plan)
        table = calibrate(prepared, batches)
        return Ready(graph, plan, prepared, table, unrefined(prepared, table), Material(batches))

    return make
