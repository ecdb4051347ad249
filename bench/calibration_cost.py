"""What does calibration cost on top of the float forward passes that it needs anyway?

The calibration stage of each observer against the plain float model over the same batches, all in memory, taking turns.
`range_ms` is what conversion spends later on choosing every range, measured once.

    python -m bench.calibration_cost --threads 2 --json calibration_cost.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bench.photo_models import model_on_photos
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.executor.run import Run
from quantflow.executor.source import Source
from quantflow.executor.steps import graph_of, plan_for
from quantflow.report import Progress
from quantflow.runtimes import choose_runtime
from quantflow.schema import Recipe
from quantflow.sources.data import Batch, Data
from quantflow.sources.models import LoadedModel
from quantflow.stages.benchmark import interleaved, threads
from quantflow.stages.calibrate import calibrate
from quantflow.stages.prepare import Prepared, prepare
from quantflow.stages.refined import measured_qparams

FLOAT = "float forward"
OBSERVERS = ("minmax", "moving_average", "histogram", "percentile", "mse", "entropy")
#: What the stage may cost, as a multiple of the float forward.
LIMITS = {"minmax": 1.5, "histogram": 3.0}
COLUMNS = ("what", "median_ms", "min_ms", "spread_ms", "ratio", "ratio_min", "ratio_max", "limit", "range_ms")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="resnet50", help="a torchvision architecture (default resnet50)")
    parser.add_argument("--size", type=int, default=224, help="side of the input (default 224)")
    parser.add_argument("--mode", default="export", choices=("export", "torchscript", "imperative"))
    parser.add_argument("--observers", nargs="+", default=OBSERVERS, choices=OBSERVERS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="batch size (default 16, as in recipes)")
    parser.add_argument("--threads", type=int, help="torch's intra-op threads; default: as the environment says")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.smoke:
        options.model, options.size, options.samples, options.batch, options.rounds = "resnet18", 64, 4, 4, 2
    with threads(options.threads):
        found = show_machine()
        module, data, _ = model_on_photos(
            options.model, options.size, calibration=options.samples, evaluation=1, batch_size=options.batch
        )
        batches = list(data.calibration)
        prepared = {name: _prepared(module, batches[0], name, options.mode) for name in options.observers}
        rows = _time(module, prepared, batches, options.rounds)
    title = f"{options.model}, {options.samples} samples in batches of {options.batch}, mode={options.mode}"
    show(f"{title}: a pass over all of them, {options.rounds} rounds", rows, COLUMNS)
    over = [row["what"] for row in rows if row["limit"] is not None and row["ratio"] > row["limit"]]
    console.print(f"above their limit: {', '.join(over)}" if over else "all within their limits")
    write(
        options.json,
        {
            "question": "calibration_cost",
            "model": options.model,
            "size": options.size,
            "mode": options.mode,
            "samples": options.samples,
            "batch": options.batch,
            "rounds": options.rounds,
            "machine": found,
            "times": rows,
        },
    )
    return 0


def _prepared(module: nn.Module, example: Batch, observer: str, mode: str) -> Prepared:
    """capture → plan → prepare, as the executor does it."""
    recipe = Recipe.from_dict(
        {
            "name": "calibration_cost",
            "model": {"kind": "given", "name": type(module).__name__},
            "data": {"kind": "given"},
            "qconfig": {"activation": {"observer": observer}},
            "mode": {"kind": mode},
        },
        "calibration_cost",
    )
    choice = choose_runtime("auto", "cpu", mode)
    source = Source(LoadedModel(module, type(module).__name__), Data([example], [example], {}))
    run = Run(recipe, source, choice, Progress(console, quiet=True))
    graph = graph_of(run, example)
    plan = plan_for(run, graph, example)
    return prepare(graph, plan, module if mode == "imperative" else None)


def _time(
    module: nn.Module, prepared: dict[str, Prepared], batches: Sequence[Batch], rounds: int
) -> list[dict[str, Any]]:
    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                module(*batch.args)

    passes: dict[str, Callable[[], Any]] = {FLOAT: forward}
    passes |= {name: lambda p=each: calibrate(p, batches) for name, each in prepared.items()}  # type: ignore[misc]
    timings = interleaved(passes, rounds=rounds, min_round_ms=0)
    rows = []
    for name, timing in timings.items():
        ratios = [a / b for a, b in zip(timing.rounds, timings[FLOAT].rounds, strict=True)]
        rows.append(
            {
                "what": name,
                "median_ms": timing.median_ms,
                "min_ms": timing.min_ms,
                "spread_ms": timing.spread_ms,
                "rounds_ms": timing.rounds,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "limit": LIMITS.get(name),
                "range_ms": _range_ms(prepared[name], batches) if name in prepared else None,
            }
        )
    return rows


def _range_ms(prepared: Prepared, batches: Sequence[Batch]) -> float:
    table = calibrate(prepared, batches)
    start = time.perf_counter()
    measured_qparams(prepared, table)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(main())
