"""task=export: an artifact in a format that other runtimes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from quantflow import report
from quantflow.config.compose import overlay
from quantflow.errors import EXIT_PASSED
from quantflow.exchange import OnnxExport, write_onnx
from quantflow.executor.source import load_source
from quantflow.ir.batch import Batch
from quantflow.numerics.seed import seeded
from quantflow.report import Progress
from quantflow.schema import Recipe
from quantflow.stages.record import Record
from quantflow.store.artifact import RESULTS, add_files
from quantflow.tasks.artifact import require_own_code_named

#: The file is written and compared on so many samples of the artifact's own data: exact integer sums are slow.
SAMPLES = 8


def task(recipe: Recipe, overrides: Sequence[str]) -> int:
    """Write the file, compare it with the reference, and add what came of it to the artifact's results."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact)
    path = Path(recipe.export.path or f"{Path(recipe.artifact)}.onnx")
    with Progress(console, quiet=recipe.report.quiet) as progress:
        with progress.stage("load"):
            batches = _own_data(record, overrides)
        with progress.stage("write and compare"):
            written = write_onnx(record.program, path, batches)
    results = {**record.results, "onnx": written.to_json()}
    add_files(Path(recipe.artifact), {RESULTS: report.to_json(results)})
    for line in _lines(written):
        console.print(Text(line))
    return EXIT_PASSED


def _own_data(record: Record, overrides: Sequence[str]) -> list[Batch] | None:
    """Some of the data that the artifact's recipe calibrates on; None: it was made in Python, from data of its own."""
    if any(record.recipe[part]["kind"] == "given" for part in ("model", "data")):
        return None
    stored = Recipe.from_dict({**overlay(record.recipe, overrides), "task": "run", "artifact": None})
    require_own_code_named(stored, record, overrides)
    with seeded(stored.seed):
        return [load_source(stored).first_batch.head(SAMPLES)]


def _lines(written: OnnxExport) -> list[str]:
    lines = [f"ONNX, opset {written.opset}: {written.path}"]
    for name, sqnr in (written.sqnr_db or {}).items():
        lines.append(
            f"{name}: onnxruntime {sqnr:.1f} dB from the reference, on {written.compared_on}; what QDQ nodes express "
            f"is {written.sqnr_to_program_db[name]:.1f} dB from the artifact's own program"
        )
    lines += [f"{layer}: float in onnxruntime, as {reason}" for layer, reason in written.float_layers.items()]
    if written.split_layers and written.compared_on != "the first batch":
        lines.append(
            f"{written.split_layers} sums with a residual are coded in the widest range that matters, as the artifact "
            "holds no data: model.to_onnx(file, batches) codes them more finely"
        )
    return lines
