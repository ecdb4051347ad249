"""Are two installations equally fast? A change that should change nothing shows here.

    python -m bench.same_speed --other-python OLD/bin/python --threads 2
    python -m bench.same_speed --other-python OLD/bin/python --threads 2 --models densenet121 --batch 16

Both sides take turns, in processes of their own that stay alive: the time to import quantflow (a fresh process each),
to load a saved ResNet-50 and MiniLM and get their first results, and the latency of int8 ResNet-50, MobileNetV2, MiniLM
and of a small SqueezeNet, where the call itself counts. Each side makes its own models, with random weights, and what a
round measures is the ratio of the two in that round. quantflow's public names are all it needs, so that modules may
move.
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
#: And a text model: its name → tokens.
TEXT = {"minilm": 128}
#: What is loaded from a file and called once.
LOADED = ("resnet50", "minilm")
IMPORT = "import time; start = time.perf_counter(); import quantflow; print(time.perf_counter() - start)"


def main() -> int:
    from bench.reporting import arguments, show, show_machine, write

    parser = arguments(__doc__)
    parser.add_argument("--other-python", default=sys.executable, help="the interpreter of the other installation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only-load", action="store_true", help="load ResNet-50 and MiniLM, and nothing else")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these of torchvision, on images of 224 x 224")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    options = parser.parse_args()
    found = show_machine()
    models = {"squeezenet1_1": 32} if options.smoke else {**MODELS, **TEXT}
    if options.models:
        models = dict.fromkeys(options.models, 224)
    if options.only_load:
        models = {name: models[name] for name in LOADED}
    rounds = 3 if options.smoke else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(python, Path(folder, name), options.threads, models, options.batch, only_load=options.only_load)
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
    columns = (
        "question",
        "this_ms",
        "other_ms",
        "ratio",
        "least_this_ms",
        "least_other_ms",
        "ratio_of_least",
        "spread",
    )
    show(f"{options.threads} threads, {rounds} rounds", rows, columns)
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
        "least_this_ms": min(this),
        "least_other_ms": min(other),
        "least_ratio": min(this) / min(other),
        "spread": f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}",
    }


class Side:
    """One installation: a process that has its models ready and times them when it is told to."""

    def __init__(
        self, python: str, folder: Path, threads: int, models: dict[str, int], batch: int, *, only_load: bool = False
    ) -> None:
        folder.mkdir()
        self._python, self._folder, self._only_load = python, folder, only_load
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(folder)}
        self._environment.pop("PYTHONPATH", None)
        # Started by its path and from elsewhere, so that the installation's quantflow is what it imports.
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), json.dumps(models), str(batch), "load" if only_load else "all"],
            cwd=folder, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ask()

    def round(self) -> dict[str, float]:
        """Question → seconds."""
        if self._only_load:
            return self._ask()
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


def answer(models: dict[str, int], batch: int, *, only_load: bool) -> None:
    """Runs in the other process: a round for every line of standard input."""
    # Only here: the process that compares times nothing of its own.
    import torch

    import quantflow

    ready, saved = {}, {}
    for name, size in models.items():
        small = ["data.calibration=4", "data.evaluation=4", "evaluate=disabled", "gates=none", "model.weights=random"]
        recipe, asked = "template", ["model=torchvision", f"model.name={name}", "data=photos", f"data.size={size}"]
        if name in TEXT:
            recipe, asked = f"{name}_sym_int8", []
        quiet = ["benchmark=disabled", "report=quiet", "runtime=native", f"output={name}"]
        with contextlib.redirect_stdout(io.StringIO()):  # standard output is for answers
            model = quantflow.run(quantflow.load_recipe(recipe, [*asked, *small, *quiet]))
        given: Any = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        if name in TEXT:
            given = {each.name: torch.ones(1, size).long() for each in model.record.program.inputs}
        ready[name], saved[name] = (model, given), Path(f"{name}.int8")
        model.save(saved[name])
    with torch.inference_mode():
        for _ in sys.stdin:
            print(json.dumps(_times(quantflow, ready, saved, batch, only_load=only_load)), flush=True)


def _times(
    quantflow: Any, ready: dict[str, Any], saved: dict[str, Path], batch: int, *, only_load: bool = False
) -> dict[str, float]:
    seconds = {}
    for name in [name for name in LOADED if name in saved] or list(saved):
        start, busy = time.perf_counter(), time.process_time()
        _called(quantflow.load(saved[name]), ready[name][1])
        seconds[f"load {name} to its first result"] = time.perf_counter() - start
        # Others on the machine do not count in this one.
        seconds[f"load {name}, CPU time"] = time.process_time() - busy
    for name, (model, x) in ready.items() if not only_load else ():
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < 0.2:
            _called(model, x)
            calls += 1
        seconds[f"{name}, batch {1 if name in TEXT else batch}"] = (time.perf_counter() - began) / calls
    return seconds


def _called(model: Any, given: Any) -> Any:
    return model(**given) if isinstance(given, dict) else model(given)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].startswith("{"):
        answer(json.loads(sys.argv[1]), int(sys.argv[2]), only_load=sys.argv[3] == "load")
    else:
        raise SystemExit(main())
