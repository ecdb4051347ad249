"""The rates by which native kernels are cut: cached, never believed blindly, without effect on results."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.report import tables
from quantflow.runtimes import native_library as lib
from quantflow.runtimes import native_rates, native_ways
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.native_devices import findings, missing
from quantflow.runtimes.runner import STEPS_ON_LINES

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason="the native library was not built here")


def as_a_new_process() -> None:
    native_rates._in_use = None
    lib.call("qf_host_set_rates", None, ctypes.c_size_t(0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    as_a_new_process()
    yield tmp_path / "quantflow"
    as_a_new_process()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Measuring is not what is tested: it sets rates at once. Gives the calls."""
    asked, call = [], lib.call

    def quickly(name: str, *args: object) -> None:
        asked.append(name)
        if name != "qf_host_measure_rates":
            return call(name, *args)
        values = [*(3.0 * value for _, value in sorted(lib.host_rates()["built_in"].items())), 2.5]
        return call("qf_host_set_rates", (ctypes.c_double * len(values))(*values), ctypes.c_size_t(len(values)))

    monkeypatch.setattr(lib, "call", quickly)
    monkeypatch.setattr(lib, "host_isa", lambda: "avx2")
    return asked


def test_measured_once_then_read_from_the_cache(cache: Path) -> None:
    if lib.host_isa() == "generic":
        pytest.skip("rates are measured where there are vectors")
    assert native_rates.take_up(2) == native_rates.InUse()
    assert not cache.exists()
    assert native_rates.measure(2)
    first = native_rates.described(2)
    for name, usual in first["built_in"].items():
        assert usual / 4.01 <= first["rates"][name] <= 4.01 * usual, name
    assert 0.7 <= first["ghz"] <= 12
    assert first["source"] == "measured"
    assert not native_rates.measure(2), "once per process"
    as_a_new_process()
    again = native_rates.take_up(2)
    assert (again.source, again.measured_at) == ("cached", first["measured_at"])
    assert native_rates.described(2)["rates"] == first["rates"]
    assert not native_rates.measure(2)
    as_a_new_process()
    assert native_rates.take_up(1).source == "built in", "another number of threads"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"", lambda _: b"\x00{{", lambda _: b"[1]", lambda text: text[:-40], lambda _: b"[" * 100000,
        lambda text: text.replace(b'"ghz": 2.5', b'"ghz": NaN'), lambda text: text.replace(b'"ghz": 2.5', b'"ghz": -1'),
        lambda text: text.replace(b'"ghz"', b'"hz"'), lambda text: text.replace(b"2.5", b'"fast"'),
    ],
)  # fmt: skip
def test_garbage_in_the_cache_is_said_and_measured_again(spoil, cache: Path, quick: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert native_rates.measure(2)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(spoil(good))
    as_a_new_process()
    found = native_rates.take_up(2)
    assert found.source == "built in"
    assert f"'{file}' held something else" in found.note
    assert native_rates.described(2)["rates"] == native_rates.described(2)["built_in"]
    assert native_rates.measure(2)
    assert str(file) in native_rates.take_up(2).said
    as_a_new_process()
    assert native_rates.take_up(2).source == "cached"
    assert quick.count("qf_host_measure_rates") == 2


def test_rates_of_another_library_are_measured_again(cache: Path, quick: list[str]) -> None:
    assert native_rates.measure(2)
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    content["key"]["library"] = "another"
    file.write_text(json.dumps(content))
    as_a_new_process()
    assert native_rates.take_up(2) == native_rates.InUse()
    assert native_rates.measure(2)
    assert quick.count("qf_host_measure_rates") == 2


def test_rates_far_off_are_held_near_the_built_in_ones(cache: Path, quick: list[str]) -> None:
    native_rates.measure(2)
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    content["rates"] |= {"product": 1e9, "finishing": 1e-9}
    file.write_text(json.dumps(content))
    as_a_new_process()
    native_rates.take_up(2)
    found = native_rates.described(2)
    assert found["rates"]["product"] == pytest.approx(4 * found["built_in"]["product"])
    assert found["rates"]["finishing"] == pytest.approx(found["built_in"]["finishing"] / 4)
    assert quick


def test_a_cache_that_cannot_be_used_is_said(cache: Path, quick: list[str]) -> None:
    cache.write_text("in the way")
    assert "can't be read" in native_rates.take_up(2).note
    assert native_rates.measure(2)
    assert "not kept" in native_rates.take_up(2).note
    assert quick


@pytest.mark.usefixtures("quick")
def test_doctor_shows_the_rates() -> None:
    (rates, caches) = [row.found for row in findings() if row.topic in ("int8 rates", "caches")]
    assert "product " in rates
    assert "at 2.50 GHz (measured 20" in rates
    assert "KiB a core" in caches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.body = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.body(torch.relu(self.stem(x))))
        return self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> qf.Quantized:
    torch.manual_seed(0)
    return qf.quantize(Net().eval(), [torch.randn(4, 3, 48, 48)], benchmark=False, runtime="native")


@pytest.mark.parametrize("threads", [2, native_ways.MANY_THREADS])
def test_what_was_tried_and_by_which_rates(model: qf.Quantized, quick: list[str], threads: int) -> None:
    runner = NativeRunner(model.record.program, threads=threads)
    tries = native_ways.tries_of(threads)
    assert runner.choices() == {}
    rows = runner.tune([torch.randn(1, 3, 48, 48)])
    choices = runner.choices()
    assert choices["rates"]["source"] == "measured"
    assert quick.count("qf_host_measure_rates") == 1
    (batch,) = choices["batches"]
    assert {row["name"] for row in batch["layers"]} >= {"head"}
    for row in batch["layers"]:
        cuts = [way for way in row["ways"] if "shape" not in way]  # others' kernels are tried beyond that
        assert 1 <= len(cuts) <= tries.most
        least = cuts[0]["predicted_ms"]
        assert all(least <= way["predicted_ms"] <= (1 + tries.margin) * least for way in cuts)
        assert row["ways"][row["kept"]]["ms"] <= row["ways"][0]["ms"]
    assert [row["cuts"] for row in rows if row["chosen"]] == [native_ways.kept(batch["layers"])]
    json.dumps(choices)
    said = " ".join(next(row for row in tables.figures({"warmup": {"choices": choices}}).rows if "cuts" in row[0]))
    assert "tried" in said
    assert "rates measured 20" in said


def test_rates_and_cuts_never_change_a_result(model: qf.Quantized) -> None:
    program, x = model.record.program, torch.randn(3, 3, 48, 48)
    as_a_new_process()
    native_rates.take_up(2)
    runner = NativeRunner(program, threads=2)
    expected = runner([x])
    for factor in (0.25, 4.0):
        usual = [value for _, value in sorted(lib.host_rates()["built_in"].items())]
        values = [*(value * (factor if i % 2 else 1 / factor) for i, value in enumerate(usual)), 3.0]
        lib.call("qf_host_set_rates", (ctypes.c_double * len(values))(*values), ctypes.c_size_t(len(values)))
        assert torch.equal(NativeRunner(program, threads=2)([x]), expected)
    ((_, given, plan),) = runner._sections([x], 2)
    # Where Winograd takes a 3x3 convolution, that one has no cut to try.
    shapes = 2 if any("winograd" in row["kernel"] for row in runner.profile([x], 1)) else 3
    assert len(native_ways.try_ways(plan, given, 2, native_ways.Tries(5, 10.0))) >= shapes
    runner._forget_plans()
    assert torch.equal(runner([x]), expected)


class Blocks(nn.Module):
    """A pointwise, a depthwise and a pointwise convolution with a residual, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(32, 96, 1),
                nn.ReLU6(),
                nn.Conv2d(96, 96, 3, padding=1, groups=96),
                nn.ReLU6(),
                nn.Conv2d(96, 32, 1),
            )
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        for block in self.blocks:
            y = y + block(y)
        return y


@pytest.mark.usefixtures("cache")
def test_steps_that_run_together_are_tried_both_ways_and_give_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 48, 48)
    program = qf.quantize(Blocks().eval(), [x], benchmark=False, runtime="native").record.program
    as_a_new_process()
    expected = NativeRunner(program, threads=1)([x])
    runner = NativeRunner(program, threads=3)
    row = {"batch": 1, "asked_threads": 3, "threads": 3, "chunk": 0, "chosen": True}
    assert torch.equal(runner([x]), expected)
    ((_, given, plan),) = runner._sections([x], 3)
    rows = native_ways.try_ways(plan, given, 2, native_ways.OF_FEW_THREADS)
    tried = [row for row in rows if row["kernel"] == STEPS_ON_LINES]
    assert tried
    for found in tried:
        apart, together = sorted(found["ways"], key=lambda way: -way["rows"])
        assert apart["rows"] == 24
        assert 1 <= together["rows"] < 24
        for rows in (together["rows"], 24, 5, 2**39):
            runner.adopt([{**row, "cuts": [[found["shape"], rows, 1]]}])
            runner._forget_plans()
            assert torch.equal(runner([x]), expected)
        for kept, said in ((found["ways"].index(together), f"{found['count']} runs of steps line by line"), (None, "")):
            choices = {"batches": [{"layers": [{**found, "kept": kept}]}]}
            (line,) = (row for row in tables.figures({"warmup": {"choices": choices}}).rows if "cuts" in row[0])
            assert ("line by line" in " ".join(line)) is bool(said)
            assert said in " ".join(line)


def test_an_artifact_brings_its_cuts_and_never_its_rates(model: qf.Quantized, tmp_path: Path) -> None:
    runner = NativeRunner(model.record.program, threads=2)
    row = {"batch": 1, "asked_threads": 2, "threads": 2, "chunk": 0, "chosen": True}
    x = torch.randn(1, 3, 48, 48)
    expected = runner([x])
    for cuts in (
        None,
        3,
        [[]],
        [["x", 1]],
        [["x", "1", 2]],
        [["x", 2**70, 1]],
        [["x", True, 1]],
        [["1x64x128", -1, 0]],
        [["1x64x128", -(2**70), 1]],
        [["\ud800", 1, 1]],
    ):
        runner.adopt([{**row, "cuts": cuts}])
        assert torch.equal(runner([x]), expected)
    model.save(tmp_path / "art")
    assert not [file for file in (tmp_path / "art").rglob("*") if "rates-" in file.name]
    as_a_new_process()
    assert torch.equal(qf.load(tmp_path / "art")(x), model(x))


def test_one_thread_is_not_tried_where_it_is_predicted_to_lose() -> None:
    layers = [{"count": 2, "ways": [{"predicted_ms": 1.0, "ms": 2.0}]}]
    layers += [{"count": 1, "kernel": STEPS_ON_LINES, "ways": [{"predicted_ms": 9.0, "ms": 1.0}]}]

    class Plan:
        handle = None

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(native_ways, "predicted_ms", lambda _: 4.0)
        assert native_ways.why_not_alone(layers, [Plan()], 2, 7.0) == ""  # type: ignore[list-item]
        why = native_ways.why_not_alone(layers, [Plan()], 2, 6.0)  # type: ignore[list-item]
    assert why == "1 thread: its int8 steps alone are predicted to take 8 ms, 2 threads took 6"
    assert native_ways.why_not_alone([], [], 2, 1.0) == ""
