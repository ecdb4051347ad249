"""The program as data: what survives JSON, and what the loader refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantflow.errors import ArtifactError
from quantflow.ir.activations import Epilogue
from quantflow.ir.aten_policy import aten_op
from quantflow.ir.calls import Input
from quantflow.ir.ops import OPS
from quantflow.ir.program import Node, Program, Ref, TensorRef, Value
from quantflow.numerics.affine import MAX_REDUCTION, QParams

SIGNED = Value(QParams("int8", 0.5, 0))


@pytest.fixture
def program() -> Program:
    """One node of many kinds, with every sort of argument that JSON has no word for."""
    attrs = {"weight": "w", "weight_scale": "s", "bias": "b", "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    nodes = (
        Node("x.quantize", "quantize", "x.codes", (Ref("x"),)),
        Node("conv", "conv", "y", (Ref("x.codes"), None), epilogue=Epilogue("relu"), attrs={**attrs, "groups": 1}),
        Node("pool", "max_pool", "p", (Ref("y"), [2, 2]), {"ceil_mode": True}, target="max_pool2d.default"),
        Node("clamp", "clamp", "c", (Ref("p"),), attrs={"low": 0, "high": 90}),
        Node("cat", "cat", "k", ([Ref("c"), Ref("p")], 1), target="cat.default"),
        Node("k.size", "size", "n", (Ref("k"), 0), target="sym_size.int"),
        Node("n.double", "size", "m", (Ref("n"), 2), target="mul"),
        Node("view", "shape", "v", (Ref("k"), [Ref("n"), -1]), target="reshape.default"),
        Node("v.dequantize", "dequantize", "f", (Ref("v"),)),
        Node("clip", "aten", "g", (Ref("f"), -math.inf, math.inf), target="clamp.default"),
        Node("cast", "aten", "h", (Ref("g"),), {"dtype": torch.float64, "pin_memory": None}, target="_to_copy.default"),
        Node("add", "aten", "o", (Ref("g"), TensorRef("t")), {"alpha": 1}, target="add.Tensor"),
    )  # fmt: skip
    values = dict.fromkeys(("x.codes", "y", "p", "c", "k", "v"), SIGNED) | {"y": Value(SIGNED.qparams, True)}
    tensors = {
        "w": torch.randint(-127, 128, (4, 3, 3, 3)).to(torch.int8),
        "s": torch.full((4,), 0.01),
        "b": torch.zeros(4),
        "t": torch.ones(1),
    }
    inputs = (Input("x", "image", "float32", (None, 3, 8, 8)),)
    return Program(inputs, nodes, values, tensors, {"a": Ref("o"), "b": [Ref("h"), (Ref("m"), None, TensorRef("t"))]})


def test_a_program_survives_json(program: Program) -> None:
    text = json.dumps(program.to_json(), allow_nan=False)
    assert Program.from_json(json.loads(text), program.tensors) == program
    assert json.dumps(Program.from_json(json.loads(text), program.tensors).to_json()) == text


def test_json_names_no_code(program: Program) -> None:
    """Ops are words from a table: no module path, nothing pickled."""
    text = json.dumps(program.to_json())
    assert not any(word in text for word in ("quantflow", "torch", "builtins", "import", "pickle"))
    assert {node["op"] for node in program.to_json()["nodes"]} <= set(OPS)


def edited(program: Program, change: Callable[[Any], object]) -> Any:
    data = copy.deepcopy(program.to_json())
    change(data)
    return data


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """`nodes.1.attrs.groups` → a function that puts `value` there; Ellipsis removes the key."""

    def change(data: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in parents:
            data = data[part]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 3, "newer than this quantflow"),
        ("format", "1", "format .1. is not known"),
        ("nodes", ..., "'nodes'"),
        ("nodes", 3, "TypeError"),
        ("inputs/0/dtype", "object", "dtype 'object' is not known"),
        ("inputs/0/shape", [-1], "not made of sizes"),
        ("inputs/0/keyword", 5, "keyword 5"),
        ("inputs", [{"name": "x", "keyword": None, "dtype": "float32", "shape": []}] * 2, "two inputs have one name"),
        ("values/y/dtype", "int4", "'int4' is not int8 or uint8"),
        ("values/y/scale", 0.0, "scale must be positive"),
        ("values/y/scale", math.nan, "scale must be positive"),
        ("values/y/scale", 10**400, "OverflowError"),
        ("values/y/zero_point", 1.5, "not an integer"),
        ("values/y/zero_point", 128, "outside int8"),
        ("values/p/scale", 0.25, "must share one scale"),
        ("values/v", ..., "no scale and zero_point"),
        ("values/x.codes", ..., "no scale and zero_point"),
        ("values/f", {"dtype": "int8", "scale": 1, "zero_point": 0, "is_nonnegative": False}, "can't hold int8 codes"),
        ("nodes/0/op", "eval", "'eval' is not one of"),
        ("nodes/0/args", [], "takes 1 arguments, has 0"),
        ("nodes/0/args", [{"value": "nothing"}], "no earlier node defines"),
        ("nodes/0/args", [{"value": "y"}], "no earlier node defines"),
        ("nodes/0/args", [{"code": "y"}], "'code' is not a kind of argument"),
        ("nodes/0/args", [{"value": "x", "tensor": "t"}], "ValueError"),
        ("nodes/1/args", [{"value": "x"}, None], "holds no int8 codes"),
        ("nodes/1/args", [{"value": "x.codes"}, 3], "residual 3 is no value"),
        ("nodes/1/args", [{"value": "x.codes"}], "takes 2 arguments"),
        ("nodes/1/output", "x", "a second time"),
        ("nodes/1/epilogue", {"kind": "exec", "values": []}, "epilogue 'exec'"),
        ("nodes/1/epilogue", {"kind": "hardtanh", "values": [1.0]}, "with 1 numbers"),
        ("nodes/1/attrs/weight", "nothing", "not in weights.safetensors"),
        ("nodes/1/attrs/weight", "t", "takes int8 codes"),
        ("nodes/1/attrs/weight_scale", "t4", "weight_scale"),
        ("nodes/1/attrs/weight_scale", "negative", "not positive and finite"),
        ("nodes/1/attrs/weight_scale", "w", "weight_scale must be"),
        ("nodes/1/attrs/bias", "t4", "bias must hold 4"),
        ("nodes/1/attrs/bias", "half", "float32"),
        ("nodes/1/attrs/bias", ..., "'bias'"),
        ("nodes/1/attrs/stride", [0, 1], r"stride \[0, 1\]"),
        ("nodes/1/attrs/padding", [-1, 0], "padding"),
        ("nodes/1/attrs/dilation", [1], "dilation"),
        ("nodes/1/attrs/groups", 3, "groups 3"),
        ("nodes/1/attrs/groups", "2", "groups 2"),
        ("nodes/1/attrs/stride", ..., "'stride'"),
        ("nodes/1/attrs/weight", "lowest", "below -127"),
        ("nodes/1/attrs/weight", "long", "int32 could overflow"),
        ("nodes/2/target", "relu.default", "max_pool can't be"),
        ("nodes/2/target", "max_pool2d.nothing", "has no op"),
        ("nodes/2/args", [{"value": "x"}, [2, 2]], "holds no int8 codes"),
        ("nodes/3/attrs", {"low": 0}, "'high'"),
        ("nodes/3/attrs/high", 128, "are not codes"),
        ("nodes/3/attrs/low", 0.5, "are not codes"),
        ("nodes/4/args", [[{"value": "x"}, {"value": "p"}], 1], "holds no int8 codes"),
        ("nodes/6/target", "exec", "no op aten|not an ATen op"),
        ("nodes/9/target", "mul", "not an ATen op"),
        ("nodes/9/args", [{"value": "k"}], "holds int8 codes"),
        ("nodes/11/args", [{"tensor": "nothing"}], "reads tensor 'nothing'"),
        ("nodes/10/kwargs", {"dtype": {"dtype": "qint8"}}, "KeyError"),
        ("nodes/10/kwargs", {"device": {"device": "cuda"}}, "KeyError"),
        ("output", {"value": "nothing"}, "the output 'nothing' is not defined"),
        ("output", {"tensor": "nothing"}, "the output tensor 'nothing'"),
        ("batch_is_dynamic", ..., "batch_is_dynamic"),
    ],
)  # fmt: skip
def test_the_loader_refuses(program: Program, path: str, value: Any, message: str) -> None:
    tensors = dict(program.tensors) | {
        "t4": torch.ones(3),
        "negative": -torch.ones(4),
        "half": torch.ones(4).half(),
        "lowest": torch.full((4, 3, 3, 3), -128, dtype=torch.int8),
        "long": torch.zeros(4, MAX_REDUCTION + 1, 1, 1, dtype=torch.int8),
    }
    with pytest.raises(ArtifactError, match=message):
        Program.from_json(edited(program, _set(path, value)), tensors)


@pytest.mark.parametrize("data", [None, [], 3, "program", {}, {"format": 1}], ids=str)
def test_the_loader_refuses_what_is_no_program(data: Any) -> None:
    with pytest.raises(ArtifactError, match=r"program\.json"):
        Program.from_json(data, {})


def test_only_a_symmetric_value_can_be_nonnegative(program: Program) -> None:
    value = {"dtype": "uint8", "scale": 1.0, "zero_point": 128, "is_nonnegative": True}
    with pytest.raises(ArtifactError, match="is_nonnegative"):
        Program.from_json(edited(program, _set("values/y", value)), program.tensors)


@pytest.mark.parametrize(
    "target",
    [
        "from_file.default", "save.default", "set_.source_Tensor", "add_.Tensor", "relu_.default", "copy_.default",
        "add.out", "resize_.default", "record_stream.default", "warn.default", "manual_seed.default",
        "backward.default", "set_grad_enabled.default", "_print.default", "cuda.default", "to_here.default",
        "wait.default", "nothing.default", "__class__.default", "add.__class__", "add", "", "..", "os.system",
        "add.Tensor.more", "append.t", "Generator.default",
    ],
)  # fmt: skip
def test_forbidden_ops(target: str) -> None:
    with pytest.raises(ArtifactError, match=r"program\.json"):
        aten_op(target)


@pytest.mark.parametrize(
    "target", ["add.Tensor", "softmax.int", "sym_size.int", "split.Tensor", "zeros.default", "topk.default"]
)
def test_ops_that_programs_use(target: str) -> None:
    assert callable(aten_op(target))


def test_complex_numbers_are_refused_when_saving(program: Program) -> None:
    node = Node("mul", "aten", "z", (Ref("g"), 1j), target="mul.Tensor")
    with pytest.raises(ValueError, match="complex"):
        Program(program.inputs, (*program.nodes, node), program.values, program.tensors, Ref("z")).to_json()


def test_last_uses_keep_the_output(program: Program) -> None:
    freed = [name for names in program.last_uses().values() for name in names]
    assert len(freed) == len(set(freed))
    assert not {"o", "h", "m"} & set(freed)
    assert {"x", "x.codes", "y", "p"} <= set(freed)


def test_fused_names_say_what_one_kernel_computes() -> None:
    assert Node("n", "conv", "y", (Ref("x"), Ref("r")), epilogue=Epilogue("relu")).fused_name == "conv_sum_relu"
    assert Node("n", "linear", "y", (Ref("x"), None), epilogue=Epilogue("gelu")).fused_name == "linear_gelu"
    assert Node("n", "add", "y", (Ref("x"), Ref("r"))).fused_name == "add"
