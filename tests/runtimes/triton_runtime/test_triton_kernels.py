"""Every Triton kernel against the reference, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/runtimes/triton_runtime

The variable must be set before anything imports Triton, so these tests have a process of their own, in `.ci/run` too.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.errors import UnavailableError
from quantflow.ir.activations import ACTIVATIONS, Epilogue, tie_tolerance
from quantflow.ir.calls import Input
from quantflow.ir.program import Node, Program, Ref, Value
from quantflow.numerics.affine import QParams, quantize
from quantflow.numerics.agreement import disagreement
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.reference import ReferenceRunner, run_node, unrounded
from quantflow.runtimes.triton import devices
from quantflow.runtimes.triton import script as triton_script
from quantflow.schema import PRESETS
from quantflow.tasks.selftest import quantized_program, selftest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: .ci/run installs it"),
    pytest.mark.skipif(
        not devices.is_interpreting(), reason="needs TRITON_INTERPRET=1 from the start: .ci/run sets it"
    ),
    # numpy, in which kernels are interpreted, warns where float32 overflows; a card does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CODINGS = (
    Value(QParams("int8", 0.03, 0)), Value(QParams("int8", 0.03, 0), is_nonnegative=True),
    Value(QParams("int8", 0.03, -17)), Value(QParams("int8", 0.03, -128)), Value(QParams("int8", 0.03, 127)),
    Value(QParams("uint8", 0.03, 128)), Value(QParams("uint8", 0.03, 0)), Value(QParams("uint8", 0.03, 255)),
)  # fmt: skip
EPILOGUES = (None, None, Epilogue("hardtanh", (-1.5, 2.5)), *(Epilogue(k, a.example) for k, a in ACTIVATIONS.items()))
FILLS = ("random", "random", "lowest", "highest")


def codes(value: Value, shape: Sequence[int], fill: str = "random") -> torch.Tensor:
    assert value.qparams is not None
    low, high = (0, 127) if value.is_nonnegative else value.qparams.range
    if fill != "random":
        return torch.full(tuple(shape), low if fill == "lowest" else high).to(value.qparams.torch_dtype)
    return torch.randint(low, high + 1, tuple(shape)).to(value.qparams.torch_dtype)


def program_of(
    node: Node, values: Mapping[str, Value], tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> Program:
    described = tuple(Input(n, None, str(x.dtype).removeprefix("torch."), tuple(x.shape)) for n, x in inputs.items())
    return Program(described, (node,), values, tensors, Ref(node.output))


def check(program: Program, inputs: Mapping[str, torch.Tensor], magnitude: float = 0.0) -> torch.Tensor:
    """The last node against the reference: codes by the rule, float results within rounding of their magnitude."""
    node = program.nodes[-1]
    expected = run_node(program, node, inputs)
    actual = devices.build(program, "cpu").run_node(len(program.nodes) - 1, inputs)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.is_floating_point():
        bound = 1e-6 * magnitude + 4e-6 * (1 + expected.abs())
        assert ((expected - actual).abs() <= bound).all(), (expected - actual).abs().max()
    else:
        illegal, worst = disagreement(expected, actual, unrounded(program, node, inputs), tie_tolerance(node.epilogue))
        assert not illegal, f"{illegal} of {expected.numel()} codes differ, up to {worst} codes from a tie"
    return actual


def test_the_self_test_passes() -> None:
    rows = selftest(lambda program: devices.build(program, "cpu"))
    assert [f"{row.kernel}: {failure}" for row in rows for failure in row.failures] == []


def layer_case(seed: int) -> tuple[Program, dict[str, torch.Tensor], float]:
    """A convolution or linear as hard as the seed makes it."""
    torch.manual_seed(seed)
    pick = random.Random(seed).choice
    x, out = pick(CODINGS), pick((None, *CODINGS))
    epilogue = pick(EPILOGUES)
    if out is not None and out.is_nonnegative and not (epilogue and epilogue.is_nonnegative):
        out = replace(out, is_nonnegative=False)
    dims, batch = pick((0, 1, 2, 2, 3)), pick((1, 1, 2, 3))
    groups = pick((1, 1, 2, 5)) if dims else 1
    per, each = pick((1, 3, 4, 17, 32)), pick((1, 2, 7, 16))
    channels, results = groups * per, groups * each
    kernel = [pick((1, 2, 3)) for _ in range(dims)]
    attrs: dict[str, Any] = {"weight": "w", "weight_scale": "s", "bias": pick(("b", None))}
    if dims:
        attrs |= {
            "stride": [pick((1, 2, 3)) for _ in kernel], "padding": [pick((0, 1, 3)) for _ in kernel],
            "dilation": [pick((1, 1, 2)) for _ in kernel], "groups": groups,
        }  # fmt: skip
        spatial = [max(pick((1, 2, 5, 9)), (k - 1) * d + 1 - 2 * p)
                   for k, d, p in zip(kernel, attrs["dilation"], attrs["padding"], strict=True)]  # fmt: skip
        shape = [batch, channels, *spatial]
    else:
        shape = [*pick(([], [3], [2, 5])), pick((1, 1, 19)), channels]
    fill = pick(FILLS)
    weight = torch.randint(-127, 128, (results, per, *kernel)) if fill == "random" else torch.full(
        (results, per, *kernel), -127 if fill == "lowest" else 127
    )  # fmt: skip
    tensors = {"w": weight.to(torch.int8), "s": torch.rand(pick((1, results))) * 1e-3 + 1e-4, "b": torch.randn(results)}
    inputs = {"x": codes(x, shape, fill)}
    values = {"x": x}
    node = Node("layer", "conv" if dims else "linear", "y", (Ref("x"), None), attrs=attrs, epilogue=epilogue)
    result = run_node(program_of(node, values, tensors, inputs), node, inputs)
    added = pick((None, "codes", "float", "broadcast"))
    if added is not None:
        r = pick(CODINGS)
        wide = result.shape if added != "broadcast" else (1, *result.shape[1:])
        inputs["r"] = torch.randn(result.shape) if added == "float" else codes(r, wide)
        values |= {} if added == "float" else {"r": r}
        node = replace(node, args=(Ref("x"), Ref("r")))
    magnitude = float(result.abs().max()) if result.numel() else 0.0
    if out is not None:
        factor = pick((0.3, 1.0, 3.0))
        scale = float(torch.tensor(max(magnitude, 1.0) / (127 * factor)))
        assert out.qparams is not None
        values["y"] = replace(out, qparams=replace(out.qparams, scale=scale))
    return program_of(node, values, tensors, inputs), inputs, max(magnitude, 8.0)


@pytest.mark.parametrize("seed", range(90))
def test_a_layer_of_any_geometry_coding_and_epilogue(seed: int) -> None:
    check(*layer_case(seed))


@pytest.mark.parametrize("way", [(16, 16, 32, 4, 3, 4, 2), (16, 32, 64, 1, 5, 4, 2), (32, 16, 32, 8, 16, 4, 2)])
def test_a_tile_that_several_programs_share(way: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from quantflow.runtimes.triton import layers

    monkeypatch.setattr(layers, "SAFE", way)
    for seed in range(12):
        check(*layer_case(seed))


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantflow.runtimes.triton import layers, operators

    monkeypatch.setattr(layers, "WIDE", 0)
    monkeypatch.setattr(operators, "WIDE", 0)
    for seed in range(12):
        check(*layer_case(seed))


def test_a_sum_that_int32_could_not_hold_is_refused() -> None:
    from quantflow.runtimes.triton.cards import card_of
    from quantflow.runtimes.triton.layers import Finish, Layer

    weight = torch.ones(1, 70_000, dtype=torch.int8)
    finish = Finish(QParams("int8", 1.0, 0), None)
    with pytest.raises(ValueError, match="70000 products in a sum exceed 66311"):
        Layer(weight, torch.ones(1), None, None, finish, card_of("cpu"))


STEMS = [
    ((2, 3, 33, 35), (16, 3, 7, 7), [2, 2], [3, 3]), ((1, 3, 17, 16), (8, 3, 3, 3), [2, 2], [1, 1]),
    ((1, 1, 28, 28), (6, 1, 5, 5), [1, 1], [0, 0]), ((2, 4, 9, 12), (20, 4, 2, 8), [3, 1], [1, 4]),
    ((1, 3, 64, 64), (24, 3, 8, 8), [8, 8], [0, 0]), ((1, 2, 5, 5), (3, 2, 3, 1), [1, 2], [0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "weight", "stride", "padding"), STEMS)
@pytest.mark.parametrize("x", [CODINGS[0], CODINGS[2], CODINGS[7]])
def test_a_stem_on_framed_codes(
    shape: tuple[int, ...], weight: tuple[int, ...], stride: list[int], padding: list[int], x: Value
) -> None:
    """In a whole run the codes of an image are framed as they are made; alone they are not."""
    torch.manual_seed(0)
    attrs = {"weight": "w", "weight_scale": "s", "bias": "b", "stride": stride, "padding": padding,
             "dilation": [1, 1], "groups": 1}  # fmt: skip
    nodes = (
        Node("q", "quantize", "x", (Ref("image"),)),
        Node("stem", "conv", "y", (Ref("x"), None), attrs=attrs, epilogue=Epilogue("relu")),
    )
    tensors = {"w": torch.randint(-127, 128, weight).to(torch.int8), "s": torch.full((1,), 1e-3),
               "b": torch.randn(weight[0])}  # fmt: skip
    out = Value(QParams("int8", 0.02, 0), is_nonnegative=True)
    program = Program((Input("image", None, "float32", shape),), nodes, {"x": x, "y": out}, tensors, Ref("y"))
    image = torch.randn(shape) * 2
    runner = devices.build(program, "cpu")
    expected = ReferenceRunner(program)([image])
    illegal, _ = disagreement(expected, runner([image]), _unrounded(program, image), 1e-3)
    assert not illegal
    strided = image.to(memory_format=torch.channels_last)
    assert torch.equal(runner([strided]), runner([image]))


def _unrounded(program: Program, image: torch.Tensor) -> torch.Tensor | None:
    return unrounded(program, program.nodes[1], {"x": run_node(program, program.nodes[0], {"image": image})})


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((2, 3, 33, 35), (8, 8)), ((1, 1, 12), (4,)), ((2, 2, 5, 7, 4), (2, 3, 2)), ((3, 15, 6, 4), (3, 2))],
)
def test_patches_that_lie_side_by_side(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attrs = {"weight": "w", "weight_scale": "s", "bias": "b", "stride": list(kernel), "padding": [0] * len(kernel),
             "dilation": [1] * len(kernel), "groups": 1}  # fmt: skip
    tensors = {"w": torch.randint(-127, 128, (20, shape[1], *kernel)).to(torch.int8), "s": torch.rand(20) * 1e-3,
               "b": torch.randn(20)}  # fmt: skip
    for x, added in itertools.product(CODINGS, (False, True)):
        inputs = {"x": codes(x, shape)}
        node = Node("patches", "conv", "y", (Ref("x"), Ref("r") if added else None), attrs=attrs)
        if added:
            inputs["r"] = torch.randn(shape[0], 20, *(n // k for n, k in zip(shape[2:], kernel, strict=True)))
        check(program_of(node, {"x": x}, tensors, inputs), inputs, 16.0)


@pytest.mark.parametrize("op", ["add", "mul"])
def test_pairs_of_any_shapes_and_layouts(op: str) -> None:
    torch.manual_seed(0)
    shapes = [
        ((2, 5, 4, 3), (2, 5, 4, 3)), ((2, 5, 4, 3), (1, 5, 1, 1)), ((2, 5, 1, 3), (2, 1, 4, 3)), ((7,), (1,)),
        ((3, 1, 2, 1, 4), (1, 5, 1, 3, 1)), ((), (4,)), ((0, 3), (1, 3)),
    ]  # fmt: skip
    for (left, right), epilogue in itertools.product(shapes, EPILOGUES[1:]):
        a, b = random.Random(math.prod(left)).choices(CODINGS, k=2)
        inputs = {"a": codes(a, left), "b": codes(b, right)}
        if len(left) == 4 and epilogue is not None:
            inputs["a"] = inputs["a"].contiguous(memory_format=torch.channels_last)
        node = Node(op, op, "y", (Ref("a"), Ref("b")), epilogue=epilogue)
        for out in (None, Value(QParams("uint8", 0.05, 77))):
            values = {"a": a, "b": b} | ({} if out is None else {"y": out})
            check(program_of(node, values, {}, inputs), inputs, 16.0)


POOLS: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = [
    ("max_pool1d.default", (2, 3, 11), ([3], [2], [1])),
    ("max_pool2d.default", (2, 65, 9, 7), ([3, 2], [2, 1], [1, 0], [2, 1], True)),
    ("max_pool2d.default", (1, 3, 12, 12), ([5, 5], [1, 1], [2, 2])),
    ("max_pool3d.default", (1, 2, 4, 5, 6), ([2, 2, 2], [2, 1, 2])),
    ("avg_pool1d.default", (2, 3, 11), ([3], [2], [1], True)),
    ("avg_pool2d.default", (2, 5, 9, 7), ([3, 2], [2, 2], [1, 1], True, False)),
    ("avg_pool2d.default", (2, 5, 9, 7), ([3, 3], [2, 2], [1, 1], True, True)),
    ("avg_pool2d.default", (1, 4, 6, 6), ([2, 2], [2, 2], [0, 0], False, True, 7)),
    ("avg_pool3d.default", (1, 2, 4, 5, 6), ([2, 3, 2], [1, 1, 2], [1, 1, 1], False, False)),
    ("adaptive_avg_pool1d.default", (2, 3, 10), ([4],)),
    ("adaptive_avg_pool2d.default", (2, 70, 7, 5), ([1, 1],)),
    ("adaptive_avg_pool2d.default", (2, 3, 7, 5), ([3, 4],)),
    ("mean.dim", (2, 3, 7, 5), ([2, 3],)), ("mean.dim", (2, 3, 7, 5), ([-1],)), ("mean.dim", (2, 9, 33), ([1], True)),
    ("mean.dim", (2, 3, 4, 5), ([0, 2],)), ("mean.dim", (2, 3, 4, 5), ([1, 3], True)),
]  # fmt: skip


@pytest.mark.parametrize(("target", "shape", "args"), POOLS)
def test_pools(target: str, shape: tuple[int, ...], args: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    op = "max_pool" if target.startswith("max") else "avg_pool"
    for x, fill in itertools.product(CODINGS, ("random", "lowest", "highest")):
        inputs = {"x": codes(x, shape, fill)}
        outs = [x] if op == "max_pool" else [None, Value(QParams("int8", 0.021, 5))]
        for out in outs:
            values = {"x": x} | ({} if out is None else {"y": out})
            check(program_of(Node("pool", op, "y", (Ref("x"), *args), target=target), values, {}, inputs), inputs)


def test_products_of_two_activations() -> None:
    torch.manual_seed(0)
    shapes = [((2, 3, 9, 17), (2, 3, 17, 5)), ((70, 40), (40, 65)), ((3, 4, 8), (8, 2)), ((5, 1, 2, 8), (3, 8, 1)),
              ((8,), (8, 3)), ((4, 8), (8,))]  # fmt: skip
    for (left, right), (a, b) in itertools.product(shapes, itertools.combinations(CODINGS, 2)):
        inputs = {"a": codes(a, left), "b": codes(b, right)}
        node = Node("m", "matmul", "y", (Ref("a"), Ref("b")))
        for out in (None, Value(QParams("int8", 0.2, 3))):
            values = {"a": a, "b": b} | ({} if out is None else {"y": out})
            check(program_of(node, values, {}, inputs), inputs, 500.0)


def test_numbers_that_are_none_and_those_next_to_a_tie() -> None:
    odd = [0.0, -0.0, 1e38, -1e38, math.inf, -math.inf, math.nan, *(0.03 * (i + 0.5) for i in range(-130, 130))]
    for shape, value in itertools.product(((len(odd),), (1, 3, 1, 89), (2, 1, 67, 2)), CODINGS):
        x = torch.tensor((odd * 2)[: math.prod(shape)]).reshape(shape)
        node = Node("q", "quantize", "y", (Ref("x"),))
        back = Node("d", "dequantize", "y", (Ref("x"),))
        q = check(program_of(node, {"y": value}, {}, {"x": x}), {"x": x})
        check(program_of(back, {"x": value}, {}, {"x": q}), {"x": q})


def test_operators_of_a_script_compute_the_same() -> None:
    """The same functions are registered for cards; here they are called on interpreted kernels."""
    for seed in range(20):
        program, inputs, _ = layer_case(seed)
        (node,) = program.nodes
        a, tensors = node.attrs, program.tensors
        qx, qy = program.values["x"].qparams, program.values.get("y")
        assert qx is not None
        geometry = (a["stride"], a["padding"], a["dilation"], a["groups"]) if node.op == "conv" else ()
        out = (1.0, 0, "float32") if qy is None or qy.qparams is None else (
            qy.qparams.scale, qy.qparams.zero_point, qy.qparams.dtype
        )  # fmt: skip
        kind, numbers = ("", []) if node.epilogue is None else (node.epilogue.kind, list(node.epilogue.values))
        residual = program.values["r"].qparams if "r" in program.values else None
        added = (inputs.get("r"), *((1.0, 0) if residual is None else (residual.scale, residual.zero_point)), False)
        function = triton_script.conv if node.op == "conv" else triton_script.linear
        bias = None if a["bias"] is None else tensors[a["bias"]]
        found = function(inputs["x"], qx.scale, qx.zero_point, False, tensors["w"], tensors["s"], bias, *geometry, *out,
                         kind, numbers, *added)  # fmt: skip
        assert torch.equal(found, devices.build(program, "cpu").run_node(0, inputs))


class Block(nn.Module):
    """Pre-norm attention as torchvision has it, tokens first; the sums and a norm are read by others, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.first(x).transpose(1, 0)
        q, k, v = self.qkv(y).reshape(length, batch, 3, 2, 16).permute(2, 1, 3, 0, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(length * batch, width)
        x = x + self.out(y).reshape(length, batch, width).transpose(1, 0)
        y = self.second(x)
        x = y + self.down(nn.functional.gelu(self.up(y))) + x
        return self.head(self.third(x)[:, 0])


def test_a_layer_norm_writes_codes_and_adds_what_comes_before_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32)
    program = quantized_program(Block(), x)
    runner = devices.build(program, "cpu")
    assert sqnr_db(ReferenceRunner(program)([x]), runner([x])) > 60
    steps = runner._lowering.together  # type: ignore[attr-defined]
    joined = [
        [program.nodes[i].target or program.nodes[i].op for i in step.nodes] for step in steps if len(step.nodes) > 1
    ]
    assert ["add.Tensor", "layer_norm.default"] in joined, "the residual's addition, whose sum is read again"
    assert ["transpose.int", "quantize"] in joined, "codes are made before they are moved"
    assert sum(part == ["select.int", "quantize"] or part == ["slice.Tensor", "quantize"] for part in joined) <= 1
    assert len(steps) < len(program.nodes)


class Padded(nn.Module):
    """Pads of their own in front of a stem, a depthwise convolution, a dense one, and what no convolution takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, 2, groups=16)
        self.dense, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = nn.functional.pad
        x = torch.relu(self.stem(pad(x, [0, 1, 0, 1])))
        x = torch.relu(self.deep(pad(x, [2, 1])))
        y = self.dense(pad(x, [1, 1, 0, 2])) + pad(x, [1, 1, 0, 2])
        return self.last(pad(y, [1, 0, 1, 0], value=0.5))


@pytest.mark.parametrize("preset", ["sym_int8", "affine_uint8"])
def test_convolutions_pad_what_is_padded_for_them_alone(preset: str) -> None:
    torch.manual_seed(0)
    net, x = Padded().eval(), torch.randn(2, 3, 19, 22)
    program = quantized_program(net, x, PRESETS[preset])
    runner = devices.build(program, "cpu")
    steps = runner._lowering.together  # type: ignore[attr-defined]
    joined = [[program.nodes[i].target or program.nodes[i].op for i in step.nodes] for step in steps]
    assert ["pad.default", "quantize"] in joined
    assert ["constant_pad_nd.default", "conv"] in joined
    kept = [names for names in joined if names in (["constant_pad_nd.default"], ["pad.default"])]
    assert len(kept) == 2, "one that others read, too, and one with another number"
    assert sqnr_db(ReferenceRunner(program)([x]), runner([x])) > 40


@pytest.mark.parametrize(("shape", "order"), [((3, 5, 24), (1, 0, 2)), ((4, 1), (0, 1)), ((1, 2, 3, 8), (0, 2, 1, 3))])
def test_a_layer_norm_of_rows_that_lie_anyhow(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    from quantflow.runtimes.triton.joins import normalized

    torch.manual_seed(0)
    a, b = torch.randn(shape).permute(order), torch.randn([shape[i] for i in order])
    weight, bias, q = torch.randn(shape[-1]), torch.randn(shape[-1]), QParams("uint8", 0.05, 3)
    total, normal, found = normalized([a, b], weight, bias, 1e-5, q, True, True)
    assert total is not None
    assert normal is not None
    assert torch.equal(total, a + b)
    expected = torch.layer_norm(a + b, weight.shape, weight, bias, 1e-5)
    assert (normal - expected).abs().max() < 1e-5
    steps = expected.to(torch.float64) / q.scale + q.zero_point
    illegal, _ = disagreement(quantize(expected, q), found, steps, 1e-3)
    assert not illegal


def test_recordings_are_made_once_per_set_of_shapes_and_what_can_not_be_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quantflow.runtimes.triton import graphs

    tried: list[int] = []

    class Recorded:
        """On a card that records whatever has no three rows."""

        def __init__(self, _card: Any, function: Any, inputs: Sequence[torch.Tensor]) -> None:
            tried.append(inputs[0].shape[0])
            if inputs[0].shape[0] == 3:
                raise torch.OutOfMemoryError("out of memory\nand a long story")
            self.function = function

        def __call__(self, inputs: Sequence[torch.Tensor]) -> Any:
            return "replayed", self.function(inputs)

    class Card:
        has_graphs = True

    monkeypatch.setattr(graphs, "Recording", Recorded)
    recordings = graphs.Recordings(Card(), lambda inputs: inputs[0].shape[0])  # type: ignore[arg-type]
    seen = [recordings([torch.zeros(rows)]) for rows in (1, 1, 1, 3, 3, 3, 0, 0, 0)]
    assert seen == [1, ("replayed", 1), ("replayed", 1), 3, 3, 3, 0, 0, 0]
    assert tried == [1, 3]
    assert recordings.refused == "out of memory"
    for _ in range(2):
        for rows in range(10, 14 + graphs.GRAPHS):
            for _ in range(2):
                recordings([torch.zeros(rows)])
    assert len(recordings._kept) == graphs.GRAPHS
    assert tried == [1, 3, *range(10, 8 + graphs.GRAPHS)], "in turn, none takes the place of one that is replayed"
    for _ in range(graphs.PATIENCE + 2):
        recordings([torch.zeros(100)])
    assert tried[-1] == 100, "none of the others is in use any more"
    assert len(recordings._kept) == graphs.GRAPHS


def test_tensors_in_containers_of_any_kind_are_reached() -> None:
    from quantflow.runtimes.triton.graphs import on_tensors

    found = on_tensors(lambda x: x + 1, {"a": [torch.zeros(1), 3, None], "b": (torch.ones(2),)})
    assert found["a"][0] == 1
    assert found["a"][1:] == [3, None]
    assert torch.equal(found["b"][0], torch.full((2,), 2.0))


def test_a_kernel_that_can_not_be_built_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.errors import TritonError

    torch.manual_seed(0)
    x = torch.randn(2, 8)
    program = quantized_program(nn.Sequential(nn.Linear(8, 8)), x)
    runner = devices.build(program, "cpu")

    def broken(*_: Any, **__: Any) -> None:
        raise TritonError("PTXAS error: unknown instruction\nmore of it")

    monkeypatch.setattr("quantflow.runtimes.triton.operators.quantize", broken)
    with pytest.raises(
        UnavailableError, match=r"can't be built for interpreter \(TritonError: PTXAS error.*runtime=torch"
    ) as e:
        runner([x])
    assert e.value.exit_code == 4
    assert ReferenceRunner(program)([x]).shape == (2, 8)


def test_runs_are_recorded_with_the_graphs_that_the_devices_torch_has() -> None:
    from quantflow.runtimes.triton.cards import Card, recording
    from quantflow.runtimes.triton.tuner import Tuner

    seen: list[Any] = []

    class Interface:
        """As torch.xpu and torch.cuda are, as far as recording goes."""

        @contextmanager
        def graph(self, graph: Any, **settings: Any) -> Iterator[None]:
            seen.append((type(graph).__name__, settings))
            yield

    class XPU(Interface):
        XPUGraph = type("XPUGraph", (), {})

    class CUDA(Interface):
        CUDAGraph = type("CUDAGraph", (), {})

    for interface in (XPU(), CUDA()):
        with recording(interface, "a stream") as graph:
            assert type(graph).__name__ == seen[-1][0]
    assert seen[0] == ("XPUGraph", {"stream": "a stream"})
    assert seen[1] == ("CUDAGraph", {"stream": "a stream", "capture_error_mode": "thread_local"})
    tuner = Tuner(None, lambda *_: 0.0)
    assert not Card(torch.device("cpu"), "interpreter", 0, tuner).has_graphs
    assert Card(torch.device("xpu", 0), "a card", 64, tuner).has_graphs is hasattr(torch.xpu, "XPUGraph")


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        ("to.device", (Ref("x"), torch.device("cpu"), torch.float64), {}),
        ("to.dtype_layout", (Ref("x"),), {"dtype": torch.float64, "device": torch.device("cpu")}),
        ("arange.default", (6,), {"device": torch.device("cpu")}),
        ("zeros_like.default", (Ref("x"),), {}),
    ],
)
def test_what_names_the_cpu_is_made_on_the_card(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    node = Node("it", "aten", "y", args, kwargs, target=target)
    program = program_of(node, {"x": Value(), "y": Value()}, {}, {"x": torch.zeros(6)})
    from quantflow.runtimes.triton import cards, lower, tuner  # they need Triton

    elsewhere = cards.Card(torch.device("meta"), "no card", 0, tuner.Tuner(None, lambda _call, _runs: 0.0))
    values = {"x": torch.zeros(6, device="meta")}
    (made,) = lower.Lowering(program, elsewhere).alone[0].run(values)
    assert made.device.type == "meta"
