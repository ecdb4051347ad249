"""Rescaled channels: the same float model, and int8 that no longer suffers from the scales it came with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.algorithms import Material, equalize
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.numerics.measures import sqnr_db
from quantflow.schema import PRESETS, EqualizeAlgorithm, LayerOverride, QConfig, WeightSpec
from quantflow.stages.plan import make_plan

Prepare = Callable[..., Any]


def captured(model: nn.Module, batch: Batch) -> Graph:
    return fold_batch_norms(capture_export(model.eval(), batch))


def equalized(
    graph: Graph, batches: list[Batch], layers: Any = None, fixed: frozenset[str] = frozenset(), **settings: Any
) -> tuple[Graph, Any]:
    plan = make_plan(graph, PRESETS["sym_int8"], layers)
    return equalize(EqualizeAlgorithm(**settings), graph, plan, Material(batches, fixed=fixed)).whole()


def rescaled(model: nn.Sequential, first: int, second: int, seed: int = 0) -> None:
    """Divide the second layer's columns by what the first one's rows are multiplied with: 0.01 to 100."""
    a, b = model[first], model[second]
    factors = 10 ** (4 * torch.rand(a.weight.shape[0], generator=torch.Generator().manual_seed(seed)) - 2)
    with torch.no_grad():
        a.weight.mul_(factors.reshape(-1, *[1] * (a.weight.dim() - 1)))
        a.bias.mul_(factors)
        if b.weight.shape[1] == 1:
            b.weight.div_(factors.reshape(-1, 1, 1, 1))
        else:
            repeat = b.weight.shape[1] // len(factors)
            b.weight.div_(factors.repeat_interleave(repeat).reshape(1, -1, *[1] * (b.weight.dim() - 2)))


def chain(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        activation,
        nn.ConstantPad2d(1, 0.0),
        nn.Conv2d(8, 8, 3, groups=8),
        activation,
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(54, 5),
    ).eval()


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_bad_scales_are_undone(ready: Prepare, images: list[Batch], granularity: str) -> None:
    qconfig = QConfig(weight=WeightSpec(granularity=granularity))
    found = {}
    for name, pairs in {"good": (), "bad": ((0, 3), (3, 6), (6, 8))}.items():
        model = chain(nn.ReLU())
        for pair in pairs:
            rescaled(model, *pair, seed=pair[0])
        graph = captured(model, images[0])
        plan = make_plan(graph, qconfig)
        better, outcome = equalize(EqualizeAlgorithm(), graph, plan, Material(images)).whole()
        assert sqnr_db(interpret(graph, images[0].args), interpret(better, images[0].args)) > 90
        before, after = (ready(g, images, qconfig) for g in (graph, better))
        found[name] = before.db(before.refined), after.db(after.refined)
        assert len(outcome.changes) == 3
        assert all(change.after <= change.before + 1e-6 for change in outcome.changes[:1])
    assert found["bad"][0] < found["good"][0] - 10, "the scales do harm"
    assert found["bad"][1] == pytest.approx(found["good"][1], abs=2), "and none once equalized"
    assert found["bad"][1] > found["good"][0] - 2


def test_a_residual_stream_shares_factors_and_dead_channels_survive(depthwise: nn.Module, images: list[Batch]) -> None:
    graph = captured(depthwise, images[0])
    better, outcome = equalized(graph, images)
    assert {change.layer for change in outcome.changes} == {"stem", "depthwise", "project and 1 more", "late"}
    assert all(bool(value.isfinite().all()) for value in better.constants.values())
    assert sqnr_db(interpret(graph, images[0].args), interpret(better, images[0].args)) > 90
    factor = graph.constants["project.weight"].flatten(1) / better.constants["project.weight"].flatten(1)
    shared = graph.constants["back.weight"].flatten(1) / better.constants["back.weight"].flatten(1)
    rows = factor[:, 0] / factor[0, 0]
    assert torch.allclose(shared[:, 0] / shared[0, 0], rows, rtol=1e-4), "both writers are divided by the same"
    assert not torch.allclose(rows, torch.ones(6), rtol=0.01)


class BoundPerChannel(nn.Module):
    def __init__(self, bound: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("bound", bound.reshape(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.relu(x), self.bound)


def test_a_bound_per_channel_is_rescaled_with_its_channels(images: list[Batch]) -> None:
    model = chain(nn.ReLU())
    model[1] = BoundPerChannel(torch.linspace(0.1, 1, 8))
    graph = captured(model, images[0])
    better, outcome = equalized(graph, images)
    assert outcome.changes[0].layer == "0"
    assert outcome.changes[0].after < outcome.changes[0].before
    assert not torch.equal(graph.constants["1.bound"].flatten(), better.constants["1.bound"].flatten())
    assert sqnr_db(interpret(graph, images[0].args), interpret(better, images[0].args)) > 90


def test_bounds_that_are_reached_say_what_a_channel_may_hold(images: list[Batch]) -> None:
    """Channels that stay far below their bound on the samples are not blown up to it: other data may reach it."""
    model = chain(nn.ReLU())
    bound = torch.tensor([0.1, 0.1, 0.2, 0.2, 5.0, 6.0, 7.0, 8.0])
    model[1] = BoundPerChannel(bound)
    graph = captured(model, images[0])
    better, _ = equalized(graph, images)
    equal = better.constants["1.bound"].flatten()
    torch.testing.assert_close(equal / equal[0], torch.ones(8), rtol=0.05, atol=0)
    model[1] = BoundPerChannel(100 * bound)
    far, _ = equalized(captured(model, images[0]), images)
    assert far.constants["1.bound"].max() > 2 * far.constants["1.bound"].min(), "no channel comes near: ranges count"


def test_relu6_is_left_alone_unless_a_margin_is_given(images: list[Batch]) -> None:
    model = chain(nn.ReLU6())
    with torch.no_grad():
        model[0].weight[:4].mul_(30)  # half the channels are clipped, the others never come near it
        model[0].weight[4:].mul_(0.3)
    graph = captured(model, images[0])
    kept, _ = equalized(graph, images)
    assert torch.equal(kept.constants["0.weight"], graph.constants["0.weight"])
    moved, _ = equalized(graph, images, clip_margin=1.5)
    same = (moved.constants["0.weight"] == graph.constants["0.weight"]).flatten(1).all(1)
    assert same.tolist() == [True] * 4 + [False] * 4
    assert sqnr_db(interpret(graph, images[0].args), interpret(moved, images[0].args)) > 90


def test_what_may_not_change_does_not(images: list[Batch]) -> None:
    graph = captured(chain(nn.ReLU()), images[0])
    _, outcome = equalized(graph, images, {"3": LayerOverride(without=("equalize",))})
    assert dict(outcome.skipped)["0"] == "the recipe says so"
    assert [change.layer for change in outcome.changes] == ["6"]
    _, outcome = equalized(graph, images, fixed=frozenset({"6.weight"}))
    assert [change.layer for change in outcome.changes] == ["0"]


class Odd(nn.Module):
    """What keeps factors from passing: a shared weight, a cat, a sigmoid, a broadcast sum, an output in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.b(torch.relu(self.a(x)))
        y = self.b(x)
        return self.c(torch.cat([torch.sigmoid(x), y], 1)) + x.mean((2, 3), keepdim=True), y


def test_unusual_graphs_stay_what_they_are(images: list[Batch]) -> None:
    torch.manual_seed(0)
    graph = captured(Odd(), images[0])
    better, outcome = equalized(graph, images)
    assert outcome.changes == ()
    assert all(torch.equal(value, graph.constants[name]) for name, value in better.constants.items())


def test_iterations_and_samples_change_the_result(depthwise: nn.Module, images: list[Batch]) -> None:
    graph = captured(depthwise, images[0])
    base, _ = equalized(graph, images)
    for settings in ({"iterations": 1}, {"samples": 2}):
        other, _ = equalized(graph, images, **settings)
        assert any(not torch.equal(base.constants[name], other.constants[name]) for name in base.constants)


def test_a_channel_that_the_samples_never_woke_is_rescaled_by_its_weights(images: list[Batch]) -> None:
    """Otherwise its scale, whatever it is, would decide the tensor's range as soon as other data wake it."""
    model = chain(nn.ReLU())
    with torch.no_grad():
        model[0].bias[2] = -50 * model[0].weight[2].abs().sum()
        model[0].weight[2].mul_(100)
        model[0].bias[2].mul_(100)
        model[3].weight[2].div_(100)
    graph = captured(model, images[0])
    better, _ = equalized(graph, images)
    rows = better.constants["0.weight"].abs().flatten(1).amax(1)
    assert float(rows[2] / rows.median()) < 10 < float(graph.constants["0.weight"][2].abs().max() / rows.median())
