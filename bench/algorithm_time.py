"""How long do the presets of accuracy algorithms take, beside NNCF's quantize on the same model and samples?

EfficientNet-Lite0 on 96 crops of photos and all-MiniLM-L6-v2 on 64 documents, real weights. `seconds` is the time from
the float module to the integer program: capture, calibration, algorithms, conversion; NNCF's, with its defaults for the
kind of model, that of OpenVINO's conversion and `nncf.quantize`. `capture_s` is the first part of it: torch.export, and
that conversion. `to NNCF` compares `seconds`, `behind capture` what follows `capture_s`, `mixed` all of ours with what
follows NNCF's. Both take turns; medians over the rounds. `cpu_s`, all threads' processor time, depends less on what
else the machine does: ours is that of all of `quantize`, NNCF's that of `nncf.quantize`.

    OMP_NUM_THREADS=2 python -m bench.algorithm_time --peer-python PATH/bin/python --json algorithm_time.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import quantflow
from bench import nncf_process
from bench.ablation import MODELS
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.schema import ALGORITHM_PRESETS
from quantflow.sources.data import Data
from quantflow.stages.evaluate import EMBEDDING

COLUMNS = (
    "model",
    "what",
    "seconds",
    "least",
    "most",
    "capture_s",
    "to NNCF",
    "behind capture",
    "mixed",
    "cpu_s",
    "all of quantize",
)
#: #4: `fast`, capture included, may take this many times the time of `nncf.quantize`, and `best` so many seconds.
MOST, MOST_S = 1.5, 600.0


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--algorithms", nargs="+", default=["fast"], choices=[n for n in ALGORITHM_PRESETS if n != "none"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", metavar="PATH", help="an interpreter with nncf, openvino and torch")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.model = 1, ["minilm"]
    found = show_machine()
    rows: list[dict[str, Any]] = []
    for name in options.model:
        module, data, outputs = MODELS[name](options.smoke)
        times: dict[str, list[dict[str, float]]] = {preset: [] for preset in options.algorithms}
        with tempfile.TemporaryDirectory() as folder:
            peer = _peer(options.peer_python, Path(folder), module, data, outputs) if options.peer_python else None
            for _ in range(options.rounds):
                if peer is not None:
                    times.setdefault("NNCF", []).append(_asked(peer))
                for preset in options.algorithms:
                    times[preset].append(_timed(module, data, preset))
            if peer is not None:
                peer.communicate()
        theirs = _medians(times["NNCF"]) if "NNCF" in times else None
        rows += [_row(name, what, measured, theirs) for what, measured in times.items()]
    show(f"median of {options.rounds} rounds, {torch.get_num_threads()} threads", rows, COLUMNS)
    broken = [f"{row['model']} {row['what']}" for row in rows if not row["holds"]]
    console.print(f"not within the limits: {', '.join(broken)}" if broken else "all within the limits")
    write(options.json, {"question": "algorithm_time", "machine": found, "results": rows})
    return 1 if broken and not options.smoke else 0


def _row(model: str, what: str, measured: list[dict[str, float]], theirs: dict[str, float] | None) -> dict[str, Any]:
    seconds = [each["seconds"] for each in measured]
    ours = _medians(measured)
    row: dict[str, Any] = ours | {"model": model, "what": what, "least": min(seconds), "most": max(seconds)}
    if theirs is not None:
        behind = theirs["seconds"] - theirs["capture_s"]
        row["to NNCF"] = ours["seconds"] / theirs["seconds"]
        row["behind capture"] = (ours["seconds"] - ours["capture_s"]) / behind
        row["mixed"] = ours["seconds"] / behind
    slow = what == "fast" and row.get("mixed", 0) > MOST
    return row | {"holds": not slow and row["seconds"] <= MOST_S, "rounds": seconds}


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in measured) for key in measured[0]}


def _timed(module: torch.nn.Module, data: Data, preset: str) -> dict[str, float]:
    """Seconds of the stages up to the program, and of everything that `quantize` does."""
    started, cpu = time.perf_counter(), time.process_time()
    model = quantflow.quantize(
        module,
        data.calibration,
        evaluation=[data.calibration[0].head(1)],
        qconfig="affine_uint8",
        algorithms=preset,
    )
    whole, cpu = time.perf_counter() - started, time.process_time() - cpu
    stages = {stage["name"]: stage["seconds"] for stage in model.results["stages"]}
    names = list(stages)
    made = names[: names.index("convert") + 1]
    return {
        "seconds": sum(stages[name] for name in made),
        "capture_s": stages["capture"],
        "all of quantize": whole,
        "cpu_s": cpu,
    }


def _peer(python: str, folder: Path, module: torch.nn.Module, data: Data, outputs: str) -> subprocess.Popen[str]:
    batches = list(data.calibration)
    inputs = [torch.cat(same) for same in zip(*(batch.tensors for batch in batches), strict=True)]
    return nncf_process.started(python, folder, module, inputs, is_text=outputs == EMBEDDING)


def _asked(peer: subprocess.Popen[str]) -> dict[str, float]:
    found = nncf_process.asked(peer)
    both = found["quantize_s"] + found["convert_s"]
    return {"seconds": both, "capture_s": found["convert_s"], "cpu_s": found["cpu_s"]}


if __name__ == "__main__":
    sys.exit(main())
