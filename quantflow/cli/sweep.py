"""A sweep: every point of a multirun as a job in a process of its own, and one report of all of them.

    FOLDER/0.json, 1.json, …    how each job ended (JobOutcome), written the moment it ends
    FOLDER/0.log, …             what it printed, where several jobs run at once
    FOLDER/0/, …                its artifact
    FOLDER/sweep.json, .md, .html    the report, made from the outcomes: it does not need the launcher to survive
    FOLDER/.work/               locks, requests and attempts; gone when every job has passed

A job that ends badly is a row with its reason. When the launcher itself fails, because one of its own processes was
killed, say, it is started again: what has ended is not run twice, and a job whose launcher died twice is given up.
The same sweep started again goes on where it was, however it ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from quantflow import report
from quantflow.config import app
from quantflow.config.app import Job
from quantflow.errors import (
    EXIT_CRASH,
    EXIT_GATE,
    EXIT_INTERRUPTED,
    EXIT_PASSED,
    QuantflowError,
    UnavailableError,
    UsageError,
    first_line,
    worst,
)
from quantflow.host.cores import CORES, INHERITED
from quantflow.host.environment import distribution_version
from quantflow.schema import Recipe
from quantflow.store.artifact import MANIFEST, RESULTS
from quantflow.store.whole_file import disk_trouble, read_regular, replace_file

WORK = ".work"
#: How often a job may take its launcher's process down with it.
ATTEMPTS = 2
#: A launcher that loses one of its processes ends the others, and not all at once: seconds after which what still runs
#: was not meant.
SETTLING = 2.0
#: Launchers set these in their processes; a job gets what the sweep was started with, so that figures compare.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class JobOutcome:
    """How one job ended.

    Attributes:
        number: counts from 0 within the sweep.
        key: Recipe.work_key(); "" where the recipe is not legal.
        version: of the quantflow that ran it.
        exit_code, reason: as of the command line; the reason is "" where it passed.
        figures: what `figures` takes from its results.
        reused_from: the job whose outcome this is, where it had been run before.
        run: which start of the sweep it belongs to.
    """

    number: int
    name: str
    overrides: tuple[str, ...]
    output: str | None
    key: str
    version: str
    exit_code: int
    reason: str = ""
    seconds: float = 0.0
    host: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    reused_from: int | None = None
    run: str = ""


@dataclass(frozen=True)
class Sweep:
    """What each job needs to know of its sweep, in whatever process it is started."""

    folder: str
    cwd: str
    run: str
    environment: Mapping[str, str | None]

    @property
    def path(self) -> Path:
        return Path(self.cwd, self.folder)

    @property
    def work(self) -> Path:
        return self.path / WORK


def run_sweep(arguments: Sequence[str]) -> int:
    """Runs a multirun's command line and returns its exit code: the worst of its jobs'.

    Raises:
        RecipeError: the command line can't be composed. Nothing has been written then.
        UsageError: the same sweep is running already.
    """
    folder = app.sweep_folder(arguments)
    environment = {name: os.environ.get(name) for name in THREADS}
    sweep = Sweep(str(folder), str(Path.cwd()), uuid.uuid4().hex, environment)
    with _running(sweep, is_forced=_is_forced(arguments)):
        try:
            results = _report(arguments, sweep, _launch(arguments, sweep))
        except KeyboardInterrupt:
            _report(arguments, sweep, "interrupted before all jobs were run; the same command goes on with the others")
            raise
        if not results["jobs"] and not results["trouble"]:  # --cfg and its like
            return EXIT_PASSED
        if results["exit_code"] == EXIT_PASSED:
            shutil.rmtree(sweep.work, ignore_errors=True)
    report.print_sweep(report.make_console(), results, folder=str(folder))
    return int(results["exit_code"])


def read_outcomes(folder: Path) -> list[JobOutcome]:
    """Every outcome in the folder, by number; what can't be read as one is none."""
    return sorted(filter(None, map(_read_outcome, folder.glob("[0-9]*.json"))), key=lambda outcome: outcome.number)


def summarize(arguments: Sequence[str], outcomes: Sequence[JobOutcome], trouble: str = "") -> dict[str, Any]:
    """The sweep's results: every view is made from these.

    Args:
        trouble: why the launcher ended early, if it did.
    """
    jobs = [asdict(outcome) for outcome in outcomes]
    return {
        "format": 1,
        "arguments": list(arguments),
        "trouble": trouble,
        "exit_code": worst([EXIT_CRASH] * bool(trouble) + [outcome.exit_code for outcome in outcomes]),
        "jobs": [{key: value for key, value in job.items() if key != "run"} for job in jobs],
        "accuracy_axis": accuracy_axis([outcome.figures for outcome in outcomes]),
        "pareto": pareto(outcomes),
    }


def pareto(outcomes: Sequence[JobOutcome]) -> list[int]:
    """Numbers of the jobs that no other beats in both accuracy and latency, the fastest first.

    Accuracy is the metric where every job has the same one, else SQNR against float.
    """
    axis = accuracy_axis([outcome.figures for outcome in outcomes])
    points = [
        (outcome.figures["latency_ms"], -outcome.figures[axis], outcome.number)
        for outcome in outcomes
        if _is_number(outcome.figures.get("latency_ms")) and _is_number(outcome.figures.get(axis))
    ]
    front: list[int] = []
    best = float("inf")
    for _, loss, number in sorted(points):
        if loss < best:
            best = loss
            front.append(number)
    return front


def accuracy_axis(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figure that stands for accuracy: "metric" or "sqnr_db"."""
    measured = [row for row in figures if _is_number(row.get("latency_ms"))]
    names = {row.get("metric_name") for row in measured}
    return "metric" if len(names) == 1 and None not in names else "sqnr_db"


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a job that a sweep compares, from its results; latency is the first batch size's."""
    accuracy, benchmark = results.get("accuracy") or {}, results.get("benchmark") or {}
    metric, first = accuracy.get("metric") or {}, next(iter(benchmark.get("configs") or ()), {})
    found = {
        "metric_name": metric.get("name"),
        "metric": metric.get("int8"),
        "metric_float": metric.get("float"),
        "metric_drop": metric.get("drop"),
        "sqnr_db": accuracy.get("sqnr_db"),
        "agreement": accuracy.get("agreement"),
        "batch_size": first.get("batch_size"),
        "float_ms": (first.get("float") or {}).get("median_ms"),
        "latency_ms": (first.get("int8") or {}).get("median_ms"),
        "speedup": first.get("speedup"),
        "size_ratio": (benchmark.get("size") or {}).get("ratio"),
        "int8_coverage": (results.get("int8_proof") or {}).get("coverage"),
        "resumed": results.get("resumed"),
        "runtime": (results.get("runtime") or {}).get("chosen"),
        "threads": (results.get("environment") or {}).get("threads"),
    }
    return {name: value for name, value in found.items() if value is not None}


# --- one job, in whatever process the launcher started


def run_one(job: Job, sweep: Sweep) -> float | list[float] | None:
    """Runs a job unless it has been run, writes its outcome, and returns its objectives for the sweeper.

    None where an objective was not measured: a failed trial.
    """
    try:
        recipe = Recipe.from_dict(job.settings, job.name)
    except QuantflowError as error:
        print(error, file=sys.stderr)
        _write_outcome(sweep, _outcome(job, sweep, "", error.exit_code, str(error)))
        return None
    sweep.work.mkdir(parents=True, exist_ok=True)
    with _attempt(sweep.work / f"{job.number}.attempts") as attempt:
        outcome = _known(job, sweep, recipe.work_key())
        if outcome is None and attempt.made >= ATTEMPTS:
            reason = f"gave up: the process that ran it was killed {ATTEMPTS} times"
            outcome = _outcome(job, sweep, recipe.work_key(), EXIT_CRASH, reason)
        elif outcome is None:
            # Of those that were running when a launcher died, one may be to blame: they don't run together again.
            with _attempt(sweep.work / "suspects") if attempt.made else nullcontext():
                if attempt.made:
                    time.sleep(SETTLING)  # the lock may be free because its holder was killed: is this one next?
                attempt.count()
                outcome = _run(job, sweep, recipe)
        _write_outcome(sweep, outcome)
    found = [outcome.figures.get(name) for name in recipe.sweep.objectives]
    values = [float(value) for value in found if _is_number(value)]
    if len(values) < len(found):
        return None
    return values[0] if len(values) == 1 else values


def _run(job: Job, sweep: Sweep, recipe: Recipe) -> JobOutcome:
    """Starts the job's process and waits for it."""
    request = sweep.work / f"{job.number}.request"
    ending = request.with_suffix(".ending")
    ending.unlink(missing_ok=True)
    _write(request, {"name": job.name, "settings": job.settings, "overrides": list(job.overrides)})
    if job.is_alone:
        print(f"job {job.number}: {' '.join(job.overrides)}", flush=True)
    results = Path(sweep.cwd, recipe.artifact or job.settings["output"], RESULTS)
    before, start = _identity(results), time.monotonic()
    code = start_process(request, sweep, None if job.is_alone else sweep.path / f"{job.number}.log")
    seconds = time.monotonic() - start
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code < 0 and not job.is_alone:
        time.sleep(SETTLING)  # the job may have been killed first, and this process is next
    told = _read(ending) or {}
    exit_code = told.get("exit_code", EXIT_CRASH)
    reason = str(told.get("reason", "")) or ("" if exit_code == EXIT_PASSED else _how_it_ended(code))
    measured = figures(_results(results)) if told and _identity(results) != before else {}
    print(f"job {job.number} ended after {seconds:.1f} s: {reason.splitlines()[0] if reason else 'passed'}", flush=True)
    return _outcome(job, sweep, recipe.work_key(), exit_code, reason, seconds, measured)


def start_process(request: Path, sweep: Sweep, log: Path | None) -> int:
    """Runs `python -m quantflow.cli.job REQUEST`; returns what it ended with, negative: the signal that killed it."""
    environment = {**os.environ, **{name: value for name, value in sweep.environment.items() if value is not None}}
    for name in (name for name, value in sweep.environment.items() if value is None):
        environment.pop(name, None)
    command = [sys.executable, "-m", "quantflow.cli.job", str(request), str(os.getpid())]
    process = None
    try:
        with CORES.lent() as cores, open(log or os.devnull, "wb") as output:  # noqa: PTH123 a device or a file
            environment |= {} if cores is None else {INHERITED: str(cores)}
            with _unheard():
                process = subprocess.Popen(
                    command, cwd=sweep.cwd, env=environment, stdin=subprocess.DEVNULL,
                    stdout=output if log else None, stderr=subprocess.STDOUT if log else None,
                    pass_fds=() if cores is None else (cores,),
                )  # fmt: skip
        return process.wait()
    except BaseException:
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                process.wait(20)
            process.kill()
            process.wait()
        raise


@contextmanager
def _unheard() -> Iterator[None]:
    """Ctrl-C waits in this thread, and in the processes that it starts, until they take it.

    A terminal sends it to all of them, and one that still imports could only show a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _known(job: Job, sweep: Sweep, key: str) -> JobOutcome | None:
    """The outcome of this job, or of one that asked for the same."""
    version = _version()
    for outcome in sorted(read_outcomes(sweep.path), key=lambda outcome: outcome.number != job.number):
        if (outcome.key, outcome.version) != (key, version):
            continue
        is_new = outcome.run == sweep.run
        if not is_new and not _is_done(outcome, sweep):
            continue
        if not is_new or outcome.number != job.number:
            print(f"job {job.number} was run before (its outcome is that of job {outcome.number}); "
                  "--force runs all again", flush=True)  # fmt: skip
        reused = outcome.number if outcome.number != job.number or not is_new else outcome.reused_from
        return replace(
            outcome, number=job.number, overrides=job.overrides, name=job.name, reused_from=reused, run=sweep.run
        )
    return None


def _is_done(outcome: JobOutcome, sweep: Sweep) -> bool:
    """Whether an earlier run's outcome still stands: it passed, or a gate failed, and its artifact is there."""
    if outcome.exit_code not in (EXIT_PASSED, EXIT_GATE):
        return False
    return not outcome.figures or Path(sweep.cwd, outcome.output or "", MANIFEST).is_file()


def _outcome(
    job: Job,
    sweep: Sweep,
    key: str,
    exit_code: int,
    reason: str = "",
    seconds: float = 0.0,
    measured: Mapping[str, Any] | None = None,
) -> JobOutcome:
    output = job.settings.get("artifact") or job.settings.get("output")
    return JobOutcome(
        job.number, job.name, job.overrides, output, key, _version(), exit_code, reason, seconds,
        socket.gethostname(), measured or {}, None, sweep.run,
    )  # fmt: skip


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and no word why"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", which the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


class _Attempt:
    """How often a job has been started by launchers that did not live to see it end."""

    def __init__(self, file: int) -> None:
        self._file = file
        text = os.pread(file, 20, 0).decode(errors="replace").strip()
        self.made = int(text) if text.isdigit() else 0

    def count(self) -> None:
        self.made += 1
        os.pwrite(self._file, f"{self.made}\n".encode(), 0)


@contextmanager
def _attempt(path: Path) -> Iterator[_Attempt]:
    """A job's lock, and its attempts: a launcher may start a job again while it still runs elsewhere."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield _Attempt(file)
    finally:
        os.close(file)


# --- the sweep around its jobs


def _launch(arguments: Sequence[str], sweep: Sweep) -> str:
    """Runs all jobs; why the launcher failed for good, or ""."""
    while True:
        before = _progress(sweep)
        try:
            with (
                _grid_without_stop() if "hydra/sweeper=optuna" in arguments else nullcontext(),
                deaf_workers() if "hydra/launcher=joblib" in arguments else nullcontext(),
            ):
                app.run_app(arguments, partial(run_one, sweep=sweep), Path(sweep.folder))
            return ""
        except Exception as error:  # the launcher's, not a job's: those don't raise
            if _progress(sweep) == before:
                if not before[0]:
                    _require_slurm(arguments)
                    raise
                if not disk_trouble(error):
                    traceback.print_exc()
                return f"the launcher failed: {disk_trouble(error) or first_line(error)}"
            print(f"the launcher failed and is started again for what is left: {first_line(error)}", file=sys.stderr)


@contextmanager
def _grid_without_stop() -> Iterator[None]:
    """Keeps Optuna's grid sampler from stopping the study, which Hydra's sweeper ends by itself.

    The sweeper knows that `Study.stop` raises when the grid's last trial is told, but only where that trial passed.
    """
    try:
        from optuna.samplers import BaseSampler, GridSampler
    except ImportError:  # Hydra says so
        yield
        return
    stops = GridSampler.after_trial
    GridSampler.after_trial = BaseSampler.after_trial
    try:
        yield
    finally:
        GridSampler.after_trial = stops


@contextmanager
def deaf_workers() -> Iterator[None]:
    """joblib's processes never take Ctrl-C: this one does, and ends them. Their jobs take it themselves."""
    try:
        from joblib.externals.loky.backend import resource_tracker as lokys_tracker
        from joblib.externals.loky.process_executor import ProcessPoolExecutor
    except ImportError:  # Hydra says so
        yield
        return
    start = ProcessPoolExecutor._adjust_process_count

    def start_unheard(executor: Any) -> None:
        for tracker in (lokys_tracker, resource_tracker):
            tracker.ensure_running()  # when one of them is started, SIGINT is taken from then on
        with _unheard():
            start(executor)

    ProcessPoolExecutor._adjust_process_count = start_unheard
    try:
        yield
    finally:
        ProcessPoolExecutor._adjust_process_count = start


def _require_slurm(arguments: Sequence[str]) -> None:
    """Why submitit could not start, where that is the reason.

    Raises:
        UnavailableError: Slurm was asked for, and is not here.
    """
    if "hydra/launcher=submitit_slurm" in arguments and shutil.which("srun") is None:
        raise UnavailableError(
            "hydra/launcher: submitit_slurm hands jobs to Slurm, and there is no srun on this machine; start the sweep "
            "on a node of the cluster, or choose joblib, submitit_local or ray"
        )


def _progress(sweep: Sweep) -> tuple[int, int]:
    """Grows with each outcome and each attempt; both are bounded by the number of jobs."""
    ended = sum(outcome.run == sweep.run for outcome in read_outcomes(sweep.path))
    attempts = (file.read_text().strip() for file in sweep.work.glob("*.attempts"))
    return ended, sum(int(text) for text in attempts if text.isdigit())


@contextmanager
def _running(sweep: Sweep, *, is_forced: bool) -> Iterator[None]:
    """Nobody else runs this sweep; attempts start at 0; nothing is left where nothing was done."""
    created = [path for path in (sweep.work, *sweep.work.parents) if not path.exists()]
    if sweep.work.is_symlink() or (created[:1] != [sweep.work] and not sweep.work.is_dir()):
        raise UsageError(f"sweep: '{sweep.work}' is in the way: it is no folder of ours; remove it")
    sweep.work.mkdir(parents=True, exist_ok=True)
    with _locked(sweep):
        for file in sweep.work.iterdir():
            if not _is_regular(file):  # nothing of ours
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            elif file.suffix == ".attempts":
                file.write_text("")
        if is_forced:
            for file in sweep.path.glob("[0-9]*.json"):
                file.unlink()
        try:
            yield
        finally:
            if not read_outcomes(sweep.path):
                shutil.rmtree(sweep.work, ignore_errors=True)
                if sweep.path in created:
                    (sweep.path / "multirun.yaml").unlink(missing_ok=True)
                for path in created:
                    with suppress(OSError):
                        path.rmdir()


@contextmanager
def _locked(sweep: Sweep) -> Iterator[None]:
    lock = os.open(sweep.work / "sweep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(
            f"sweep: '{sweep.folder}' is being written by the same sweep, started elsewhere; wait for it, "
            "or choose another folder with hydra.sweep.dir=…"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(lock)


def _is_forced(arguments: Sequence[str]) -> bool:
    return any(argument.lower() == "resume=false" for argument in arguments)


def _report(arguments: Sequence[str], sweep: Sweep, trouble: str) -> dict[str, Any]:
    """The results of what has been run so far, written down if there are any."""
    results = summarize(arguments, [each for each in read_outcomes(sweep.path) if each.run == sweep.run], trouble)
    if results["jobs"]:
        for name, content in report.sweep_files(results).items():
            replace_file(sweep.path / name, content)
    return results


# --- files


def _results(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return report.from_json(read_regular(path))
    return {}


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes when the file is written again: a job that wrote none must not get an older one's figures."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _write_outcome(sweep: Sweep, outcome: JobOutcome) -> None:
    replace_file(sweep.path / f"{outcome.number}.json", report.to_json(asdict(outcome)))


def _read_outcome(path: Path) -> JobOutcome | None:
    try:
        record = report.from_json(read_regular(path))
        outcome = JobOutcome(**{**record, "overrides": tuple(record["overrides"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    is_one = type(outcome.number) is int and type(outcome.exit_code) is int and isinstance(outcome.figures, dict)
    return outcome if is_one else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(content).encode())


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(read_regular(path))
        return content if isinstance(content, dict) else None
    return None


def _version() -> str:
    return distribution_version("quantflow") or "not installed"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
