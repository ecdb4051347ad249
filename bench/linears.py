"""How near do int8 linears come to the processor's own rate, and to PyTorch's oneDNN kernels?

Layers of 768 x 3072, 3072 x 768, 1024 x 1024 and 2048 x 2048 that read codes and write codes, on several numbers of
rows. In each round the engine's rate (`engine_rate.c`: products of registers; with AMX, of tiles loaded from the L1
cache, one instruction right behind the other, and beside it with empty instructions between), then ours, then oneDNN's
qlinear on u8 codes of the same shape: the least of `--runs` times each. Ratios are of one round; shown are medians and
quartiles.

    python -m bench.linears --threads 1
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow as qf
from bench.engine_rate import FROM_L1, NoEngineRate, built, engine_rate
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.runtimes import native_library as lib
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.native_ways import least_ms

SHAPES = (768, 3072), (3072, 768), (1024, 1024), (2048, 2048)
COLUMNS = (
    "layer", "rows", "kernel", "gmacs", "of the engine", "quartiles", "of it spaced", "to oneDNN's rate",
    "its quartiles",
)  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=12, help="of each in a round (default 12)")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.rounds, options.runs = [32], 2, 2
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"machine": show_machine(), "isa": lib.host_isa(), "threads": options.threads, "rows": []}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        try:
            program: Path | None = built(Path(folder))
        except NoEngineRate as error:
            console.print(f"the engine's own rate: not measured ({error})", markup=False)
            program = None
        for inputs, outputs in SHAPES:
            for rows in options.rows:
                found["rows"].append(measured(inputs, outputs, rows, program, options))
    show(f"int8 linears, {found['isa']}, {options.threads} threads", found["rows"], COLUMNS)
    write(options.json, found)
    return 0


def measured(inputs: int, outputs: int, rows: int, program: Path | None, options: Any) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    # The layer in the middle has codes on both sides.
    widths = outputs, inputs, outputs, 64
    module = nn.Sequential(*map(nn.Linear, widths[:-1], widths[1:])).eval()
    x = torch.randn(rows, widths[0])
    runner = qf.quantize(module, [x], benchmark=False, runtime="native").compiled.runner
    assert isinstance(runner, NativeRunner)
    kernel = ""

    def ours() -> float:
        nonlocal kernel
        layers = [row for row in runner.profile([x], options.runs) if row["op"].startswith("linear")]
        kernel = layers[1]["kernel"]
        return float(layers[1]["ms"])

    peer = onednn(inputs, outputs, rows)
    macs = rows * inputs * outputs / 1e6  # GMAC/s of a millisecond
    isa = lib.host_isa()
    loops = FROM_L1.get(isa, (isa,))
    rates, shares, spaced_shares, ratios = [], [], [], []
    for _ in range(options.rounds):
        engines = [] if program is None else [engine_rate(program, loop, options.threads) for loop in loops]
        own = macs / ours()
        rates.append(own)
        ratios.append(own / (macs / least_ms(peer, options.runs)))
        for found, engine in zip((shares, spaced_shares), engines, strict=False):
            found.append(own / engine)
    return {
        "layer": f"{inputs} x {outputs}", "rows": rows, "kernel": kernel, "gmacs": statistics.median(rates),
        "rounds_gmacs": rates, "of the engine": statistics.median(shares) if shares else None,
        "quartiles": _quartiles(shares), "of it spaced": statistics.median(spaced_shares) if spaced_shares else None,
        "to oneDNN's rate": statistics.median(ratios),
        "its quartiles": _quartiles(ratios),
    }  # fmt: skip


def onednn(inputs: int, outputs: int, rows: int) -> Callable[[], object]:
    """oneDNN's linear on codes, as PyTorch calls it: u8 to u8, a scale per output channel."""
    x = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(
        torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), [rows, inputs]
    )
    scales, zeros, bias = torch.rand(outputs) / 1e3, torch.zeros(outputs, dtype=torch.int64), torch.rand(outputs)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        x, 0.1, 3, weight, scales, zeros, bias, 0.1, 3, torch.uint8, "none", [], ""
    )


def _quartiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    sys.exit(main())
