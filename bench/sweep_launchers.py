"""Does a sweep lose anything when one of its jobs fails and another is killed?

The same sweep of tiny jobs under each launcher; one job raises an error, one is killed with SIGKILL while it runs. The
sweep's report must hold every job, with figures or with the reason why there are none. Ray runs on a cluster of two
nodes that this script starts. Needs the extra `sweeps`.

    python -m bench.sweep_launchers --json sweep_launchers.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.reporting import arguments, console, show, show_machine, write

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "launcher",
    "jobs",
    "with figures",
    "failed",
    "killed",
    "in the table",
    "in the plot",
    "seconds",
    "exit code",
)
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray"],
}
#: Job 5 fails, job 8 is killed.
MODEL = """
import os, signal
from torch import nn

def net(job=0, fail=-1, kill=-1):
    if job == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == fail:
        raise RuntimeError("no such checkpoint")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""
#: Two nodes, each with a process of its own per job, until the input ends.
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


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--launchers", nargs="+", default=["joblib", "submitit", "ray"], choices=LAUNCHERS)
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    if options.smoke:
        options.launchers, options.jobs = ["basic"], 3
    found = show_machine()
    rows = [_sweep(launcher, options.jobs) for launcher in options.launchers]
    show(f"{options.jobs} jobs, one made to fail, one killed", rows, COLUMNS)
    complete = all(row["in the table"] == options.jobs and row["with figures"] == options.jobs - 2 for row in rows)
    console.print("nothing was lost" if complete else "something was LOST")
    write(options.json, {"question": "sweep_launchers", "machine": found, "sweeps": rows, "complete": complete})
    return 0 if complete else 1


def _sweep(launcher: str, jobs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _cluster(launcher) as address:
        Path(folder, "mine.py").write_text(MODEL)
        fail, kill = jobs * 5 // 12, jobs * 8 // 12
        command = [
            sys.executable, "-m", "quantflow", "-m", *LAUNCHERS[launcher], "model=entry", "model.entry=mine:net",
            f"model.kwargs={{fail:{fail},kill:{kill}}}", f"+model.kwargs.job=range({jobs})", "data=random",
            "data.shape=[[3,8,8]]", "data.calibration=4", "data.evaluation=4", "mode=torchscript", "evaluate=summary",
            "benchmark.rounds=3", "benchmark.min_round_ms=20", "report=quiet", "hydra.sweep.dir=sweep",
            *([f"hydra.launcher.ray.init.address={address}"] if address else []),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        results = json.loads(Path(folder, "sweep", "sweep.json").read_text())
        page = Path(folder, "sweep", "sweep.html").read_text()
    reasons = {job["number"]: job["reason"] for job in results["jobs"]}
    return {
        "launcher": launcher, "jobs": len(results["jobs"]),
        "with figures": sum("latency_ms" in job["figures"] for job in results["jobs"]),
        "failed": "no such checkpoint" in reasons[fail], "killed": "SIGKILL" in reasons[kill],
        "in the table": page.count('id="job-'), "in the plot": page.count("<title>job "),
        "seconds": seconds, "exit code": done.returncode, "reasons": reasons,
    }  # fmt: skip


@contextmanager
def _cluster(launcher: str) -> Iterator[str]:
    """The address of a Ray cluster, for the launcher that needs one."""
    if launcher != "ray":
        yield ""
        return
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


if __name__ == "__main__":
    sys.exit(main())
