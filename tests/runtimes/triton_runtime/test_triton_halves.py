"""Floats held in half precision, in Triton's interpreter (which rounds bfloat16 down: its bound here is doubled)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.ir.program import Program
from quantflow.numerics.affine import QParams, dequantize
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.triton import devices
from quantflow.tasks.selftest import quantized_program

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: .ci/run installs it"),
    pytest.mark.skipif(
        not devices.is_interpreting(), reason="needs TRITON_INTERPRET=1 from the start: .ci/run sets it"
    ),
]
BOUNDS = {torch.float16: 2**-11, torch.bfloat16: 2**-7}
HALVES = pytest.mark.parametrize("held", list(BOUNDS))


def close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Within the type's rounding of each value, and float32's of the largest."""
    bound = BOUNDS[found.dtype] * expected.abs() + 1e-6 * expected.abs().max()
    return bool(((expected - found.to(torch.float32)).abs() <= bound).all())


class Block(nn.Module):
    """Attention with projections of their own and a mask of the batch, between residual sums."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(batch, length, 2, width // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = (x[..., 0] > -1)[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return self.last(x + self.down(nn.functional.gelu(self.up(x)))).cumsum(-1)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 7, 32)


@pytest.fixture(scope="module")
def program(x: torch.Tensor) -> Program:
    torch.manual_seed(0)
    return quantized_program(Block(), x)


def steps_of(runner: object) -> list[list[str]]:
    lowering = runner._lowering  # type: ignore[attr-defined]
    nodes = lowering.program.nodes
    return [[nodes[i].target or nodes[i].op for i in step.nodes] for step in lowering.together]


def test_linears_of_the_same_codes_are_one_product_with_the_same_result(program: Program, x: torch.Tensor) -> None:
    runner = devices.build(program, "cpu")
    assert ["linear", "linear", "linear"] in steps_of(runner)
    assert runner.halves == 0
    values = dict(runner.trace([x]))
    assert torch.equal(values[len(program.nodes) - 1], runner([x]))


@pytest.mark.parametrize(("floats", "least"), [("float16", 45), ("bfloat16", 25)])
def test_a_whole_run_in_half_precision(program: Program, x: torch.Tensor, floats: str, least: float) -> None:
    full, half = devices.build(program, "cpu"), devices.build(program, "cpu", floats)
    found = half([x])
    assert found.dtype is torch.float32, "what a program returns"
    assert half.halves > 10
    assert sqnr_db(full([x]), found) > least
    joined = next(step for step in steps_of(half) if "scaled_dot_product_attention.default" in step)
    assert joined[-1] == "quantize", "attention writes the codes"
    for (index, one), (_, other) in zip(full.trace([x]), half.trace([x]), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, program.nodes[index].name


def test_who_does_not_tolerate_half_precision_gets_float32(program: Program, x: torch.Tensor) -> None:
    half = devices.build(program, "cpu", "bfloat16")._lowering  # type: ignore[attr-defined]
    nodes = {node.target or node.op: node for node in program.nodes}
    assert half.halves.of(nodes["layer_norm.default"]) is torch.bfloat16
    assert half.halves.of(nodes["cumsum.default"]) is torch.float32
    given: list[torch.dtype] = []
    step = next(s for s in half.together if program.nodes[s.nodes[-1]] is nodes["cumsum.default"])
    (name,) = step.reads
    given.extend(value.dtype for value in step.run({name: x.to(torch.bfloat16)}))
    assert given == [torch.float32]


@HALVES
def test_a_linear_and_a_layer_norm_round_once(held: torch.dtype) -> None:
    from quantflow.runtimes.triton.cards import card_of
    from quantflow.runtimes.triton.joins import normalized
    from quantflow.runtimes.triton.layers import Finish, Layer

    torch.manual_seed(0)
    codes, weight = torch.randint(-128, 128, (7, 16)).to(torch.int8), torch.randint(-127, 128, (9, 16)).to(torch.int8)
    for residual in (None, torch.randn(7, 9).to(held)):
        finish = Finish(QParams("int8", 1.0, 0), None, None, residual is not None)
        layer = Layer(weight, torch.full((9,), 1e-3), torch.randn(9), None, finish, card_of("cpu"))
        found = layer(codes, residual, held)
        assert found.dtype is held
        assert close(layer(codes, None if residual is None else residual.to(torch.float32)), found)
    a, b, q = torch.randn(2, 5, 24).to(held), torch.randn(1, 5, 24), QParams("int8", 0.05, 0)
    gain, shift = torch.randn(24), torch.randn(24)
    total, normal, found = normalized([a, b], gain, shift, 1e-5, q, True, True, held)
    assert total is not None
    assert normal is not None
    assert isinstance(found, torch.Tensor)
    expected = torch.layer_norm(a.to(torch.float32) + b, (24,), gain, shift, 1e-5)
    assert close(a.to(torch.float32) + b, total)
    assert close(expected, normal)
    assert (dequantize(found, q) - expected).abs().max() < 0.5 * q.scale + 1e-5, "codes are of what is not rounded"


MASKS = ("none", "causal", "row", "full", "added", "nothing")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("queries", "keys", "width", "held"), [(37, 50, 16, torch.bfloat16), (1, 33, 40, torch.float16)]
)
def test_attention_is_the_softmax_of_products(
    mask: str, queries: int, keys: int, width: int, held: torch.dtype
) -> None:
    from quantflow.runtimes.triton.attending import Attention
    from quantflow.runtimes.triton.cards import card_of

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, width).transpose(1, 2).to(held) for n in (queries, keys, keys))
    looked = {
        "row": torch.rand(2, 1, 1, keys) > 0.3, "full": torch.rand(1, 3, queries, keys) > 0.3,
        "added": torch.randn(2, 1, queries, keys), "nothing": torch.arange(keys).expand(queries, keys) > keys,
    }.get(mask)  # fmt: skip
    out = QParams("uint8", 0.02, 128)
    attention = Attention(out, None, mask == "causal", held, card_of("cpu"))
    moves = [("transpose.int", [1, 2]), ("reshape.default", [[2, queries, -1]])]
    found = attention(q, k, v, looked, moves)
    assert found is not None
    full = (x.to(torch.float32) for x in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(*full, looked, is_causal=mask == "causal")
    expected = expected.transpose(1, 2).reshape(2, queries, -1)
    # Each weight is rounded once: of a mean of values of magnitude m that leaves an error of m times the bound.
    bound = 0.5 * out.scale + BOUNDS[held] * float(v.abs().max())
    assert found.shape == expected.shape
    assert (dequantize(found, out) - expected.clamp(-2.56, 2.54)).abs().max() <= bound


def test_attention_that_the_kernel_can_not_compute_is_pytorchs() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(320, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).repeat(1, 1, 40)
            return self.b(nn.functional.scaled_dot_product_attention(y, y, y))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    program = quantized_program(Wide(), x)
    assert sqnr_db(devices.build(program, "cpu")([x]), devices.build(program, "cpu", "float16")([x])) > 40


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def held_by(net: nn.Module, floats: str, folder: Path | None = None) -> tuple[str, str, int]:
    """(how floats are held, why, in how many values)."""
    model = qf.quantize(net, [torch.randn(4, 8)], runtime="triton", device="cpu", policy={"float": floats})
    section = model.results["runtime"]
    if folder is not None:
        model.save(folder)
    return section["float"], section["float_reason"], model.compiled.runner.halves


def test_a_recipe_says_how_floats_are_held_and_so_does_its_artifact(tmp_path: Path) -> None:
    assert held_by(small(), "float16", tmp_path / "artifact") == ("float16", "", 2)
    assert qf.load(tmp_path / "artifact", runtime="triton", device="cpu").compiled.runner.halves == 2
    with pytest.warns(UserWarning, match="floats in float16, which runtime reference does not have"):
        loaded = qf.load(tmp_path / "artifact", runtime="reference", device="cpu")
    assert loaded.compiled.runner.halves == 0


def test_auto_is_bfloat16_where_that_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantflow.executor import steps

    floats, reason, values = held_by(small(), "auto")
    assert (floats, values) == ("bfloat16", 2)
    assert "dB to the float model in bfloat16" in reason
    monkeypatch.setattr(steps, "MOST_HALF_COST_DB", -100.0)
    floats, reason, values = held_by(small(), "auto")
    assert (floats, values) == ("float32", 0)
    assert "dB in float32" in reason
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert held_by(plain, "auto")[:2] == (
        "float32", "policy.float=auto: nothing between int8 layers is held in bfloat16"
    )  # fmt: skip


@pytest.mark.parametrize(("floats", "least"), [("float16", 40), ("bfloat16", 25)])
def test_a_script_holds_them_so_on_a_card(x: torch.Tensor, floats: str, least: float) -> None:
    from quantflow.runtimes.triton.script import _whole

    torch.manual_seed(0)
    model = qf.quantize(Block(), [x], runtime="triton", device="cpu", mode="torchscript", policy={"float": floats})
    section = model.results["runtime"]
    assert (section["float"], section["float_reason"]) == (floats, "")
    names = model.native_names
    tensors = [model.compiled.program.tensors[name].clone() for name in names]
    (found,) = _whole([x], model.native_program, names, tensors)
    assert torch.equal(found, model.compiled.runner([x])), "as the program runs"
    assert least < sqnr_db(model(x), found) < 100, "the ops behind it, for other devices, compute in float32"


def test_a_script_in_float32_does_not_speak_of_it() -> None:
    model = qf.quantize(small(), [torch.randn(4, 8)], runtime="triton", device="cpu", mode="torchscript")
    assert '"floats"' not in model.native_program


@pytest.mark.parametrize(("floats", "least"), [("float16", 40), ("bfloat16", 20)])
def test_a_module_of_ones_own_holds_them_so(x: torch.Tensor, floats: str, least: float) -> None:
    held = getattr(torch, floats)
    torch.manual_seed(0)
    net = Block()
    asked = {"runtime": "triton", "device": "cpu", "mode": "imperative"}
    full, half = qf.quantize(net, [x], **asked), qf.quantize(net, [x], **asked, policy={"float": floats})
    assert half.results["runtime"]["float"] == floats
    given: dict[str, torch.dtype] = {}
    for name in ("q", "up", "last"):
        half.module.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: given.update({name: output.dtype})
        )
    found = half(x)  # a layer that takes no half precision would warn
    assert given == {"q": held, "up": torch.float32, "last": torch.float32}, "PyTorch's autocast leaves norms float32"
    assert found.dtype is torch.float32, "what a model returns"
    assert least < sqnr_db(full(x), found) < 100
    assert half.module(x).dtype is torch.float32
    assert half.int8_layers() == full.int8_layers()


@pytest.mark.parametrize("mode", ["torchscript", "imperative"])
def test_auto_is_decided_by_what_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantflow.executor import steps

    torch.manual_seed(1)
    batch = torch.randn(64, 8)

    def found() -> tuple[str, str]:
        model = qf.quantize(small(), [batch], runtime="triton", device="cpu", mode=mode, policy={"float": "auto"})
        return model.results["runtime"]["float"], model.results["runtime"]["float_reason"]

    floats, reason = found()
    assert floats == "bfloat16"
    assert "dB to the float model in bfloat16" in reason
    monkeypatch.setattr(steps, "MOST_HALF_COST_DB", -100.0)
    assert found()[0] == "float32"
