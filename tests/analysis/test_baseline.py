"""Another artifact's figures in a run's results and report."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_models
import pytest

from quantflow.analysis.baseline import beside, read_baseline
from quantflow.cli import command as cli
from quantflow.errors import ArtifactError
from quantflow.stages.record import Record

SMALL = [
    "model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]", "data.calibration=4",
    "data.evaluation=4", "benchmark.rounds=1", "benchmark.min_round_ms=1", "report=quiet",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copy(Path(own_models.__file__), tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


pytestmark = pytest.mark.usefixtures("place")


def test_a_baseline_stands_beside_the_run_in_every_view() -> None:
    assert cli.run([*SMALL, "output=before", "layers={head: float}"]) == 0
    assert cli.run([*SMALL, "output=after"]) == 0
    assert "baseline" not in Record.load("after").results
    plain = Path("after/report.html").read_text()
    assert "Against the baseline" not in plain
    assert cli.run(["task=report", "artifact=after", "report.baseline=before"]) == 0
    results, before = Record.load("after").results, Record.load("before").results
    section = results["baseline"]
    assert section["artifact"] == "before"
    assert section["differences"] == []
    assert section["accuracy"]["sqnr_db"] == before["accuracy"]["sqnr_db"] != results["accuracy"]["sqnr_db"]
    assert "histograms" not in section["accuracy"]
    assert "settings" not in section["recipe"]
    for name in ("report.html", "report.md"):
        assert "Against the baseline" in Path("after", name).read_text()


def test_the_earlier_artifact_may_be_the_baseline_of_the_one_that_replaces_it() -> None:
    assert cli.run([*SMALL, "output=art"]) == 0
    earlier = Record.load("art").results
    assert cli.run([*SMALL, "output=art", "report.baseline=art", "data.evaluation=3"]) == 0
    section = Record.load("art").results["baseline"]
    assert section["benchmark"]["configs"][0]["speedup"] == earlier["benchmark"]["configs"][0]["speedup"]
    assert [text.split(":")[0] for text in section["differences"]] == ["data"]


def test_a_baseline_that_is_not_there_stops_the_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*SMALL, "output=art", "report.baseline=nowhere"]) == 2
    shown = capsys.readouterr()
    assert "nowhere" in shown.err
    assert "load" not in shown.out
    assert not Path("art").exists()


def test_a_changed_baseline_is_refused() -> None:
    assert cli.run([*SMALL, "output=art"]) == 0
    file = Path("art/results.json")
    file.write_text(file.read_text() + " ")
    with pytest.raises(ArtifactError, match=r"results\.json"):
        read_baseline("art")


def test_conditions_that_differ_are_named() -> None:
    def results(cpu: str, sha: str, threads: int) -> dict[str, Any]:
        return {
            "environment": {"cpu": cpu},
            "data": {"content_sha256": sha},
            "benchmark": {"threads": threads},
            "device": "cpu",
        }

    there, here = results("A", "a" * 64, 2), results("B", "b" * 64, 2)
    section = beside(there, here)
    assert section["differences"] == [
        "data: aaaaaaaaaaaa… there, bbbbbbbbbbbb… here",
        "processor: A there, B here",
    ]
    assert beside(there, there)["differences"] == []
    assert beside({}, here)["differences"] == []
    assert json.dumps(section)
