"""Does one native model stay right under many threads, and does its memory stay flat over many calls?

First `--threads` Python threads call one model `--calls` times each, on inputs of three batch sizes whose results are
known; then one thread calls it `--long` times while the process's resident memory is read. Exit code 1 if any result
differs by one bit, or memory grows by more than 1 % after the first tenth.

    python -m bench.endurance
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import quantflow
from bench.photo_models import model_on_photos
from bench.reporting import arguments, show, show_machine, write


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="squeezenet1_1", help="torchvision's")
    parser.add_argument("--size", type=int, default=64, help="side of the image")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=2000, help="of each thread")
    parser.add_argument("--long", type=int, default=20_000, help="calls of one thread")
    options = parser.parse_args()
    if options.smoke:
        options.calls, options.long = 20, 200
    found = show_machine()
    module, data, _ = model_on_photos(options.model, options.size, calibration=8, evaluation=8, batch_size=8)
    model = quantflow.quantize(module, data.calibration, runtime="native")
    photos = next(iter(data.evaluation)).args[0]
    inputs = [photos[:1], photos[1:4], photos[4:6]]
    expected = [model(x) for x in inputs]

    def work(thread: int) -> int:
        return sum(
            not torch.equal(model(inputs[i % 3]), expected[i % 3]) for i in range(thread, thread + options.calls)
        )

    with ThreadPoolExecutor(options.threads) as pool:
        wrong = sum(pool.map(work, range(options.threads)))
    resident = []
    for i in range(options.long):
        if i % max(1, options.long // 100) == 0:
            resident.append(_resident_mib())
        wrong += not torch.equal(model(inputs[i % 3]), expected[i % 3])
    early, late = max(resident[: max(1, len(resident) // 10)]), resident[-1]
    row = {
        "threads": options.threads,
        "calls": options.threads * options.calls + options.long,
        "wrong": wrong,
        "early_mib": early,
        "late_mib": late,
    }
    show(f"{options.model}, {options.size} x {options.size}", [row], tuple(row))
    write(options.json, {"question": "endurance", "machine": found, **row, "resident_mib": resident})
    return 1 if wrong or late > 1.01 * early else 0


def _resident_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
