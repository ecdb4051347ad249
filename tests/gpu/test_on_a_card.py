"""The triton runtime on a CUDA card: every kernel, the three modes, scripts, recordings. Skipped without one."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import UnavailableError
from quantflow.ir.program import Program
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.triton import devices
from quantflow.tasks.selftest import quantized_program, selftest

pytestmark = pytest.mark.skipif(
    devices.missing("cuda") is not None, reason=f"no CUDA card here: {devices.missing('cuda')}"
)
MODES = ("export", "torchscript", "imperative")


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 32, 7, 2, 3), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1)
        self.pool, self.norm, self.fc = nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.norm(self.b(torch.relu(self.a(x)))) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, 64, 64) for _ in range(3)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def made(net: nn.Module, batches: list[torch.Tensor]) -> Callable[[str], Any]:
    kept: dict[str, Any] = {}

    def make(mode: str) -> Any:
        if mode not in kept:
            kept[mode] = qf.quantize(net, batches, mode=mode, device="cuda")
        return kept[mode]

    return make


def test_every_kernel_and_three_models_agree_with_the_reference() -> None:
    rows = selftest(lambda program: devices.build(program, "cuda"))
    assert [f"{row.kernel}: {failure}" for row in rows for failure in row.failures] == []


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_on_the_card(mode: str, made: Callable[[str], Any], net: nn.Module, batches: list[torch.Tensor]) -> None:
    model, x = made(mode), batches[0]
    assert model.results["runtime"]["chosen"] == "triton"
    assert model.results["device"] == "cuda"
    here = model(x)
    assert here.device.type == "cpu", "inputs on the CPU come back there"
    assert sqnr_db(net(x).detach(), here) > 20
    model = model.to("cuda") if mode == "imperative" else model
    for _ in range(3):  # eager, recorded, replayed
        there = model(x.cuda())
        assert there.device.type == "cuda"
        if mode == "imperative":  # the module's own float32 code, moved to the card with it
            assert sqnr_db(here, there.cpu()) > 40
        else:
            assert torch.equal(there.cpu(), here)


def test_an_artifact_made_on_the_cpu_runs_on_the_card(
    net: nn.Module, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = qf.quantize(net, batches, device="cpu")
    model.save(tmp_path / "artifact")
    loaded = qf.load(tmp_path / "artifact", runtime="triton", device="cuda")
    assert sqnr_db(model(batches[0]), loaded(batches[0].cuda()).cpu()) > 40


def test_a_script_is_saved_loaded_and_moved(
    made: Callable[[str], Any], batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model, x = made("torchscript"), batches[0]
    model.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt", map_location="cpu").to("cuda")
    assert torch.equal(loaded(x.cuda()), model(x.cuda()))
    assert torch.equal(loaded(x), model(x))
    shown = str(loaded.graph_for(x.cuda()))
    assert "quantflow::conv_relu" in shown
    assert "quantflow::conv_sum_relu" in shown


def test_a_script_of_the_cpu_runs_on_the_card(net: nn.Module, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = qf.quantize(net, batches, mode="torchscript", device="cpu")
    model.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt").to("cuda")
    assert sqnr_db(model(batches[0]), loaded(batches[0].cuda()).cpu()) > 40


def test_threads_on_streams_of_their_own(made: Callable[[str], Any]) -> None:
    model = made("export")
    images = {size: torch.full((size, 3, 64, 64), size / 8, device="cuda") for size in (1, 2, 3, 4)}
    expected = {size: model(image) for size, image in images.items()}
    wrong: list[int] = []

    def work(size: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                if not torch.equal(model(images[size]), expected[size]):
                    wrong.append(size)
                    return

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(1 + i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_recordings_are_bounded_and_memory_does_not_grow(made: Callable[[str], Any]) -> None:
    model = made("export")

    def calls(count: int) -> None:
        for i in range(count):
            model(torch.randn(1 + i % 20, 3, 64, 64, device="cuda"))

    calls(60)
    before = torch.cuda.memory_allocated()
    calls(400)
    assert torch.cuda.memory_allocated() <= before * 1.2 + 2**22
    recordings = model.compiled.runner._recordings
    assert not recordings.refused
    assert len(recordings._kept) <= 16


class Attends(nn.Module):
    """Attention between residual sums, with a mask of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(128), nn.Linear(128, 384), nn.Linear(128, 128)
        self.last, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, 2, 64).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (x[..., 0] > -1)[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.last(x))))


@pytest.mark.parametrize(("floats", "least"), [("bfloat16", 30), ("float16", 40)])
def test_floats_in_half_precision(floats: str, least: float) -> None:
    torch.manual_seed(0)
    net, x = Attends().eval(), torch.randn(4, 75, 128)
    full = qf.quantize(net, [x], device="cuda")
    half = qf.quantize(net, [x], device="cuda", policy={"float": floats})
    assert half.results["runtime"]["float"] == floats
    expected = full(x.cuda())
    first = half(x.cuda())
    assert first.dtype is torch.float32
    assert sqnr_db(expected, first) > least
    for _ in range(3):
        assert torch.equal(half(x.cuda()), first)
    decided = qf.quantize(net, [x], device="cuda", policy={"float": "auto"}).results["runtime"]
    assert re.fullmatch(
        r"policy\.float=auto: .* dB to the float model in bfloat16, .* dB in float32", decided["float_reason"]
    )
    half_db, full_db = map(float, re.findall(r"([\d.]+) dB", decided["float_reason"]))
    assert (decided["float"] == "bfloat16") is (half_db >= full_db - 1) or abs(
        half_db - full_db + 1
    ) < 0.2  # as printed


def test_what_can_not_be_recorded_still_runs() -> None:
    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y * torch.histc(y, 4).sum()

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program: Program = quantized_program(Finds(), x)
    runner = devices.build(program, "cuda")
    first = runner([x.cuda()])
    for _ in range(3):
        assert torch.equal(runner([x.cuda()]), first)


def test_what_is_not_there_is_said(net: nn.Module, batches: list[torch.Tensor]) -> None:
    with pytest.raises(UnavailableError, match=r"devices found: cpu.*cuda:0"):
        qf.quantize(net, batches, device="xpu")
    with pytest.raises(UnavailableError, match="it runs on the CPU and on Intel GPUs"):
        qf.quantize(net, batches, device="cuda", runtime="native")


def test_times_are_of_the_card(made: Callable[[str], Any], batches: list[torch.Tensor]) -> None:
    rows = made("export").compiled.runner.profile([batches[0].cuda()])
    assert all(0 < row["ms"] < 5 for row in rows if row["kernel"].startswith("triton"))
    assert {"triton.quantize", "triton.conv_relu", "triton.max_pool"} <= {row["kernel"] for row in rows}
