"""Does every legal qconfig give a verified int8 model in every mode?

{symmetric, affine} x {int8, uint8} activations x {per_tensor, per_channel} weights x {export, torchscript, imperative}
on resnet18. A run violates if it raises (warm-up raises where a layer, fed with the reference's codes, differs from the
reference by more than one code, or away from a rounding tie), if a convolution or linear does not run in int8, if its
output equals float's, or if the whole model is further from the reference runtime's output than from float's. Exit
code 1 if any run violates.

`one_flip_db` says what `reference_sqnr_db` can be: it is the reference against itself with a single code per sample, in
the first layer's output, moved by one step. Rounding turns a disturbance of d steps into one of about sqrt(d), so
one legal difference early in a deep model is as far away as many.

    python -m bench.qconfig_matrix --json qconfig_matrix.json
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import quantflow
from bench.photo_models import model_on_photos
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.ir.binding import bind
from quantflow.ir.program import Node
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import choose_runtime
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.sources.data import Batch
from quantflow.stages.compile import Compiled, compile_program

MODES = ("export", "torchscript", "imperative")
COLUMNS = (
    "mode",
    "qscheme",
    "dtype",
    "granularity",
    "int8/core",
    "output_differs",
    "layers_checked",
    "one_code_differences",
    "float_sqnr_db",
    "reference_sqnr_db",
    "one_flip_db",
    "seconds",
    "verdict",
)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="resnet18", help="a torchvision architecture (default resnet18)")
    parser.add_argument("--weights", default="random", help="random, auto, pretrained or a file (default random)")
    parser.add_argument("--size", type=int, default=224, help="side of the input (default 224)")
    parser.add_argument("--calibration", type=int, default=32, help="samples")
    parser.add_argument("--evaluation", type=int, default=16, help="samples")
    options = parser.parse_args()
    if options.smoke:
        options.size, options.calibration, options.evaluation = 64, 4, 2
    found = show_machine()
    module, data, weights = model_on_photos(
        options.model,
        options.size,
        calibration=options.calibration,
        evaluation=options.evaluation,
        weights=options.weights,
    )
    calibration, evaluation = list(data.calibration), list(data.evaluation)

    runs = list(itertools.product(MODES, ("symmetric", "affine"), ("int8", "uint8"), ("per_tensor", "per_channel")))
    if options.smoke:
        runs = runs[:: len(runs) // len(MODES)]
    rows = []
    for asked in runs:
        row: dict[str, Any] = dict(zip(("mode", "qscheme", "dtype", "granularity"), asked, strict=True))
        row |= _attempt(module, calibration, evaluation, row)
        rows.append(row)
        console.print(f"{len(rows)}/{len(runs)} {' '.join(asked)}: {row['verdict']}")
    show(f"{options.model}, {weights}, photos {options.size} x {options.size}", rows, COLUMNS)
    violations = [row for row in rows if row["verdict"] != "ok"]
    for row in violations:
        console.print(row.get("traceback", ""), markup=False)
    console.print(f"{len(rows) - len(violations)} of {len(rows)} runs hold")
    write(options.json, {"question": "qconfig_matrix", "model": options.model, "machine": found, "runs": rows})
    return 1 if violations else 0


def _attempt(
    module: nn.Module, calibration: Sequence[Batch], evaluation: Sequence[Batch], asked: dict[str, str]
) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        figures = _run(module, calibration, evaluation, asked)
    except Exception as error:  # noqa: BLE001 - the table lists every failure
        summary = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        figures = {"verdict": summary, "traceback": traceback.format_exc()}
    return figures | {"seconds": round(time.perf_counter() - start, 1)}


def _run(
    module: nn.Module, calibration: Sequence[Batch], evaluation: Sequence[Batch], asked: dict[str, str]
) -> dict[str, Any]:
    model = quantflow.quantize(
        module,
        calibration,
        qconfig={
            "activation": {"qscheme": asked["qscheme"], "dtype": asked["dtype"]},
            "weight": {"granularity": asked["granularity"]},
        },
        mode=asked["mode"],
        runtime="torch",
        evaluation=evaluation,
    )
    proof, warmup = model.results["int8_proof"], model.results["warmup"]
    reference = compile_program(model.record.program, choose_runtime("reference"))
    with torch.inference_mode():
        exact = torch.cat([reference(*batch.args) for batch in evaluation])
        found = torch.cat([model(*batch.args) for batch in evaluation])
    figures = {
        "int8/core": f"{proof['int8_layers_run']}/{proof['core_layers']}",
        "output_differs": proof["output_differs"],
        "layers_checked": warmup["layers_checked"],
        "one_code_differences": warmup["one_code_differences"],
        "float_sqnr_db": model.results["accuracy"]["sqnr_db"],
        "reference_sqnr_db": sqnr_db(exact, found),
        "one_flip_db": _one_flip_db(reference, evaluation[0]),
        "verdict": "ok",
    }
    if proof["int8_layers_run"] != proof["core_layers"]:
        figures["verdict"] = "a convolution or linear does not run in int8"
    elif not proof["output_differs"]:
        figures["verdict"] = "the output equals float's"
    elif not figures["reference_sqnr_db"] > figures["float_sqnr_db"]:
        figures["verdict"] = "the output is further from the reference runtime's than from float's"
    return figures


def _one_flip_db(reference: Compiled, batch: Batch) -> float:
    """The reference against itself, with one code per sample of the first layer's output moved by one step."""
    program, runner = reference.program, reference.runner
    assert isinstance(runner, ReferenceRunner)
    inputs = bind(program, batch.args, batch.kwargs)
    _, first, *_ = (
        node for node in program.nodes if node.output in program.values
    )  # the input's own codes, then these

    def flip(node: Node, values: Mapping[str, Any]) -> None:
        if node is first:
            q = values[node.output]
            centre = (slice(None), 0, *(side // 2 for side in q.shape[2:]))
            q[centre] = torch.where(q[centre] < torch.iinfo(q.dtype).max, q[centre] + 1, q[centre] - 1)

    return sqnr_db(runner(inputs), runner(inputs, flip))


if __name__ == "__main__":
    sys.exit(main())
