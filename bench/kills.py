"""Is anything half-written after a kill, garbage in a file, a full disk? Does the next run end as an untroubled one?

A small model, and a private home, working and temporary folder. The jobs are an export, a search, a compare, and a
sweep by each of two launchers. Each is killed (SIGKILL, and Ctrl-C's SIGINT) at random moments; runs beside itself;
finds garbage in every file that it keeps for later; runs out of disk; finds no compiler, and a clock set back. After
each: every JSON parses, an artifact loads or isn't there, other people's files are as they were; the same command once
more makes the result files of an untroubled run, but for times, and leaves nothing else. A run that fails says why in a
line, and never with a traceback. Full disks take the right to mount, unreadable files that to run as nobody: without
them those rows say so. Exit code 1 if anything was found.

    python -m bench.kills
    python -m bench.kills --jobs search --troubles kill --kills 20
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.reporting import arguments, show, show_machine, write
from quantflow.errors import QuantflowError
from quantflow.stages.record import Record
from quantflow.store.artifact import read_artifact

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
#: Imports everything once, then forks a child for each line: a start costs milliseconds. What a change to the model
#: costs is fixed, so that two searches decide alike. The parent never computes: its children inherit no threads.
NURSERY = """
import ctypes, json, os, signal, sys, time, traceback
from quantflow.cli import command as cli, job, sweep
import quantflow.tasks.table, quantflow.executor.order, quantflow.analysis.compare
import quantflow.sources.models.user_model
import torch, torch.export
import torch._dynamo
from quantflow.search.workbench import FLOAT, Workbench
def cost_ms(setting):
    return sum((2.0 if change == FLOAT else 0.5) + 0.01 * len(name) for name, change in setting.changes)
Workbench.latency = lambda self, setting, rounds=1: {
    "ms": 10 + cost_ms(setting), "start_ms": 10.0, "relative": 1 + cost_ms(setting) / 10}
Workbench.added_ms = lambda self, setting, changed: cost_ms(changed) - cost_ms(setting)
def forked(request, sweep, log):
    # As `sweep.start_process`, without a new interpreter; launchers with processes of their own start real ones.
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if log:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
        try:
            code = job.run_request(request)
        except KeyboardInterrupt:
            code = 130
        except BaseException:  # as an interpreter of its own ends
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        raise
sweep.start_process = forked
def backwards(now=[time.time()]):
    now[0] -= 3600
    return now[0]
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setsid()
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(asked["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked["nobody"]:
            os.setgid(asked["nobody"])
            os.setuid(asked["nobody"])
        if asked["backwards"]:
            time.time = backwards
        code = cli.run(asked["arguments"])
        # What an interpreter does at its end; joblib's workers would hold their memory for minutes.
        pool = sys.modules.get("joblib.externals.loky.reusable_executor")
        if pool is not None and pool._executor is not None:
            pool._executor.shutdown(kill_workers=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""
MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        model[2].weight[0] *= 30
    return model
"""
TINY = [
    "model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]", "data.calibration=24",
    "data.evaluation=16", "data.batch_size=8", "mode=torchscript", "evaluate.per_layer=true", "benchmark.rounds=2",
    "benchmark.min_round_ms=5", "gates=none", "warmup.iterations=1", "calibrate.checkpoint_every_s=0.0001",
    "observer=histogram",
]  # fmt: skip
SWEEP = ["-m", *TINY, "report=quiet", "seed=1,2", "hydra.sweep.dir=out"]
JOBS = {
    "export": [*TINY, "output=out"],
    "search": [
        *TINY, "qconfig.weight.granularity=per_tensor", "tune.algorithms=[]", "tune.subject_to.min_sqnr_db=38",
        "output=out",
    ],
    "compare": ["task=compare", "compare=untimed", "baseline=a", "candidate=b", "output=out"],
    "sweep, basic": SWEEP,
    "sweep, joblib": [*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}  # fmt: skip
SIGNALS = ["SIGKILL", "SIGINT"]
TROUBLES = ("kill", "beside", "garbage", "full", "compiler", "clock")
#: What an artifact holds that may not differ by a bit.
EXACT = {"program.json", "weights.safetensors", "calibration.safetensors", "plan.json", "recipe.json"}
#: What differs from run to run in a results file.
CLOCKS = re.compile(
    r".*(_ms|_s|_share)$|seconds|stages|benchmark|environment|warmup|resumed.*|host|created|notices|reused_from|speedup|"
    r"run|trials|measurements|versions|layer_times|size_bytes|figures|arguments|pareto|times|text"
)
#: Folders in the temporary one that stay: the locks on the cores, and PyTorch's own.
LOCKS_AND_TORCH = ("quantflow-", "torchinductor_")
CAUSES = "No space left|full|in use|being written|Permission|permission|can't|not writable|Is a directory"


class Found(AssertionError):
    """What should not be."""


class House:
    """A private home, working and temporary folder, and a process that runs commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.temporary = folder / "work", folder / "home", folder / "tmp"
        for place in (self.folder, self.home, self.temporary):
            place.mkdir()
        self.log = folder / "log"
        (self.folder / "mine.py").write_text(MODEL)
        self.environment = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", "OMP_NUM_THREADS": "1", "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / ".cache"), "TMPDIR": str(self.temporary), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            cwd=self.folder, env=os.environ | self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"
        for name in ("a", "b"):
            self.must_pass([*TINY, f"output={name}"])
        self.cache = self.home / ".cache/quantflow"
        #: Other people's files, where quantflow works.
        self.foreign = [
            self.folder / "notes.json",
            self.folder / ".out.notes",
            self.cache / "notes.json",
        ]
        for path in self.foreign:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"mine": 1}')

    def start(self, job: Sequence[str], log: Path | None = None, **how: Any) -> int:
        """A child that runs the command; its number."""
        told = {"arguments": list(job), "log": str(log or self.log), "environment": how.get("environment", {})}
        self._ask({**told, "nobody": how.get("nobody", 0), "backwards": how.get("backwards", False)})
        return int(self._answer())

    def wait(self, child: int) -> int:
        self._ask({"wait": child})
        return int(self._answer())

    def run(self, job: Sequence[str], at: float | None = None, how: int = signal.SIGKILL, **more: Any) -> int:
        """The exit code; the signal comes `at` so many seconds: SIGINT to all its processes, as a terminal sends it."""
        child, start = self.start(job, **more), time.perf_counter()
        while at is not None and not has_ended(child):
            if time.perf_counter() - start >= at:
                with suppress(ProcessLookupError):
                    os.killpg(child, how) if how == signal.SIGINT else os.kill(child, how)
                break
            time.sleep(0.0005)
        code, deadline = self.wait(child), time.monotonic() + 5
        with suppress(ProcessLookupError):  # a forked job dies with its sweep, but later, and holds its locks
            while code == -signal.SIGKILL and time.monotonic() < deadline:
                os.killpg(child, 0)
                time.sleep(0.001)
        return code

    def must_pass(self, job: Sequence[str]) -> None:
        if code := self.run(job):
            raise Found(f"exit code {code}: {self.last_words()}")

    def last_words(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])

    def clean(self) -> None:
        """As before the first run of a job."""
        for path in self.folder.iterdir():
            if path.name not in ("mine.py", "a", "b", "notes.json", ".out.notes"):
                remove(path)

    def require_whole(self) -> None:
        """
        Raises:
            Found: something is half-written, or another's file was touched.
        """
        for path in self.foreign:
            if path.read_text() != '{"mine": 1}':
                raise Found(f"{path.name} was another's and is changed")
        for path in [*self.folder.rglob("*.json"), *self.cache.rglob("*.json")]:
            if any(".staging-" in part or ".work" in part for part in path.parts) or not path.is_file():
                continue  # what is being prepared, and what says itself whether it is whole
            try:
                json.loads(path.read_bytes())
            except ValueError:
                raise Found(f"{path.name} does not parse") from None
        for manifest in self.folder.rglob("manifest.json"):
            if ".staging-" in str(manifest):
                continue
            try:
                read_artifact(manifest.parent)
                if (manifest.parent / "program.json").exists():
                    Record.load(manifest.parent)
            except QuantflowError as error:
                raise Found(f"{manifest.parent.name} does not load: {error}") from None

    def require_result(self, expected: dict[str, Any]) -> None:
        """
        Raises:
            Found: the result is not that of an untroubled run, or something lies about.
        """
        self.require_whole()
        found = result(self.folder / "out")
        names = sorted(expected.keys() | found.keys())
        if differing := [name for name in names if expected.get(name) != found.get(name)]:
            raise Found(f"differs from an untroubled run: {', '.join(differing)}")
        about = {path.name for path in self.folder.iterdir()} - {"mine.py", "a", "b", "notes.json", ".out.notes", "out"}
        about |= {path.name for path in (self.folder / "out").glob(".*")}
        about |= {path.name for path in self.temporary.iterdir() if not path.name.startswith(LOCKS_AND_TORCH)}
        about |= {path.name for path in self.cache.rglob("*.partial")}
        if about:
            raise Found(f"left behind: {sorted(about)}")

    def require_reason(self, code: int) -> None:
        """
        Raises:
            Found: a run that failed did not say why, or showed a traceback.
        """
        text = self.log.read_text(errors="replace")
        if "Traceback" in text:
            raise Found(f"a traceback: {self.last_words()}")
        if code and not re.search(CAUSES, text):
            raise Found(f"exit code {code} and no reason: {self.last_words()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def _ask(self, asked: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def has_ended(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def result(folder: Path) -> dict[str, Any]:
    """Every result file by its path: the bytes where these may not differ, else JSON without its clocks."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        if path.name in EXACT:
            found[name] = path.read_bytes()
        elif path.suffix == ".json" and path.name != "manifest.json":
            found[name] = without_clocks(json.loads(path.read_bytes()))
        else:
            found[name] = "there"
    return found


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if not CLOCKS.fullmatch(key)}
    if isinstance(value, list):
        return [without_clocks(each) for each in value]
    return value


# --- troubles: each yields what it did, and raises Found


def kill(house: House, job: Sequence[str], expected: dict[str, Any], options: Any) -> Iterator[str]:
    for how in (signal.Signals[name] for name in options.signals):
        moments, done = random.Random(how), 0
        whole = untroubled_s(house, job)
        while done < options.kills:
            house.clean()
            if moments.random() < 0.5:
                shutil.rmtree(house.cache / "sensitivity", ignore_errors=True)
            code = house.run(job, whole * (done + moments.random()) / options.kills, how)
            if code == 0:  # over before its moment
                whole *= 0.97
            done += 1
            if code not in (0, -signal.SIGKILL, 130):
                raise Found(f"{how.name}: exit code {code}: {house.last_words()}")
            if how == signal.SIGINT:
                house.require_reason(0)
            house.require_whole()
            house.must_pass(job)
            house.require_result(expected)
            yield how.name


def untroubled_s(house: House, job: Sequence[str]) -> float:
    house.clean()
    start = time.perf_counter()
    house.must_pass(job)
    return time.perf_counter() - start


def beside(house: House, job: Sequence[str], expected: dict[str, Any], options: Any) -> Iterator[str]:
    """The same command twice at once, into one folder."""
    for turn in range(3 if options.smoke else 6):
        house.clean()
        logs = [house.log.with_name(f"log{i}") for i in range(2)]
        children = [house.start(job, logs[0])]
        time.sleep(0.1 * turn)
        children.append(house.start(job, logs[1]))
        codes = [house.wait(child) for child in children]
        if all(codes):
            raise Found(f"none of the two passed: {[log.read_text()[-300:] for log in logs]}")
        for code, log in zip(codes, logs, strict=True):
            shutil.copy(log, house.log)
            house.require_reason(code)
        house.require_whole()
        house.must_pass(job)
        house.require_result(expected)
        yield "two at once"


def garbage(house: House, job: Sequence[str], expected: dict[str, Any], options: Any) -> Iterator[str]:
    """Garbage in each file that an unfinished run and the caches keep."""
    kept = house.folder.with_name("kept")
    remove(kept)
    whole, files = untroubled_s(house, job), 0
    for share in (0.4, 0.55, 0.7, 0.8, 0.9):
        house.clean()
        house.run(job, share * whole)
        if len(keepings(house)) > files:
            files = len(keepings(house))
            remove(kept)
            shutil.copytree(house.folder, kept / "work")
            shutil.copytree(house.cache, kept / "cache")
    names = {re.sub(r"[0-9a-f]{8,}|\d+", "N", path.name): path for path in reversed(keepings(house, kept))}
    for name, path in list(names.items())[: 2 if options.smoke else None]:
        for what, spoil in GARBAGE.items():
            if what == "no permission" and os.getuid() != 0:
                continue
            house.clean()
            remove(house.cache)
            shutil.copytree(kept / "cache", house.cache)
            shutil.copytree(kept / "work", house.folder, dirs_exist_ok=True)
            part, place = ("work", house.folder) if path.is_relative_to(kept / "work") else ("cache", house.cache)
            spoiled = place / path.relative_to(kept / part)
            spoil(spoiled)
            before = spoiled.read_bytes() if spoiled.is_file() and not spoiled.is_symlink() else None
            nobody = NOBODY if what == "no permission" else 0
            if nobody:
                for place in (house.folder.parent, *house.folder.parent.rglob("*")):
                    if place.is_symlink() or place.stat().st_mode & 0o777:
                        os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
            child = house.start(job, nobody=nobody)
            deadline = time.monotonic() + 120
            while not has_ended(child):
                if time.monotonic() > deadline:
                    os.killpg(child, signal.SIGKILL)
                    house.wait(child)
                    raise Found(f"{what} in {name}: hangs")
                time.sleep(0.01)
            code = house.wait(child)
            if before is not None and spoiled.is_file() and spoiled.read_bytes() == before:
                spoiled.unlink()  # nothing that the job keeps or reads
            try:
                house.require_reason(code)
                if code == 0:
                    house.require_result(expected)
            except Found as found:
                print(f"  {what} in {name}: {found}", flush=True)
                raise Found(f"{what} in {name}: {found}") from None
            yield f"garbage: {'went on' if code == 0 else 'said why'}"


def keepings(house: House, kept: Path | None = None) -> list[Path]:
    """The files that are kept for later: hidden ones beside the output, a sweep's, the caches'."""
    work = house.folder if kept is None else kept / "work"
    cache = house.cache if kept is None else kept / "cache"
    own = [path for path in work.rglob("*") if any(p.startswith(".") for p in path.relative_to(work).parts)]
    own += list((work / "out").glob("*.json")) if (work / "out/.work").exists() else []
    return sorted(
        path for path in [*own, *cache.rglob("*")]
        if path.is_file() and ".staging-" not in str(path) and "notes" not in path.name
    )  # fmt: skip


def _bytes(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_bytes(content(path.read_bytes()))

    return spoil


def _instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def _locked_away(path: Path) -> None:
    os.chown(path, 0, 0)
    path.chmod(0)


GARBAGE: dict[str, Callable[[Path], None]] = {
    "random bytes": _bytes(lambda old: random.Random(len(old)).randbytes(max(64, len(old)))),
    "half of it": _bytes(lambda old: old[: len(old) // 2]),
    "nothing": _bytes(lambda _: b""),
    "a list": _bytes(lambda _: b"[1, 2]\n"),
    "empty objects": _bytes(lambda _: b"{}\n"),
    "deep nesting": _bytes(lambda _: b"[" * 100_000 + b"\n"),
    "a number for each": _bytes(lambda old: re.sub(rb'"[a-z_]+": *"[^"]*"', b'"x": 1', old)),
    "a directory": _instead(Path.mkdir),
    "a loop of links": _instead(lambda path: path.symlink_to(path.name)),
    "a named pipe": _instead(os.mkfifo),
    "no permission": _locked_away,
}


@contextmanager
def _disk(place: Path, size: str) -> Iterator[None]:
    """A file system of that size at the place."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        raise PermissionError("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full(house: House, job: Sequence[str], expected: dict[str, Any], options: Any) -> Iterator[str]:
    """The folder of the results, the cache, the temporary folder: each full from the start or soon."""
    for what, place in (("work", house.folder), ("cache", house.cache), ("tmp", house.temporary)):
        for size in ("4k", "16k", "64k") if not options.smoke else ("16k",):
            house.clean()
            if what == "work":
                # The results alone go to the small disk.
                place = house.folder / "disk"
                there = [each.replace("=out", "=disk/out") for each in job]
            else:
                there = list(job)
            with _disk(place, size):
                if what == "tmp":
                    (place / "filler").write_bytes(b"x" * (int(size[:-1]) * 1024 - 4096))
                code = house.run(there)
                house.require_reason(code)
                if what != "work" and code:
                    raise Found(f"{what} of {size}: {house.last_words()}")
                if code == 0 and what == "work" and not (place / "out").exists():
                    raise Found(f"{what} of {size}: passed without a result")
                for left in place.rglob("manifest.json"):
                    if ".staging-" not in str(left):
                        read_artifact(left.parent)
            remove(house.folder / "disk")
            house.must_pass(job)
            house.require_result(expected)
            yield f"full {what}: {'went on' if code == 0 else 'said why'}"


def compiler(house: House, job: Sequence[str], expected: dict[str, Any], _: Any) -> Iterator[str]:
    house.clean()
    code = house.run(job, environment={"PATH": "/nowhere", "CC": "/nowhere/cc", "CXX": "/nowhere/c++"})
    house.require_reason(code)
    house.require_result(expected)
    yield "no compiler"


def clock(house: House, job: Sequence[str], expected: dict[str, Any], _: Any) -> Iterator[str]:
    """The clock goes back while a run works, and between a killed run and the next: its files come from the future."""
    house.clean()
    code = house.run(job, backwards=True)
    house.require_reason(code)
    house.require_result(expected)
    yield "backwards"
    whole = untroubled_s(house, job)
    for share in (0.3, 0.6, 0.9):
        house.clean()
        house.run(job, share * whole)
        future = time.time() + 10 * 365 * 86400
        for path in (*house.folder.rglob("*"), *house.cache.rglob("*")):
            with suppress(OSError):
                os.utime(path, (future, future), follow_symlinks=False)
        house.must_pass(job)
        house.require_result(expected)
        yield "files of the future"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--troubles", nargs="+", choices=TROUBLES, default=list(TROUBLES))
    parser.add_argument("--kills", type=int, default=20, help="of each job, with each signal")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS)
    options = parser.parse_args()
    if options.smoke:
        options.kills = 1
    machine = show_machine()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        try:
            for name in options.jobs:
                untroubled_s(house, JOBS[name])
                expected = result(house.folder / "out")
                house.require_result(expected)
                rows += [_row(house, name, trouble, expected, options) for trouble in options.troubles]
        finally:
            house.close()
    show("what was done, and what was found", rows, ("job", "trouble", "done", "found"))
    write(options.json, {"question": "kills", "machine": machine, "rows": rows})
    return 1 if any(row["found"] for row in rows) else 0


def _row(house: House, name: str, trouble: str, expected: dict[str, Any], options: Any) -> dict[str, Any]:
    done: dict[str, int] = {}
    found = skipped = ""
    try:
        for each in globals()[trouble](house, JOBS[name], expected, options):
            done[each] = done.get(each, 0) + 1
            print(".", end="", flush=True)
    except Found as what:
        found = str(what)
    except PermissionError as error:
        skipped = f"; not done: {error}"
    counted = ", ".join(f"{count} x {each}" for each, count in done.items())
    print(f" {name}, {trouble}: {counted}{skipped} {found}", flush=True)
    return {"job": name, "trouble": trouble, "done": counted + skipped, "found": found}


if __name__ == "__main__":
    sys.exit(main())
