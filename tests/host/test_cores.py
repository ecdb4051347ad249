"""Who may use the cores: many that compute, or one that times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantflow import api, quantize
from quantflow.executor import contest, measure, steps
from quantflow.host import cores as _cores
from quantflow.host.cores import CORES, INHERITED, Cores
from quantflow.report import Progress
from quantflow.runtimes.native import NativeRunner
from quantflow.stages import warmup

FILE = str(_cores.__file__)

#: Holds the cores as told by its first argument until it is told to let go.
HOLDER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("loaded", sys.argv[3])
loaded = importlib.util.module_from_spec(spec)
sys.modules["loaded"] = loaded
spec.loader.exec_module(loaded)
cores = loaded.CORES if sys.argv[1] == "inherited" else loaded.Cores(Path(sys.argv[2]))
print("asked", flush=True)
with getattr(cores, "alone" if sys.argv[1] == "alone" else "shared")(lambda text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
    print("ending", flush=True)
"""


class Holder:
    """Another process that asks for the cores."""

    def __init__(self, use: str, folder: Path, lent: int | None = None) -> None:
        environment = os.environ | ({} if lent is None else {INHERITED: str(lent)})
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, use, str(folder), FILE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            pass_fds=() if lent is None else (lent,),
        )  # fmt: skip
        assert self.line() == "asked"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.line() == "ending"
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        holder.close()


def test_many_compute_together(tmp_path: Path, holders: list[Holder]) -> None:
    holders += [Holder("shared", tmp_path), Holder("shared", tmp_path)]
    assert [holder.line() for holder in holders] == ["held", "held"]
    with Cores(tmp_path).shared():
        assert set(Cores(tmp_path).holders()) >= {holder.process.pid for holder in holders}


def test_who_times_waits_for_those_who_compute_and_keeps_new_ones_out(tmp_path: Path, holders: list[Holder]) -> None:
    cores = Cores(tmp_path)
    with cores.shared():
        holders.append(Holder("alone", tmp_path))
        waiting = holders[0].line()
        assert waiting == f"waiting to measure time alone; the cores are held by quantflow processes {os.getpid()}"
        holders.append(Holder("shared", tmp_path))
        assert holders[1].line().startswith("waiting until another run has measured its times")
    assert holders[0].line() == "held"
    holders[0].let_go()
    assert holders[1].line() == "held"


def test_time_alone_inside_shared_use(tmp_path: Path, holders: list[Holder]) -> None:
    """It lets go first: two runs that both want to time don't wait for each other forever."""
    cores = Cores(tmp_path)
    with cores.shared(), cores.shared():
        with cores.alone():
            holders.append(Holder("shared", tmp_path))
            assert holders[0].line().startswith("waiting")
            with cores.shared(), cores.alone():
                assert cores.holders() == [os.getpid()]
        assert holders[0].line() == "held"
    assert cores.holders() == [holders[0].process.pid]


def test_a_new_stage_gives_way_to_who_waits(tmp_path: Path, holders: list[Holder]) -> None:
    lender = Cores(tmp_path)
    with lender.lent() as descriptor:
        assert descriptor is not None
        cores = Cores(tmp_path, os.dup(descriptor))
    holders.append(Holder("alone", tmp_path))
    assert holders[0].line().startswith("waiting")
    said: list[str] = []

    def let_go(text: str) -> None:
        said.append(text)
        assert holders[0].line() == "held"
        holders[0].let_go()

    with cores.shared(let_go):
        assert said == [f"waiting until another run has measured its times; the cores are held by quantflow processes "
                        f"{holders[0].process.pid}"]  # fmt: skip


def test_released_while_waiting_for_others(tmp_path: Path, holders: list[Holder]) -> None:
    cores = Cores(tmp_path)
    with cores.shared():
        with cores.released():
            holders.append(Holder("alone", tmp_path))
            assert holders[0].line() == "held"
            holders[0].let_go()
        assert cores.holders() == [os.getpid()]


def test_the_dead_hold_nothing(tmp_path: Path, holders: list[Holder]) -> None:
    holders += [Holder("alone", tmp_path)]
    assert holders[0].line() == "held"
    os.kill(holders[0].process.pid, signal.SIGKILL)
    with Cores(tmp_path).alone():
        pass


def test_a_lent_hold_outlives_the_lender_and_ends_with_the_child(tmp_path: Path, holders: list[Holder]) -> None:
    with Cores(tmp_path).lent() as descriptor:
        holders.append(Holder("inherited", tmp_path, descriptor))
    holders.append(Holder("alone", tmp_path))
    assert holders[1].line().startswith("waiting to measure time alone")
    assert holders[0].line() == "held" or holders[0].line() == "held"
    holders[0].close()
    assert holders[1].line() == "held"


def test_without_a_place_for_locks_everything_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cores = Cores(tmp_path / "file")
    start = time.monotonic()
    with cores.shared(), cores.alone(), cores.lent() as descriptor:
        assert descriptor is None
    assert cores.holders() == []
    assert time.monotonic() - start < 60


def test_a_full_temporary_folder_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", full)
    with _cores._cores().shared():
        pass


def test_a_run_times_alone_and_computes_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, its search for variants and the benchmark time; calibration, verification and evaluation compute."""
    uses: dict[str, set[str]] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            uses.setdefault(name, set()).add(CORES._use)
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (steps, "calibrate"), (measure, "tally"), (contest.timing, "interleaved"), (NativeRunner, "tune"),
        (warmup, "_verify"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize(module, [torch.randn(4, 8)], mode="torchscript", benchmark=True)
    assert set().union(*uses.values()) == {"none"}, "a call from Python waits for nobody"
    uses.clear()
    monkeypatch.setattr(api, "Progress", lambda *args, **options: Progress(*args, **{**options, "waits": True}))
    quantize(module, [torch.randn(4, 8)], mode="torchscript", benchmark=True)
    computing, timing = {"shared"}, {"alone"}
    assert uses == {
        "calibrate": computing, "tally": computing, "_verify": computing, "interleaved": timing, "tune": timing,
    }  # fmt: skip
    assert CORES._use == "none"
