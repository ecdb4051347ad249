"""What doctor and the report say of a card, on a machine that has none: the cards are made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantflow import runtimes
from quantflow.report import tables
from quantflow.runtimes.triton import devices
from quantflow.stages.benchmark import Timing, comparison, interleaved


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    properties = SimpleNamespace(name="A card", total_memory=80 * 2**30, driver_version="1.2.3")
    interface = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 1,
        get_device_properties=lambda _: properties,
    )
    monkeypatch.setattr(torch, "xpu", interface)
    monkeypatch.setattr(torch.version, "xpu", "20260000", raising=False)
    monkeypatch.setattr(devices, "find_spec", lambda _: object())
    devices.missing.cache_clear()
    yield
    devices.missing.cache_clear()


@pytest.mark.usefixtures("a_card")
def test_doctor_names_every_card_and_what_runs_on_it() -> None:
    found = {finding.topic: finding.found for finding in devices.findings()}
    assert found["xpu:0"] == found["xpu:1"]
    assert found["xpu:1"].startswith("A card, memory 80.0 GiB, driver 1.2.3, xpu 20260000, triton ")
    assert "int8 on runtime triton in every mode; the float model, calibration" in found["device=xpu"]


@pytest.mark.usefixtures("a_card")
def test_results_describe_the_current_card() -> None:
    assert runtimes.card("xpu")["name"] == "A card"
    assert runtimes.card("cpu") == {}


def test_nvidias_driver_is_read_from_its_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 13\n"
    )
    assert devices._nvidia_driver(file) == "580.95.05"
    assert devices._nvidia_driver(tmp_path / "none") is None


def test_the_report_puts_bfloat16_beside_int8() -> None:
    timings = {name: Timing(ms, ms, 0.0, (ms,), 1) for name, ms in (("float", 4.0), ("int8", 1.0), ("bfloat16", 1.5))}
    results: dict[str, Any] = {
        "benchmark": {"configs": [comparison(2, timings)], "on": "cuda:0", "rounds": 7, "card_memory_bytes": 2**30},
        "card": {"name": "A card", "driver": "1.2.3"},
        "device": "cuda",
    }
    table = tables.figures(results)
    rows = {row[0]: row for row in table.rows}
    assert rows["bfloat16, compiled, batch 2"][1:] == ("1.5 +- 0 ms", "1 +- 0 ms", "1.5x as fast")
    assert rows["peak memory of the card"][2] == "1073.7 MB"
    assert "events on cuda:0" in table.caption
    assert ("card: driver", "1.2.3") in {row[:2] for row in tables.settings(results).rows}


def test_a_devices_own_clock_is_what_counts() -> None:
    counted: list[int] = []

    def clock(call: Any, calls: int) -> float:
        counted.append(calls)
        call()
        return 2.0 * calls

    timing = interleaved({"a": lambda: None}, rounds=3, min_round_ms=10, clock=clock)["a"]
    assert timing.median_ms == 2.0
    assert timing.calls_per_round == 5
    assert counted == [1, 5, 5, 5]
