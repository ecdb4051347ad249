"""Are two installations equally fast? A change that should change nothing shows here.

    python -m bench.same_speed --other-python OLD/bin/python --threads 2

Both sides take turns, in processes of their own that stay alive: the time to import quantflow (a fresh process each),
to load a saved ResNet-50 and get its first result, and the latency of int8 ResNet-50, MobileNetV2 and of a small
SqueezeNet, where the call itself counts. Each side makes its own models, with random weights, and what a round
measures is the ratio of the two in that round. quantflow's public names are all it needs, so that modules may move.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: torchvision model → side of the image.
MODELS = {"resnet50": 224, "mobilenet_v2": 224, "squeezenet1_1": 64}
IMPORT = "import time; start = time.perf_counter(); import quantflow; print(time.perf_counter() - start)"


def main() -> int:
    from bench.reporting import arguments, show, show_machine, write

    parser = arguments(__doc__)
    parser.add_argument("--other-python", default=sys.executable, help="the interpreter of the other installation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    found = show_machine()
    models = {"squeezenet1_1": 32} if options.smoke else MODELS
    rounds = 3 if options.smoke else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(python, Path(folder, name), options.threads, models)
            for name, python in (("this", sys.executable), ("other", options.other_python))
        }
        taken: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
        for round_ in range(rounds):
            for name in list(sides) if round_ % 2 else list(reversed(sides)):
                for question, seconds in sides[name].round().items():
                    taken[name].setdefault(question, []).append(seconds * 1e3)
        for side in sides.values():
            side.close()
    rows = [_row(question, taken["this"][question], taken["other"][question]) for question in taken["this"]]
    show(f"{options.threads} threads, {rounds} rounds", rows, ("question", "this_ms", "other_ms", "ratio", "spread"))
    write(options.json, {"question": "same_speed", "machine": found, "rows": rows})
    return 0


def _row(question: str, this: list[float], other: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(this, other, strict=True))
    quarter = len(ratios) // 4
    return {
        "question": question,
        "this_ms": statistics.median(this),
        "other_ms": statistics.median(other),
        "ratio": statistics.median(ratios),
        "spread": f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}",
    }


class Side:
    """One installation: a process that has its models ready and times them when it is told to."""

    def __init__(self, python: str, folder: Path, threads: int, models: dict[str, int]) -> None:
        folder.mkdir()
        self._python, self._folder = python, folder
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(folder)}
        self._environment.pop("PYTHONPATH", None)
        # Started by its path and from elsewhere, so that the installation's quantflow is what it imports.
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), json.dumps(models)],
            cwd=folder, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ask()

    def round(self) -> dict[str, float]:
        """Question → seconds."""
        done = subprocess.run(
            [self._python, "-c", IMPORT],
            cwd=self._folder, env=self._environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {"import quantflow": float(done.stdout)} | self._ask()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds: dict[str, float] = json.loads(self._process.stdout.readline())
        return seconds


def answer(models: dict[str, int]) -> None:
    """Runs in the other process: a round for every line of standard input."""
    # Only here: the process that compares times nothing of its own.
    import torch

    import quantflow

    ready, saved = {}, {}
    for name, size in models.items():
        small = [f"data.size={size}", "data.calibration=4", "data.evaluation=4", "evaluate=disabled", "gates=none"]
        asked = ["model=torchvision", f"model.name={name}", "model.weights=random", "data=photos", *small]
        quiet = ["benchmark=disabled", "report=quiet", "runtime=native", f"output={name}"]
        with contextlib.redirect_stdout(io.StringIO()):  # standard output is for answers
            model = quantflow.run(quantflow.load_recipe("template", [*asked, *quiet]))
        batches = [torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))]
        ready[name], saved[name] = (model, batches[0][:1].clone()), Path(f"{name}.int8")
        model.save(saved[name])
    with torch.inference_mode():
        for _ in sys.stdin:
            print(json.dumps(_times(quantflow, ready, saved)), flush=True)


def _times(quantflow: Any, ready: dict[str, Any], saved: dict[str, Path]) -> dict[str, float]:
    first = next(iter(saved))
    start = time.perf_counter()
    quantflow.load(saved[first])(ready[first][1])
    seconds = {f"load {first} to its first result": time.perf_counter() - start}
    for name, (model, x) in ready.items():
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < 0.2:
            model(x)
            calls += 1
        seconds[f"{name}, batch 1"] = (time.perf_counter() - began) / calls
    return seconds


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        answer(json.loads(sys.argv[1]))
    else:
        raise SystemExit(main())
