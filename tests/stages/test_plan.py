"""What the plan decides, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantflow.capture import capture_export
from quantflow.errors import NothingQuantizedError, RecipeError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan
from quantflow.numerics.affine import MAX_REDUCTION
from quantflow.schema import PRESETS, ActivationSpec, LayerOverride, QConfig

Stages = Callable[..., Any]


class Net(nn.Module):
    """A forward written as a function over named layers."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **kwargs)


def image(channels: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def precision(plan: Plan) -> dict[str, str]:
    return {row.name: row.precision for row in plan.rows}


def reasons(plan: Plan) -> dict[str, str]:
    return {row.name: row.reason for row in plan.rows}


def override(**activation: Any) -> LayerOverride:
    return LayerOverride.model_validate({"activation": activation})


# -- fusion


def test_an_activation_behind_a_linear_op_is_fused(stages: Stages) -> None:
    plan = stages(Net(lambda m, x: m.b(m.act(m.a(x))), a=conv(), act=nn.Hardswish(), b=conv()), image()).plan
    assert [row.group for row in plan.rows] == [("a", "act"), ("b",)]


def test_an_activation_is_not_fused_when_the_value_before_it_is_read_too(stages: Stages) -> None:
    done = stages(Net(lambda m, x: (lambda y: m.b(F.relu(y)) + m.c(y))(m.a(x)), a=conv(), b=conv(), c=conv()), image())
    assert done.plan.rows[0].group == ("a",)
    assert precision(done.plan)["relu"] == "int8"
    assert [node.op for node in done.program.nodes][:4] == ["quantize", "conv", "clamp", "conv"]


def test_the_later_branch_takes_the_residual_sum(stages: Stages) -> None:
    done = stages(Net(lambda m, x: m.c(F.relu(m.a(x) + m.b(x))), a=conv(), b=conv(), c=conv()), image())
    (fused,) = (node for node in done.program.nodes if node.fused_name == "conv_sum_relu")
    assert fused.name == "b"
    assert next(row for row in done.plan.rows if row.name == "b").reason == "residual added"
    swapped = stages(Net(lambda m, x: m.c(F.relu(m.b(x) + m.a(x))), a=conv(), b=conv(), c=conv()), image())
    (fused,) = (node for node in swapped.program.nodes if node.fused_name == "conv_sum_relu")
    assert fused.name == "a"


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(F.relu(m.a(x)) + F.relu(m.b(x))),
        lambda m, x: (lambda y, z: m.c(y + z) + m.c(y * z))(m.a(x), m.b(x)),
        lambda m, x: m.c(m.a(x).mean((2, 3), keepdim=True) + m.b(x).mean((2, 3), keepdim=True)),
    ],
    ids=["both have activations", "both are read twice", "an op lies between"],
)
def test_no_residual_fusion(stages: Stages, forward: Callable[..., Any]) -> None:
    program = stages(Net(forward, a=conv(), b=conv(), c=conv()), image()).program
    assert not any("sum" in node.fused_name for node in program.nodes)
    assert any(node.op == "add" for node in program.nodes)


def test_a_sum_that_broadcasts_the_convolution_is_not_fused(stages: Stages) -> None:
    model = Net(
        lambda m, x: m.c(m.a(F.adaptive_avg_pool2d(x, 1)) + F.relu(m.b(x))), a=conv(kernel=1), b=conv(), c=conv()
    )
    assert not any("sum" in node.fused_name for node in stages(model, image()).program.nodes)


# -- demand


def test_nothing_is_quantized_that_no_int8_op_reads(stages: Stages) -> None:
    model = Net(lambda m, x: F.softmax(F.max_pool2d(m.b(m.a(x)), 2) + 1, 1), a=conv(), b=conv())
    done = stages(model, image())
    assert [row.qparams for row in done.plan.rows][:2] == ["own", "float32 out"]
    assert precision(done.plan)["max_pool2d"] == "float"
    assert reasons(done.plan)["max_pool2d"] == "no int8 op reads its result, or none of its inputs is int8"
    assert [node.op for node in done.program.nodes] == ["quantize", "conv", "conv", "aten", "aten", "aten"]


def test_an_op_between_two_int8_layers_stays_on_codes(stages: Stages) -> None:
    model = Net(lambda m, x: m.b(F.max_pool2d(F.pad(m.a(x).flip(3), (1, 1)), 2)), a=conv(), b=conv())
    assert [n.op for n in stages(model, image()).program.nodes] == [
        "quantize",
        "conv",
        "shape",
        "shape",
        "max_pool",
        "conv",
    ]


def test_a_float_op_in_between_has_a_name_and_a_reason(stages: Stages) -> None:
    done = stages(Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.GroupNorm(2, 8), b=conv()), image())
    assert precision(done.plan) == {"a": "int8", "n": "float", "b": "int8"}
    assert reasons(done.plan)["n"] == "group_norm has no int8 form"


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, of every LSTM
def test_every_float_op_has_a_row_even_with_several_outputs(stages: Stages) -> None:
    done = stages(Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=nn.LSTM(8, 8), fc=nn.Linear(8, 4)), torch.randn(3, 2, 8))
    assert reasons(done.plan)["rnn"] == "lstm has no int8 form"


def test_a_value_is_quantized_and_dequantized_once(stages: Stages) -> None:
    model = Net(
        lambda m, x: (m.a(x), m.b(x), (lambda y: (m.c(y), y.exp(), y.sin()))(m.a(x))), a=conv(), b=conv(), c=conv()
    )
    ops = [node.op for node in stages(model, image()).program.nodes]
    assert ops.count("quantize") == 1
    assert ops.count("dequantize") == 1


# -- qparams


@pytest.mark.parametrize("qconfig", PRESETS)
def test_cat_and_pool_share_one_scale(stages: Stages, qconfig: str) -> None:
    model = Net(
        lambda m, x: m.c(torch.cat([F.max_pool2d(m.a(x), 3, 1, 1), F.relu(m.b(x)) * 20, m.b(x)], 1)),
        a=conv(), b=conv(), c=conv(24),
    )  # fmt: skip
    done = stages(model, image(), qconfig)
    cat = next(node for node in done.program.nodes if node.op == "cat")
    held = {done.program.values[name].qparams for name in (*cat.refs(), cat.output)}
    assert len(held) == 1
    (qparams,) = held
    largest = max(observer.range()[1] for name, observer in done.table.observers.items() if name != "x")
    assert qparams.scale * 256 >= largest


def test_values_that_only_pass_codes_on_are_not_observed(stages: Stages) -> None:
    done = stages(Net(lambda m, x: m.b(F.max_pool2d(m.a(x), 2).flip(2)), a=conv(), b=conv()), image())
    assert list(done.table.observers) == ["x", "conv2d"]


# -- overrides


@functools.cache
def captured() -> Graph:
    model = Net(lambda m, x: m.block(m.first(x)), first=conv(), block=nn.Sequential(conv(), nn.ReLU(), conv()))
    return capture_export(model.eval(), Batch((image(),)))


def two(stages: Stages, layers: Any, **kwargs: Any) -> Any:
    return stages(captured(), image(), layers=layers, **kwargs)


@pytest.mark.parametrize(
    ("layers", "left_float"),
    [
        ({"first": "float"}, ["first"]),
        ({"block.*": "float"}, ["block.0", "block.2"]),
        ({"*.2": "float"}, ["block.2"]),
        ({"conv2d": "float", "first": "int8"}, ["block.0", "block.2"]),
        ({"core": "float", "block.*": "int8"}, ["first"]),
        ({"block.*": "float", "block.0": "int8"}, ["block.2"]),
        ({"block.0": "int8", "block.*": "float"}, ["block.2"]),
        ({"block.1": "float"}, ["block.0"]),
    ],
    ids=str,
)
def test_overrides_by_name_glob_and_type(stages: Stages, layers: dict[str, str], left_float: list[str]) -> None:
    plan = two(stages, layers).plan
    assert {name for name, chosen in precision(plan).items() if chosen == "float"} == set(left_float)
    for name in left_float:
        assert reasons(plan)[name].startswith("the recipe says so: layers.")


@pytest.mark.parametrize(
    ("layers", "left_float"),
    [({"conv_transpose2d": "float"}, ["up"]), ({"conv2d": "float"}, ["down"]), ({"up": "float"}, ["up"])],
    ids=["its type", "not that of what computes it", "name"],
)
def test_a_transposed_convolution_goes_by_its_own_type(
    stages: Stages, layers: dict[str, str], left_float: list[str]
) -> None:
    model = Net(lambda net, x: net.down(net.up(x)), up=nn.ConvTranspose2d(8, 4, 3, 2), down=conv(4))
    plan = stages(model, image(), layers=layers).plan
    rows = {row.name: row for row in plan.rows}
    assert [name for name, row in rows.items() if row.precision == "float"] == left_float
    assert (rows["up"].op, rows["down"].op) == ("conv_transpose2d", "conv2d")
    assert plan.core_layers == 2
    assert rows["up"].reason in ("transposed: 4 phases", f"the recipe says so: layers.{next(iter(layers))}")


def test_an_override_that_matches_nothing_names_the_nearest(stages: Stages) -> None:
    with pytest.raises(
        RecipeError, match=r"(?s)2 problems.*'blok.0' matches nothing.*block\.0.*'fc\*' matches nothing"
    ):
        two(stages, {"blok.0": "float", "fc*": "float"})


def test_int8_where_there_is_none_is_an_error(stages: Stages) -> None:
    model = Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.GroupNorm(2, 8), b=conv())
    with pytest.raises(
        RecipeError, match=r"layers\.n: can't run in int8: group_norm has no int8 form; remove the override"
    ):
        stages(model, image(), layers={"n": "int8"})


def test_an_override_changes_only_the_fields_it_gives(stages: Stages) -> None:
    done = two(stages, {"first": override(dtype="uint8", qscheme="affine"), "block.0": override(observer="percentile")})
    held = [value.qparams for value in done.program.values.values()]
    # A layer's spec is its output's, and its input's where no int8 layer writes that.
    assert [q.dtype for q in held] == ["uint8", "uint8", "int8"]
    assert list(done.plan.specs.values()) == [
        *[ActivationSpec(dtype="uint8", qscheme="affine")] * 2,
        ActivationSpec(observer="percentile"),
    ]


def test_per_tensor_weights(stages: Stages) -> None:
    layers = {"first": LayerOverride.model_validate({"weight": {"granularity": "per_tensor"}})}
    program = two(stages, layers).program
    assert [program.tensors[n.attrs["weight_scale"]].numel() for n in program.int8_nodes()] == [1, 8, 8]
    qconfig = QConfig.model_validate({"weight": {"granularity": "per_tensor"}})
    program = two(stages, None, qconfig=qconfig).program
    assert [program.tensors[n.attrs["weight_scale"]].numel() for n in program.int8_nodes()] == [1, 1, 1]


def test_matmul_is_int8_when_asked_for(stages: Stages) -> None:
    model = Net(
        lambda m, x: m.out(m.q(x) @ m.k(x).transpose(1, 2)), q=nn.Linear(6, 6), k=nn.Linear(6, 6), out=nn.Linear(5, 3)
    )
    x = torch.randn(2, 5, 6)
    done = stages(model, x)
    assert "unless asked for" in reasons(done.plan)["matmul"]
    assert any(node.op == "matmul" for node in stages(model, x, layers={"matmul": "int8"}).program.nodes)


def test_reduce_range_halves_the_codes(stages: Stages) -> None:
    full, reduced = two(stages, None), two(stages, None, reduce_range=True)
    for name, value in full.program.values.items():
        ratio = reduced.program.values[name].qparams.scale / value.qparams.scale
        assert ratio == pytest.approx(127 / 63, rel=1e-6)


# -- the whole plan


def test_coverage_is_the_share_of_layers_with_weights(stages: Stages) -> None:
    plan = two(stages, {"first": "float"}).plan
    assert (plan.core_layers, plan.int8_layers, plan.int8_coverage) == (3, 2, pytest.approx(2 / 3))


def test_nothing_left_in_int8_is_an_error(stages: Stages) -> None:
    with pytest.raises(NothingQuantizedError, match=r"first: the recipe says so: layers\.\*"):
        two(stages, {"*": "float"})
    with pytest.raises(NothingQuantizedError, match="no convolution and no linear"):
        stages(Net(lambda _, x: x.relu() + 1), image())


def test_a_reduction_that_could_overflow_stays_float(stages: Stages) -> None:
    wide = nn.Linear(MAX_REDUCTION + 1, 2)
    plan = stages(Net(lambda m, x: m.b(m.a(x)), a=wide, b=nn.Linear(2, 2)), torch.randn(2, MAX_REDUCTION + 1)).plan
    assert precision(plan) == {"a": "float", "b": "int8"}
    assert f"at most {MAX_REDUCTION} are safe" in reasons(plan)["a"]


def test_a_plan_is_json(stages: Stages) -> None:
    plan = two(stages, {"first": "float"}).plan
    data = plan.to_json()
    assert [row["name"] for row in data["rows"]] == ["first", "block.0", "block.2"]
    assert data["rows"][1]["group"] == ("block.0", "block.1")
    assert data["reduce_range"] is False
