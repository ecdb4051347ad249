"""Every kernel of the torch runtime against the reference, on the same codes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.ir.activations import ACTIVATIONS, Epilogue, tie_tolerance
from quantflow.ir.calls import Input
from quantflow.ir.program import Node, Program, Ref, Value
from quantflow.numerics.affine import QParams
from quantflow.numerics.agreement import disagreement
from quantflow.runtimes import kernels
from quantflow.runtimes.reference import run_node, unrounded
from quantflow.runtimes.torch import TorchRunner

SIGNED = Value(QParams("int8", 0.03, 0))
NONNEGATIVE = Value(QParams("int8", 0.03, 0), is_nonnegative=True)
AFFINE = Value(QParams("int8", 0.03, -17))
LOWEST, HIGHEST = Value(QParams("int8", 0.03, -128)), Value(QParams("int8", 0.03, 127))
UINT8 = Value(QParams("uint8", 0.03, 128))
UINT8_LOWEST, UINT8_HIGHEST = Value(QParams("uint8", 0.03, 0)), Value(QParams("uint8", 0.03, 255))
HELD = (SIGNED, NONNEGATIVE, AFFINE, LOWEST, HIGHEST, UINT8, UINT8_LOWEST, UINT8_HIGHEST)
EPILOGUES = (
    None,
    Epilogue("hardtanh", (0.0, 6.0)),
    Epilogue("hardtanh", (-1.5, 2.5)),
    *(Epilogue(kind, row.example) for kind, row in ACTIVATIONS.items()),
)
FILLS = ("random", "lowest", "highest", "alternating")
#: Float results: rounding steps of float32 between the sum and the result, and what an approximated activation adds.
FLOAT_STEPS, APPROXIMATION = 8 * 2.0**-24, 2e-6

each = settings(deadline=None, derandomize=True, max_examples=60)


def codes(value: Value, shape: tuple[int, ...], fill: str, seed: int) -> torch.Tensor:
    """Codes that are legal for the value: random, or all at one end of the range, or at both in turn."""
    assert value.qparams is not None
    low, high = (0, 127) if value.is_nonnegative else value.qparams.range
    generator = torch.Generator().manual_seed(seed)
    if fill == "random":
        drawn = torch.randint(low, high + 1, shape, generator=generator)
    elif fill == "alternating":
        drawn = torch.where(torch.arange(math.prod(shape)).reshape(shape) % 2 == 0, low, high)
    else:
        drawn = torch.full(shape, low if fill == "lowest" else high)
    return drawn.to(value.qparams.torch_dtype)


def weights(shape: tuple[int, ...], fill: str, seed: int) -> torch.Tensor:
    if fill == "random":
        return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    if fill == "alternating":
        return torch.where(torch.arange(math.prod(shape)).reshape(shape) % 2 == 0, -127, 127).to(torch.int8)
    return torch.full(shape, -127 if fill == "lowest" else 127, dtype=torch.int8)


def program_of(
    node: Node, operands: Mapping[str, Value], out: Value | None, tensors: Mapping[str, torch.Tensor] | None = None
) -> Program:
    """Inputs, their quantize nodes, and the node: what makes the runtime decide how each operand is stored."""
    inputs = tuple(Input(f"{name}.in", None, "float32", (None,)) for name in operands)
    before = tuple(Node(f"{name}.quantize", "quantize", name, (Ref(f"{name}.in"),)) for name in operands)
    values = dict(operands) | ({} if out is None else {node.output: out})
    return Program(inputs, (*before, node), values, tensors or {}, Ref(node.output))


def check(program: Program, values: Mapping[str, Any], magnitude: torch.Tensor | float = 0.0) -> torch.Tensor:
    """The last node on the torch runtime, held to the rule against the reference.

    In floating point on every machine; where int8 products are exact, by PyTorch's int8 kernels too.

    Args:
        magnitude: for float results, the sum of the magnitudes that were added.
    """
    node = program.nodes[-1]
    expected = run_node(program, node, values)
    actual = torch.empty(0)
    for has_int8_kernels in dict.fromkeys((False, kernels.HAS_INT8_KERNELS)):
        with mock.patch.object(kernels, "HAS_INT8_KERNELS", has_int8_kernels):
            actual = TorchRunner(program).run_node(len(program.nodes) - 1, values)
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if expected.is_floating_point():
            approximation = APPROXIMATION * (1 + expected.abs()) if tie_tolerance(node.epilogue) > 1e-3 else 0
            bound = FLOAT_STEPS * magnitude + approximation
            assert ((expected - actual).abs() <= bound).all(), (expected - actual).abs().max()
        else:
            illegal, worst = disagreement(
                expected, actual, unrounded(program, node, values), tie_tolerance(node.epilogue)
            )
            assert not illegal, f"{illegal} of {expected.numel()} codes differ, up to {worst} codes from a tie"
    return actual


def fitted(out: Value | None, r: torch.Tensor, factor: float) -> Value | None:
    """`out` with a scale at which r fills `factor` of the range; below 1 leaves room, above 1 saturates."""
    if out is None:
        return None
    assert out.qparams is not None
    largest = r.abs().max().item() if r.numel() else 1.0
    scale = float(torch.tensor((largest or 1.0) / (127 * factor)))
    return replace(out, qparams=replace(out.qparams, scale=scale))


@dataclass(frozen=True)
class Settled:
    """What a linear op or an addition needs besides its operands."""

    epilogue: Epilogue | None
    out: Value | None
    factor: float


@st.composite
def finishes(draw: st.DrawFn) -> Settled:
    epilogue = draw(st.sampled_from(EPILOGUES))
    legal = [v for v in (None, *HELD) if v is not NONNEGATIVE or (epilogue is not None and epilogue.is_nonnegative)]
    return Settled(epilogue, draw(st.sampled_from(legal)), draw(st.sampled_from([0.3, 1.0, 3.0])))


def linear_case(
    node: Node, x: torch.Tensor, held: Value, settled: Settled, weight: torch.Tensor, per_channel: bool, bias: bool,
    residual: Value | None, fill: str, seed: int,
) -> None:  # fmt: skip
    """Check one convolution or linear."""
    generator = torch.Generator().manual_seed(seed)
    channels = weight.shape[0]
    # Each channel's sums come out near 1, as in a trained network.
    norm = 1 / (0.03 * 127 * 100 * max(weight[0].numel(), 1) ** 0.5)
    scale = torch.rand(channels if per_channel else 1, generator=generator).add_(0.1) * norm * 3
    tensors = {"w": weight, "s": scale} | ({"b": torch.randn(channels, generator=generator)} if bias else {})
    attrs = {"weight": "w", "weight_scale": "s", "bias": "b" if bias else None, **node.attrs}
    operands, values = {"x": held}, {"x": x}
    alone = replace(node, args=(Ref("x"), None), attrs=attrs)
    sums = run_node(program_of(alone, operands, None, tensors), alone, values)
    if residual is not None:
        operands["r"], values["r"] = residual, codes(residual, tuple(sums.shape), fill, seed + 1)
        node = replace(node, args=(Ref("x"), Ref("r")), attrs=attrs, epilogue=settled.epilogue)
    else:
        node = replace(alone, epilogue=settled.epilogue)
    r = run_node(program_of(node, operands, None, tensors), node, values)
    magnitude = sums.abs() + (tensors["b"].abs().max() * 2 if bias else 0) + (0.03 * 256 if residual else 0)
    out = fitted(settled.out, r, settled.factor)
    check(program_of(node, operands, out, tensors), values, magnitude)


@each
@given(st.data())
def test_convolution(data: st.DataObject) -> None:
    draw = data.draw
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3, "depthwise"]))
    per_group = 1 if groups == "depthwise" else draw(st.sampled_from([1, 3, 8, 17]))
    groups = draw(st.sampled_from([3, 16, 33])) if groups == "depthwise" else groups
    outputs = groups * draw(st.sampled_from([1, 2, 5, 16]))
    kernel = [draw(st.sampled_from([1, 1, 2, 3, 5] if dims < 3 else [1, 2, 3])) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), d * (k - 1) + 5))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    held, fill, seed = draw(st.sampled_from(HELD)), draw(st.sampled_from(FILLS)), draw(st.integers(0, 999))
    x = codes(held, (draw(st.integers(1, 3)), groups * per_group, *size), fill, seed)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    node = Node("conv", "conv", "y", (Ref("x"), None), attrs=attrs)
    weight = weights((outputs, per_group, *kernel), draw(st.sampled_from(FILLS)), seed)
    residual = draw(st.sampled_from((None, None, *HELD)))
    linear_case(node, x, held, draw(finishes()), weight, draw(st.booleans()), draw(st.booleans()), residual, fill, seed)


@each
@given(st.data())
def test_linear(data: st.DataObject) -> None:
    draw = data.draw
    rows = draw(st.sampled_from([(), (1,), (5,), (1, 1), (2, 7), (2, 3, 4), (16,)]))
    inputs, outputs = draw(st.sampled_from([1, 3, 16, 33, 100])), draw(st.sampled_from([1, 2, 15, 64]))
    held, fill, seed = draw(st.sampled_from(HELD)), draw(st.sampled_from(FILLS)), draw(st.integers(0, 999))
    x = codes(held, (*rows, inputs), fill, seed)
    weight = weights((outputs, inputs), draw(st.sampled_from(FILLS)), seed)
    residual = draw(st.sampled_from((None, None, *HELD)))
    node = Node("fc", "linear", "y", (Ref("x"), None))
    linear_case(node, x, held, draw(finishes()), weight, draw(st.booleans()), draw(st.booleans()), residual, fill, seed)


@pytest.mark.parametrize("residual", HELD, ids=str)
@pytest.mark.parametrize("out", [None, *HELD], ids=str)
@pytest.mark.parametrize("op", ["conv", "linear"])
def test_residual_in_every_storage(op: str, out: Value | None, residual: Value) -> None:
    shape, weight = ((2, 8, 5, 5), (8, 8, 3, 3)) if op == "conv" else ((4, 8), (8, 8))
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1} if op == "conv" else {}
    node = Node(op, op, "y", (Ref("x"), None), attrs=geometry)
    for epilogue in (Epilogue("relu"), None, Epilogue("silu")):
        if out is NONNEGATIVE and epilogue != Epilogue("relu"):
            continue
        settled = Settled(epilogue, out, 1.0)
        x = codes(SIGNED, shape, "random", 3)
        linear_case(node, x, SIGNED, settled, weights(weight, "random", 4), True, True, residual, "random", 5)


@each
@given(st.data())
def test_add_and_mul_broadcast(data: st.DataObject) -> None:
    draw = data.draw
    a_shape, b_shape = draw(
        st.sampled_from([
            ((2, 5, 3, 3), (2, 5, 3, 3)), ((2, 5, 7, 1), (2, 5, 1, 3)), ((2, 5, 3, 3), (2, 5, 1, 1)),
            ((1, 5, 1, 1), (2, 5, 4, 4)), ((3, 7), (7,)), ((7,), (3, 7)), ((1,), (1,)), ((), (4,)), ((0, 4), (0, 4)),
            ((2, 9, 3), (1, 9, 1)),
        ])
    )  # fmt: skip
    a, b, fill = draw(st.sampled_from(HELD)), draw(st.sampled_from(HELD)), draw(st.sampled_from(FILLS))
    settled, op, seed = draw(finishes()), draw(st.sampled_from(["add", "mul"])), draw(st.integers(0, 999))
    out = settled.out or SIGNED
    values = {"a": codes(a, a_shape, fill, seed), "b": codes(b, b_shape, fill, seed + 1)}
    node = Node(op, op, "y", (Ref("a"), Ref("b")), epilogue=settled.epilogue)
    operands = {"a": a, "b": b}
    r = run_node(program_of(node, operands, None), node, values)
    check(program_of(node, operands, fitted(out, r, settled.factor)), values)


@each
@given(st.data())
def test_matmul(data: st.DataObject) -> None:
    draw = data.draw
    a_shape, b_shape = draw(
        st.sampled_from([
            ((5, 7), (7, 3)), ((2, 4, 33), (2, 33, 5)), ((2, 3, 4, 8), (2, 3, 8, 4)), ((1, 1), (1, 1)),
            ((3, 300), (300, 2)), ((2, 2, 300), (2, 300, 2)), ((0, 3, 4), (0, 4, 2)), ((6,), (6,)), ((2, 3, 6), (6,)),
        ])
    )  # fmt: skip
    a, b, fill = draw(st.sampled_from(HELD)), draw(st.sampled_from(HELD)), draw(st.sampled_from(FILLS))
    seed, out = draw(st.integers(0, 999)), draw(st.sampled_from([v for v in HELD if not v.is_nonnegative] + [None]))
    values = {"a": codes(a, a_shape, fill, seed), "b": codes(b, b_shape, fill, seed + 1)}
    node, operands = Node("mm", "matmul", "y", (Ref("a"), Ref("b"))), {"a": a, "b": b}
    r = run_node(program_of(node, operands, None), node, values)
    out = fitted(out, r, draw(st.sampled_from([0.3, 1.0, 3.0])))
    check(program_of(node, operands, out), values, r.abs() * 2)


AVERAGES = [
    ("avg_pool1d.default", (2, 5, 9), ([3], [2], [1])),
    ("avg_pool1d.default", (2, 5, 8), ([4], [3], [0], True)),
    ("avg_pool2d.default", (2, 17, 7, 7), ([3, 3], [2, 2], [1, 1], True, False)),
    ("avg_pool2d.default", (2, 5, 7, 8), ([2, 3], [2, 1], [1, 0], False, True)),
    ("avg_pool2d.default", (1, 3, 4, 4), ([2, 2], [2, 2], [0, 0], False, True, 3)),
    ("avg_pool3d.default", (2, 3, 4, 5, 6), ([2, 2, 2], [2, 2, 2], [0, 1, 0])),
    ("adaptive_avg_pool1d.default", (2, 3, 7), ([3],)),
    ("adaptive_avg_pool2d.default", (2, 19, 7, 7), ([1, 1],)),
    ("adaptive_avg_pool2d.default", (2, 3, 7, 5), ([3, 2],)),
    ("adaptive_avg_pool2d.default", (2, 3, 3, 3), ([6, 6],)),
    ("adaptive_avg_pool3d.default", (1, 2, 3, 4, 5), ([1, 2, 2],)),
    ("mean.dim", (2, 16, 8, 8), ([-1, -2], True)),
    ("mean.dim", (2, 7, 6), ([1],)),
    ("mean.default", (3, 5), ()),
]


@pytest.mark.parametrize("held", [SIGNED, NONNEGATIVE, AFFINE, UINT8_HIGHEST], ids=str)
@pytest.mark.parametrize(("target", "shape", "args"), AVERAGES, ids=lambda a: str(a) if isinstance(a, str) else "")
def test_averages_have_the_reference_s_ties(
    held: Value, target: str, shape: tuple[int, ...], args: tuple[Any, ...]
) -> None:
    for fill in FILLS:
        values = {"x": codes(held, shape, fill, 1)}
        node = Node("pool", "avg_pool", "y", (Ref("x"), *args), target=target)
        for scale, zero_point in ((0.03, 0), (0.03, 1), (0.06, 7), (0.011, -128)):
            program = program_of(node, {"x": held}, Value(QParams("int8", scale, zero_point)))
            actual, expected = check(program, values), run_node(program, node, values)
            ties = (unrounded(program, node, values) * 2 % 2 - 1).abs() < 1e-9  # type: ignore[operator]
            assert torch.equal(actual[ties], expected[ties])


def test_a_mean_over_a_large_image() -> None:
    node = Node("pool", "avg_pool", "y", (Ref("x"), [-1, -2]), target="mean.dim")
    program = program_of(node, {"x": UINT8_LOWEST}, Value(QParams("uint8", 0.03, 0)))
    for fill in FILLS:
        check(program, {"x": codes(UINT8_LOWEST, (1, 2, 700, 700), fill, 0)})


@each
@given(st.data())
def test_max_pool(data: st.DataObject) -> None:
    draw = data.draw
    dims = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 3)) for _ in range(dims)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    stride = draw(st.sampled_from([[], [draw(st.integers(1, 3)) for _ in range(dims)]]))
    size = [draw(st.integers(d * (k - 1) + 1, d * (k - 1) + 6)) for k, d in zip(kernel, dilation, strict=True)]
    leading = draw(st.sampled_from([(2, 5), (1, 17), (3,), (0, 4)]))
    held, fill = draw(st.sampled_from(HELD)), draw(st.sampled_from(FILLS))
    x = codes(held, (*leading, *size), fill, draw(st.integers(0, 999)))
    args = (kernel, stride, padding, dilation, draw(st.booleans()))
    node = Node("pool", "max_pool", "y", (Ref("x"), *args), target=f"max_pool{dims}d.default")
    check(program_of(node, {"x": held}, held), {"x": x})


def test_max_pool_arguments_left_out_or_by_keyword() -> None:
    x = {"x": codes(SIGNED, (1, 2, 7, 7), "random", 0)}
    for args, kwargs in (((2,), {}), (([3, 3], 2), {}), (([3, 3],), {"padding": [1, 1], "ceil_mode": True})):
        node = Node("pool", "max_pool", "y", (Ref("x"), *args), kwargs, target="max_pool2d.default")
        check(program_of(node, {"x": SIGNED}, SIGNED), x)


SHAPES = [
    ("reshape.default", (2, 12, 2), ([2, -1],)),
    ("flatten.using_ints", (2, 3, 4, 5), (1,)),
    ("permute.default", (2, 3, 4), ([2, 0, 1],)),
    ("transpose.int", (2, 3, 4), (1, 2)),
    ("t.default", (3, 4), ()),
    ("slice.Tensor", (4, 6), (1, 1, 5, 2)),
    ("select.int", (4, 6), (1, -1)),
    ("squeeze.dims", (2, 1, 3, 1), ([1, 3],)),
    ("squeeze.dim", (2, 1, 3), (1,)),
    ("unsqueeze.default", (2, 3), (1,)),
    ("unflatten.int", (2, 12), (1, [3, 4])),
    ("expand.default", (2, 1, 3), ([2, 4, 3],)),
    ("repeat.default", (2, 3), ([1, 2, 2],)),
    ("roll.default", (2, 3, 4), ([1], [2])),
    ("flip.default", (2, 3), ([1],)),
    ("narrow.default", (2, 6), (1, 2, 3)),
    ("pixel_shuffle.default", (2, 8, 3, 3), (2,)),
    ("pixel_unshuffle.default", (2, 2, 4, 6), (2,)),
    ("channel_shuffle.default", (2, 8, 3, 3), (2,)),
    ("upsample_nearest1d.default", (2, 3, 5), ([10],)),
    ("upsample_nearest2d.default", (2, 3, 5, 5), ([10, 7],)),
    ("upsample_nearest2d.vec", (2, 3, 5, 5), (None, [2.0, 2.0])),
    ("upsample_nearest3d.default", (1, 2, 2, 3, 4), ([4, 6, 8],)),
]


@pytest.mark.parametrize("held", [SIGNED, NONNEGATIVE, AFFINE, UINT8], ids=str)
@pytest.mark.parametrize(("target", "shape", "args"), SHAPES, ids=lambda a: str(a) if isinstance(a, str) else "")
def test_shape_ops_move_codes(held: Value, target: str, shape: tuple[int, ...], args: tuple[Any, ...]) -> None:
    node = Node("shape", "shape", "y", (Ref("x"), *args), target=target)
    check(program_of(node, {"x": held}, held), {"x": codes(held, shape, "random", 0)})


@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("pads", [[1, 2], [0, 1, 2, 0], [-1, 0, 0, 1]], ids=str)
def test_pad_fills_with_a_code(held: Value, pads: list[int]) -> None:
    assert held.qparams is not None
    for fill in (held.qparams.zero_point, held.qparams.range[1]):
        node = Node("pad", "shape", "y", (Ref("x"), pads, fill), target="constant_pad_nd.default")
        check(program_of(node, {"x": held}, held), {"x": codes(held, (2, 3, 4, 4), "random", 0)})


@pytest.mark.parametrize("target", ["split.Tensor", "chunk.default", "unbind.int"])
@pytest.mark.parametrize("held", [SIGNED, NONNEGATIVE, UINT8], ids=str)
def test_parts_of_a_tensor(held: Value, target: str) -> None:
    args = (0,) if target == "unbind.int" else (2, 1)
    split = Node("split", "shape", "parts", (Ref("x"), *args), target=target)
    part = Node("part", "shape", "y", (Ref("parts"), 1), target="getitem")
    program = program_of(part, {"x": held}, held)
    program = replace(program, nodes=(program.nodes[0], split, part), values={**program.values, "parts": held})
    values: dict[str, Any] = {"x": codes(held, (2, 4, 3), "random", 0)}
    values["parts"] = run_node(program, split, values)
    for mine, expected in zip(TorchRunner(program).run_node(1, values), values["parts"], strict=True):
        assert torch.equal(mine, expected)
    check(program, values)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shared", [SIGNED, NONNEGATIVE, AFFINE, UINT8], ids=str)
def test_cat(shared: Value, dim: int) -> None:
    node = Node("cat", "cat", "y", ([Ref("a"), Ref("b"), Ref("c")], dim), target="cat.default")
    held = {"a": shared, "b": replace(shared, is_nonnegative=shared is SIGNED), "c": shared}
    out = replace(shared, is_nonnegative=all(v.is_nonnegative for v in held.values()))
    values = {name: codes(v, (2, 3, 4, 4), "random", i) for i, (name, v) in enumerate(held.items())}
    check(program_of(node, held, out), values)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_clamp(held: Value) -> None:
    assert held.qparams is not None
    low, high = held.qparams.range
    for bounds in ((low, high), (max(low, 0), 100), (50, 60), (held.qparams.zero_point, high)):
        node = Node("clamp", "clamp", "y", (Ref("x"),), attrs={"low": bounds[0], "high": bounds[1]})
        check(program_of(node, {"x": held}, held), {"x": codes(held, (2, 33), "random", 0)})


@each
@given(st.data())
def test_quantize_and_dequantize(data: st.DataObject) -> None:
    draw = data.draw
    held, count = (
        draw(st.sampled_from([v for v in HELD if not v.is_nonnegative])),
        draw(st.sampled_from([0, 1, 7, 8, 65, 1000])),
    )
    scale = draw(st.floats(2.0**-30, 2.0**30, width=32))
    held = replace(held, qparams=replace(held.qparams, scale=scale))  # type: ignore[type-var]
    x = torch.randn(count, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * scale * 100
    strange = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, -0.0, 0.5 * scale, -1.5 * scale])
    x = torch.cat([x, strange, x])
    node = Node("quantize", "quantize", "y", (Ref("x"),))
    program = Program((Input("x", None, "float32", (None,)),), (node,), {"y": held}, {}, Ref("y"))
    q = check(program, {"x": x})
    back = Node("dequantize", "dequantize", "z", (Ref("y"),))
    check(replace(program, nodes=(node, back), output=Ref("z")), {"y": q})


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 8, 5), (0, 8, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_an_empty_batch_through_a_convolution(shape: tuple[int, ...], residual: bool) -> None:
    dims = len(shape) - 2
    attrs: dict[str, Any] = {"stride": [2] * dims, "padding": [1] * dims, "dilation": [1] * dims, "groups": 2}
    tensors = {"w": weights((4, 4, *[3] * dims), "random", 0), "s": torch.ones(4)}
    attrs |= {"weight": "w", "weight_scale": "s", "bias": None}
    node = Node("conv", "conv", "y", (Ref("x"), Ref("r") if residual else None), attrs=attrs, epilogue=Epilogue("relu"))
    out = (0, 4, *((n + 2 - 3) // 2 + 1 for n in shape[2:]))
    values = {"x": codes(SIGNED, shape, "random", 0)} | ({"r": codes(SIGNED, out, "random", 0)} if residual else {})
    assert check(program_of(node, dict.fromkeys(values, SIGNED), NONNEGATIVE, tensors), values).shape == out


@pytest.mark.parametrize("op", ["conv", "linear", "add", "max_pool", "avg_pool", "cat"])
def test_inputs_need_not_be_contiguous(op: str) -> None:
    """A transposed view, a strided slice and an expanded tensor give what their dense copies give."""
    dense = codes(SIGNED, (2, 8, 6, 6), "random", 0)
    views = (
        dense.transpose(2, 3),
        dense[:, :, ::2, 1::2],
        dense[:1, :, :1].expand(2, 8, 6, 6),
        dense.permute(0, 2, 1, 3),
    )
    for x in views:
        values = {"x": x}
        tensors, channels = {}, x.shape[-1 if op == "linear" else 1]
        if op in ("conv", "linear"):
            tensors = {
                "w": weights((4, channels, *([3, 3] if op == "conv" else [])), "random", 1),
                "s": torch.ones(4) * 1e-3,
            }
        weighted = {"weight": "w", "weight_scale": "s", "bias": None}
        node = {
            "conv": Node(op, op, "y", (Ref("x"), None), attrs={
                "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, **weighted}),
            "linear": Node(op, op, "y", (Ref("x"), None), attrs=weighted),
            "add": Node(op, op, "y", (Ref("x"), Ref("x"))),
            "max_pool": Node(op, op, "y", (Ref("x"), [3, 3], [2, 2], [1, 1]), target="max_pool2d.default"),
            "avg_pool": Node(op, op, "y", (Ref("x"), [2, 2]), target="avg_pool2d.default"),
            "cat": Node(op, op, "y", ([Ref("x"), Ref("x")], 1), target="cat.default"),
        }[op]  # fmt: skip
        first = check(program_of(node, {"x": SIGNED}, SIGNED, tensors), values)
        again = check(program_of(node, {"x": SIGNED}, SIGNED, tensors), {"x": x.contiguous()})
        assert torch.equal(first, again)


def test_the_longest_legal_reduction_does_not_overflow() -> None:
    from quantflow.numerics.affine import MAX_REDUCTION

    node = Node("fc", "linear", "y", (Ref("x"), None), attrs={"weight": "w", "weight_scale": "s", "bias": None})
    for fill in ("lowest", "highest"):
        tensors = {"w": weights((2, MAX_REDUCTION), fill, 0), "s": torch.full((2,), 1e-9)}
        for held in (UINT8_LOWEST, UINT8_HIGHEST):
            values = {"x": codes(held, (1, MAX_REDUCTION), "highest" if held is UINT8_LOWEST else "lowest", 0)}
            check(program_of(node, {"x": held}, None, tensors), values, 1e3)


@contextlib.contextmanager
def reduced_float_precision() -> Iterator[None]:
    """Everything by which a user lets torch compute float32 less exactly."""
    precision, mkldnn = torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.mkldnn.enabled = False  # convolutions of 16 images and more would go to NNPACK
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.mkldnn.enabled = mkldnn


@pytest.mark.parametrize("setting", [contextlib.nullcontext, reduced_float_precision])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("channels", [1, 58, 518, 1500])
@pytest.mark.parametrize("op", ["linear", "pointwise", "conv1d", "conv", "conv3d"])
def test_sums_in_floating_point_are_exact(
    op: str, channels: int, fill: str, setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the reference's float32, below and above the longest reduction that float32 can hold."""
    monkeypatch.setattr(kernels, "HAS_INT8_KERNELS", False)
    kernel = {"linear": (), "pointwise": (1, 1), "conv1d": (3,), "conv": (3, 3), "conv3d": (1, 3, 3)}[op]
    size = {"linear": (), "pointwise": (1, 1), "conv1d": (5,), "conv": (4, 4), "conv3d": (2, 3, 3)}[op]
    geometry = {"stride": [1], "padding": [0 if op == "pointwise" else 1], "dilation": [1]}
    attrs: dict[str, Any] = {key: value * len(kernel) for key, value in geometry.items()} | {"groups": 1}
    attrs |= {"weight": "w", "weight_scale": "s", "bias": "b"}
    name = "linear" if op == "linear" else "conv"
    node = Node(name, name, "y", (Ref("x"), None), attrs=attrs)
    tensors = {"s": torch.tensor([1e-3, 3e-4]), "b": torch.tensor([0.7, -0.3])}
    for held in (SIGNED, NONNEGATIVE, LOWEST, UINT8_LOWEST, UINT8_HIGHEST):
        x = codes(held, (16 if channels < 100 else 2, channels, *size), fill, 0)
        for of_weight in ("random", "lowest", "highest"):
            tensors["w"] = weights((2, channels, *kernel), of_weight, 1)
            program = program_of(node, {"x": held}, None, tensors)
            expected = run_node(program, node, {"x": x})
            with setting():
                actual = TorchRunner(program).run_node(1, {"x": x})
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("value", "zero_point", "count", "dtype"),
    [(127, 0, 518, torch.float32), (127, 0, 519, torch.float64), (-127, 255, 519, torch.float64),
     (127, 128, 1032, torch.float32), (127, 128, 1033, torch.float64), (1, 0, 65793, torch.float32),
     (1, 0, 65794, torch.float64)],
)  # fmt: skip
def test_float32_is_used_while_it_holds_the_sums(value: int, zero_point: int, count: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(1, count, dtype=torch.uint8), torch.full((1, count), value, dtype=torch.int8)
    q, w = kernels._exact_in_float(x, zero_point, weight)
    assert q.dtype == w.dtype == dtype
    assert kernels._exact_in_float(x, zero_point, weight)[1] is w


def test_a_weight_that_two_geometries_share() -> None:
    tensors = {"w": weights((16, 16, 3, 3), "random", 0), "s": torch.full((16,), 1e-3)}
    values = {"x": codes(SIGNED, (1, 16, 9, 9), "random", 0)}
    for stride, padding, dilation in ((1, 0, 1), (2, 1, 1), (1, 1, 2), (3, 0, 1)):
        attrs = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "groups": 1}
        node = Node(
            "conv", "conv", "y", (Ref("x"), None), attrs={"weight": "w", "weight_scale": "s", "bias": None, **attrs}
        )
        check(program_of(node, {"x": SIGNED}, Value(QParams("int8", 0.5, 0)), tensors), values)


def test_the_flip_of_the_top_bit_is_a_shift_by_128() -> None:
    q = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(kernels.flip(q).int(), q.int() + 128)
    assert torch.equal(kernels.flip(kernels.flip(q)), q)


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "padding", "dilation", "groups"),
    [
        ((2, 4, 5), (4, 4, 1), [2], [1], [1], 1),
        ((2, 8, 7, 1), (4, 8, 1, 1), [3, 2], [0, 1], [1, 1], 1),
        ((1, 4, 2, 2, 2), (4, 4, 1, 1, 1), [1, 1, 1], [1, 1, 1], [1, 1, 1], 1),
        ((1, 8, 10, 4), (256, 1, 3, 3), [3, 2], [0, 0], [2, 1], 8),
        ((2, 1, 8, 1), (1, 1, 5, 3), [1, 3], [1, 1], [1, 1], 1),
        ((2, 16, 10, 2), (5, 16, 3, 2), [1, 1], [1, 1], [2, 3], 1),
        ((2, 2, 5, 3), (4, 1, 3, 3), [1, 2], [1, 0], [2, 1], 2),
        ((2, 1, 1, 11, 8), (1, 1, 3, 3, 3), [2, 1, 3], [2, 2, 0], [1, 2, 1], 1),
        ((2, 16, 1, 9, 7), (32, 1, 2, 5, 3), [2, 1, 3], [2, 2, 0], [2, 1, 1], 16),
        ((3, 1, 1, 3, 3), (1, 1, 3, 3, 3), [2, 3, 2], [1, 1, 2], [1, 2, 1], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("residual", [None, SIGNED], ids=["", "sum"])
def test_geometries_that_onednn_gets_wrong(
    shape: tuple[int, ...], weight: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, residual: Value | None,
) -> None:  # fmt: skip
    """Padding wider than the kernel crashed oneDNN 3.12; outputs of width 1 and volumes of depth 1 had wrong sums."""
    for held in (SIGNED, UINT8_HIGHEST, NONNEGATIVE):
        attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        node = Node("conv", "conv", "y", (Ref("x"), None), attrs=attrs)
        x, settled = codes(held, shape, "random", 0), Settled(Epilogue("relu"), SIGNED, 1.0)
        linear_case(node, x, held, settled, weights(weight, "random", 1), True, True, residual, "random", 2)
