"""Mean errors are gone after bias correction, and only those of layers that may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.algorithms.bias_correction import bias_correction
from quantflow.algorithms.simulate import Layer, walk
from quantflow.ir.batch import Batch
from quantflow.ir.graph import interpret
from quantflow.schema import BiasCorrectionAlgorithm, LayerOverride
from quantflow.stages.refined import float_numbers

Prepare = Callable[..., Any]


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_uint8"])
def test_full_leaves_no_mean_error_in_any_layer(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], qconfig: str
) -> None:
    start = ready(depthwise, images, qconfig)
    refined, outcome = bias_correction(
        BiasCorrectionAlgorithm(method="full"), start.prepared, start.refined, start.material
    )
    before, after = largest_mean_errors(start, start.refined), largest_mean_errors(start, refined)
    assert max(after.values()) < 1e-5 < min(before.values())
    assert outcome.changes[0].before == pytest.approx(before["stem"], rel=1e-3)
    assert start.db(refined) > start.db(start.refined)


def largest_mean_errors(start: Any, refined: Any) -> dict[str, float]:
    found = {}

    def on_layer(layer: Layer) -> None:
        pairs = zip(layer.float_outputs, layer.run(refined.layers[layer.name]), strict=True)
        errors = torch.cat([(a - b).movedim(layer.channel_axis(), 0).flatten(1) for a, b in pairs], 1)
        found[layer.name] = float(errors.mean(1).abs().max())

    walk(start.prepared, refined, start.material.batches, on_layer)
    return found


def test_fast_is_the_mean_of_what_rounding_the_weight_does(ready: Prepare, images: list[Batch]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)).eval()
    start = ready(model, images)
    refined, _ = bias_correction(BiasCorrectionAlgorithm(), start.prepared, start.refined, start.material)
    values: dict[str, torch.Tensor] = {}
    interpret(start.graph, [torch.cat([b.args[0] for b in images])], lambda n, x: values.update({n.name: x}))
    for planned in start.plan.units:
        name, x = planned.unit.name, values[planned.unit.inputs[0].name].mean((0, 2, 3))
        weight, bias = float_numbers(start.graph, planned)
        per_input = x.reshape(planned.unit.anchor.args[6] if name == "2" else 1, 1, -1, 1)
        lost = (weight - start.refined.layers[name].weight()).sum((2, 3))
        shift = (lost.reshape(per_input.shape[0], -1, 1, lost.shape[1]) @ per_input).flatten()
        torch.testing.assert_close(refined.layers[name].bias, bias + shift)


def test_correcting_twice_is_correcting_once(ready: Prepare, depthwise: nn.Module, images: list[Batch]) -> None:
    start = ready(depthwise, images)
    for method in ("fast", "full"):
        settings = BiasCorrectionAlgorithm(method=method)  # type: ignore[arg-type]
        once, _ = bias_correction(settings, start.prepared, start.refined, start.material)
        twice, _ = bias_correction(settings, start.prepared, once, start.material)
        for name, numbers in once.layers.items():
            torch.testing.assert_close(twice.layers[name].bias, numbers.bias, rtol=0, atol=1e-5)


def test_layers_without_a_bias_get_one_and_closed_ones_stay(ready: Prepare, images: list[Batch]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 3)).eval()
    start = ready(model, images, layers={"2": LayerOverride(without=("bias_correction",))})
    refined, outcome = bias_correction(BiasCorrectionAlgorithm(), start.prepared, start.refined, start.material)
    assert refined.layers["0"].bias is not None
    assert torch.equal(refined.layers["2"].bias, start.refined.layers["2"].bias)
    assert outcome.skipped == (("2", "the recipe says so"),)
    fewer, _ = bias_correction(BiasCorrectionAlgorithm(samples=2), start.prepared, start.refined, start.material)
    assert not torch.equal(fewer.layers["0"].bias, refined.layers["0"].bias), "samples change the result"


def test_dead_channels_survive(ready: Prepare, depthwise: nn.Module, images: list[Batch]) -> None:
    start = ready(depthwise, [replace(b, args=(torch.zeros_like(b.args[0]),)) for b in images])
    for method in ("fast", "full"):
        settings = BiasCorrectionAlgorithm(method=method)  # type: ignore[arg-type]
        refined, _ = bias_correction(settings, start.prepared, start.refined, start.material)
        assert all(bool(numbers.bias.isfinite().all()) for numbers in refined.layers.values())
