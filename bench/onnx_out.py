"""Do onnxruntime and OpenVINO run what we write as ONNX in int8, and as accurately as we do?

For each recipe: the program with its own data, without tuning or timing, written as `to_onnx` does with one calibration
batch; int8 layers as the runtimes themselves count them (onnxruntime's profile, OpenVINO's execution graph), and the
SQNR of each against float and against our reference, on evaluation samples that were not calibrated on.

    OMP_NUM_THREADS=2 python -m bench.onnx_out --recipes resnet50_affine_uint8 minilm_sym_int8

Needs the extra `onnx`, and openvino for its columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.algorithms import refine
from quantflow.exchange import write_onnx
from quantflow.executor.order import observed
from quantflow.executor.run import Run
from quantflow.executor.source import Source, load_source
from quantflow.executor.steps import calibrated, captured
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.program import Program
from quantflow.numerics.measures import sqnr_db
from quantflow.report import Progress, make_console
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.stages.convert import convert
from quantflow.stages.evaluate import tensors

RECIPES = (
    "mnist_cnn_sym_int8", "resnet18_sym_int8", "mobilenet_v2_affine_uint8", "efficientnet_lite0_affine_uint8",
    "efficientnet_lite0_sym_int8", "minilm_sym_int8", "resnet50_affine_uint8", "resnet50_sym_int8", "vit_b_16_sym_int8",
)  # fmt: skip
COLUMNS = ("recipe", "layers", "ort int8", "ov int8", "ours dB", "ort dB", "ov dB", "ort to ours", "file to program")
#: onnxruntime's kernels on codes that multiply by weights.
INT8_KERNELS = (
    "QLinearConv",
    "QGemm",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
)


def program_of(recipe: Any) -> tuple[Program, Source]:
    """What convert makes, without what comes behind it."""
    with Progress(make_console(), quiet=True, waits=False) as progress:
        source = load_source(recipe)
        run = Run.of(recipe, source, progress)
        observable = observed(run, captured(run, source.first_batch))
        table = calibrated(run, observable.prepared, lambda *_: None)
        material = run.material(observable.prepared.graph)
        refined, _ = refine(recipe.algorithms, observable.prepared, table, material, progress.stage)
        return convert(observable.prepared, table, refined), source


def by_onnxruntime(path: Path, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})[0]
    events = json.loads(Path(session.end_profiling()).read_text())
    kinds = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    return torch.from_numpy(found), sum(kind in INT8_KERNELS for kind in kinds)


def by_openvino(path: Path, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([given[i.get_any_name()].numpy() for i in model.inputs])[0]
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    layers = [i for i in infos if i["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")]
    int8 = sum(i["runtimePrecision"].astype(str) in ("u8", "i8") for i in layers)
    return torch.from_numpy(found.copy()), int8


def measure(name: str, settings: list[str], samples: int) -> dict[str, Any]:
    recipe = qf.load_recipe(name, settings)
    program, source = program_of(recipe)
    batch: Batch = next(iter(source.data.evaluation)).head(samples)
    inputs = bind(program, batch.args, batch.kwargs)
    given = {item.keyword or item.name: x for item, x in zip(program.inputs, inputs, strict=True)}
    with torch.no_grad():
        wanted = next(iter(tensors(source.float_model()(*batch.args, **batch.kwargs))))[1]
    ours = next(iter(tensors(ReferenceRunner(program)(inputs))))[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        written = write_onnx(program, path, [source.first_batch.head(samples)])
        row: dict[str, Any] = {"recipe": name, "layers": len(program.int8_nodes())}
        row["file to program"] = next(iter(written.sqnr_to_program_db.values()))
        ort, row["ort int8"] = by_onnxruntime(path, given)
        row |= {"ours dB": sqnr_db(wanted, ours), "ort dB": sqnr_db(wanted, ort), "ort to ours": sqnr_db(ours, ort)}
        try:
            ov, row["ov int8"] = by_openvino(path, given)
            row["ov dB"] = sqnr_db(wanted, ov)
        except ImportError:
            console.print("openvino is not installed")
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=8, help="evaluation samples, and those that sums are coded for")
    parser.add_argument("settings", nargs="*", help="further settings, as data.calibration=16")
    options = parser.parse_args()
    found, rows = show_machine(), []
    for name in options.recipes[:1] if options.smoke else options.recipes:
        rows.append(measure(name, options.settings, 2 if options.smoke else options.samples))
        show(name, rows[-1:], COLUMNS)
    show("all", rows, COLUMNS)
    write(options.json, {"machine": found, "rows": rows})


if __name__ == "__main__":
    main()
