"""Sweeps: every job ends as a row with its reason, whatever happens to the others, to the launcher or to the sweep."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantflow.cli import command as cli
from quantflow.cli import job, sweep
from quantflow.cli.sweep import JobOutcome, Sweep, figures, pareto, read_outcomes, run_one
from quantflow.config import app
from quantflow.config.app import Job
from quantflow.config.recipe_file import recipe_files
from quantflow.errors import (
    EXIT_CRASH,
    EXIT_GATE,
    EXIT_INTERRUPTED,
    EXIT_PASSED,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    UsageError,
    worst,
)
from quantflow.schema import OBJECTIVES

ROOT = Path(cli.__file__).parents[2]
PLAN = ["task=plan", "model=mnist_cnn", "data=mnist"]


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """What the jobs' processes end with, one after the other; 0 when it is used up. The job itself is not run."""
    codes: list[int] = []

    def end(request: Path, *_: object) -> int:
        code = codes.pop(0) if codes else EXIT_PASSED
        if code >= 0:
            request.with_suffix(".ending").write_text(json.dumps({"exit_code": code, "reason": "why" if code else ""}))
        return code

    monkeypatch.setattr(sweep, "start_process", end)
    monkeypatch.chdir(tmp_path)
    return codes


def report_of(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "sweep.json").read_text())


def test_every_job_is_a_row_with_its_reason(endings: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    endings += [EXIT_PASSED, EXIT_CRASH, -signal.SIGKILL, EXIT_GATE]
    assert cli.run(["-m", *PLAN, "seed=1,2,3,4", "hydra.sweep.dir=sw"]) == EXIT_CRASH
    jobs = report_of("sw")["jobs"]
    assert [(job["number"], job["exit_code"]) for job in jobs] == [(0, 0), (1, 1), (2, 1), (3, 3)]
    assert [job["reason"] for job in jobs[:2]] == ["", "why"]
    assert jobs[2]["reason"] == "its process was killed by SIGKILL, which the system does when memory runs out"
    assert [job["overrides"][-1] for job in jobs] == ["seed=1", "seed=2", "seed=3", "seed=4"]
    table = Path("sw", "sweep.md").read_text()
    assert "4 jobs: 1 passed, 2 crashed, 1 a gate failed" in table
    assert "4 jobs: 1 passed, 2 crashed, 1 a gate failed" in capsys.readouterr().out
    assert "its process was killed by SIGKILL" in table
    assert "its process was killed by SIGKILL" in Path("sw", "sweep.html").read_text()


def test_the_same_sweep_again_runs_only_what_has_not_passed(
    endings: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    endings += [EXIT_PASSED, EXIT_CRASH, EXIT_GATE]
    assert cli.run(["-m", *PLAN, "seed=1,2,3"]) == EXIT_CRASH
    (folder,) = Path("outputs", "multirun").iterdir()
    assert (folder / ".work").exists()
    capsys.readouterr()
    endings.append(EXIT_PASSED)
    assert cli.run([*PLAN, "seed=1,2,3", "-m"]) == EXIT_GATE
    assert [path.name for path in Path("outputs", "multirun").iterdir()] == [folder.name]
    said = capsys.readouterr().out
    assert said.count("was run before") == 2
    assert "job 0 was run before (its outcome is that of job 0); --force runs all again" in said
    assert [job["reused_from"] for job in report_of(str(folder))["jobs"]] == [0, None, 2]
    endings += [EXIT_PASSED] * 3
    assert cli.run(["-m", *PLAN, "seed=1,2,3", "--force"]) == EXIT_PASSED
    assert "was run before" not in capsys.readouterr().out
    assert endings == []
    assert not (folder / ".work").exists()


def test_what_was_run_by_another_version_or_recipe_is_run_again(
    endings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["-m", *PLAN, "seed=1,2", "hydra.sweep.dir=sw"]) == 0
    Path("sw", "0.json").write_text("not an outcome")
    endings += [EXIT_CRASH]
    assert cli.run(["-m", *PLAN, "seed=1,2", "hydra.sweep.dir=sw"]) == EXIT_CRASH
    assert [job["exit_code"] for job in report_of("sw")["jobs"]] == [1, 0]
    endings += [EXIT_CRASH, EXIT_CRASH]
    assert cli.run(["-m", *PLAN, "seed=1,2", "gates.min_sqnr_db=3", "hydra.sweep.dir=sw"]) == EXIT_CRASH
    assert endings == []
    monkeypatch.setattr(sweep, "_version", lambda: "9.9")
    endings += [EXIT_CRASH, EXIT_CRASH]
    assert cli.run(["-m", *PLAN, "seed=1,2", "hydra.sweep.dir=sw"]) == EXIT_CRASH
    assert endings == []


def test_points_that_ask_for_the_same_are_run_once(endings: list[int]) -> None:
    endings += [EXIT_GATE, EXIT_CRASH]
    assert cli.run(["-m", *PLAN, "seed=1,1,1", "hydra.sweep.dir=sw"]) == EXIT_GATE
    assert [job["reused_from"] for job in report_of("sw")["jobs"]] == [None, 0, 0]
    assert endings == [EXIT_CRASH]


def test_an_illegal_point_is_a_row_too(endings: list[int]) -> None:
    assert cli.run(["-m", *PLAN, "data.calibration=0,8", "hydra.sweep.dir=sw"]) == EXIT_USAGE
    first, second = report_of("sw")["jobs"]
    assert "data.calibration: found 0; must be at least 1" in first["reason"]
    assert (first["exit_code"], second["exit_code"]) == (EXIT_USAGE, EXIT_PASSED)
    assert endings == []


def test_every_recipe_by_glob(endings: list[int]) -> None:
    assert cli.run(["-m", "recipe=glob(resnet*)", "task=plan", "hydra.sweep.dir=sw"]) == EXIT_PASSED
    names = [job["name"] for job in report_of("sw")["jobs"]]
    assert names == sorted(name for name in recipe_files() if name.startswith("resnet"))
    assert endings == []


def test_an_interrupted_sweep_leaves_a_report_and_goes_on(endings: list[int]) -> None:
    endings += [EXIT_PASSED, EXIT_INTERRUPTED]
    assert cli.run(["-m", *PLAN, "seed=1,2,3", "hydra.sweep.dir=sw"]) == EXIT_INTERRUPTED
    assert [job["number"] for job in report_of("sw")["jobs"]] == [0]
    assert report_of("sw")["trouble"].startswith("interrupted")
    assert cli.run(["-m", *PLAN, "seed=1,2,3", "hydra.sweep.dir=sw"]) == EXIT_PASSED
    assert [job["reused_from"] for job in report_of("sw")["jobs"]] == [0, None, None]


def test_a_launcher_that_fails_is_started_again_and_what_takes_it_down_is_given_up(
    endings: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second job kills the launcher whenever it is started."""
    assert endings == []
    whole = sweep.start_process
    started: list[str] = []

    def end(request: Path, *rest: Any) -> int:
        started.append(request.stem)
        if request.stem == "1":
            raise OSError("a worker process was killed")
        return whole(request, *rest)

    monkeypatch.setattr(sweep, "start_process", end)
    assert cli.run(["-m", *PLAN, "seed=1,2,3", "hydra.sweep.dir=sw"]) == EXIT_CRASH
    assert started == ["0", "1", "2", "1"]
    jobs = report_of("sw")["jobs"]
    assert [job["exit_code"] for job in jobs] == [0, 1, 0]
    assert jobs[1]["reason"] == "gave up: the process that ran it was killed 2 times"
    assert "the launcher failed and is started again for what is left: a worker process" in capsys.readouterr().err


def test_a_launcher_that_can_not_work_is_reported(endings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first job, always."""
    assert endings == []
    run_app = app.run_app

    def fails(_: list[str], job: Any, folder: Path) -> None:
        if not (folder / "0.json").exists():
            run_app(["-m", *PLAN, "seed=1"], job, folder)
        raise ConnectionError("the cluster is gone")

    monkeypatch.setattr(app, "run_app", fails)
    assert cli.run(["-m", *PLAN, "seed=1,2", "hydra.sweep.dir=sw"]) == EXIT_CRASH
    assert report_of("sw")["trouble"] == "the launcher failed: the cluster is gone"
    assert len(report_of("sw")["jobs"]) == 1


def test_slurm_where_there_is_none(
    endings: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert endings == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run(["-m", *PLAN, "seed=1,2", "hydra/launcher=submitit_slurm"]) == EXIT_UNAVAILABLE
    assert "there is no srun on this machine; start the sweep on a node of the cluster" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_sweep_at_a_time_in_a_folder(endings: list[int], tmp_path: Path) -> None:
    assert endings == []
    mine = Sweep("sw", str(tmp_path), "run", {})
    with sweep._running(mine, is_forced=False):
        assert cli.run(["-m", *PLAN, "seed=1,2", "hydra.sweep.dir=sw"]) == EXIT_USAGE
        with pytest.raises(UsageError, match="started elsewhere"), sweep._running(mine, is_forced=False):
            pass
    assert not (tmp_path / "sw").exists()


@pytest.mark.parametrize(
    ("objectives", "returned"),
    [
        (["sqnr_db"], 20.5),
        (["latency_ms"], 2.0),
        (["metric", "latency_ms"], [0.75, 2.0]),
        (["speedup", "size_ratio", "agreement", "metric_drop"], [3.0, 0.25, 0.9, 0.05]),
        (["int8_coverage"], 1.0),
        (["sqnr_db", "agreement"], [20.5, 0.9]),
    ],
)
def test_a_job_returns_the_objectives_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, objectives: list[str], returned: float | list[float]
) -> None:
    def end(request: Path, *_: object) -> int:
        request.with_suffix(".ending").write_text('{"exit_code": 0, "reason": ""}')
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "results.json").write_text(json.dumps(RESULTS))
        return 0

    monkeypatch.setattr(sweep, "start_process", end)
    job = Job("mine", settings("out", objectives), ("seed=1",), 0)
    assert run_one(job, Sweep("sw", str(tmp_path), "run", {})) == returned
    assert set(objectives) <= OBJECTIVES.keys()


def test_figures_of_an_older_run_are_not_taken_for_a_jobs_own(endings: list[int], tmp_path: Path) -> None:
    assert endings == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(json.dumps(RESULTS))
    job = Job("mine", settings("out", ["sqnr_db"]), (), 0)
    assert run_one(job, Sweep("sw", str(tmp_path), "run", {})) is None
    assert read_outcomes(tmp_path / "sw")[0].figures == {}


def test_a_job_without_its_objective_is_a_failed_trial(endings: list[int], tmp_path: Path) -> None:
    endings += [EXIT_CRASH, EXIT_PASSED]
    mine = Sweep("sw", str(tmp_path), "run", {})
    assert run_one(Job("mine", settings("out", ["sqnr_db"]), (), 0), mine) is None
    assert run_one(Job("mine", {**settings("out", ["sqnr_db"]), "seed": 1}, (), 1), mine) is None


RESULTS = {
    "accuracy": {
        "sqnr_db": 20.5, "agreement": 0.9, "metric": {"name": "top1", "float": 0.8, "int8": 0.75, "drop": 0.05},
    },
    "benchmark": {
        "configs": [
            {"batch_size": 1, "float": {"median_ms": 6.0}, "int8": {"median_ms": 2.0}, "speedup": 3.0},
            {"batch_size": 8, "float": {"median_ms": 9.0}, "int8": {"median_ms": 9.0}, "speedup": 1.0},
        ],
        "size": {"ratio": 0.25},
    },
    "int8_proof": {"coverage": 1.0},
    "runtime": {"chosen": "native"},
    "environment": {"threads": 2},
}  # fmt: skip


def settings(output: str, objectives: list[str]) -> dict[str, Any]:
    return {"model": {"kind": "mnist_cnn"}, "output": output, "sweep": {"objectives": objectives}}


def test_figures_of_a_result() -> None:
    assert figures(RESULTS)["latency_ms"] == 2.0
    assert figures({}) == {}
    assert set(figures(RESULTS)) >= OBJECTIVES.keys()


def outcome(number: int, ms: float | None, metric: float | None, sqnr: float, name: str = "top1") -> JobOutcome:
    measured = {
        "latency_ms": ms,
        "metric": metric,
        "sqnr_db": sqnr,
        "metric_name": name if metric is not None else None,
    }
    return JobOutcome(number, "r", (), None, "", "", 0, figures={k: v for k, v in measured.items() if v is not None})


def test_the_pareto_front() -> None:
    """By hand: 1 is fastest; 0 slower and better; 2 slower than 0 and worse; 3 not measured; 4 as 0 and slower."""
    outcomes = [
        outcome(0, 2.0, 0.8, 1.0), outcome(1, 1.0, 0.5, 9.0), outcome(2, 3.0, 0.7, 9.0), outcome(3, None, 0.9, 9.0),
        outcome(4, 2.5, 0.8, 1.0),
    ]  # fmt: skip
    assert pareto(outcomes) == [1, 0]
    assert pareto([*outcomes, outcome(5, 4.0, 0.9, 2.0, "spearman")]) == [1], "unlike metrics: by SQNR"
    assert pareto([]) == []


@pytest.mark.parametrize(
    ("codes", "code"), [([], 0), ([0, 3], 3), ([3, 4, 0], 4), ([4, 2], 2), ([2, 1, 0], 1), ([1, 99], 99)]
)
def test_the_worst_exit_code(codes: list[int], code: int) -> None:
    assert worst(codes) == code


# --- the real thing

NET = """
import os, signal
import torch
from torch import nn

def net(job=0, kill=-1, fail=-1, kill_launcher=-1):
    if job == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == kill_launcher:
        os.kill(os.getppid(), signal.SIGKILL)
    if job == fail:
        raise RuntimeError("no such checkpoint")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""
TINY = [
    "model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]", "data.calibration=4",
    "data.evaluation=4", "mode=torchscript", "evaluate=summary", "benchmark.rounds=2", "benchmark.min_round_ms=5",
    "warmup.iterations=1", "report=quiet",
]  # fmt: skip

#: A Ray cluster of two nodes, each with processes of its own, until its input ends.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
cluster.add_node(**small)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(NET)
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", "quantflow", *arguments],
        cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[str]:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(60)


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_in_other_processes_one_fails_one_is_killed_none_is_lost(
    launcher: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    arguments = [*LAUNCHERS[launcher], *TINY, "model.kwargs={fail:1,kill:2}", "+model.kwargs.job=range(3)"]
    if launcher == "ray":
        arguments.append(f"hydra.launcher.ray.init.address={request.getfixturevalue('cluster')}")
    done = command(tmp_path, "-m", *arguments, "hydra.sweep.dir=sw")
    jobs = report_of(str(tmp_path / "sw"))["jobs"]
    assert [job["exit_code"] for job in jobs] == [0, 2, 1], done.stderr
    assert "no such checkpoint" in jobs[1]["reason"]
    assert "SIGKILL" in jobs[2]["reason"]
    assert {"sqnr_db", "latency_ms"} <= jobs[0]["figures"].keys()
    assert done.returncode == EXIT_CRASH
    assert "no such checkpoint" in (tmp_path / "sw" / "1.log").read_text()
    page = (tmp_path / "sw" / "sweep.html").read_text()
    assert "3 jobs: 1 passed, 1 can&#39;t run as written, 1 crashed" in page


def test_a_jobs_process_takes_ctrl_c_that_came_while_it_was_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback of an import, and a second one, as the terminal and the sweep both send it, is not heard."""

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.send_signal(signal.SIGINT)

        def wait(self, timeout: float | None = None) -> int:
            self.send_signal(signal.SIGINT)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "0.request").write_text(json.dumps({"name": "it", "settings": {}, "overrides": []}))
    code = sweep.start_process(tmp_path / "0.request", Sweep("sw", str(tmp_path), "run", {}), tmp_path / "0.log")
    assert (code, (tmp_path / "0.log").read_text()) == (EXIT_INTERRUPTED, "")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_job_whose_ending_has_no_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    request = tmp_path / "0.request"
    request.write_text(json.dumps({"name": "it", "settings": {"no": "such key"}, "overrides": []}))
    monkeypatch.setattr(job, "replace_file", full)
    assert job.run_request(request) == EXIT_USAGE
    assert f"'{tmp_path}/0.ending' can't be used (No space left on device); free some space" in capsys.readouterr().err


def test_joblibs_processes_never_take_ctrl_c() -> None:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    with sweep.deaf_workers(), ProcessPoolExecutor(1) as executor:
        assert signal.SIGINT in executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result(60)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
def test_a_launchers_process_is_killed(tmp_path: Path) -> None:
    """joblib ends all its processes then; the sweep goes on, and what took them down is given up."""
    arguments = [*LAUNCHERS["joblib"], *TINY, "model.kwargs={kill_launcher:1}", "+model.kwargs.job=range(2)"]
    done = command(tmp_path, "-m", *arguments, "hydra.sweep.dir=sw")
    jobs = report_of(str(tmp_path / "sw"))["jobs"]
    assert [job["exit_code"] for job in jobs] == [0, 1], done.stderr
    assert jobs[1]["reason"] == "gave up: the process that ran it was killed 2 times"
    assert "the launcher failed and is started again" in done.stderr


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NET)
    arguments = [sys.executable, "-m", "quantflow", "-m", *TINY, "seed=1,2", "hydra.sweep.dir=sw"]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL) as process:
        for _ in range(6000):
            if (tmp_path / "sw" / "1.request").exists() or (tmp_path / "sw" / ".work" / "1.request").exists():
                break
            time.sleep(0.01)
        process.kill()
    assert [each.number for each in read_outcomes(tmp_path / "sw")] == [0]
    done = subprocess.run(arguments, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert "job 0 was run before" in done.stdout
    assert [job["exit_code"] for job in report_of(str(tmp_path / "sw"))["jobs"]] == [0, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optuna's own, on import
def test_a_grid_whose_last_trial_fails_ends_in_peace() -> None:
    """Which trial comes last is the grid sampler's dice; Optuna can stop a study only inside its own loop."""
    import optuna

    def fail_the_only_trial() -> None:
        study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1]}))
        trial = study.ask()
        trial.suggest_categorical("x", [1])
        study.tell(trial, state=optuna.trial.TrialState.FAIL)

    with pytest.raises(RuntimeError, match=r"Study\.stop"):
        fail_the_only_trial()
    with sweep._grid_without_stop():
        fail_the_only_trial()
    with pytest.raises(RuntimeError, match=r"Study\.stop"):
        fail_the_only_trial()


@pytest.mark.slow
def test_optuna_finds_what_is_better_by_the_returned_figures(tmp_path: Path) -> None:
    """Two objectives, whose directions follow from their names; a failed trial does not end the study."""
    done = command(
        tmp_path, "-m", *TINY, "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1", "sweep.objectives=[sqnr_db,latency_ms]", "model.kwargs={fail:1}",
        "+model.kwargs.job=choice(0,1,2)", "hydra.sweep.dir=sw",
    )  # fmt: skip
    results = report_of(str(tmp_path / "sw"))
    assert sorted(job["exit_code"] for job in results["jobs"]) == [0, 0, 2], done.stderr
    assert results["trouble"] == ""
    best = (tmp_path / "sw" / "optimization_results.yaml").read_text()
    found = {job["figures"].get("sqnr_db") for job in results["jobs"]}
    assert any(f"- {value}" in best for value in found if value is not None), best
