"""Is mode=torchscript as fast as torch.ao's FX int8 model, traced and frozen?

Both quantize the same module on the same batches and run in one process, taking turns; torch.ao runs with its x86 and
its onednn engine. Random weights with BatchNorm statistics estimated on the calibration data: this is about speed only.

    python -m bench.torchscript_vs_torch_ao --threads 2 --json torchscript_vs_torch_ao.json
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import quantflow
from bench.photo_models import float_module
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.numerics.measures import sqnr_db
from quantflow.sources.data import Batch
from quantflow.sources.models import estimate_batchnorm
from quantflow.sources.models.torchvision_zoo import load_torchvision
from quantflow.stages.benchmark import Timing, interleaved, threads

OURS, THEIRS = ("sym_int8", "affine_uint8"), ("x86", "onednn")
FLOAT = "float32, eager"
COLUMNS = ("what", "median_ms", "min_ms", "spread_ms", "calls_per_round", "float_sqnr_db", "speedup")
RATIO_COLUMNS = ("ours", "torch.ao", "ratio", "ratio_min", "ratio_max")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="resnet50", help="a torchvision architecture (default resnet50)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default 1)")
    parser.add_argument("--size", type=int, default=224, help="side of the input (default 224)")
    parser.add_argument("--threads", type=int, help="torch's intra-op threads; default: as the environment says")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--min-round-ms", type=float, default=300.0)
    parser.add_argument("--contiguous", action="store_true", help="input in NCHW order; default: channels last")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.size, options.rounds, options.min_round_ms = "resnet18", 64, 3, 20.0
    with threads(options.threads):
        found = show_machine()
        torch.manual_seed(0)
        module = float_module(load_torchvision(options.model, "random", None, seed=0))
        calibration = [Batch((torch.randn(8, 3, options.size, options.size),)) for _ in range(2)]
        estimate_batchnorm(module, calibration)
        x = torch.randn(options.batch, 3, options.size, options.size)
        if not options.contiguous:
            x = x.to(memory_format=torch.channels_last)
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {FLOAT: module}
        for preset in OURS:
            console.print(f"quantflow {preset} …")
            models[f"quantflow {preset}"] = quantflow.quantize(module, calibration, qconfig=preset, mode="torchscript")
        for engine in THEIRS:
            console.print(f"torch.ao {engine} …")
            models[f"torch.ao {engine}"] = _torch_ao(module, calibration, x, engine)
        rows, ratios = _time(models, x, options.rounds, options.min_round_ms)
    title = f"{options.model}, batch {options.batch}, {options.size} x {options.size}, {options.rounds} rounds"
    show(title, rows, COLUMNS)
    show("ours / torch.ao: median over the rounds of the two times in one round", ratios, RATIO_COLUMNS)
    best = min(r["median_ms"] for r in rows if r["what"].startswith("torch.ao"))
    for row in rows:
        if row["what"].startswith("quantflow"):
            console.print(f"{row['what']} / the faster torch.ao, of medians: {row['median_ms'] / best:.3f}")
    write(
        options.json,
        {
            "question": "torchscript_vs_torch_ao",
            "model": options.model,
            "batch": options.batch,
            "size": options.size,
            "layout": "contiguous" if options.contiguous else "channels_last",
            "rounds": options.rounds,
            "machine": found,
            "times": rows,
            "ratios": ratios,
        },
    )
    return 0


def _torch_ao(module: nn.Module, calibration: Sequence[Batch], x: torch.Tensor, engine: str) -> torch.jit.ScriptModule:
    """torch.ao's FX workflow with the engine's default qconfig, then trace and freeze."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization announces its own removal at every step
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = engine
        prepared = prepare_fx(module, get_default_qconfig_mapping(engine), (x,))
        with torch.no_grad():
            for batch in calibration:
                prepared(*batch.args)
            converted = convert_fx(prepared)
            return torch.jit.freeze(torch.jit.trace(converted, x))  # type: ignore[no-any-return, no-untyped-call]


def _time(
    models: dict[str, Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, rounds: int, min_round_ms: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    with torch.inference_mode():
        outputs = {name: model(x) for name, model in models.items()}
        timings = interleaved(
            {name: lambda m=model: m(x) for name, model in models.items()},  # type: ignore[misc]
            rounds=rounds,
            min_round_ms=min_round_ms,
        )
    rows = [
        {
            "what": name,
            "median_ms": timing.median_ms,
            "min_ms": timing.min_ms,
            "spread_ms": timing.spread_ms,
            "calls_per_round": timing.calls_per_round,
            "rounds_ms": timing.rounds,
            "float_sqnr_db": None if name == FLOAT else sqnr_db(outputs[FLOAT], outputs[name]),
            "speedup": timings[FLOAT].median_ms / timing.median_ms,
        }
        for name, timing in timings.items()
    ]
    return rows, [_ratio(f"quantflow {a}", f"torch.ao {b}", timings) for a in OURS for b in THEIRS]


def _ratio(ours: str, theirs: str, timings: dict[str, Timing]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(timings[ours].rounds, timings[theirs].rounds, strict=True)]
    return {
        "ours": ours,
        "torch.ao": theirs,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


if __name__ == "__main__":
    sys.exit(main())
