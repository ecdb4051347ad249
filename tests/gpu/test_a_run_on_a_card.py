"""A whole run on a CUDA card: calibration, algorithms, evaluation, benchmark, what goes wrong. Skipped without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import UnavailableError
from quantflow.runtimes.triton import devices
from quantflow.stages.calibrate import CalibrationTable

pytestmark = pytest.mark.skipif(
    devices.missing("cuda") is not None, reason=f"no CUDA card here: {devices.missing('cuda')}"
)
#: How far an end of a range that a card measured may lie from the CPU's, as a share of the range.
TABLE_BOUND = 1e-4
MODES = ("export", "torchscript", "imperative")
FULL = {"name": "bias_correction", "method": "full"}
ALGORITHMS = ["equalize", "smooth", "unsigned", "activation_scale", FULL, "gptq"]


class Block(nn.Module):
    """Convolutions, a residual sum, a norm and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, 1, 1)
        self.ln, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = (torch.relu(self.b(x)) + x).flatten(2).transpose(1, 2)
        x = x + torch.arange(x.shape[1], device=x.device).reshape(1, -1, 1) / 100
        return self.down(torch.nn.functional.gelu(self.up(self.ln(x))))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 16, 16) for _ in range(6)]


def on_the_cpu(model: Any) -> list[str]:
    return [notice for notice in model.results["notices"] if "run on the CPU" in notice]


def apart(a: CalibrationTable, b: CalibrationTable) -> float:
    worst = 0.0
    for name, observer in a.observers.items():
        (low, high), (other_low, other_high) = observer.range(), b.observers[name].range()
        worst = max(worst, max(abs(low - other_low), abs(high - other_high)) / (high - low))
    return worst


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram", "percentile", "mse", "entropy"])
def test_the_table_is_the_cpus(observer: str, net: nn.Module, batches: list[torch.Tensor]) -> None:
    qconfig = {"activation": {"observer": observer}}
    here = qf.quantize(net, batches, device="cpu", qconfig=qconfig, mode="torchscript")
    there = qf.quantize(net, batches, device="cuda", qconfig=qconfig, mode="torchscript")
    assert on_the_cpu(there) == []
    # A count next to a bin's edge may fall on its other side, and a search then end one step further.
    bound = TABLE_BOUND if observer in ("minmax", "moving_average") else 1 / 64
    assert apart(here.record.table, there.record.table) <= bound


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_calibrated_there(mode: str, net: nn.Module, batches: list[torch.Tensor]) -> None:
    here = qf.quantize(net, batches, device="cpu", mode=mode)
    there = qf.quantize(net, batches, device="cuda", mode=mode)
    assert on_the_cpu(there) == []
    assert apart(here.record.table, there.record.table) <= TABLE_BOUND
    assert there.results["accuracy"]["sqnr_db"] == pytest.approx(here.results["accuracy"]["sqnr_db"], abs=1.0)
    assert there.results["card"]["calibration, evaluation and float on"] == "cuda:0"


def test_algorithms_come_to_what_they_do_on_the_cpu(net: nn.Module, batches: list[torch.Tensor]) -> None:
    here = qf.quantize(net, batches, device="cpu", algorithms=ALGORITHMS, mode="torchscript")
    there = qf.quantize(net, batches, device="cuda", algorithms=ALGORITHMS, mode="torchscript")
    assert on_the_cpu(there) == []
    assert there.results["accuracy"]["sqnr_db"] == pytest.approx(here.results["accuracy"]["sqnr_db"], abs=1.0)


def test_a_model_and_batches_that_are_on_the_card(net: nn.Module, batches: list[torch.Tensor]) -> None:
    import copy

    moved = copy.deepcopy(net).cuda()
    model = qf.quantize(moved, [x.cuda() for x in batches], device="cuda")
    assert any("the model is on cuda:0: a copy of it on the CPU was quantized" in n for n in model.results["notices"])
    assert next(moved.parameters()).is_cuda
    assert model(batches[0].cuda()).is_cuda
    assert model.record.program.to_json() == qf.quantize(net, batches, device="cuda").record.program.to_json()


def test_float32_is_not_cut_to_ten_bits_and_the_settings_come_back(net: nn.Module, batches: list[torch.Tensor]) -> None:
    before = torch.backends.cudnn.allow_tf32
    qf.quantize(net, batches, device="cuda", mode="torchscript")
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_the_benchmark_has_compiled_bfloat16_and_its_times_are_of_events(batches: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    model = qf.quantize(convolutions, batches, device="cuda", benchmark=True)
    section = model.results["benchmark"]
    (config,) = section["configs"]
    assert section["on"] == "cuda:0"
    assert section["notices"] == []
    assert config["bfloat16"]["median_ms"] > 0
    assert config["speedup_bfloat16"] == pytest.approx(config["bfloat16"]["median_ms"] / config["int8"]["median_ms"])
    worse = [n for n in model.results["notices"] if "not worth having" in n]
    assert bool(worse) is (config["speedup_bfloat16"] <= 1)
    assert section["per_layer"]


def _path(*folders: str | Path) -> str:
    """A PYTHONPATH that begins with these."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_too_little_memory_is_said(net: nn.Module) -> None:
    big = [torch.randn(8, 3, 160, 160)]
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-4)
        with pytest.raises(UnavailableError, match=r"device: cuda has too little memory.*data\.batch_size"):
            qf.quantize(net, big, device="cuda", mode="torchscript")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    qf.quantize(net, [torch.randn(2, 3, 8, 8)], device="cpu", mode="torchscript")


def test_a_kernel_that_can_not_be_built_is_said(tmp_path: Path) -> None:
    assembler = tmp_path / "ptxas"
    assembler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 12.8, V12.8.93" && exit 0\nexit 1\n')
    assembler.chmod(0o755)
    code = (
        "import torch, quantflow as qf\n"
        "qf.quantize(torch.nn.Linear(32, 32), [torch.randn(4, 32)], device='cuda').save('artifact')"
    )
    variables = dict.fromkeys(("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"), str(assembler))
    root = str(Path(qf.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables | {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": _path(root)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "UnavailableError: runtime triton: a kernel can't be built for" in done.stderr
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("workers", [2])
def test_workers_on_cards_make_the_table_of_one(workers: int, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()\n"
    )
    root = str(Path(qf.__file__).parents[1])
    job = [
        "-m", "quantflow", "model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]",
        "data.calibration=64", "data.evaluation=16", "data.batch_size=8", "device=cuda", "benchmark=disabled",
        "mode=torchscript", "report=quiet",
    ]  # fmt: skip
    starts = {"one": [], "several": ["-m", "quantflow.torchrun", "--nproc-per-node", str(workers)]}
    for name, start in starts.items():
        done = subprocess.run(
            [sys.executable, *start, *job, f"output={name}"],
            env=os.environ | {"PYTHONPATH": _path(root, tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    for file in ("calibration.safetensors", "program.json", "weights.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "several" / file).read_bytes(), file


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_copied_ahead_to_the_same_table(
    mode: str, net: nn.Module, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantflow.stages import calibrate

    ahead = qf.quantize(net, batches, device="cuda", mode=mode)
    monkeypatch.setattr(calibrate, "_brought", lambda _place, given, _beside: ((batch, None) for batch in given))
    assert qf.quantize(net, batches, device="cuda", mode=mode).record.table == ahead.record.table
