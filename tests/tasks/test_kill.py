"""A run that is killed leaves a whole artifact or none, and the next run makes the same one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from quantflow.cli import command as cli
from quantflow.stages.record import Record

ROOT = Path(cli.__file__).parents[2]
ARGUMENTS = [
    "model=entry", "model.entry=mine:wide", "data=random", "data.shape=[[3,40,40]]", "data.calibration=512",
    "data.evaluation=4", "data.batch_size=8", "mode=torchscript", "observer=histogram", "benchmark=disabled",
    "calibrate.checkpoint_every_s=0.05", "output=art",
]  # fmt: skip
WORK = ".art.work"
CHECKPOINT = f"{WORK}/calibration.safetensors"
KILLS = 20
#: Of these, at least so many leave a calibration to go on from.
RESUMED = 5

#: Imports everything once, then forks a child for each line of arguments: a start costs milliseconds, not seconds.
#: The parent never computes, so that the children inherit no threads, and it waits for a child only when told to:
#: until then the child's number can't belong to another process.
NURSERY = """
import os, sys
from quantflow.cli import command as cli
import quantflow.tasks.table
import quantflow.sources.models.user_model
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(cli.run(line.split()))
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

WIDE = """
import torch
from torch import nn

def wide():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
"""


class Nursery:
    """Runs the command line in children that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def run(
        self,
        kill_when: Callable[[float], bool] = lambda _: False,
        how: signal.Signals = signal.SIGKILL,
        more: Sequence[str] = (),
    ) -> tuple[int, float]:
        """(exit code, seconds) of one run; it gets the signal as soon as `kill_when(seconds so far)`."""
        self._ask(" ".join([*ARGUMENTS, *more]))
        child, start = int(self._answer()), time.perf_counter()
        while not _has_ended(child):
            if kill_when(time.perf_counter() - start):
                os.kill(child, how)
                break
            time.sleep(0.0005)
        self._ask("wait")
        return int(self._answer()), time.perf_counter() - start

    def log(self) -> str:
        """What the last run printed."""
        return (self.folder / "log").read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def _has_ended(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("kill")
    (folder / "mine.py").write_text(WIDE)
    started = Nursery(folder)
    yield started
    started.close()


@pytest.fixture(scope="module")
def expected(nursery: Nursery) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    assert nursery.run()[0] == 0, nursery.log()
    return files(nursery.folder)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "art" / name).read_bytes() for name in ("program.json", "weights.safetensors")}


def is_whole_or_absent(folder: Path) -> bool:
    """False if there is no artifact. Half of one raises."""
    if not (folder / "art").exists():
        return False
    Record.load(folder / "art")
    return True


def clean(folder: Path) -> None:
    for path in (*folder.glob("art"), *folder.glob(".*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def strays(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


@pytest.mark.slow
def test_killed_at_any_moment(nursery: Nursery, expected: dict[str, bytes]) -> None:
    """Moments from start to end, each followed by a run that is left alone."""
    folder, moments = nursery.folder, random.Random(7)
    clean(folder)
    _, whole = nursery.run()
    killed = resumed = 0
    while killed < KILLS:
        clean(folder)
        moment = whole * (killed + moments.random()) / KILLS
        # The first ones as soon as calibration has saved something, which moments in time may miss.
        in_calibration = killed < RESUMED
        exit_code, seconds = nursery.run(
            lambda seconds, moment=moment, in_calibration=in_calibration: (
                (folder / CHECKPOINT).exists() if in_calibration else seconds >= moment
            )
        )
        if exit_code == 0:  # faster than the first run: choose an earlier moment
            whole = min(whole, seconds)
            continue
        assert exit_code == -signal.SIGKILL
        killed += 1
        is_whole_or_absent(folder)
        had_checkpoint = (folder / CHECKPOINT).exists()
        assert nursery.run()[0] == 0, nursery.log()
        assert Record.load(folder / "art").results["calibration"]["resumed"] is had_checkpoint
        assert ("calibration resumed" in nursery.log()) is had_checkpoint
        resumed += had_checkpoint
        assert files(folder) == expected
        assert strays(folder) == []
    assert resumed >= RESUMED


@pytest.mark.slow
def test_killed_while_the_artifact_is_replaced(nursery: Nursery, expected: dict[str, bytes]) -> None:
    """The old artifact or the new one, and what the dead left behind goes with the next write."""
    folder, moments = nursery.folder, random.Random(8)
    assert nursery.run()[0] == 0
    for _ in range(5):
        seen: list[float] = []

        def is_writing(seconds: float, seen: list[float] = seen, delay: float = moments.uniform(0, 0.02)) -> bool:
            if not seen and any(folder.glob(".art.staging-*")):
                seen.append(seconds)
            return bool(seen) and seconds >= seen[0] + delay

        nursery.run(is_writing)
        assert is_whole_or_absent(folder)
        assert files(folder) == expected
    assert nursery.run()[0] == 0
    assert strays(folder) == []


def test_a_checkpoint_of_another_recipe_is_not_used(nursery: Nursery, expected: dict[str, bytes]) -> None:
    folder = nursery.folder
    clean(folder)
    (folder / WORK).mkdir()
    (folder / CHECKPOINT).write_bytes(b"of another time")
    (folder / WORK / ".calibration.safetensors.99999999.partial").write_bytes(b"of a run killed while it wrote")
    assert nursery.run()[0] == 0
    assert "calibration started clean" in nursery.log()
    assert files(folder) == expected
    assert strays(folder) == []


@pytest.mark.slow
def test_interrupted_at_any_moment(nursery: Nursery, expected: dict[str, bytes]) -> None:
    """Ctrl-C: one line, exit code 130, no half artifact."""
    folder, moments = nursery.folder, random.Random(9)
    clean(folder)
    _, whole = nursery.run()
    for step in range(5):
        clean(folder)
        moment = whole * (0.1 + 0.8 * (step + moments.random()) / 5)
        exit_code, _ = nursery.run(lambda seconds, moment=moment: seconds >= moment, signal.SIGINT)
        is_whole_or_absent(folder)
        if exit_code != 0:
            assert exit_code == 130
            assert nursery.log().splitlines()[-1] == "interrupted"
            assert "Traceback" not in nursery.log()
    assert nursery.run()[0] == 0
    assert files(folder) == expected


def test_interrupted_by_the_user(nursery: Nursery, expected: dict[str, bytes]) -> None:
    """The same as a program of its own; the next run goes on from its checkpoint."""
    folder = nursery.folder
    clean(folder)
    arguments = [sys.executable, "-m", "quantflow", *ARGUMENTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        for _ in range(6000):
            if (folder / CHECKPOINT).exists():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        message = process.communicate()[1]
    assert (process.returncode, message) == (130, "interrupted\n")
    assert not (folder / "art").exists()
    assert strays(folder) == [WORK]
    assert nursery.run()[0] == 0
    assert "calibration resumed" in nursery.log()
    assert files(folder) == expected


#: Long enough to be killed in.
TIMED = ["benchmark=default", "benchmark.rounds=20", "benchmark.min_round_ms=40"]


@pytest.mark.slow
def test_killed_while_it_times_goes_on_with_what_is_finished(nursery: Nursery, expected: dict[str, bytes]) -> None:
    """Calibration, evaluation and layers are not computed again, unless --force says so; the figures are the same."""
    folder = nursery.folder
    clean(folder)
    for force in ([], ["--force"]):
        exit_code, _ = nursery.run(lambda _: (folder / WORK / "layers.json").exists(), more=TIMED)
        assert exit_code == -signal.SIGKILL
        assert strays(folder) == [WORK]
        assert not (folder / "art").exists()
        measured = json.loads((folder / WORK / "accuracy.json").read_text())["content"]
        exit_code, _ = nursery.run(more=[*TIMED, *force])
        assert exit_code == 0, nursery.log()
        results = Record.load(folder / "art").results
        assert results["resumed"] == ([] if force else ["accuracy", "layers"])
        assert results["calibration"]["resumed"] is not bool(force)
        assert ("accuracy resumed: taken from an earlier run" in nursery.log()) is not bool(force)
        assert {name: results["accuracy"][name] for name in ("sqnr_db", "agreement")} == {
            name: measured[name] for name in ("sqnr_db", "agreement")
        }
        assert files(folder) == expected
        assert strays(folder) == []
        clean(folder)


#: The last one takes long enough to be killed in.
ALGORITHMS = "algorithms: [equalize, gptq, {name: adaround, iterations: 2500}]\n"


@pytest.mark.slow
def test_killed_in_an_algorithm_goes_on_with_those_before_it(nursery: Nursery) -> None:
    folder, more = nursery.folder, ["recipe=listed.yaml", "evaluate.per_layer=false"]
    (folder / "listed.yaml").write_text(ALGORITHMS)
    clean(folder)
    assert nursery.run(more=more)[0] == 0, nursery.log()
    expected = files(folder)
    assert strays(folder) == []
    for force in ([], ["--force"]):
        clean(folder)
        exit_code, _ = nursery.run(lambda _: any((folder / WORK).glob("gptq-*.json")), more=more)
        assert exit_code == -signal.SIGKILL
        assert not list((folder / WORK).glob("adaround-*"))
        assert nursery.run(more=[*more, *force])[0] == 0, nursery.log()
        assert Record.load(folder / "art").results["resumed"] == ([] if force else ["equalize", "gptq"])
        assert ("gptq resumed: taken from an earlier run" in nursery.log()) is not bool(force)
        assert files(folder) == expected
        assert strays(folder) == []


def test_leftovers_of_another_recipe_are_computed_again(nursery: Nursery, expected: dict[str, bytes]) -> None:
    folder = nursery.folder
    clean(folder)
    nursery.run(lambda _: (folder / WORK / "layers.json").exists(), more=TIMED)
    (folder / WORK / "layers.json").write_bytes(b"of another time")
    assert nursery.run(more=["evaluate.per_layer=true", "warmup.iterations=2"])[0] == 0
    assert "accuracy is computed again" in nursery.log()
    assert "layers is computed again" in nursery.log()
    assert "calibration resumed" in nursery.log(), "it depends on none of what differs"
    assert files(folder) == expected
    assert strays(folder) == []
