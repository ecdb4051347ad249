"""GPTQ and AdaRound: codes that give a layer's output back, checked against brute force and on whole models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.algorithms import NUMBER_ALGORITHMS
from quantflow.algorithms.gptq import _compensated, _descend
from quantflow.algorithms.gram import gram_of, windows_of
from quantflow.algorithms.rounding import damped, form, nearest
from quantflow.algorithms.simulate import Layer, linear_op, walk
from quantflow.ir.batch import Batch
from quantflow.numerics.affine import WEIGHT_RANGE
from quantflow.schema import AdaroundAlgorithm, GptqAlgorithm, LayerOverride, QConfig, WeightSpec
from quantflow.stages.refined import float_numbers

Prepare = Callable[..., Any]
SETTINGS = {"gptq": GptqAlgorithm(samples=32), "adaround": AdaroundAlgorithm(samples=32, iterations=200)}


def correlated(k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return (x.T @ x / 400).unsqueeze(0)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_comes_close_to_the_best_of_all_codes(seed: int) -> None:
    h = damped(correlated(5, seed), 0.001)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 6, 5, generator=generator)
    scale = torch.full((1, 6, 1), 0.3)
    around = nearest(weight, scale)
    choices = torch.tensor(list(itertools.product((-2.0, -1.0, 0.0, 1.0, 2.0), repeat=5)))
    best = torch.stack([form(h, (around + c) * scale - weight) for c in choices]).amin(0)
    compensated = _compensated(h, weight, scale)
    found = form(h, _descend(h, weight, scale, compensated, 10) * scale - weight)
    plain = form(h, around * scale - weight)
    assert (found >= best - 1e-5).all()
    assert (found <= form(h, compensated * scale - weight) + 1e-5).all(), "the descent never makes it worse"
    assert found.sum() < 0.8 * plain.sum()
    assert found.sum() < 2 * best.sum()


def test_the_form_is_the_layers_squared_error(ready: Prepare, depthwise: nn.Module, images: list[Batch]) -> None:
    start = ready(depthwise, images)
    layers: dict[str, Layer] = {}
    walk(start.prepared, start.refined, images, lambda layer: layers.update({layer.name: layer}))
    for layer in layers.values():
        gram = gram_of(layer, layer.inputs, torch.Generator())
        numbers = start.refined.layers[layer.name]
        weight, _ = float_numbers(start.graph, layer.planned)
        lost = numbers.weight() - weight
        errors = [linear_op(layer.planned.unit.anchor, x, lost, None) for x in layer.inputs]
        rows = torch.cat([e.movedim(layer.channel_axis(), 0).flatten(1) for e in errors], 1)
        quadratic = form(gram.h, lost.reshape(gram.h.shape[0], -1, gram.h.shape[1])).flatten()
        torch.testing.assert_close(quadratic, rows.var(1, correction=0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 4, 9, 8)),
        (nn.Conv3d(2, 4, 2, padding=1), (2, 2, 3, 4, 3)),
        (nn.Linear(4, 3), (2, 5, 4)),
    ],
)
def test_windows_are_what_rows_of_the_weight_are_multiplied_with(
    ready: Prepare, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    start = ready(nn.Sequential(layer).eval(), [Batch((x,))])
    (planned,) = start.plan.units
    windows = windows_of(planned, x, torch.Generator())
    groups, _, k = windows.shape
    weight = layer.weight.detach().reshape(groups, -1, k)
    product = (windows @ weight.transpose(1, 2)).permute(0, 2, 1).reshape(layer.weight.shape[0], -1)
    wanted = layer(x).detach()
    channels = -1 if isinstance(layer, nn.Linear) else 1
    wanted = wanted.movedim(channels, 0).flatten(1) - layer.bias.detach().unsqueeze(1)
    torch.testing.assert_close(product, wanted)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_layers_come_closer_to_float(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], name: str, granularity: str
) -> None:
    start = ready(depthwise, images, QConfig(weight=WeightSpec(granularity=granularity)))  # type: ignore[arg-type]
    refined, outcome = NUMBER_ALGORITHMS[name](SETTINGS[name], start.prepared, start.refined, start.material)
    again, _ = NUMBER_ALGORITHMS[name](SETTINGS[name], start.prepared, start.refined, start.material)
    assert [c.layer for c in outcome.changes] == ["stem", "depthwise", "project", "expand", "back", "head"]
    assert all(c.after >= c.before for c in outcome.changes)
    assert sum(c.after > c.before for c in outcome.changes) >= 3
    for layer, numbers in refined.layers.items():
        assert torch.equal(numbers.codes, again.layers[layer].codes), "seeds are fixed"
        assert numbers.codes.dtype is torch.int8
        assert int(numbers.codes.min()) >= WEIGHT_RANGE[0]
        assert torch.equal(numbers.scale, start.refined.layers[layer].scale)
        assert bool(numbers.bias.isfinite().all())


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_the_result(ready: Prepare, depthwise: nn.Module, images: list[Batch], name: str) -> None:
    start = ready(depthwise, images)
    run = NUMBER_ALGORITHMS[name]
    base, _ = run(SETTINGS[name], start.prepared, start.refined, start.material)
    other = {"gptq": {"sweeps": 0}, "adaround": {"iterations": 10}}[name]
    own = {"gptq": [], "adaround": [{"learning_rate": 1e-4}, {"regularization": 0.0}]}[name]
    for changed in ({"samples": 8}, {"damping": 1.0}, other, *own):
        found, _ = run(SETTINGS[name].model_copy(update=changed), start.prepared, start.refined, start.material)
        assert any(not torch.equal(found.layers[n].codes, base.layers[n].codes) for n in base.layers), changed
    again, _ = run(SETTINGS[name].model_copy(update={"refit": True}), start.prepared, start.refined, start.material)
    assert any(not torch.equal(again.layers[n].bias, base.layers[n].bias) for n in base.layers), (
        "the mean of all samples"
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_time_is_bounded_and_what_was_left_out_is_said(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], name: str
) -> None:
    start = ready(depthwise, images, layers={"head": LayerOverride(without=("all",))})
    settings = SETTINGS[name].model_copy(update={"max_seconds": 1e-9})
    refined, outcome = NUMBER_ALGORITHMS[name](settings, start.prepared, start.refined, start.material)
    assert outcome.notices == (f"{name}: stopped after max_seconds=1e-09; 5 layers keep the codes they had",)
    assert outcome.skipped == (("head", "the recipe says so"),)
    assert refined == start.refined


def test_a_weight_that_two_ops_read_is_left_alone(ready: Prepare, images: list[Batch]) -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 1)
    start = ready(nn.Sequential(shared, nn.ReLU(), shared).eval(), images)
    _, outcome = NUMBER_ALGORITHMS["gptq"](SETTINGS["gptq"], start.prepared, start.refined, start.material)
    assert {reason for _, reason in outcome.skipped} == {"another op reads its weight"}
