"""Each layer's own share of the error, measured on real programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.cli import command as cli
from quantflow.errors import RecipeError
from quantflow.ir import float_passes
from quantflow.search.sensitivity import noise, plot_ready

#: `1` has one weight that dwarfs the others: with one scale per tensor its codes are nearly all zero.
BAD = "1"


def fragile() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[1].weight[0, 0, 0, 0] = 6.0
    return net


def batches(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]


PER_TENSOR = {"weight": {"granularity": "per_tensor"}}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_worst_layer_comes_first(place: Path) -> None:
    found = qf.sensitivity(fragile(), batches(), qconfig=PER_TENSOR)
    assert [row["rank"] for row in found["layers"]] == [1, 2, 3, 4]
    assert {row["layer"] for row in found["layers"]} == {"0", "1", "3", "6"}
    worst = found["layers"][0]
    assert worst["layer"] == BAD
    # What int8 in it alone costs is nearly all that int8 costs, and float in it alone gives nearly all back.
    assert worst["int8_alone"]["sqnr_db"] < found["all_int8"]["sqnr_db"] + 2
    assert worst["float_alone"]["gain_db"] > 4
    assert worst["float_alone"]["noise_back"] > 0.6
    assert all(row["int8_alone"]["sqnr_db"] > worst["int8_alone"]["sqnr_db"] + 6 for row in found["layers"][1:])
    assert all(math.isfinite(row["float_alone"]["added_ms"]) for row in found["layers"])
    assert list((place / "cache/quantflow/sensitivity").iterdir())


@pytest.mark.parametrize("stands_in", [False, True])
def test_float_alone_is_the_run_with_that_layer_in_float(stands_in: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digit, unless the graph stands for the float model on the batch that calibration computed last."""
    if not stands_in:
        monkeypatch.setattr(float_passes, "memory_bytes", lambda: 0)
    found = qf.sensitivity(fragile(), batches(), qconfig=PER_TENSOR)
    (row,) = (row for row in found["layers"] if row["layer"] == BAD)
    others = {name: "float" for name in ("0", "3", "6")}
    for figures, layers in ((row["float_alone"], {BAD: "float"}), (row["int8_alone"], others)):
        own = qf.quantize(fragile(), batches(), qconfig=PER_TENSOR, layers=layers).results["accuracy"]
        assert figures["sqnr_db"] == pytest.approx(own["sqnr_db"], rel=1e-6 if stands_in else 0, abs=0)
        assert figures["agreement"] == own["agreement"]


def test_what_was_measured_is_not_measured_again(place: Path) -> None:
    first = qf.sensitivity(fragile(), batches(), qconfig=PER_TENSOR)
    again = qf.sensitivity(fragile(), batches(), qconfig=PER_TENSOR)
    assert (first["resumed"], again["resumed"]) == (0, 9)
    assert {**again, "resumed": 0} == first  # times included: nothing ran
    assert qf.sensitivity(fragile(), batches(seed=2), qconfig=PER_TENSOR)["resumed"] == 0
    assert qf.sensitivity(fragile(), batches(), qconfig=PER_TENSOR, samples=4)["resumed"] == 0
    changed = fragile()
    with torch.no_grad():
        changed[0].bias += 1e-3
    assert qf.sensitivity(changed, batches(), qconfig=PER_TENSOR)["resumed"] == 0
    # An interrupted one keeps the layers it had.
    for file in (place / "cache/quantflow/sensitivity").iterdir():
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:5]))
    assert qf.sensitivity(fragile(), batches(), qconfig=PER_TENSOR)["resumed"] == 4


def test_samples_are_the_setting() -> None:
    few = qf.sensitivity(fragile(), batches(), samples=4)
    all_of_them = qf.sensitivity(fragile(), batches(), samples=16)
    assert (few["samples"], all_of_them["samples"]) == (4, 16)
    assert few["all_int8"]["sqnr_db"] != all_of_them["all_int8"]["sqnr_db"]
    with pytest.raises(RecipeError, match=r"sensitivity\.samples: found 0; must be at least 1"):
        qf.sensitivity(fragile(), batches(), samples=0)


def test_a_single_layer_and_a_matmul() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x)
            return torch.matmul(q, q.transpose(1, 2))

    torch.manual_seed(0)
    data = [torch.randn(2, 4, 8)]
    found = qf.sensitivity(Attention().eval(), data, layers={"matmul": "int8"})
    by_name = {row["layer"]: row for row in found["layers"]}
    assert by_name["matmul"]["int8_alone"] is None
    assert by_name["matmul"]["float_alone"]["gain_db"] > 0
    (only,) = qf.sensitivity(Attention().eval(), data)["layers"]
    assert only["float_alone"]["sqnr_db"] == math.inf
    assert only["float_alone"]["noise_back"] == 1
    flat = plot_ready(qf.sensitivity(Attention().eval(), data))
    assert json.loads(json.dumps(flat, allow_nan=False))["layers"][0]["float_alone_sqnr_db"] is None


def test_the_task_prints_a_ranking_and_writes_it_for_plots(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["task=sensitivity", "recipe=mnist_cnn_sym_int8", "data.calibration=16", "sensitivity.samples=16"]
    assert cli.run([*arguments, "model.weights=random"]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    written: dict[str, Any] = json.loads((place / "outputs/mnist_cnn_sym_int8.sensitivity.json").read_text())
    start = next(n for n, line in enumerate(lines) if line.startswith("layer "))
    shown = [line.split()[0] for line in lines[start + 1 :]][:4]
    assert shown == [row["layer"] for row in written["layers"]]
    assert "agreement, int8 alone" in lines[start]
    assert lines[-1].endswith("saved in outputs/mnist_cnn_sym_int8.sensitivity.json")
    numbers = [v for row in written["layers"] for v in row.values() if not isinstance(v, str)]
    assert all(v is None or isinstance(v, (int, float)) for v in numbers)
    assert [path.name for path in (place / "outputs").iterdir()] == ["mnist_cnn_sym_int8.sensitivity.json"]


def test_noise_is_the_power_of_the_error() -> None:
    assert noise({"sqnr_db": 20.0}) == pytest.approx(0.01)
    assert noise({"sqnr_db": math.inf}) == 0
    assert noise({"sqnr_db": math.nan}) == math.inf
