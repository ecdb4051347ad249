"""The workbench of a run: its model captured and calibrated once, for any number of settings; and its caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantflow.algorithms import refine
from quantflow.executor.placed import placed
from quantflow.executor.run import Run
from quantflow.executor.steps import captured, plan_for, rewritten, without_drowned
from quantflow.host.environment import cache_folder, environment
from quantflow.host.place import exact_float32
from quantflow.ir.batch import Batch
from quantflow.schema import Algorithm
from quantflow.search.sensitivity import measure_sensitivity
from quantflow.search.variants import Variants
from quantflow.search.workbench import Setting, Workbench, Yardstick
from quantflow.stages import benchmark as timing
from quantflow.store.journal import Journal


def analyse(run: Run) -> dict[str, Any]:
    """Each layer's sensitivity, from the cache as far as it was measured before: see `measure_sensitivity`."""
    bench = workbench(run)
    with (
        timing.threads(run.recipe.benchmark.threads),
        sensitivity_cache(run, bench) as journal,
        run.progress.stage("sensitivity") as stage,
    ):
        found = measure_sensitivity(bench, bench.start, journal, progress=stage.update)
    return {"recipe": run.recipe.name, "samples": run.recipe.sensitivity.samples, "resumed": journal.resumed, **found}


@exact_float32()
def workbench(run: Run, *, judges: bool = False) -> Workbench:
    """capture → calibrate, for any number of settings. `judges`: float also runs over the evaluation data."""
    recipe, source, stages = run.recipe, run.source, run.progress.stage
    example, kept = source.first_batch, run.kept_algorithms()
    run, original = placed(run, captured(run, example), example)

    def variants_of(algorithms: tuple[Algorithm, ...]) -> Variants:
        asked = replace(run, recipe=recipe.model_copy(update={"algorithms": algorithms}))
        graph, applied, module = rewritten(asked, original, example, kept)
        material = run.material(graph)
        _, joins = without_drowned(asked, graph, example, plan_for(asked, graph, example), material)
        variants = Variants(
            graph,
            source.data.calibration,
            lambda qconfig, layers: plan_for(
                replace(asked, recipe=asked.recipe.model_copy(update={"qconfig": qconfig, "layers": dict(layers)})),
                graph,
                example,
                joins=joins,
            ),
            lambda prepared, table: refine(algorithms, prepared, table, material, stages, kept.numbers(prepared)),
            rewritten=applied,
            imperative=module,
            key=asked.recipe.calibration_key(),
            checkpoint=run.checkpoint() if algorithms == recipe.algorithms else None,
            checkpoint_every_s=recipe.calibrate.checkpoint_every_s,
            resume=recipe.calibrate.resume,
            place=run.place,
        )
        with stages("calibrate") as stage:
            variants.calibrate(recipe.qconfig, recipe.layers, stage.update)
        return variants

    measured = {"metric": source.data.metric, "outputs": source.model.outputs}
    with stages("float") as stage:
        ranked = _last(source.data.calibration, recipe.sensitivity.samples, original.batch_is_dynamic)
        ranking = Yardstick(source.float_model(), ranked, **measured)
        judging = None
        if judges:
            judging = Yardstick(source.float_model(), source.data.evaluation, **measured, progress=stage.update)
    start = Setting(recipe.algorithms, recipe.qconfig, recipe.layers)
    size = recipe.benchmark.batch_sizes[0]
    timed = timing.resized(example, size) if original.batch_is_dynamic else example
    return Workbench(variants_of, run.choice, start, timed, ranking, judging)


def sensitivity_cache(run: Run, bench: Workbench) -> Journal:
    """The journal of a model's sensitivities, in the user's cache: later runs on the same model and data read it."""
    key = measurement_key(run, bench, {"last_samples": run.recipe.sensitivity.samples})
    return Journal(cache_folder() / "sensitivity" / f"{key[:32]}.jsonl", key, is_cache=True)


def measurement_key(run: Run, bench: Workbench, more: Mapping[str, Any]) -> str:
    """sha256 of all that measurements depend on: recipe, model, data, machine."""
    recipe, found, choice = run.recipe, environment(), run.choice
    depends_on = {
        "calibration": recipe.calibration_key(),
        "model": bench.variants(bench.start).graph.digest,
        "data": run.source.data.identity,
        "runtime": [choice.runtime.name, choice.device, *([] if choice.floats == "float32" else [choice.floats])],
        "timed": [recipe.benchmark.batch_sizes[0], recipe.benchmark.threads],
        "machine": {name: found[name] for name in ("quantflow", "torch", "cpu", "isa", "cores")},
        **more,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _last(batches: Sequence[Batch], samples: int, can_cut: bool) -> list[Batch]:
    """The last batches with that many samples, the first one cut where it can be.

    Algorithms fit a model to the first samples, on which its layers' errors seem smaller than they are.
    """
    taken: list[Batch] = []
    for batch in reversed(batches):
        if samples <= 0:
            break
        taken.insert(0, batch.tail(samples) if can_cut else batch)
        samples -= batch.size
    return taken
