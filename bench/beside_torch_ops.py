"""Is an int8 model slower where torch computes before, inside or after it?

    OMP_NUM_THREADS=2 python -m bench.beside_torch_ops

Torch's threads spin for milliseconds after each op. Each case is timed on the library's own threads alone ("own") and
as it comes, where it borrows torch's while those spin ("borrowed"), in turns within one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.runtimes import native_library as lib
from quantflow.sources.models.torchvision_zoo import import_torchvision

COLUMNS = ("model", "torch op", "own_ms", "borrowed_ms", "borrowed to own", "spread")


class Between(nn.Module):
    """Convolutions with an op between them that has no native kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.special.expit(block(x)).sort(1).values
        return x


def _made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name == "between":
        return Between().eval(), torch.randn(1, 64, 28, 28)
    return getattr(import_torchvision().models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)


def measure(name: str, mode: str, rounds: int) -> list[dict[str, Any]]:
    """One row per place of the torch op."""
    module, x = _made(name)
    models: dict[str, Callable[..., Any]] = {}
    borrowing = lib.region_of_torch()
    for kind, region in (("own", None), ("borrowed", borrowing)):
        lib.library().qf_host_borrow(region)
        lib.forget_backends()
        models[kind] = qf.quantize(module, [x], mode=mode, device="cpu")
    large, rows = torch.randn(256, 4096), []
    with torch.inference_mode():
        for place in ("inside",) if name == "between" else ("none", "before", "after"):
            taken: dict[str, list[float]] = {kind: [] for kind in models}
            for turn in range(rounds):
                for kind in list(models)[:: 1 if turn % 2 else -1]:
                    found = []
                    for _ in range(6):
                        if place == "before":
                            large.relu()
                        start = time.perf_counter()
                        models[kind](x)
                        if place == "after":
                            large.relu()
                        found.append((time.perf_counter() - start) * 1e3)
                    taken[kind].append(statistics.median(found[2:]))
            ratios = [b / a for a, b in zip(taken["own"], taken["borrowed"], strict=True)]
            quarters = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "model": f"{name}, {mode}",
                    "torch op": place,
                    "own_ms": statistics.median(taken["own"]),
                    "borrowed_ms": statistics.median(taken["borrowed"]),
                    "borrowed to own": statistics.median(ratios),
                    "spread": f"{quarters[0]:.2f} to {quarters[2]:.2f}",
                }
            )
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2", "between"])
    parser.add_argument("--mode", default="export")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    found, rows = show_machine(), []
    for name in ["between"] if options.smoke else options.models:
        rows += measure(name, options.mode, 2 if options.smoke else options.rounds)
        console.print(rows[-1])
    show("beside torch ops", rows, COLUMNS)
    write(options.json, {"machine": found, "rows": rows})


if __name__ == "__main__":
    main()
