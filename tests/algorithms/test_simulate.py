"""The simulated stream is the integer program up to float32's rounding, whatever an algorithm puts into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.algorithms.simulate import Layer, on_grid, simulate, walk
from quantflow.ir.batch import Batch
from quantflow.ir.graph import interpret
from quantflow.numerics.affine import dequantize, quantize
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.schema import LayerOverride
from quantflow.stages.convert import convert
from quantflow.stages.refined import LayerNumbers

Prepare = Callable[..., Any]


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_uint8"])
def test_every_layer_sees_what_the_integer_program_computes(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], qconfig: str
) -> None:
    start = ready(depthwise, images, qconfig)
    program = convert(start.prepared, start.table, start.refined)
    inputs: dict[str, torch.Tensor] = {}

    def on_value(node: Any, values: Any) -> None:
        if node.op in ("conv", "linear"):
            name = node.args[0].name
            inputs[node.name] = dequantize(values[name], program.values[name].qparams)

    ReferenceRunner(program)(images[0].args, on_value)
    floats: dict[str, torch.Tensor] = {}
    interpret(start.graph, images[0].args, lambda node, x: floats.update({node.name: x}))
    seen: list[str] = []

    def on_layer(layer: Layer) -> None:
        seen.append(layer.name)
        name = layer.planned.unit.inputs[0].name
        scale = program.values[name if name in program.values else f"{name}.codes"].qparams.scale
        off = (layer.inputs[0] - inputs[layer.name]).abs() / scale
        assert off.max() <= 1.001, "one code at most"
        assert (off > 0.01).float().mean() < 0.01, "and that near ties only"
        assert torch.equal(layer.float_outputs[0], floats[layer.planned.unit.anchor.name])

    assert walk(start.prepared, start.refined, images[:1], on_layer) == start.refined
    assert seen == ["stem", "depthwise", "project", "expand", "back", "head"]


class PostNorm(nn.Module):
    """A value that a linear reads as codes and an addition as it is, an int8 layer in two terms, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(x)
        return {"sum": y + self.a(y).tanh(), "b": self.b(y).relu(), "norm": y}


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_uint8"])
def test_a_simulated_batch_is_what_the_integer_program_returns(ready: Prepare, qconfig: str) -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(16, 8),))
    start = ready(PostNorm().eval(), [batch], qconfig, {"b": LayerOverride.model_validate({"weight": {"terms": 2}})})
    expected = ReferenceRunner(convert(start.prepared, start.table, start.refined))(batch.args)
    found = simulate(start.prepared, start.refined, batch)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["sum"], expected["sum"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["b"], expected["b"], rtol=0, atol=2e-2)
    torch.testing.assert_close(found["norm"], PostNorm().eval().norm(*batch.args))
    with torch.inference_mode():
        assert not torch.equal(found["sum"], interpret(start.graph, batch.args)["sum"])


class Split(nn.Module):
    """Padding and parts between a layer and those that read it in two terms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(6, 8), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = nn.functional.pad(self.stem(x).relu(), (1, 1)).chunk(2, 1)
        return torch.cat([self.left(left), self.right(right)], 1)


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_uint8"])
def test_inputs_in_two_terms(ready: Prepare, qconfig: str) -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(16, 6),))
    layers = {name: LayerOverride(input_terms=2) for name in ("left", "right")}
    start = ready(Split().eval(), [batch], qconfig, layers)
    expected = ReferenceRunner(convert(start.prepared, start.table, start.refined))(batch.args)
    torch.testing.assert_close(simulate(start.prepared, start.refined, batch), expected, rtol=0, atol=1e-3)
    plain = ready(Split().eval(), [batch], qconfig)
    assert (simulate(plain.prepared, plain.refined, batch) - expected).abs().max() > 3e-3
    seen: dict[str, torch.Tensor] = {}
    walk(start.prepared, start.refined, [batch], lambda layer: seen.update({layer.name: layer.inputs[0]}))
    scale = start.refined.qparams[start.prepared.plan.codes["relu"]].scale
    steps = seen["left"] / (scale / 254)
    assert (steps - steps.round()).abs().max() < 0.1


def test_walking_gives_an_addition_the_value_itself(ready: Prepare) -> None:
    torch.manual_seed(0)

    class Behind(PostNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            y = self.norm(x)
            return self.b(y + self.a(y).tanh())  # type: ignore[no-any-return]

    batch = Batch((torch.randn(16, 8),))
    start = ready(Behind().eval(), [batch])
    seen: dict[str, torch.Tensor] = {}
    walk(start.prepared, start.refined, [batch], lambda layer: seen.update({layer.name: layer.inputs[0]}))
    runner, program = ReferenceRunner, convert(start.prepared, start.table, start.refined)
    inputs: dict[str, torch.Tensor] = {}

    def on_value(node: Any, values: Any) -> None:
        if node.op == "linear":
            name = node.args[0].name
            inputs[node.name] = dequantize(values[name], program.values[name].qparams)

    runner(program)(batch.args, on_value)
    torch.testing.assert_close(seen["b"], inputs["b"])


def test_numbers_that_change_reach_the_layers_behind(ready: Prepare, depthwise: nn.Module, images: list[Batch]) -> None:
    start = ready(depthwise, images)
    behind: list[torch.Tensor] = []

    def on_layer(layer: Layer) -> LayerNumbers | None:
        if layer.name == "head":
            behind.append(layer.inputs[0])
        numbers = start.refined.layers[layer.name]
        return replace(numbers, bias=torch.zeros_like(numbers.bias)) if layer.name == "project" and behind else None

    walk(start.prepared, start.refined, images, on_layer)
    refined = walk(start.prepared, start.refined, images, on_layer)
    assert not torch.equal(behind[0], behind[1])
    assert not refined.layers["project"].bias.any()


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_uint8"])
def test_on_grid_is_quantize_and_dequantize(
    ready: Prepare, depthwise: nn.Module, images: list[Batch], qconfig: str
) -> None:
    x = torch.linspace(-9, 9, 999)
    for qparams in ready(depthwise, images, qconfig).refined.qparams.values():
        torch.testing.assert_close(on_grid(x, qparams), dequantize(quantize(x, qparams), qparams))
