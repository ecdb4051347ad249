"""activation_scale, clip_weights and batchnorm: ranges and statistics that fit what layers compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.algorithms import Material, activation_scale, batchnorm, clip_weights
from quantflow.algorithms.simulate import Layer, walk
from quantflow.ir.batch import Batch
from quantflow.numerics.affine import dequantize_weight, quantize_weight, weight_scale
from quantflow.numerics.observers import weight_max_abs
from quantflow.schema import (
    ActivationScaleAlgorithm,
    BatchNormAlgorithm,
    ClipWeightsAlgorithm,
    LayerOverride,
    QConfig,
    WeightSpec,
)
from quantflow.stages.refined import float_numbers

Prepare = Callable[..., Any]


def wide(ready: Prepare, images: list[Batch], qconfig: str = "sym_int8", layers: Any = None) -> Any:
    """Calibrated on data that are twice as large as the algorithm sees: every range is too wide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    start = ready(model, [Batch((2 * b.args[0],)) for b in images], qconfig, layers)
    return replace(start, material=Material(images))


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_uint8"])
def test_ranges_are_cut_where_that_pays(ready: Prepare, images: list[Batch], qconfig: str) -> None:
    start = wide(ready, images, qconfig)
    refined, outcome = activation_scale(ActivationScaleAlgorithm(), start.prepared, start.refined, start.material)
    assert all(c.after > c.before for c in outcome.changes[:1])
    ratios = [q.scale / start.refined.qparams[root].scale for root, q in refined.qparams.items()]
    assert min(ratios) < 0.9
    assert max(ratios) <= 1
    assert start.db(refined) > start.db(start.refined)
    for changed in ({"smallest": 0.95}, {"steps": 1, "smallest": 0.75}, {"samples": 4}):
        settings = ActivationScaleAlgorithm().model_copy(update=changed)
        other, found = activation_scale(settings, start.prepared, start.refined, start.material)
        assert other.qparams != refined.qparams or found.changes != outcome.changes, changed


def test_symmetric_ranges_stay_symmetric_and_closed_ones_stay(ready: Prepare, images: list[Batch]) -> None:
    start = wide(ready, images, layers={"0": LayerOverride(without=("activation_scale",))})
    refined, outcome = activation_scale(ActivationScaleAlgorithm(), start.prepared, start.refined, start.material)
    assert all(q.zero_point == 0 for q in refined.qparams.values())
    assert [reason for _, reason in outcome.skipped] == ["the recipe says so"]
    assert len(outcome.changes) == 1


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_clipped_weights_are_those_of_the_mse_observer(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], granularity: str
) -> None:
    qconfig = QConfig(weight=WeightSpec(granularity=granularity))  # type: ignore[arg-type]
    start = ready(depthwise, images, qconfig, {"head": LayerOverride(without=("clip_weights",))})
    refined, outcome = clip_weights(ClipWeightsAlgorithm(), start.prepared, start.refined, start.material)
    assert outcome.skipped == (("head", "the recipe says so"),)
    assert refined.layers["head"] is start.refined.layers["head"]
    assert any(change.after > change.before for change in outcome.changes)
    for planned in start.plan.units:
        if planned.unit.name in ("stem", "project"):
            weight, bias = float_numbers(start.graph, planned)
            spec, axis = WeightSpec(granularity=granularity, observer="mse"), 0  # type: ignore[arg-type]
            scale = weight_scale(weight_max_abs(weight, spec, axis)).reshape(-1)
            wanted = dequantize_weight(quantize_weight(weight, scale, axis if scale.numel() > 1 else None), scale,
                                       axis if scale.numel() > 1 else None)  # fmt: skip
            assert torch.equal(refined.layers[planned.unit.name].weight(), wanted)
            assert torch.equal(refined.layers[planned.unit.name].bias, bias)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_statistics_behind_a_folded_batchnorm_are_floats_again(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], granularity: str
) -> None:
    start = ready(depthwise, images, QConfig(weight=WeightSpec(granularity=granularity)))  # type: ignore[arg-type]
    refined, outcome = batchnorm(BatchNormAlgorithm(), start.prepared, start.refined, start.material)
    assert [change.layer for change in outcome.changes] == ["stem"]
    assert dict(outcome.skipped)["head"] == "no BatchNorm was folded into it"
    assert outcome.changes[0].after > outcome.changes[0].before

    def on_layer(layer: Layer) -> None:
        if layer.name == "stem":
            real, found = (
                torch.cat(list(y)).movedim(1, 0).flatten(1)
                for y in (layer.float_outputs, layer.run(refined.layers["stem"]))
            )
            torch.testing.assert_close(found.mean(1), real.mean(1), rtol=0, atol=1e-5)
            if granularity == "per_channel":
                torch.testing.assert_close(found.std(1), real.std(1), rtol=1e-4, atol=1e-6)

    walk(start.prepared, refined, images, on_layer)
    assert refined.layers["stem"].scale.numel() == start.refined.layers["stem"].scale.numel()
    fewer, _ = batchnorm(BatchNormAlgorithm(samples=4), start.prepared, start.refined, start.material)
    assert not torch.equal(fewer.layers["stem"].bias, refined.layers["stem"].bias)
