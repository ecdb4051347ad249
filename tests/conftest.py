"""A model taken through every stage up to its integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.passes.transposed_convolutions import transposed_to_convolutions
from quantflow.ir.plan import Plan
from quantflow.ir.program import Program
from quantflow.schema import PRESETS, LayerOverride, QConfig
from quantflow.stages.calibrate import CalibrationTable, calibrate
from quantflow.stages.convert import convert
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import Prepared, prepare

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads that wait for each other spin, and take the time of those that work.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class Stages:
    """What each stage made of one model."""

    graph: Graph
    plan: Plan
    prepared: Prepared
    table: CalibrationTable
    program: Program


Quantize = Callable[..., Stages]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: at the end no worker waits long for the other."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _own_code_is_imported_afresh() -> Iterator[None]:
    """Tests put modules of the name `mine` into folders of their own, and one process runs many tests."""
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)


@pytest.fixture
def stages() -> Quantize:
    """stages(model, batch, qconfig="sym_int8", layers=None, reduce_range=False) → Stages; the batch also calibrates."""

    def run(
        model: nn.Module | Graph,
        batch: torch.Tensor | Batch,
        qconfig: str | QConfig = "sym_int8",
        layers: Mapping[str, str | LayerOverride] | None = None,
        reduce_range: bool = False,
    ) -> Stages:
        batch = Batch((batch,)) if isinstance(batch, torch.Tensor) else batch
        batch = Batch(batch.args, batch.kwargs, ids=tuple(map(str, range(batch.size))))
        graph = model if isinstance(model, Graph) else _captured(model, batch)
        chosen = PRESETS[qconfig] if isinstance(qconfig, str) else qconfig
        plan = make_plan(graph, chosen, layers, reduce_range=reduce_range)
        prepared = prepare(graph, plan)
        table = calibrate(prepared, [batch])
        return Stages(graph, plan, prepared, table, convert(prepared, table))

    return run


def _captured(model: nn.Module, batch: Batch) -> Graph:
    return transposed_to_convolutions(fold_batch_norms(capture_export(model.eval(), batch)))
