"""Programs for many settings from one calibration are those that each setting's own run makes."""

from __future__ import annotations

from collections.abc import Callable

import own_models
import pytest
import torch
from torch import nn

from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.schema import PRESETS, ActivationOverride, LayerOverride
from quantflow.search.variants import Layers, Variants
from quantflow.stages.calibrate import calibrate
from quantflow.stages.convert import convert
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import prepare

QCONFIG = PRESETS["sym_int8"]
OTHERS = QCONFIG.model_copy(update={"activation": QCONFIG.activation.model_copy(update={"observer": "percentile"})})
PERCENTILE = LayerOverride(activation=ActivationOverride(observer="percentile", percentile=90.0))


class Passes(list[Batch]):
    """Batches that count how often they are read."""

    count = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.count += 1
        return super().__iter__()


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return fold_batch_norms(capture_export(own_models.net().eval(), batches()[0]))


def batches() -> Passes:
    generator = torch.Generator().manual_seed(1)
    return Passes(Batch((torch.randn(4, 3, 8, 8, generator=generator),)) for _ in range(3))


def variants(graph: Graph, data: Passes) -> Variants:
    return Variants(graph, data, lambda qconfig, layers: make_plan(graph, qconfig, layers))


SETTINGS: list[Layers] = [
    {}, {"block": "float"}, {"stem.0": "float"}, {"head": "float"}, {"add": "float"},
    {"block": "float", "head": "float"}, {"stem.0": "float", "head": "float"},
]  # fmt: skip


@pytest.mark.parametrize("layers", SETTINGS, ids=str)
def test_a_variant_is_what_a_run_makes(graph: Graph, layers: Layers) -> None:
    shared = variants(graph, batches())
    shared.calibrate(QCONFIG, {})
    found = shared.build(QCONFIG, layers)
    plan = make_plan(graph, QCONFIG, layers)
    prepared = prepare(graph, plan)
    table = calibrate(prepared, batches())
    own = convert(prepared, table)
    assert found.plan.rows == plan.rows
    assert found.table.to_bytes() == table.to_bytes()
    assert found.program.to_json() == own.to_json()
    assert found.program.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(found.program.tensors[name], own.tensors[name]) for name in own.tensors)


def test_fewer_int8_layers_need_no_second_pass(graph: Graph) -> None:
    data = batches()
    shared = variants(graph, data)
    shared.calibrate(QCONFIG, {})
    for layers in SETTINGS:
        shared.build(QCONFIG, layers)
    assert data.count == 1
    shared.build(OTHERS, {})
    shared.build(OTHERS, {})
    assert data.count == 2
    shared.build(QCONFIG, {"block": PERCENTILE})
    assert data.count == 3


def test_the_digest_names_the_model(graph: Graph) -> None:
    def digest(make: Callable[[], nn.Module], seed: int) -> str:
        torch.manual_seed(seed)
        return variants(fold_batch_norms(capture_export(make().eval(), batches()[0])), batches()).graph.digest

    assert digest(own_models.net, 0) == variants(graph, batches()).graph.digest
    assert digest(own_models.net, 1) != variants(graph, batches()).graph.digest
