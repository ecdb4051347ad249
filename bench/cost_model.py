"""Does the cost model order the ways of an int8 step as they are, and what does its choice lose against the best?

    python -m bench.cost_model --threads 1 2
    QUANTFLOW_ISA=avx2 python -m bench.cost_model --threads 1 2

Every shape of step of ResNet-50, MobileNetV2 (224 x 224) and MiniLM (128 tokens) is run in up to --ways cuts, of those
that the built-in rates rank first and those that this machine's measured rates rank first, in turn; a cut's time is the
least of all rounds.

rank of cuts    Spearman's correlation of predicted and measured times of one shape's cuts: mean of the shapes that have
                four or more, weighted by their time
rank of shapes  the same among all shapes, each at the cut ranked first
off             median of measured over predicted time
loss            time of the cuts ranked first, over that of the fastest, all steps together
worst           the same for one shape that takes a hundredth of the whole or more
tried           what is left of the loss after warm-up's tries
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.runtimes import native_library as lib
from quantflow.runtimes import native_ways
from quantflow.runtimes.native import NativeRunner
from quantflow.sources.models.torchvision_zoo import import_torchvision

COLUMNS = (
    "model",
    "threads",
    "rates",
    "shapes",
    "cuts",
    "rank of cuts",
    "rank of shapes",
    "off",
    "loss",
    "worst",
    "tried",
)
#: shape → (shape of other kernels, or "", rows, panels) → ms
Times = dict[str, dict[tuple[str, int, int], float]]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2", "minilm"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ways", type=int, default=16, help="cuts per shape and set of rates (default 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=7, help="of every cut in each round (default 7)")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.threads, options.ways, options.rounds, options.runs = ["squeezenet1_1"], [1], 4, 1, 2
    found = {"machine": show_machine(), "isa": lib.host_isa(), "rows": []}
    for threads in options.threads:
        start = time.perf_counter()
        lib.call("qf_host_measure_rates", ctypes.c_int32(threads))
        found[f"rates at {threads}"] = rates = lib.host_rates()
        in_cycles = ", ".join(
            f"{name} {value:.3g} ({rates['built_in'][name]:.3g})" for name, value in rates["rates"].items()
        )
        took = time.perf_counter() - start
        console.print(
            f"{lib.host_isa()}, {threads} threads, measured in {took:.2f} s at {rates['ghz']:.2f} GHz: {in_cycles}"
        )
        for name in options.models:
            found["rows"] += of_model(name, threads, rates, options)
    show("cuts of int8 steps, by the rates that rank them", found["rows"], COLUMNS)
    write(options.json, found)
    return 0


def of_model(name: str, threads: int, measured: Mapping[str, Any], options: Any) -> list[dict[str, Any]]:
    module, x = model_of(name, options.batch)
    program = qf.quantize(module, [x], benchmark=False, runtime="native").record.program
    runner = NativeRunner(program, threads=threads)
    inputs = [x]
    runner(inputs)
    sections = runner._sections(inputs, threads)
    sets = {"built in": None, "measured": measured}
    tries = native_ways.Tries(options.ways, math.inf)
    times: Times = defaultdict(dict)
    ranked: dict[str, dict[str, list[dict[str, Any]]]] = {rates: {} for rates in sets}
    counts: dict[str, int] = {}
    for round_ in range(options.rounds):
        for rates in list(sets) if round_ % 2 else list(reversed(sets)):
            use(sets[rates])
            for _, given, plan in sections:
                rows = native_ways.try_ways(plan, given, options.runs, tries, math.inf)
                for row in rows:
                    counts[row["shape"]] = row["count"]
                    ranked[rates][row["shape"]] = row["ways"]
                    for way in row["ways"]:
                        cut = cut_of(way)
                        times[row["shape"]][cut] = min(way["ms"], times[row["shape"]].get(cut, math.inf))
    use(measured)
    cuts = {shape: [[*cut, ms] for cut, ms in sorted(found.items())] for shape, found in times.items()}
    return [
        {
            "model": name, "threads": threads, "rates": rates, **summary(ranked[rates], times, counts, threads),
            "counts": counts, "ranked": ranked[rates], "times": cuts,
        }
        for rates in sets
    ]  # fmt: skip


def cut_of(way: Mapping[str, Any]) -> tuple[str, int, int]:
    return way.get("shape", ""), way["rows"], way["panels"]


def use(rates: Mapping[str, Any] | None) -> None:
    """Rates as the library described them, or the built-in ones."""
    values = [] if rates is None else [rates["rates"][name] for name in sorted(rates["rates"])] + [rates["ghz"]]
    lib.call("qf_host_set_rates", (ctypes.c_double * len(values))(*values), ctypes.c_size_t(len(values)))


def summary(
    ranked: Mapping[str, Sequence[Mapping[str, Any]]], times: Times, counts: Mapping[str, int], threads: int
) -> dict[str, Any]:
    """A line of the table for one set of rates, on the shapes that both sets give."""

    def ms(shape: str, way: Mapping[str, Any]) -> float:
        return times[shape][cut_of(way)]

    best = {shape: counts[shape] * min(times[shape].values()) for shape in ranked}
    first = {shape: counts[shape] * ms(shape, ways[0]) for shape, ways in ranked.items()}
    tried = {
        shape: counts[shape] * min(ms(shape, way) for way in worth(ways, threads)) for shape, ways in ranked.items()
    }
    whole = sum(best.values())
    within = [
        (best[shape], spearman([way["predicted_ms"] for way in ways], [ms(shape, way) for way in ways]))
        for shape, ways in ranked.items()
        if len(ways) >= 4
    ]
    across = [(ways[0]["predicted_ms"], ms(shape, ways[0])) for shape, ways in ranked.items()]
    return {
        "shapes": len(ranked),
        "cuts": sum(len(times[shape]) for shape in ranked),
        "rank of cuts": sum(w * r for w, r in within) / sum(w for w, _ in within) if within else math.nan,
        "rank of shapes": spearman(*zip(*across, strict=True)) if len(across) > 2 else math.nan,
        "off": statistics.median(took / predicted for predicted, took in across),
        "loss": sum(first.values()) / whole,
        "worst": max(first[shape] / best[shape] for shape in ranked if best[shape] >= whole / 100),
        "tried": sum(tried.values()) / whole,
    }


def worth(ways: Sequence[Mapping[str, Any]], threads: int) -> list[Mapping[str, Any]]:
    """Those that warm-up tries."""
    tries = native_ways.tries_of(threads)
    bound = (1 + tries.margin) * ways[0]["predicted_ms"]
    return [way for way in ways[: tries.most] if way["predicted_ms"] <= bound]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks."""
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def model_of(name: str, batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model with random weights, and a batch for it."""
    torch.manual_seed(0)
    if name == "minilm":
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
            attn_implementation="eager",
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False).eval(), torch.randint(0, 30000, (batch, 128))
    torchvision = import_torchvision()
    size = 64 if name == "squeezenet1_1" else 224
    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(batch, 3, size, size)


if __name__ == "__main__":
    raise SystemExit(main())
