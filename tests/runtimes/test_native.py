"""The native runtime: every kernel against the reference, sections around what it has no kernel for, and its edges."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quantflow
from quantflow.errors import ArtifactError, UnavailableError
from quantflow.host.environment import isa
from quantflow.ir.activations import ACTIVATIONS, Epilogue, tie_tolerance
from quantflow.ir.calls import Input
from quantflow.ir.program import Node, Program, Ref, Value
from quantflow.numerics.affine import QParams
from quantflow.numerics.agreement import disagreement
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import RUNTIMES, choose_runtime, native, native_devices, native_ways
from quantflow.runtimes import native_library as lib
from quantflow.runtimes.native import PLANS_PER_SECTION, NativeRunner
from quantflow.runtimes.reference import ReferenceRunner, run_node, unrounded
from quantflow.runtimes.runner import lowered
from quantflow.schema import PRESETS, WeightSpec
from quantflow.tasks.selftest import quantized_program, selftest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="native is built for Linux x86-64"
)


def test_every_kernel_and_three_models_agree_with_the_reference() -> None:
    rows = selftest(NativeRunner)
    assert [failure for row in rows for failure in row.failures] == []
    assert {"conv", "linear", "depthwise", "attention", "quantize", "model transformer"} <= {row.kernel for row in rows}
    assert sum(row.values for row in rows) > 100_000


# --- random geometry


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_convolutions_of_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    multiple = draw(st.integers(1, 9))
    channels = groups * multiple
    out = channels if draw(st.booleans()) else groups * draw(st.integers(1, 20))
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [draw(st.integers(0, 4)) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    size = [
        max(draw(st.integers(1, 9)), d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    batch = draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    value, out_value = draw(_values()), draw(st.one_of(st.none(), _values()))
    x = _codes((batch, channels, *size), value, draw(_extremes()))
    weight = _weight((out, channels // groups, *kernel), draw(_extremes()))
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    _compare_linear("conv", x, value, weight, out_value, draw(_epilogues()), attrs, draw(st.booleans()))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_linears_of_any_size(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, k, n = draw(st.integers(0, 40)), draw(st.integers(1, 300)), draw(st.integers(1, 130))
    value, out_value = draw(_values()), draw(st.one_of(st.none(), _values()))
    x, weight = _codes((rows, k), value, draw(_extremes())), _weight((n, k), draw(_extremes()))
    _compare_linear("linear", x, value, weight, out_value, draw(_epilogues()), {}, draw(st.booleans()))


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_planes_that_see_nothing_but_padding(channels: int) -> None:
    torch.manual_seed(0)
    value = Value(QParams("int8", 0.125, 3))
    attrs = {"stride": [3, 1, 1], "padding": [1, 0, 1], "dilation": [1, 1, 1]}
    for groups in {1, channels}:
        x, weight = _codes((2, channels, 1, 4, 5), value), _weight((channels, channels // groups, 1, 3, 3), "random")
        _compare_linear("conv", x, value, weight, None, None, attrs | {"groups": groups}, False)


def _values() -> st.SearchStrategy[Value]:
    signed = st.builds(lambda s, z: Value(QParams("int8", s, z)), st.floats(1e-3, 0.2), st.integers(-128, 127))
    unsigned = st.builds(lambda s, z: Value(QParams("uint8", s, z)), st.floats(1e-3, 0.2), st.integers(0, 255))
    nonnegative = st.builds(lambda s: Value(QParams("int8", s, 0), is_nonnegative=True), st.floats(1e-3, 0.2))
    return st.one_of(signed, unsigned, nonnegative)


def _extremes() -> st.SearchStrategy[str]:
    return st.sampled_from(["random", "random", "low", "high"])


def _epilogues() -> st.SearchStrategy[Epilogue | None]:
    return st.sampled_from([None, *(Epilogue(kind, row.example) for kind, row in ACTIVATIONS.items())])


def _codes(shape: tuple[int, ...], value: Value, kind: str = "random") -> torch.Tensor:
    assert value.qparams is not None
    low, high = value.qparams.range
    low = 0 if value.is_nonnegative else low
    if kind != "random":
        return torch.full(shape, low if kind == "low" else high, dtype=value.qparams.torch_dtype)
    return torch.randint(low, high + 1, shape).to(value.qparams.torch_dtype)


def _weight(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    if kind != "random":
        return torch.full(shape, -127 if kind == "low" else 127, dtype=torch.int8)
    return torch.randint(-127, 128, shape).to(torch.int8)


def _compare_linear(
    op: str, x: torch.Tensor, value: Value, weight: torch.Tensor, out_value: Value | None, epilogue: Epilogue | None,
    attrs: dict[str, object], with_residual: bool,
) -> None:  # fmt: skip
    """The node by the native runtime and by the reference, with a residual where asked."""
    tensors = {"w": weight, "s": torch.rand(weight.shape[0]) * 1e-3 + 1e-4, "b": torch.randn(weight.shape[0])}
    names = {"weight": "w", "weight_scale": "s", "bias": "b"}
    values = {"x": value} | ({"y": out_value} if out_value is not None else {})
    nonnegative = out_value is not None and out_value.is_nonnegative
    if nonnegative:
        epilogue = Epilogue("relu")
    inputs = {"x": x}

    def program(residual: torch.Tensor | None) -> Program:
        args = (Ref("x"), None if residual is None else Ref("r"))
        node = Node(op, op, "y", args, attrs=names | attrs, epilogue=epilogue)
        given = inputs | ({} if residual is None else {"r": residual})
        described = tuple(Input(n, None, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in given.items())
        return Program(described, (node,), values, tensors, Ref("y"))

    if with_residual:
        shape = run_node(program(None), program(None).nodes[0], inputs).shape
        values["r"] = Value(QParams("uint8", 0.07, 120))
        inputs["r"] = _codes(tuple(shape), values["r"])
    chosen = program(inputs.get("r"))
    expected = run_node(chosen, chosen.nodes[0], inputs)
    runner = NativeRunner(chosen)
    actual = runner(list(inputs.values()))
    assert runner.in_torch == {}
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    tolerance = tie_tolerance(epilogue)
    if out_value is None:
        # The far tail of an activation may be flushed to zero. In torch's x * (1 + erf(x / sqrt(2))) / 2 the sum in
        # brackets cancels up to |x| = 6, with the noise of numbers around 1.
        entered = run_node(chosen, replace(chosen.nodes[0], epilogue=None), inputs)
        noise = 8 * 2.0**-24 * entered.abs().clamp(max=6) if tolerance > tie_tolerance(None) else 0
        flushed = max(1e-5 * float(expected.abs().max() if expected.numel() else 1), 1e-30)
        assert ((actual - expected).abs() <= 1e-4 * expected.abs() + flushed + noise).all()
        return
    if (epilogue is None or epilogue.bounds) and "avx512_vnni" in isa():
        assert torch.equal(expected, actual), f"{int((expected != actual).sum())} of {expected.numel()} codes differ"
    illegal, worst = disagreement(expected, actual, unrounded(chosen, chosen.nodes[0], inputs), tolerance)
    assert not illegal, f"{illegal} of {expected.numel()} codes differ, up to {worst} codes from a tie"


# --- whole models


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x) + x)
        return self.c(x.mean((2, 3)))


class Interrupted(nn.Module):
    """Something in the middle that only torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.silu(self.a(x))
        y = torch.cumsum(x, 1)
        return self.b(y), y


@pytest.fixture(scope="module")
def convolutions() -> Program:
    torch.manual_seed(0)
    return quantized_program(Convolutions(), torch.randn(4, 3, 12, 12))


def test_equals_the_reference_for_every_batch_and_layout(convolutions: Program) -> None:
    runner, reference = NativeRunner(convolutions), ReferenceRunner(convolutions)
    for batch in (1, 3, 16):
        x = torch.randn(batch, 3, 12, 12)
        expected = reference([x])
        assert sqnr_db(expected, runner([x])) > 40
        assert torch.equal(runner([x]), runner([x.contiguous(memory_format=torch.channels_last)]))
        assert torch.equal(runner([x]), runner([x.transpose(2, 3).contiguous().transpose(2, 3)]))
    assert runner([torch.randn(0, 3, 12, 12)]).shape == (0, 5)
    assert runner.in_torch == {}


def test_whole_equals_node_by_node(convolutions: Program) -> None:
    runner, x = NativeRunner(convolutions), torch.randn(2, 3, 12, 12)
    values: dict[str, object] = {convolutions.inputs[0].name: x}
    for index, node in enumerate(convolutions.nodes):
        values[node.output] = runner.run_node(index, values)
    assert torch.equal(values[convolutions.output_names()[0]], runner([x]))  # type: ignore[arg-type]


@pytest.mark.parametrize("in_torch", [False, True])
def test_steps_hand_codes_on_as_the_kernels_hold_them(convolutions: Program, in_torch: bool) -> None:
    x = torch.randn(2, 3, 16, 16)
    runner = NativeRunner(convolutions)
    if in_torch:  # every second node has a kernel
        runner.in_torch.update(dict.fromkeys(range(1, len(convolutions.nodes), 2), "asked for"))
    expected = dict(ReferenceRunner(convolutions).trace([x]))
    values: dict[str, Any] = {convolutions.inputs[0].name: x}
    raised = 0
    for index, node in enumerate(convolutions.nodes):
        if node.op == "size":
            values[node.output] = expected[index]
            continue
        given = [values[name] for name in dict.fromkeys(node.refs())]
        made = values[node.output] = runner.step(index)(given)
        form = convolutions.values.get(node.output)
        if form is not None and form.qparams is not None and form.qparams.torch_dtype is not made.dtype:
            made, raised = lowered(made), raised + 1
        assert torch.equal(made, expected[index]), node.output
    assert raised > 1


def test_what_has_no_kernel_runs_in_torch_between_sections() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 12)
    program = quantized_program(Interrupted(), x)
    runner = NativeRunner(program)
    for actual, expected in zip(runner([x]), ReferenceRunner(program)([x]), strict=True):
        assert sqnr_db(expected, actual) > 60
    assert list(runner.in_torch.values()) == ["layer cumsum (cumsum.default): a running sum of floats"]
    assert runner.int8_layers() == 2
    rows = runner.profile([x])
    assert [row["kernel"].startswith("torch ") for row in rows].count(True) == 1
    assert all(row["ms"] > 0 for row in rows)


class FloatConvolutions(nn.Module):
    """One int8 layer, and float convolutions of every kind around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.int8 = nn.Conv2d(12, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.grouped = nn.Conv2d(12, 6, (3, 2), padding=(1, 0), dilation=(1, 2), groups=3, bias=False)
        self.row = nn.Conv1d(6, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.int8(torch.relu(self.stem(x)))
        x = self.grouped(torch.relu(self.depthwise(x)))
        return self.row(x.flatten(2))


@pytest.mark.parametrize("batch", [1, 3])
def test_float_convolutions_are_native(batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 17, 14)
    layers = dict.fromkeys(("stem", "depthwise", "grouped", "row"), "float")
    program = quantized_program(FloatConvolutions(), x, layers=layers)
    runner = NativeRunner(program)
    assert sqnr_db(ReferenceRunner(program)([x]), runner([x])) > 60
    assert not runner.in_torch
    assert runner.int8_layers() == 1


@pytest.mark.parametrize("model", [Convolutions, FloatConvolutions])
@pytest.mark.parametrize("preset", PRESETS)
def test_two_terms_are_native(model: type[nn.Module], preset: str) -> None:
    """A layer's products are one step, and so is what writes codes and what these leave over."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 17, 14)
    qconfig = PRESETS[preset].model_copy(update={"input_terms": 2, "weight": WeightSpec(terms=2)})
    program = quantized_program(model(), x, qconfig)
    runner, reference = NativeRunner(program), ReferenceRunner(program)
    assert sqnr_db(reference([x]), runner([x])) > 50
    assert not runner.in_torch
    rows = runner.profile([x])
    products = [row["name"] for row in rows if re.search(r"igemm|depthwise", row["kernel"])]
    assert not [name for name in products if name.endswith((".low", ".rest"))]
    split = [row["name"] for row in rows if row["name"].endswith(".rest.sub")]
    # What no convolution writes, or what something else reads as float.
    assert split == (["x.rest.sub"] if model is FloatConvolutions else [f"{x}.rest.sub" for x in ("x", "relu", "mean")])


class SamePadding(nn.Module):
    """Padded as TensorFlow does it, more on one side: around reals, around codes, in front of every kind of kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.pointwise = nn.Conv2d(16, 8, 1, stride=2)
        self.dense = nn.Conv2d(8, 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = torch.relu(self.depthwise(F.pad(x, (1, 0, 0, 1))))
        x = torch.relu(self.pointwise(F.pad(x, (0, 1, 1, 0))))
        return self.dense(F.pad(x, (2, 3, 1, 2)))


def test_convolutions_do_the_padding_in_front_of_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 31, 30)
    program = quantized_program(SamePadding(), x)
    runner = NativeRunner(program)
    assert sqnr_db(ReferenceRunner(program)([x]), runner([x])) > 60
    kernels = [row["kernel"] for row in runner.profile([x])]
    # A kernel of one tap reaches over no padding; that one is written out.
    assert kernels.count("host.fill") == 1
    assert len(kernels) == 8


class Block(nn.Module):
    """A residual block of convolutions, then one number per channel and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.inner = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.outer = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("threads", [1, 2])
def test_large_batches_pass_steps_in_parts(threads: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 128, 128)  # 8 MiB of codes between the convolutions, more than any core's cache
    program = quantized_program(Block(), x[:2])
    runner = NativeRunner(program, threads=threads)
    together, one_by_one = runner([x]), torch.cat([runner([each]) for each in x.split(1)])
    assert torch.equal(together, one_by_one)
    parts = {row["name"]: row["parts"] for row in runner.profile([x], runs=1)}
    assert parts["inner"] == 16
    assert {row["parts"] for row in runner.profile([x[:2]], runs=1)} == {1}


class WrittenOutAttention(nn.Module):
    """softmax(q k / 4 + mask) v, operation by operation."""

    def __init__(self, shares_scores: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)
        self.register_buffer("mask", torch.where(torch.rand(9, 9) < 0.2, -torch.inf, torch.randn(9, 9)))
        self._shares_scores = shares_scores

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (f(x).view(-1, 9, 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / 4 + self.mask
        y = self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(-1, 9, 32))
        return (y, scores) if self._shares_scores else y


@pytest.mark.parametrize("shares_scores", [False, True])
def test_written_out_attention_is_one_kernel_unless_its_parts_are_asked_for(shares_scores: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 32)
    program = quantized_program(WrittenOutAttention(shares_scores), x)
    runner, reference = NativeRunner(program), ReferenceRunner(program)
    actuals, expecteds = (r([x]) if shares_scores else (r([x]),) for r in (runner, reference))
    for actual, expected in zip(actuals, expecteds, strict=True):
        finite = expected.isfinite()
        assert torch.equal(actual[~finite], expected[~finite])
        assert sqnr_db(expected[finite], actual[finite]) > 45
    kernels = [row["kernel"].partition(".")[2].partition(".")[0] for row in runner.profile([x])]
    assert ("attention" in kernels) is not shares_scores
    assert ("softmax" in kernels) is shares_scores


def test_a_busy_machine_does_not_choose_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds in which the system took a core away are repeated, until patience ends."""
    monkeypatch.setattr("quantflow.runtimes.native_ways.HOPELESS", math.inf)  # calls of a microsecond differ by more
    preempted = itertools.chain([0, 1, 1, 2], itertools.repeat(2))
    monkeypatch.setattr("resource.getrusage", lambda _who: SimpleNamespace(ru_nivcsw=next(preempted)))
    calls: list[str] = []
    native._interleaved_ms([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 5
    always = itertools.count()
    monkeypatch.setattr("resource.getrusage", lambda _who: SimpleNamespace(ru_nivcsw=next(always)))
    calls.clear()
    native._interleaved_ms([lambda: calls.append("a")], 2)
    assert calls == ["a", "a"]
    monkeypatch.setattr(native, "_PATIENCE_S", -1.0)
    native._interleaved_ms([lambda: calls.append("b"), lambda: calls.append("c")], 2)
    assert calls == ["a", "a", "b", "c", "b", "c"]


def test_threads_share_a_model(convolutions: Program) -> None:
    runner = NativeRunner(convolutions, threads=2)
    inputs = [torch.randn(1 + i % 3, 3, 12, 12) for i in range(12)]
    expected = [runner([x]) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: torch.equal(runner([inputs[i % 12]]), expected[i % 12]), range(800)))
    assert all(results)


def test_torchs_threads_are_borrowed_and_nothing_else_changes(convolutions: Program) -> None:
    assert lib.region_of_torch() is not None
    runner, x, large = NativeRunner(convolutions, threads=2), torch.randn(4, 3, 12, 12), torch.randn(512, 512)
    expected = NativeRunner(convolutions, threads=1)([x])
    before, products = torch.get_num_threads(), large @ large
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            assert torch.equal(large @ large, products)  # torch's team spins from here on
            assert torch.equal(runner([x]), expected)
    finally:
        torch.set_num_threads(before)


def test_what_beats_the_plain_way_once_is_asked_again(convolutions: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, x = NativeRunner(convolutions, threads=2), torch.randn(1, 3, 12, 12)
    monkeypatch.setattr(native_ways, "why_not_alone", lambda *_: "")  # it compares with a time measured here and now
    for again, chosen in (([5.0, 9.0], 2), ([9.0, 5.0], 1)):
        times = iter([[9.0, 5.0], again])
        monkeypatch.setattr(native, "_interleaved_ms", lambda _runs, _count, times=times: next(times))
        rows = runner.tune([x])
        assert [row["threads"] for row in rows if row["chosen"]] == [chosen]


def test_a_forked_child_computes_too(convolutions: Program) -> None:
    runner, x = NativeRunner(convolutions, threads=2), torch.randn(2, 3, 12, 12)
    expected = runner([x])
    child = os.fork()
    if child == 0:  # no pytest in here, whatever happens
        os._exit(0 if torch.equal(runner([x]), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_plans_are_kept_per_shape_and_bounded(convolutions: Program) -> None:
    runner = NativeRunner(convolutions)
    for size in range(4, 4 + 2 * PLANS_PER_SECTION):
        runner([torch.randn(1, 3, size, 5)])
    (plans,) = runner._plans.values()
    assert len(plans) == PLANS_PER_SECTION


def test_wrong_shapes_are_refused_by_name(convolutions: Program) -> None:
    with pytest.raises(ArtifactError, match=r"layer a.*takes 3 channels, has 4"):
        NativeRunner(convolutions)([torch.randn(1, 4, 12, 12)])


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Kernels for older CPUs give the same codes as this one's best."""
    import subprocess

    x = torch.randn(2, 3, 12, 12)
    model = quantflow.quantize(Convolutions(), [x], runtime="native")
    model.save(tmp_path / "art")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    script = (
        "import torch, quantflow; x, y = torch.load('expected.pt'); m = quantflow.load('art', runtime='native'); "
        "from quantflow.runtimes import native_library as lib; assert lib.host_isa() == 'generic'; "
        "assert torch.allclose(m(x), y, atol=float(y.abs().max()) * 0.05), (m(x) - y).abs().max()"
    )
    env = os.environ | {"QUANTFLOW_ISA": "generic", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- through the public interface


def test_auto_takes_it_and_says_so() -> None:
    choice = choose_runtime("auto", "cpu", "export")
    assert (choice.runtime.name, choice.device) == ("native", "cpu")
    assert choose_runtime("auto", "cpu", "torchscript").runtime.name == "native"
    assert choose_runtime("auto", "cpu", "imperative").runtime.name == "native"


def test_no_intel_gpu_lists_the_devices_found() -> None:
    if native_devices.has_intel_gpu():
        pytest.skip("this machine has an Intel GPU")
    with pytest.raises(UnavailableError, match="device: 'xpu' is not available; devices found: cpu") as refused:
        choose_runtime("native", "xpu")
    assert refused.value.exit_code == 4


def test_a_missing_library_leaves_the_others_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "library_path", lambda _: None)
    lib.library.cache_clear()
    native_devices.missing.cache_clear()
    try:
        choice = choose_runtime("auto", "cpu", "export")
        assert choice.runtime.name == "torch"
        assert "native" in choice.reason
        assert "was not built" in choice.reason
        with pytest.raises(UnavailableError, match="runtime: 'native' was not built for this installation"):
            choose_runtime("native")
    finally:
        monkeypatch.undo()
        lib.library.cache_clear()
        native_devices.missing.cache_clear()
    assert RUNTIMES["native"].missing("cpu") is None


def test_a_broken_library_is_one_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libquantflow_native.so").write_bytes(b"not a library")
    monkeypatch.setattr(lib, "library_path", lambda name: tmp_path / name)
    lib.library.cache_clear()
    try:
        with pytest.raises(UnavailableError, match="does not load"):
            lib.library()
    finally:
        monkeypatch.undo()
        lib.library.cache_clear()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_runs_natively_and_shows_its_fused_ops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    model = quantflow.quantize(Convolutions(), [x], mode="torchscript")
    assert isinstance(model, torch.jit.ScriptModule)
    assert model.results["runtime"]["chosen"] == "native"
    y = model(x)
    text = str(model.graph_for(x))
    assert "quantflow::native(" in text
    assert "quantflow::conv_sum_relu" in text
    model.save(str(tmp_path / "model.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "model.pt"))(x), y)
    model.save(tmp_path / "art")
    assert torch.equal(quantflow.load(tmp_path / "art")(x), y)


# --- the library refuses what is not a program


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is not what quantflow writes"),
        (b"[]", "must be an object"),
        (b'{"format": 2}', r"format: is 2, must be an integer in \[0, 1\]"),
        (b'{"format": 1, "inputs": [], "values": {}, "nodes": [{"name": "n", "op": "rm"}], "output": null}', "'rm'"),
        (b'{"format": 1, "inputs": [], "values": {"v": {"dtype": "int8", "scale": 0, "zero_point": 0, '
         b'"is_nonnegative": false}}, "nodes": [], "output": null}', "scale is 0, must be positive and finite"),
        (b'{"format": 1, "inputs": [], "values": {}, "nodes": [], "output": ' + b"[" * 3000 + b"]" * 3000 + b"}",
         "nested too deep"),
    ],
)  # fmt: skip
def test_bad_programs(text: bytes, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        lib.make("qf_program_parse", "qf_program_free", text, ctypes.c_size_t(len(text)), None, ctypes.c_size_t(0))


def test_files_are_opened_without_python(convolutions: Program, tmp_path: Path) -> None:
    """The C interface alone, from an artifact's files."""
    import json

    from quantflow.stages.record import weights_bytes

    (tmp_path / "program.json").write_text(json.dumps(convolutions.to_json()))
    (tmp_path / "weights").write_bytes(weights_bytes(convolutions))
    opened = lib.make(
        "qf_program_open",
        "qf_program_free",
        str(tmp_path / "program.json").encode(),
        str(tmp_path / "weights").encode(),
    )
    assert lib.library().qf_program_nodes(opened.pointer) == len(convolutions.nodes)
    (tmp_path / "weights").write_bytes(weights_bytes(convolutions)[:-40])
    with pytest.raises(ArtifactError, match="do not fit its shape or the file"):
        lib.make(
            "qf_program_open", "qf_program_free", str(tmp_path / "program.json").encode(),
            str(tmp_path / "weights").encode(),
        )  # fmt: skip


BOUND = """
import os, sys, torch, quantflow
torch.set_num_threads(2)
torch.randn(1 << 22).relu()  # has the OpenMP runtime make its team, and bind the caller
own, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
model = quantflow.load(sys.argv[1], device="cpu")
model(torch.randn(2, 3, 32, 32))
made = [os.sched_getaffinity(int(task)) for task in set(os.listdir("/proc/self/task")) - before]
print(len(own), len(made), any(places - own for places in made))
"""


def test_threads_do_not_share_the_place_that_openmp_leaves_their_maker(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    quantflow.quantize(net, [torch.randn(2, 3, 32, 32)], device="cpu").save(tmp_path / "model")
    command = [sys.executable, "-c", BOUND, str(tmp_path / "model")]
    settings = os.environ | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"}
    found = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "1", "torch's OpenMP runtime did not bind its caller"
    assert int(found[1]) > 0
    assert (found[2] == "True") == (len(os.sched_getaffinity(0)) > 1)
