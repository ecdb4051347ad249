"""task=run: the main job of a recipe, saved to its output folder; with limits in `tune.subject_to`, a search."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantflow import report
from quantflow.analysis.baseline import read_baseline
from quantflow.errors import EXIT_GATE, EXIT_PASSED, QuantflowError, UsageError
from quantflow.executor.measure import evaluated
from quantflow.executor.order import build, execute
from quantflow.executor.run import ONLY, Run
from quantflow.executor.source import load_source
from quantflow.host.place import current, place_of
from quantflow.host.workers import Workers, joined, rank_and_count
from quantflow.numerics.seed import seeded
from quantflow.quantized import Quantized, QuantizedParts, save_record
from quantflow.report import Progress
from quantflow.runtimes import choose_runtime
from quantflow.schema import Recipe
from quantflow.stages.gates import FAILED
from quantflow.store.artifact import check_destination
from quantflow.store.run_folder import Work
from quantflow.tasks.shown import shown
from quantflow.tasks.stage_times import earlier_times, remember_times

#: What importing a model's libraries and making it takes where nothing is counted: 0.4 to 2 s for the shipped ones.
LOAD_S = 2.0


def task(recipe: Recipe, overrides: Sequence[str]) -> int:
    """The first worker runs the job; the others take their parts of it."""
    if recipe.tune.subject_to.is_set and rank_and_count()[1] > 1:
        raise UsageError("tune: a search measures time and runs in one process; start it without torchrun")
    device = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind).device
    with joined() as workers, current(place_of(device)):
        if not workers.is_first:
            _assist(recipe, workers)
            return EXIT_PASSED
        model = run(recipe, overrides, workers)
    return EXIT_GATE if model.results["verdict"] == FAILED else EXIT_PASSED


def run(recipe: Recipe, overrides: Sequence[str] = (), workers: Workers = ONLY) -> Quantized | QuantizedParts:
    """The main job of a recipe, saved to its output folder: what `python -m quantflow recipe=…` does.

    What an interrupted run of the same recipe has finished is used, unless `recipe.resume` is false.

    Raises:
        QuantflowError: with the exit code of its class.
    """
    console = report.make_console(plain=recipe.report.plain)
    destination = output_of(recipe)
    check_destination(destination)
    choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind, recipe.policy.float)
    baseline = named_baseline(recipe)
    work = Work(destination, recipe.work_key(), resume=recipe.resume)
    with (
        Progress(console, quiet=recipe.report.quiet, expected=earlier_times(recipe, destination)) as progress,
        seeded(recipe.seed),
        nothing_left_on_error(work),
    ):
        with progress.stage("load") as stage:
            stage.expect(LOAD_S)
            source = load_source(recipe, stage.update)
        report.print_notices(console, source.notices)
        whole = Run.of(recipe, source, progress, work=work, workers=workers, overrides=overrides)
        model = quantized(whole, baseline, destination)
        report.print_notices(console, work.notices)
    remember_times(recipe, progress)
    with Progress(console, quiet=recipe.report.quiet) as progress, progress.stage("save"):
        saved = model.save(destination) if isinstance(model, QuantizedParts) else save_record(model.record, destination)
    work.remove()
    # Only here, and below: the search is much code, and few ask for it.
    from quantflow.search.driver import journal_beside

    journal_beside(destination).unlink(missing_ok=True)
    report.print_summary(console, model.results, artifact=shown(saved), quiet=recipe.report.quiet)
    return model


def quantized(
    run: Run, baseline: Mapping[str, Any] | None = None, destination: Path | None = None
) -> Quantized | QuantizedParts:
    """The recipe's model; a recipe with limits is searched for first, and the result is that of the recipe found.

    Args:
        baseline: another artifact's figures, for the report.
        destination: where a search saves the best so far; None: nowhere.
    """
    if run.recipe.tune.subject_to.is_set:
        from quantflow.search.driver import tuned

        return tuned(run, baseline, destination)
    return execute(run, baseline)


def output_of(recipe: Recipe) -> Path:
    """The folder of the artifact."""
    return Path(recipe.output or f"outputs/{recipe.name}")


def named_baseline(recipe: Recipe) -> dict[str, Any] | None:
    """Read before anything is written: the baseline may be what the output folder held so far."""
    return None if recipe.report.baseline is None else read_baseline(recipe.report.baseline)


@contextlib.contextmanager
def nothing_left_on_error(work: Work) -> Iterator[None]:
    """A run that can't be carried out takes its own work folder away; one that is interrupted or killed leaves it."""
    created = [path for path in (work.folder, *work.folder.parents) if not path.exists()]
    try:
        yield
    except QuantflowError:
        if work.folder in created:
            work.remove()
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _assist(recipe: Recipe, workers: Workers) -> None:
    """What every worker but the first does of a run, silently: its parts of the calibration and of the evaluation."""
    work = Work(output_of(recipe), recipe.work_key())
    with Progress(report.make_console(), quiet=True) as progress, seeded(recipe.seed):
        with progress.stage("load"):
            source = load_source(recipe)
        whole = Run.of(recipe, source, progress, work=work, workers=workers)
        built = build(whole)
        if recipe.evaluate.enabled:
            evaluated(replace(whole, place=built.place), built.compiled, built.call)
