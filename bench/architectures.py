"""Does every torchvision classification architecture become int8, unedited?

Random weights with BatchNorm statistics estimated on the calibration photos, the smallest input from `SIZES` that the
model accepts, mode=export. A model passes if it converts, every convolution and linear of it runs in int8, and each
layer of the runtime asked for (`--runtime`) is within one code of the reference runtime on the reference's own codes.
Linears of constants (Swin v2's position bias) are computed once, at capture, and do not count. "in torch" counts the
nodes that the native runtime has no kernel for, which run in torch between its sections.

Random deep models amplify every disturbance. `input_only_db` shows by how much: it is the float model against itself
with nothing but its input rounded to int8.

Each model runs in a process of its own. Exit code 1 if any model fails.

    python -m bench.architectures --json architectures.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow
from bench.photo_models import float_module, model_on_photos
from bench.reporting import arguments, console, machine, show, show_machine, write
from quantflow.numerics.affine import INT8, SYMMETRIC, activation_qparams, dequantize, quantize
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import choose_runtime
from quantflow.sources.models.torchvision_zoo import import_torchvision, load_torchvision
from quantflow.stages.compile import compile_program

#: Sides of square inputs, tried in this order: the first that the float model accepts is used.
SIZES = (64, 80, 96, 128, 224)
SMOKE = ("squeezenet1_1",)
COLUMNS = (
    "model",
    "size",
    "status",
    "int8/core",
    "float ops",
    "in torch",
    "sqnr_db",
    "reference_sqnr_db",
    "input_only_db",
    "vs_reference_db",
    "layers_checked",
    "one_code_differences",
    "seconds",
)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these architectures only")
    parser.add_argument("--qconfig", default="sym_int8", help="a preset's name")
    parser.add_argument("--runtime", default="native", help="native, or torch")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples, and half as many for evaluation")
    parser.add_argument("--timeout-s", type=float, default=1800, help="per model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        write(options.json, _attempt(options.one, options))
        return 0
    found = show_machine()
    names = options.models or (SMOKE if options.smoke else _names())
    rows = []
    for index, name in enumerate(names, start=1):
        row = _in_own_process(name, options)
        rows.append(row)
        console.print(f"{index}/{len(names)} {name} {row['size']}: {row['status']}, {row['int8/core']} int8")
    show(f"torchvision classification, {options.qconfig}, mode=export, runtime {options.runtime}", rows, COLUMNS)
    show("What stays float, and why", _reasons(rows), ("reason", "op", "layers", "models"))
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed:
        console.print(f"\n{row['model']}: {row['status']}\n{row.get('traceback', '')}", markup=False)
    console.print(f"{len(rows) - len(failed)} of {len(rows)} architectures pass")
    content = {"question": "architectures", "qconfig": options.qconfig, "runtime": options.runtime, "machine": found}
    write(options.json, content | {"models": rows})
    return 1 if failed else 0


def _names() -> list[str]:
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    return list(models.list_models(module=models))


def _in_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one model; a crash or a time-out is a row too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "bench.architectures", "--one", name, "--json", str(file)]
        command += ["--qconfig", options.qconfig, "--runtime", options.runtime, "--samples", str(options.samples)]
        row: dict[str, Any] = {"model": name, "size": None, "int8/core": "-"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return row | {"status": f"no result after {options.timeout_s:g} s"}
        if not file.exists():
            return row | {"status": f"the process died ({done.returncode})", "traceback": done.stderr[-4000:]}
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def _attempt(name: str, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name, "size": None, "status": "ok", "int8/core": "-"}
    try:
        row |= _quantize(name, options, row)
    except Exception as error:  # noqa: BLE001 - the table lists every failure
        row["status"] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        row["traceback"] = traceback.format_exc()
    return row | {"seconds": round(time.perf_counter() - start, 1), "machine": machine()}


def _quantize(name: str, options: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    samples = options.samples
    row["size"] = size = _smallest_input(float_module(load_torchvision(name, "random", None, seed=0)))
    module, data, _ = model_on_photos(
        name, size, calibration=samples, evaluation=max(2, samples // 2), batch_size=samples
    )
    model = quantflow.quantize(
        module,
        data.calibration,
        qconfig=options.qconfig,
        mode="export",
        runtime=options.runtime,
        evaluation=data.evaluation,
    )
    results = model.results
    proof, plan = results["int8_proof"], results["plan"]
    reference = compile_program(model.record.program, choose_runtime("reference"))
    ((x,),) = (batch.args for batch in data.evaluation)
    with torch.inference_mode():
        exact, fast, real, rounded = reference(x), model(x), module(x), module(_rounded(x))
    modules = _modules_on_input(module, size)
    in_torch = model.compiled.left_to_torch()
    floats = Counter((r["op"], r["reason"]) for r in plan if r["precision"] == "float")
    figures = {
        "int8/core": f"{proof['int8_layers_run']}/{proof['core_layers']}",
        "int8_layers": proof["int8_layers_run"],
        "core_layers": proof["core_layers"],
        "modules": modules,
        "float ops": sum(floats.values()),
        "float": [{"op": op, "reason": reason, "layers": n} for (op, reason), n in floats.most_common()],
        "float_core": [r["name"] for r in plan if r["precision"] == "float" and r["op"].startswith(("conv", "linear"))],
        "in torch": len(in_torch),
        "left_to_torch": in_torch,
        "sqnr_db": results["accuracy"]["sqnr_db"],
        "reference_sqnr_db": sqnr_db(real, exact),
        "input_only_db": sqnr_db(real, rounded),
        "vs_reference_db": sqnr_db(exact, fast),
        "layers_checked": results["warmup"]["layers_checked"],
        "one_code_differences": results["warmup"]["one_code_differences"],
        "notices": results["notices"],
    }
    if figures["int8_layers"] < figures["core_layers"]:
        figures["status"] = f"{figures['core_layers'] - figures['int8_layers']} layers with weights stay float"
    elif figures["core_layers"] < modules:
        figures["status"] = (
            f"the graph lacks some of the {modules} convolutions and linears that are called on the input"
        )
    return figures


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """x as symmetric int8 codes hold it."""
    qparams = activation_qparams(float(x.min()), float(x.max()), dtype=INT8, qscheme=SYMMETRIC)
    return dequantize(quantize(x, qparams), qparams)


def _modules_on_input(module: nn.Module, size: int) -> int:
    """Calls of convolution and linear modules whose input changes with the model's."""
    seen: list[torch.Tensor] = []
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].sum())) for layer in layers]
    try:
        with torch.inference_mode():
            for fill in (0.0, 1.0):
                module(torch.full((2, 3, size, size), fill))
    finally:
        for hook in hooks:
            hook.remove()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    return sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _smallest_input(module: nn.Module) -> int:
    """The first of `SIZES` that a forward pass accepts; the model's own words if none."""
    for size in SIZES:
        try:
            with torch.inference_mode():
                module(torch.zeros(2, 3, size, size))
        except Exception:
            if size == SIZES[-1]:
                raise
        else:
            return size
    raise AssertionError("SIZES is not empty")


def _reasons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    layers: Counter[tuple[str, str]] = Counter()
    models: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for entry in row.get("float", []):
            key = (entry["op"], entry["reason"])
            layers[key] += entry["layers"]
            models[key] += 1
    return [
        {"op": op, "reason": reason, "layers": count, "models": models[op, reason]}
        for (op, reason), count in layers.most_common()
    ]


if __name__ == "__main__":
    sys.exit(main())
