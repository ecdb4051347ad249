"""task=sensitivity: what int8 in each layer alone costs, and what float in it alone gives back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from quantflow import report
from quantflow.errors import EXIT_PASSED, UsageError
from quantflow.executor.run import Run
from quantflow.executor.source import load_source
from quantflow.numerics.seed import seeded
from quantflow.report import Progress
from quantflow.schema import Recipe
from quantflow.search.bench import analyse
from quantflow.search.sensitivity import plot_ready
from quantflow.store.run_folder import Work
from quantflow.store.whole_file import replace_file
from quantflow.tasks.run import LOAD_S, nothing_left_on_error
from quantflow.tasks.shown import shown


def task(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Measure every layer, print the ranking and write it for plots."""
    console = report.make_console(plain=recipe.report.plain)
    destination = Path(recipe.output or f"outputs/{recipe.name}.sensitivity.json")
    work = Work(destination, recipe.work_key(), resume=recipe.resume)
    with (
        Progress(console, quiet=recipe.report.quiet) as progress,
        seeded(recipe.seed),
        nothing_left_on_error(work),
    ):
        with progress.stage("load") as stage:
            stage.expect(LOAD_S)
            source = load_source(recipe, stage.update)
        report.print_notices(console, source.notices)
        found = analyse(Run.of(recipe, source, progress, work=work))
    try:
        replace_file(destination, report.to_json(plot_ready(found)))
    except OSError as error:
        raise UsageError(f"output: '{destination}' can't be written ({error.strerror}); choose another") from error
    work.remove()
    report.print_sensitivity(console, found)
    console.print(Text(f"saved in {shown(destination)}"))
    return EXIT_PASSED
