"""A recipe with limits: the search of `quantflow.search.steps`, and the model of the recipe that it finds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantflow.executor.built import Built
from quantflow.executor.order import build
from quantflow.executor.results import Addition, finished, opening
from quantflow.executor.results import judged as judged_by_gates
from quantflow.executor.run import Run
from quantflow.executor.steps import ready
from quantflow.quantized import Quantized, save_record
from quantflow.report import Progress
from quantflow.schema import ConstraintSettings, Recipe
from quantflow.search.bench import measurement_key, sensitivity_cache, workbench
from quantflow.search.sensitivity import SEARCHED, measure_sensitivity
from quantflow.search.steps import Search, SearchOutcome, Trial, judged
from quantflow.search.workbench import Setting, Workbench
from quantflow.stages import benchmark as timing
from quantflow.stages.record import Record
from quantflow.store.journal import Journal

#: A search keeps this many times the seconds that its end was measured to take.
RESERVE = 1.25
TUNE_JOURNAL = "tune.jsonl"


def tuned(run: Run, baseline: Mapping[str, Any] | None = None, destination: Path | None = None) -> Quantized:
    """The fastest model within the recipe's limits.

    Args:
        baseline: another artifact's figures, for the report.
        destination: where the best so far and the journal are saved; None: nowhere.
    """
    began = time.perf_counter()
    recipe = run.recipe
    bench = workbench(run, judges=True)
    limits = {"tune": recipe.tune.model_dump(mode="json", exclude={"time_budget_s"})}
    key = measurement_key(run, bench, {**limits, "last_samples": recipe.sensitivity.samples})
    file = None if destination is None else journal_beside(destination)
    example = run.source.first_batch

    def made(setting: Setting, progress: Progress) -> Built:
        model, converted = bench.variants(setting), bench.variant(setting)
        return ready(replace(run, progress=progress), model.graph, converted, model.imperative, example)

    def save(trial: Trial) -> None:
        if destination is not None:
            save_record(_best_so_far(run, bench, trial), destination)

    with (
        timing.threads(recipe.benchmark.threads),
        Journal(file, key) as journal,
        sensitivity_cache(run, bench) as cache,
    ):
        earlier_s = journal.spent_s
        with run.progress.stage("verify"):
            shown = run.progress.silent()
            verified = journal.measure("verify", lambda: made(bench.start, shown).verified().to_json())
        with run.progress.stage("search") as stage:
            outcome = Search(
                bench,
                lambda setting, before_each: measure_sensitivity(
                    bench, setting, cache, SEARCHED, before_each=before_each
                ),
                recipe.tune,
                journal,
                reserve_s=RESERVE * (verified["seconds"] + _measuring_s(run)),
                spent_s=lambda: earlier_s + time.perf_counter() - began,
                on_best=save,
                progress=stage.update,
            ).run(bench.start)
        found = replace(run, recipe=_found_recipe(recipe, outcome.best.setting), work=None)
        notices = [each.notice for each in (journal, cache) if each.notice]
        section, content = _section(recipe, outcome, journal), journal.content()
        built = made(outcome.best.setting, run.progress)
        if found.recipe.algorithms:
            built, differing = _as_rerun(found, recipe.tune.subject_to, bench, built)
            notices += differing
        found = replace(found, place=built.place)
        return finished(found, built, baseline, Addition({"tune": section}, notices, {TUNE_JOURNAL: content}))


def journal_beside(destination: Path) -> Path:
    """The search's journal: beside the artifact while the search goes on, then in it."""
    return destination.with_name(f".{destination.name}.{TUNE_JOURNAL}")


def _as_rerun(found: Run, limits: ConstraintSettings, bench: Workbench, built: Built) -> tuple[Built, list[str]]:
    """The model that the found recipe itself makes, if it keeps the limits as well as the search's; else the search's.

    Algorithms act on the plan they are given, so with further layers in float they may come to other numbers.
    """
    again = build(found)
    kept = all(gate.passed for gate in judged(limits, bench.judge(again.call)))
    if kept:
        return again, []
    return built, [
        "the search's own program was kept: the recipe found, run by itself, misses a limit by a little, because its "
        "algorithms come to other numbers with layers in float"
    ]


def _found_recipe(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe that makes the setting's model without a search, and is judged by the search's limits."""
    limits = {name: limit for name, limit in recipe.tune.subject_to.model_dump().items() if limit is not None}
    return recipe.model_copy(
        update={
            "task": "run",
            "algorithms": setting.algorithms,
            "qconfig": setting.qconfig,
            "layers": dict(setting.all_layers),
            "gates": recipe.gates.model_copy(update=limits),
            "tune": recipe.tune.model_copy(update={"subject_to": ConstraintSettings()}),
        }
    )


def _best_so_far(run: Run, bench: Workbench, trial: Trial) -> Record:
    """What a search has while it goes on: complete, measured against float, and not yet verified or benchmarked."""
    found, made = replace(run, recipe=_found_recipe(run.recipe, trial.setting)), bench.variant(trial.setting)
    over = "the search was not over when this was saved: the best so far"
    results = {
        **opening(found, made.plan, made.program),
        "accuracy": trial.accuracy,
        "notices": [*run.source.notices, *made.plan.notes, over],
    }
    results |= judged_by_gates(found.recipe, results)
    return Record(found.recipe.to_dict(), made.plan.to_json(), made.table, made.program, results)


def _measuring_s(run: Run) -> float:
    """Seconds that the final evaluation and benchmark will take, from the float pass and the recipe's rounds."""
    settings = run.recipe.benchmark
    float_s = sum(float(stage["seconds"]) for stage in run.progress.stages if stage["name"] == "float")
    rounds = len(settings.batch_sizes) * settings.rounds * 2 * settings.min_round_ms / 1e3
    return (2 * float_s if run.recipe.evaluate.enabled else 0.0) + (rounds if settings.enabled else 0.0)


def _section(recipe: Recipe, outcome: SearchOutcome, journal: Journal) -> dict[str, Any]:
    best = outcome.best
    return {
        "objective": recipe.tune.objective,
        "subject_to": {k: v for k, v in recipe.tune.subject_to.model_dump().items() if v is not None},
        "verdict": outcome.verdict,
        "text": outcome.text,
        "stopped_by_budget": outcome.stopped_early,
        "trials": outcome.trials,
        "measurements": len(journal.records),
        "resumed_measurements": journal.resumed,
        "seconds": journal.spent_s,
        "latency": best.latency,
        **best.setting.to_json(),
    }
