"""From measured ranges to the integer program."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from quantflow.capture import capture_export
from quantflow.errors import CalibrationError, RecipeError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.program import Program, Ref
from quantflow.numerics.affine import (
    QParams,
    dequantize,
    dequantize_weight,
)
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.schema import PRESETS, LayerOverride, WeightOverride
from quantflow.stages.convert import convert
from quantflow.stages.plan import make_plan
from quantflow.stages.refined import left_over_qparams

Stages = Callable[..., Any]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


@functools.cache
def graph() -> Graph:
    return fold_batch_norms(capture_export(model().eval(), Batch((image(),))))


def image() -> torch.Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def first_quantize(program: Program) -> QParams:
    qparams = next(program.values[node.output].qparams for node in program.nodes if node.op == "quantize")
    assert qparams is not None
    return qparams


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_are_symmetric_codes_within_half_a_step(stages: Stages, preset: str) -> None:
    done = stages(graph(), image(), preset)
    float_weights = {"4": model()[4].weight, "6": model()[6].weight}
    for node in done.program.int8_nodes():
        codes, scale = (done.program.tensors[node.attrs[key]] for key in ("weight", "weight_scale"))
        assert codes.dtype is torch.int8
        assert int(codes.min()) >= -127
        assert (codes.flatten(1).abs().amax(1) == 127).all()
        assert scale.shape == (codes.shape[0],)
        if node.name in float_weights:
            error = (dequantize_weight(codes, scale, 0) - float_weights[node.name]).abs()
            assert (error <= scale.reshape(-1, *[1] * (codes.dim() - 1)) * 0.5001).all()
        assert done.program.tensors[node.attrs["bias"]].dtype is torch.float32


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_inputs_give_the_same_bytes(stages: Stages, preset: str) -> None:
    first, second = stages(graph(), image(), preset).program, stages(model(), image(), preset).program
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert save(dict(first.tensors)) == save(dict(second.tensors))


@pytest.mark.parametrize(("preset", "dtype", "zero_point"), [("sym_int8", "int8", 0), ("sym_uint8", "uint8", 128)])
def test_a_symmetric_scale_is_the_largest_magnitude_over_127(
    stages: Stages, preset: str, dtype: str, zero_point: int
) -> None:
    program = stages(graph(), image(), preset).program
    qparams = first_quantize(program)
    assert (qparams.dtype, qparams.zero_point) == (dtype, zero_point)
    assert qparams.scale == pytest.approx(image().abs().max().item() / 127, rel=1e-6)


@pytest.mark.parametrize("preset", ["affine_uint8", "affine_int8"])
def test_an_affine_range_holds_what_was_seen(stages: Stages, preset: str) -> None:
    program = stages(graph(), image(), preset).program
    qparams = first_quantize(program)
    low, high = ((code - qparams.zero_point) * qparams.scale for code in qparams.range)
    assert low == pytest.approx(image().min().item(), abs=qparams.scale)
    assert high == pytest.approx(image().max().item(), abs=qparams.scale)


def test_only_symmetric_int8_values_after_a_relu_are_nonnegative(stages: Stages) -> None:
    for preset in PRESETS:
        values = stages(graph(), image(), preset).program.values
        assert [v.is_nonnegative for v in values.values()] == [False, *[preset == "sym_int8"] * 2, False, False]


def test_a_negative_slope_or_bound_is_not_nonnegative(stages: Stages) -> None:
    for activation in (nn.GELU(), nn.Hardtanh(-2, -1)):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3))
        assert not any(v.is_nonnegative for v in stages(net, image()).program.values.values())
    for activation in (nn.ReLU6(), nn.Sigmoid()):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3))
        assert [v.is_nonnegative for v in stages(net, image()).program.values.values()] == [False, True]


def test_a_batchnorm_s_numbers_are_in_the_weights(stages: Stages) -> None:
    program = stages(graph(), image()).program
    assert not any("batch_norm" in node.target for node in program.nodes)
    assert program.int8_nodes()[0].epilogue is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_a_weight_that_is_not_finite_names_the_layer(stages: Stages, bad: float, role: str) -> None:
    done = stages(graph(), image())
    constants = dict(done.graph.constants)
    name = next(name for name in constants if name.startswith("4") and name.endswith(role))
    constants[name] = torch.full_like(constants[name], bad)
    broken = replace(done.prepared, graph=replace(done.graph, constants=constants))
    with pytest.raises(CalibrationError, match=rf"layer 4: its {role} holds"):
        convert(broken, done.table)


def test_a_table_of_another_model_is_refused(stages: Stages) -> None:
    done = stages(graph(), image())
    table = replace(done.table, observers={"other": next(iter(done.table.observers.values()))})
    with pytest.raises(CalibrationError, match="the calibration table has no entry"):
        convert(done.prepared, table)


def test_an_all_zero_channel_gets_scale_one(stages: Stages) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        net[0].weight[3] = 0
        net[0].bias[3] = 0
    program = stages(net, image()).program
    node = program.int8_nodes()[0]
    assert program.tensors[node.attrs["weight_scale"]][3] == 1
    assert not program.tensors[node.attrs["weight"]][3].any()


def in_two_terms(layers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {name: LayerOverride(weight=WeightOverride(terms=2)) for name in layers or ("0", "4", "6")}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_weight_in_two_terms_is_nearly_exact(stages: Stages, preset: str, granularity: str) -> None:
    """Two codes leave an error of half a step of the second, 254 times smaller than half a step of the first."""
    qconfig = PRESETS[preset]
    qconfig = qconfig.model_copy(update={"weight": qconfig.weight.model_copy(update={"granularity": granularity})})
    done = stages(graph(), image(), qconfig, in_two_terms())
    nodes = {node.name: node for node in done.program.int8_nodes()}
    assert list(nodes) == ["0.low", "0", "4.low", "4", "6.low", "6"]
    for name, weight in (("4", model()[4].weight), ("6", model()[6].weight)):
        parts = []
        for node in (nodes[name], nodes[f"{name}.low"]):
            codes, scale = (done.program.tensors[node.attrs[key]] for key in ("weight", "weight_scale"))
            parts.append(dequantize_weight(codes, scale, 0 if granularity == "per_channel" else None))
        step = done.program.tensors[nodes[name].attrs["weight_scale"]].max()
        assert (weight - parts[0] - parts[1]).abs().max() <= step / 254 / 2 * 1.01
        assert nodes[f"{name}.low"].attrs["bias"] is None
        assert nodes[name].args[1] == Ref(f"{name}.low")


@pytest.mark.parametrize("preset", PRESETS)
def test_two_terms_bring_the_output_closer_to_float(stages: Stages, preset: str) -> None:
    """One large weight per row leaves few codes to the others."""
    torch.manual_seed(2)
    net = nn.Linear(64, 8).eval()
    x = torch.randn(32, 64)
    with torch.no_grad():
        net.weight[:, 0] = 10.0
        x[:, 0] *= 0.01
        expected = net(x)
    found = [
        sqnr_db(expected, ReferenceRunner(stages(net, x, preset, layers).program)([x]))
        for layers in ({}, {"linear": LayerOverride(weight=WeightOverride(terms=2))})
    ]
    assert found[1] > found[0] + 6


def test_a_residual_is_not_rounded_again(stages: Stages) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head(torch.relu(x + self.b(x)).mean((2, 3)))

    torch.manual_seed(0)
    program = stages(Block(), image(), "affine_uint8", in_two_terms({"b": None})).program
    nodes = {node.name: node for node in program.int8_nodes()}
    assert nodes["b.low"].args[1].name in program.values
    assert nodes["b"].args[1] == Ref("b.low")
    assert "b.low" not in program.values


def test_two_terms_need_two_layers(stages: Stages) -> None:
    for layers, reason, refused in (
        (in_two_terms({"4": None}), "weight in two terms", r"weight\.terms: 2 is not possible in imperative mode"),
        ({"4": INPUT}, "input in two terms", r"input_terms: 2 is not possible in imperative mode"),
    ):
        plan = stages(graph(), image(), layers=layers).plan
        assert [row.reason for row in plan.rows if row.name == "4"] == [reason]
        with pytest.raises(RecipeError, match=refused):
            make_plan(graph(), PRESETS["sym_int8"], layers, mode="imperative")


INPUT = LayerOverride(input_terms=2)
BOTH = LayerOverride(input_terms=2, weight=WeightOverride(terms=2))


class Padded(nn.Module):
    """Data movement between what writes a value and what reads it, a residual, a pool, a value that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, stride=2), nn.Conv2d(8, 8, 1)
        self.back, self.head, self.twin = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(torch.relu(self.stem(x)), (0, 1, 0, 1), value=0.3)
        x = self.b(torch.relu(self.a(x)))
        x = (x + self.back(torch.relu(x))).mean((2, 3))
        return torch.cat([self.head(x), self.twin(x)], 1)


def padded() -> nn.Module:
    torch.manual_seed(0)
    return Padded().eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_inputs_and_weights_in_two_terms_are_nearly_exact(stages: Stages, preset: str) -> None:
    """What is left are the codes of the residual and of the pooled features."""
    names = ("stem", "a", "b", "back", "head", "twin")
    with torch.no_grad():
        expected = padded()(image())

    def found_db(layers: dict[str, LayerOverride]) -> float:
        return sqnr_db(expected, ReferenceRunner(stages(padded(), image(), preset, layers).program)([image()]))

    plain, weights = found_db({}), found_db(in_two_terms(dict.fromkeys(names)))
    inputs, both = found_db(dict.fromkeys(names, INPUT)), found_db(dict.fromkeys(names, BOTH))
    assert both > max(plain, weights, inputs) + 6
    assert both > 48


@pytest.mark.parametrize("preset", PRESETS)
def test_an_input_in_two_terms(stages: Stages, preset: str) -> None:
    done = stages(padded(), image(), preset, {"a": INPUT})
    nodes = {node.output: node for node in done.program.nodes}
    rows = {row.name: row for row in done.plan.rows}
    assert rows["stem"].qparams == "float32 out"
    values: dict[str, torch.Tensor] = {}
    ReferenceRunner(done.program)([image()], lambda node, seen: values.update({node.output: seen[node.output]}))
    first, rest = nodes["pad"], nodes["pad.rest"]
    assert (first.op, rest.op) == ("shape", "shape")  # both terms are padded as codes
    assert nodes["a.rest"].args[0] == Ref("pad.rest")
    main = next(node for node in nodes.values() if node.name == "a")
    assert nodes["a.rest"].attrs == {**main.attrs, "bias": None}  # one weight, stored once
    q = {name: done.program.values[name].qparams for name in ("pad", "pad.rest")}
    assert q["pad.rest"] == left_over_qparams(q["pad"])
    exact = nn.functional.pad(torch.relu(padded().stem(image())), (0, 1, 0, 1), value=0.3)
    one = dequantize(values["pad"], q["pad"])
    two = one + dequantize(values["pad.rest"], q["pad.rest"])
    stem = next(v for v in values if v.startswith("relu"))
    computed = nn.functional.pad(values[stem], (0, 1, 0, 1), value=0.3)
    assert (computed - two).abs().max() <= q["pad.rest"].scale * 0.51
    assert (computed - one).abs().max() > q["pad"].scale / 4
    assert (computed - exact).abs().max() < 0.2


def test_terms_where_nothing_is_linear_are_noted(stages: Stages) -> None:
    notes = stages(padded(), image(), "affine_uint8", {"add": BOTH, "a": BOTH, "b": INPUT}).plan.notes
    nothing = "nothing: it matches no convolution or linear that runs in int8"
    assert [note for note in notes if "nothing" in note] == [
        f"layers.add: its weight settings change {nothing}",
        f"layers.add: its input_terms changes {nothing}",
    ]


def test_values_read_in_two_terms_are_not_rounded(stages: Stages) -> None:
    """Linear layers write float32, with an addition that they hold; pools and other additions run in float."""
    program = stages(padded(), image(), "affine_uint8", {"head": INPUT}).program
    nodes = {node.name: node for node in program.nodes}
    assert nodes["mean"].op == "aten"
    assert sum(node.op == "quantize" and node.name.startswith("mean") for node in program.nodes) == 2
    assert nodes["twin"].args[0] == nodes["head"].args[0]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.c(x + self.b(x.relu()))

    for layers, is_code in (({}, True), ({"c": INPUT}, False)):
        program = stages(Residual().eval(), image(), "affine_uint8", layers).program
        (fused,) = (node for node in program.nodes if node.name == "b")
        assert fused.fused_name == "conv_sum"
        assert (fused.output in program.values) == is_code

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y + torch.roll(y, 1, 1))

    x = torch.randn(4, 8)
    for layers, op in (({}, "add"), ({"b": INPUT}, "aten")):
        program = stages(Twice().eval(), x, "affine_uint8", layers).program
        assert [node.op for node in program.nodes if node.name == "add"] == [op]
