"""What does the Python side of one call of a native model cost, beyond the C++ time?

The same tensors through `model(x)` and straight through the library's C function, in turn; the difference of the
medians. A small model, so that the figure is not lost in the noise of a large one.

    python -m bench.call_overhead --threads 1
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

import quantflow
from bench.photo_models import model_on_photos
from bench.reporting import arguments, show, show_machine, write
from quantflow.runtimes import native_library as lib
from quantflow.runtimes.native import NativeRunner


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["squeezenet1_1", "mobilenet_v2"], help="torchvision's")
    parser.add_argument("--size", type=int, default=64, help="side of the image")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = show_machine()
    rows = [_measure(name, options.size, 50 if options.smoke else options.calls) for name in options.models]
    show(
        f"one call at batch 1, {options.threads} threads", rows, ("model", "call_us", "cpp_us", "python_us", "limit_us")
    )
    write(options.json, {"question": "call_overhead", "machine": found, "models": rows})
    return 0


def _measure(name: str, size: int, calls: int) -> dict[str, object]:
    module, data, _ = model_on_photos(name, size, calibration=8, evaluation=8, batch_size=8)
    model = quantflow.quantize(module, data.calibration, runtime="native")
    runner = model.compiled.runner
    assert isinstance(runner, NativeRunner)
    x = next(iter(data.evaluation)).args[0][:1].contiguous()
    (section,) = runner._parts
    plan = runner._plan(section, [x], torch.get_num_threads())
    outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in plan.shapes]
    given, results = lib.pointers([x]), lib.pointers(outputs)
    whole, inside = [], []
    with torch.inference_mode():
        for _ in range(calls):
            start = time.perf_counter()
            model(x)
            middle = time.perf_counter()
            lib.call("qf_plan_run", plan.handle.pointer, given, results)
            inside.append((time.perf_counter() - middle) * 1e6)
            whole.append((middle - start) * 1e6)
    call, cpp = statistics.median(whole), statistics.median(inside)
    return {"model": name, "call_us": call, "cpp_us": cpp, "python_us": call - cpp, "limit_us": 60}


if __name__ == "__main__":
    sys.exit(main())
