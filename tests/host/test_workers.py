"""Several workers give the table and the figures of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import net

from quantflow.capture import capture
from quantflow.cli import command as cli
from quantflow.errors import CalibrationError, DataError, WorkerError
from quantflow.host.workers import Workers, joined, rank_and_count
from quantflow.ir.batch import Batch
from quantflow.numerics.observers import OBSERVERS
from quantflow.schema import ActivationSpec, ModeSettings, QConfig
from quantflow.stages.calibrate import CalibrationTable, OnValue, calibrate, require_complete
from quantflow.stages.evaluate import evaluate, judge, tally
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import prepare

ROOT = Path(cli.__file__).parents[2]
COUNTS = (1, 2, 3, 4, 7, 13)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [0, 1, 6, 7, 100])
def test_parts_are_contiguous_and_even(size: int, count: int) -> None:
    parts = [Workers(rank, count).part(range(size)) for rank in range(count)]
    assert [item for part in parts for item in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [part.first for part in parts if len(part)] == [part[0] for part in parts if len(part)]


def test_a_part_is_a_sequence() -> None:
    part = Workers(1, 3).part(list("abcdef"))
    assert (part[0], part[:2], len(part)) == ("c", ["c", "d"], 2)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            part[index]


def test_one_worker_just_computes() -> None:
    alone = Workers()
    assert (alone.gather(lambda: 3), alone.from_first(lambda: 5)) == ([3], 5)
    with pytest.raises(DataError, match="as raised"):
        alone.gather(lambda: (_ for _ in ()).throw(DataError("as raised")))


@pytest.mark.parametrize(
    ("variables", "found"),
    [({}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)), ({"RANK": "x", "WORLD_SIZE": "4"}, (0, 1))],
)
def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: tuple[int, int]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_and_count() == found


@pytest.mark.parametrize("where", ["meeting", "joined"])
def test_the_first_worker_says_that_another_ended_from_the_meeting_on(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    met = threading.Event()
    if where == "joined":
        met.set()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: met.wait())
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(Workers, "tell", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(WorkerError, match="worker 0 of 2: stopped, because another one ended"), joined():
            time.sleep(60)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "what it says now is not cut short"
    finally:
        signal.signal(signal.SIGTERM, before)
        met.set()
    with joined():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


class Everything:
    """A prepared model that observes its input under one observer of each kind, and one value in some batches only."""

    observed: Mapping[str, ActivationSpec] = {
        **{name: ActivationSpec(observer=name) for name in OBSERVERS},  # type: ignore[arg-type]
        "rare": ActivationSpec(observer="minmax"),
    }
    layers: Mapping[str, str] = {}

    def run(self, batch: Batch, on_value: OnValue) -> None:
        for name in OBSERVERS:
            on_value(name, batch.args[0])
        on_value("rare", batch.args[0][batch.args[0] > 3.2])


def batches() -> list[Batch]:
    x = torch.randn(26, 40, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 0.3, 26)[:, None]
    return [Batch((part,)) for part in x.split(2)]


class Varies(torch.nn.Module):
    """Rows of any length, each through a network, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)).mean(1))


def lengths() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [Batch((torch.randn(4, length, 8, generator=generator) * length,)) for length in range(3, 43, 4)]


@pytest.mark.parametrize("count", COUNTS)
def test_tables_of_parts_merge_to_the_table_of_the_whole(count: int) -> None:
    """To the byte, whatever the observer, and though no part but the last holds the rare value."""
    whole, prepared = batches(), Everything()
    parts = [Workers(rank, count).part(whole) for rank in range(count)]
    tables = [calibrate(prepared, part, first=part.first) for part in parts]
    merged = reduce(CalibrationTable.merge, (CalibrationTable.from_bytes(t.to_bytes(), "part") for t in tables))
    require_complete(merged, prepared.layers)
    assert merged.to_bytes() == calibrate(prepared, whole).to_bytes()


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_tables_over_batches_of_ten_lengths_merge_to_the_table_of_the_whole(observer: str) -> None:
    """To the byte, on a captured model whose calls have another shape each."""
    whole = lengths()
    qconfig = QConfig(activation=ActivationSpec(observer=observer))  # type: ignore[arg-type]
    assert len({batch.args[0].shape for batch in whole}) == 10
    graph = capture(Varies().eval(), whole[0], ModeSettings(), dynamic="auto", batches=whole)
    prepared = prepare(graph, make_plan(graph, qconfig))
    parts = [Workers(rank, 2).part(whole) for rank in range(2)]
    tables = [calibrate(prepared, part, first=part.first) for part in parts]
    merged = reduce(CalibrationTable.merge, (CalibrationTable.from_bytes(t.to_bytes(), "part") for t in tables))
    assert merged.to_bytes() == calibrate(prepared, whole).to_bytes()


def test_an_error_in_a_part_names_the_batch_of_the_whole() -> None:
    bad = batches()
    bad[11].args[0][0, 0] = float("nan")
    part = Workers(1, 2).part(bad)
    with pytest.raises(DataError, match="batch 11 "):
        calibrate(Everything(), part, first=part.first)
    with pytest.raises(CalibrationError, match="there are no samples"):
        require_complete(calibrate(Everything(), [], first=0), {})


@pytest.mark.parametrize("metric", [None, "top1", "spearman"])
@pytest.mark.parametrize("count", COUNTS)
def test_tallies_of_parts_judge_as_the_whole(count: int, metric: str | None) -> None:
    """Equal floats, not nearly equal: sums are taken in the batches' order."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(27, 9, generator=generator)
    labels = torch.rand(27, 27, generator=generator) if metric == "spearman" else x.argmax(1)
    whole = [
        Batch((a,), labels=b if metric else None) for a, b in zip(x.split(2), labels.split(2), strict=True)
    ]  # fmt: skip
    noise = torch.randn(9, generator=generator) * 0.3
    models: Any = (lambda x: x, lambda x: x + noise * x.sin())
    options: dict[str, Any] = {"metric": metric, "outputs": "embedding" if metric == "spearman" else "logits"}
    parts = [Workers(rank, count).part(whole) for rank in range(count)]
    tallies = [each for part in parts for each in tally(*models, part, first=part.first, **options)]
    assert judge(tallies) == evaluate(*models, whole, **options)


# --- by torchrun

MINE = """
import os, signal
import own_models

def net(fail=-1, kill=-1, broken=-1):
    if os.environ.get("RANK") == str(fail):
        raise RuntimeError("no such checkpoint")
    if os.environ.get("RANK") == str(kill):
        os.kill(os.getpid(), signal.SIGKILL)
    return own_models.nan_weights() if os.environ.get("RANK") == str(broken) else own_models.net()

def varies():
    import test_workers
    return test_workers.Varies()

def lengths():
    import test_workers
    return test_workers.lengths()
"""
ARGUMENTS = [
    "model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]", "data.calibration=22",
    "data.evaluation=10", "data.batch_size=3", "mode=torchscript", "benchmark=disabled", "report=quiet",
    "observer=moving_average", "layers={head:{activation:{observer:histogram}}}",
]  # fmt: skip


def torchrun(
    folder: Path, count: int, *arguments: str, launcher: str = "torch.distributed.run"
) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(MINE)
    paths = os.pathsep.join(map(str, (ROOT, folder, ROOT / "tests", Path(__file__).parent)))
    launch = ["-m", launcher, "--nproc-per-node", str(count)] if count > 1 else []
    return subprocess.run(
        [sys.executable, *launch, "-m", "quantflow", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_four_workers_save_what_one_saves(tmp_path: Path) -> None:
    assert net() is not None
    found = []
    for count in (1, 4):
        done = torchrun(tmp_path, count, *ARGUMENTS, f"output=art{count}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved in") == 1, "the first worker alone prints"
        art = tmp_path / f"art{count}"
        files = ("calibration.safetensors", "program.json", "weights.safetensors")
        results = json.loads((art / "results.json").read_text())
        assert results["calibration"]["workers"] == count
        found.append((*((art / name).read_bytes() for name in files), results["accuracy"]))
        assert not (tmp_path / f".art{count}.work").exists()
    assert found[0] == found[1]


@pytest.mark.slow
def test_two_workers_save_what_one_saves_of_batches_of_ten_lengths(tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        own = ["model.entry=mine:varies", "data=entry", "data.entry=mine:lengths", "data.calibration=40"]
        more = ["data.evaluation=4", "mode=export", "benchmark=disabled", "report=quiet", "observer=histogram"]
        done = torchrun(tmp_path, count, "model=entry", *own, *more, f"output=art{count}")
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / f"art{count}/results.json").read_text())
        assert (results["calibration"]["workers"], results["calibration"]["batches"]) == (count, 10)
        files = ("calibration.safetensors", "program.json", "weights.safetensors")
        found.append([(tmp_path / f"art{count}" / name).read_bytes() for name in files])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model.kwargs={fail:1}"], 2, "raised RuntimeError"),
        (["model.kwargs={kill:1}"], 1, "worker 0 of 2: "),
        (["model.kwargs={broken:1}"], 2, "NaN"),
    ],
    ids=["one can't load", "one is killed", "one has other weights"],
)
def test_one_worker_fails_and_all_end_with_one_error(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = torchrun(tmp_path, 2, *ARGUMENTS, *arguments, "output=art", launcher="quantflow.torchrun")
    assert done.returncode == code, done.stderr
    assert done.stderr.count(message) == 1, done.stderr
    assert not (tmp_path / "art").exists()


@pytest.mark.slow
def test_a_failed_gate_is_an_exit_code_of_3_though_torchruns_is_1(tmp_path: Path) -> None:
    """torchrun's own exit code says that a worker failed, and not how."""
    for launcher, code in (("torch.distributed.run", 1), ("quantflow.torchrun", 3)):
        done = torchrun(tmp_path, 2, *ARGUMENTS, "gates.min_sqnr_db=200", "output=art", launcher=launcher)
        assert done.returncode == code, done.stderr
        assert json.loads((tmp_path / "art" / "results.json").read_text())["verdict"] == "failed"


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.run(["-m", "recipe=mnist_cnn_sym_int8", "seed=1,2"]) == 2
    assert "a sweep can't run under torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["-m", "recipe=mnist_cnn_sym_int8", "seed=1,2"]) == 2
    assert capsys.readouterr().err == "", "only the first worker says so"
    assert cli.run(["task=doctor"]) == 0
    assert capsys.readouterr().out == ""
