"""task=compare: what became worse from a baseline's artifact to a candidate's, and in which layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantflow import report
from quantflow.analysis.compare import compare
from quantflow.errors import EXIT_GATE, EXIT_PASSED, UsageError
from quantflow.schema import Recipe
from quantflow.stages.gates import FAILED
from quantflow.stages.record import Record
from quantflow.store.artifact import JUNIT, SUMMARY, check_destination, write_artifact
from quantflow.tasks.shown import shown


def task(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Hold a candidate's artifact against a baseline's, and write what changed to a folder of its own."""
    assert recipe.baseline is not None, "the schema asks for it"
    assert recipe.candidate is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    destination = Path(recipe.output or "outputs/compare")
    for place in (recipe.baseline, recipe.candidate):
        if destination.exists() and Path(place).exists() and destination.samefile(place):
            raise UsageError(f"output: '{destination}' is one of the artifacts compared; choose another output=")
    check_destination(destination)
    records = (Record.load(recipe.baseline, operators=None), Record.load(recipe.candidate, operators=None))
    results = compare(*records, recipe.compare, (recipe.baseline, recipe.candidate))
    files = {
        "compare.json": report.to_json(results),
        "compare.md": report.comparison(results).encode(),
        SUMMARY: report.comparison(results, every_layer=False).encode(),
        JUNIT: report.junit(results),
    }
    saved = write_artifact(destination, files, notices=results["notices"])
    report.print_comparison(console, results, saved=shown(saved), quiet=recipe.report.quiet)
    return EXIT_GATE if results["verdict"] == FAILED else EXIT_PASSED
