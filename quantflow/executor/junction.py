"""The only file that knows the order of the stages.

load → capture → plan → rewrite → outliers → prepare → calibrate → refine → convert → compile → warm up → evaluate →
benchmark → judge → save
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import nn

from quantflow import report
from quantflow.algorithms import NO_OUTLIERS, Applied, Material, Outliers, find_outliers, refine, rewrite
from quantflow.algorithms.kept import NOTHING_KEPT, KeptAlgorithms
from quantflow.analysis.baseline import beside, read_baseline
from quantflow.analysis.compare import compare
from quantflow.analysis.fused_graph import fused_graph
from quantflow.analysis.joins import Join, join_costs, join_notices
from quantflow.analysis.layer_errors import own_errors
from quantflow.capture import Model, capture, likely_seconds, plain
from quantflow.config.compose import group_choices, overlay
from quantflow.errors import (
    EXIT_GATE,
    EXIT_PASSED,
    ArtifactError,
    DataError,
    NothingQuantizedError,
    QuantflowError,
    UsageError,
    VerificationError,
)
from quantflow.host.environment import cache_folder, environment
from quantflow.host.machine import reused_memory
from quantflow.host.workers import Workers, joined, rank_and_count
from quantflow.ir.graph import Graph, interpret
from quantflow.ir.passes.int8_embeddings import int8_embeddings
from quantflow.ir.program import Program
from quantflow.quantized import (
    JUNIT,
    SUMMARY,
    Quantized,
    QuantizedModel,
    QuantizedModule,
    QuantizedScript,
    Record,
    as_script,
    load,
    weights_bytes,
)
from quantflow.report import Progress
from quantflow.runtimes import Choice, choose_runtime, native_devices
from quantflow.schema import Algorithm, ConstraintSettings, Recipe
from quantflow.schema.json_schema import recipe_json_schema
from quantflow.search.sensitivity import SEARCHED, measure_sensitivity, plot_ready
from quantflow.search.steps import Outcome, Search, Trial, judged
from quantflow.search.variants import Variant, Variants
from quantflow.search.workbench import Setting, Workbench, Yardstick
from quantflow.sources.data import Batch, Data, ImagePreprocess, TextPreprocess, load_data
from quantflow.sources.models import LoadedModel, estimate_batchnorm, load_model
from quantflow.stages import benchmark as timing
from quantflow.stages.calibrate import CalibrationTable, calibrate, require_complete
from quantflow.stages.compile import Compiled, compile_program
from quantflow.stages.convert import convert
from quantflow.stages.evaluate import compare_layers, evaluate, tally
from quantflow.stages.evaluate import judge as judge_tallies
from quantflow.stages.gates import FAILED, evaluate_gates, verdict
from quantflow.stages.imperative import called_modules, carry_over, fixed_constants, swap_modules
from quantflow.stages.plan import Plan, make_plan
from quantflow.stages.prepare import Prepared, bind, prepare
from quantflow.stages.warmup import Warmup, warmup
from quantflow.store.artifact import RESULTS, add_files, check_destination, write_artifact
from quantflow.store.journal import Journal
from quantflow.store.run_folder import Work, write_whole
from quantflow.tasks.doctor import diagnose
from quantflow.tasks.selftest import selftest

#: Warm-up compares with the reference on this many samples: exact integer sums are slow.
VERIFIED_SAMPLES = 2
#: Variants of larger batches are not tried: that takes longer than a user would wait.
MOST_TUNED_SAMPLES = 64
#: SQNR per layer is measured on at most this many samples, for the same reason.
LAYER_SAMPLES = 8
#: And what a layer adds by itself on this many: all of the model's values are held at once.
OWN_SAMPLES = 4
#: Each layer is timed this often, or as often as fits in about this time.
MOST_REPEATS = 10
PER_LAYER_MS = 2000.0
#: What importing a model's libraries and making it takes where nothing is counted: 0.4 to 2 s for the shipped ones.
LOAD_S = 2.0
#: A search keeps this many times the seconds that its end was measured to take.
RESERVE = 1.25
TUNE_JOURNAL = "tune.jsonl"

Update = Callable[[int, int | None], None]
#: This process computes everything by itself.
ONLY = Workers()


@dataclass(frozen=True)
class Source:
    """The float side of a run: model and data, however they were given."""

    model: LoadedModel
    data: Data

    @property
    def notices(self) -> tuple[str, ...]:
        return (*self.model.notices, *self.data.notices)

    def float_model(self) -> Callable[..., Any]:
        """The float model as a callable whose output has plain structure."""
        module = self.model.module
        run = module.module() if isinstance(module, torch.export.ExportedProgram) else module
        return lambda *args, **kwargs: plain(run(*args, **kwargs))


@dataclass(frozen=True)
class Built:
    """The int8 side: every product of the stages up to warm-up, which only the first worker goes through."""

    graph: Graph
    plan: Plan
    table: CalibrationTable
    program: Program
    compiled: Compiled
    warmup: Warmup | None
    module: nn.Module | None
    algorithms: tuple[Applied, ...] = ()
    outliers: Outliers = NO_OUTLIERS
    joins: tuple[Join, ...] = ()

    def call(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """What the user will run: the swapped module in imperative mode, else the compiled program."""
        return self.module(*args, **kwargs) if self.module is not None else self.compiled(*args, **kwargs)

    def model(self, record: Record) -> Quantized:
        """The public result for the mode."""
        if self.module is not None:
            return QuantizedModule(self.module, self.compiled, record)
        if Recipe.from_dict(record.recipe).mode.kind == "torchscript":
            return QuantizedScript.adopt(self.compiled, record)
        return QuantizedModel(self.compiled, record)


# --- the main job


def execute(
    recipe: Recipe,
    source: Source,
    progress: Progress,
    work: Work | None,
    overrides: Sequence[str],
    workers: Workers = ONLY,
    baseline: Mapping[str, Any] | None = None,
    destination: Path | None = None,
) -> Quantized:
    """Every stage on a loaded source; the result carries its record and results.

    A recipe with limits in `tune.subject_to` is searched for first, and the result is that of the recipe found.

    Args:
        baseline: another artifact's figures, for the report.
        destination: where a search saves the best so far; None: nowhere.

    Raises:
        QuantflowError: any stage's own error.
    """
    if recipe.tune.subject_to.is_set:
        return _tuned(recipe, source, progress, work, overrides, baseline, destination)
    built = build(recipe, source, progress, work, workers)
    return _finished(recipe, source, built, progress, overrides, work, workers, baseline)


def _finished(
    recipe: Recipe,
    source: Source,
    built: Built,
    progress: Progress,
    overrides: Sequence[str],
    work: Work | None = None,
    workers: Workers = ONLY,
    baseline: Mapping[str, Any] | None = None,
    sections: Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
    attached: Mapping[str, bytes] | None = None,
) -> Quantized:
    """Measured, judged and with its record. A search adds its own sections, notices and files."""
    assert built.warmup is not None, "the first worker warms up"
    results: dict[str, Any] = {
        **_opening(recipe, source, built.plan, built.program, built.compiled.choice, overrides),
        "calibration": {
            "batches": built.table.batches,
            "samples": built.table.samples,
            "seconds": next((s["seconds"] for s in progress.stages if s["name"] == "calibrate"), None),
            "resumed": built.table.resumed_batches > 0,
            "workers": workers.count,
        },
        "algorithms": [applied.to_json() for applied in built.algorithms],
        "joins": [vars(join) for join in built.joins],
        "outliers": [each.to_json() for each in built.outliers.found],
        "warmup": built.warmup.to_json(),
    }
    results["int8_proof"] = _int8_proof(built, source)
    results |= sections or {}
    results |= measure(recipe, source, built.program, built.compiled, built.graph, built.call, progress, work, workers)
    results["notices"] = [
        *source.notices,
        *built.plan.notes,
        *built.outliers.notices,
        *join_notices(built.joins),
        *built.table.notices,
        *(notice for applied in built.algorithms for notice in applied.outcome.notices),
        *built.warmup.notices,
        *timing.unsteady(_timed(results)),
        *([] if work is None else work.notices),
        *notices,
    ]
    results["resumed"] = [] if work is None else work.resumed
    results |= judge(recipe, results)
    if baseline is not None:
        results["baseline"] = beside(baseline, results)
    results["stages"] = progress.stages
    graph_text = _graph_text(recipe, built, source) if recipe.report.graph_dump else None
    record = Record(
        recipe.to_dict(), built.plan.to_json(), built.table, built.program, results, graph_text, attached or {}
    )
    return built.model(record)


def _opening(
    recipe: Recipe, source: Source, plan: Plan, program: Program, choice: Choice, overrides: Sequence[str]
) -> dict[str, Any]:
    """What the results say before anything is measured."""
    return {
        "format": 1,
        "recipe": {
            "name": recipe.name,
            "description": recipe.description,
            "hash": recipe.hash(),
            "overrides": list(overrides),
            "settings": recipe.to_dict(),
        },
        "environment": environment(),
        "model": _model_section(source.model),
        "data": source.data.identity,
        "mode": recipe.mode.kind,
        "device": choice.device,
        "runtime": _runtime_section(choice),
        "plan": plan.to_json()["rows"],
        "graph": fused_graph(program),
    }


@reused_memory()
def build(
    recipe: Recipe,
    source: Source,
    progress: Progress,
    work: Work | None = None,
    workers: Workers = ONLY,
) -> Built:
    """capture → plan → rewrite → prepare → calibrate → refine → convert → compile → warm up.

    Workers calibrate together and convert the merged table each for itself; the first one verifies and tunes.
    """
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    example = _first_batch(source)
    module = source.model.module
    kept = _kept_algorithms(recipe, source, choice, work, workers)
    graph, rewritten, imperative = captured(recipe, source, choice, example, progress, kept)
    with progress.stage("plan"):
        plan = plan_for(recipe, graph, choice, module, example)
    with progress.stage("outliers") as stage:
        material = replace(_material(recipe, source, graph), update=stage.update)
        outliers = find_outliers(recipe.outliers, graph, plan, material)
        if outliers.left_float:
            plan = plan_for(recipe, graph, choice, module, example, outliers)
    with progress.stage("prepare"):
        prepared: Prepared = prepare(graph, plan, imperative)
    with progress.stage("calibrate") as stage:
        table = _calibrated(recipe, source, prepared, work, stage.update, workers)
    refined, improved = refine(
        recipe.algorithms, prepared, table, _material(recipe, source, graph), progress.stage, kept.numbers(prepared)
    )
    joins = ()
    if recipe.evaluate.enabled and recipe.evaluate.per_layer:
        joins = join_costs(prepared, refined, _material(recipe, source, graph).first(LAYER_SAMPLES))
    with progress.stage("convert"):
        program = convert(prepared, table, refined)
    variant = Variant(plan, table, program, (*rewritten, *improved))
    built = _made_ready(recipe, graph, variant, imperative, choice, example, progress, workers)
    return replace(built, outliers=outliers, joins=joins)


def _made_ready(
    recipe: Recipe,
    graph: Graph,
    variant: Variant,
    imperative: nn.Module | None,
    choice: Choice,
    example: Batch,
    progress: Progress,
    workers: Workers = ONLY,
) -> Built:
    """compile → warm up, which is the first worker's."""
    plan, program = variant.plan, variant.program
    with progress.stage("compile"):
        compiled = compile_program(program, choice)
        swapped = swap_modules(imperative, plan, program, choice.runtime.name) if imperative is not None else None
    if not workers.is_first:
        return Built(graph, plan, variant.table, program, compiled, None, swapped)
    with progress.stage("warm up") as stage:
        warm = warmup(
            compiled,
            timing.resized(example, min(VERIFIED_SAMPLES, example.size)) if graph.batch_is_dynamic else example,
            iterations=recipe.warmup.iterations,
            min_sqnr_db=recipe.warmup.min_sqnr_db,
            call=swapped,
            tuned_for=_tuned_for(recipe, graph, example),
            alone=progress.alone,
            progress=stage.update,
        )
    return Built(graph, plan, variant.table, program, compiled, warm, swapped, variant.algorithms)


def captured(
    recipe: Recipe,
    source: Source,
    choice: Choice,
    example: Batch,
    progress: Progress,
    kept: KeptAlgorithms = NOTHING_KEPT,
) -> tuple[Graph, tuple[Applied, ...], nn.Module | None]:
    """capture → rewrite: the graph that is quantized, and in imperative mode the module that computes the same."""
    with progress.stage("capture") as stage:
        stage.expect(likely_seconds(source.model.module, recipe.mode))
        original = _graph_of(recipe, source.model.module, example)
    return _rewritten(recipe, source, choice, example, original, progress, kept)


def _graph_of(recipe: Recipe, module: Model, example: Batch) -> Graph:
    """The captured graph, with what the policy asks for before anything is planned."""
    graph = capture(module, example, recipe.mode)
    return int8_embeddings(graph) if recipe.policy.embedding == "int8" else graph


def _rewritten(
    recipe: Recipe,
    source: Source,
    choice: Choice,
    example: Batch,
    original: Graph,
    progress: Progress,
    kept: KeptAlgorithms,
) -> tuple[Graph, tuple[Applied, ...], nn.Module | None]:
    module = source.model.module
    imperative = module if recipe.mode.kind == "imperative" and isinstance(module, nn.Module) else None
    fixed = frozenset() if imperative is None else fixed_constants(imperative, original)
    graph, applied = rewrite(
        recipe.algorithms,
        original,
        lambda graph: plan_for(recipe, graph, choice, module, example),
        replace(_material(recipe, source, original), fixed=fixed, may_insert=imperative is None),
        progress.stage,
        kept.graphs(),
    )
    return graph, applied, None if imperative is None else carry_over(imperative, original, graph)


def _kept_algorithms(
    recipe: Recipe, source: Source, choice: Choice, work: Work | None, workers: Workers = ONLY
) -> KeptAlgorithms:
    """What an interrupted run's algorithms have finished. Every worker reads it; the first one writes."""
    if work is None or not (workers.is_first or recipe.resume):
        return NOTHING_KEPT
    inputs = json.dumps([choice.runtime.name, choice.device, source.data.identity], sort_keys=True)
    return KeptAlgorithms(work, inputs, writes=workers.is_first)


def _material(recipe: Recipe, source: Source, graph: Graph) -> Material:
    return Material(source.data.calibration, graph.batch_is_dynamic, recipe.seed)


def _calibrated(
    recipe: Recipe, source: Source, prepared: Prepared, work: Work | None, update: Update, workers: Workers
) -> CalibrationTable:
    """The table of all batches: each worker's part, merged in order, which is what one worker gets of the whole."""
    part = workers.part(source.data.calibration)

    def own() -> CalibrationTable:
        return calibrate(
            prepared,
            part,
            key=recipe.calibration_key(),
            checkpoint=None if work is None else work.checkpoint(workers.rank, workers.count),
            checkpoint_every_s=recipe.calibrate.checkpoint_every_s,
            resume=recipe.calibrate.resume,
            first=None if workers.count == 1 else part.first,
            progress=update,
        )

    if workers.count == 1:
        return own()
    states = workers.gather(lambda: own().to_bytes())
    tables = [CalibrationTable.from_bytes(state, f"worker {rank}'s table") for rank, state in enumerate(states)]
    table = functools.reduce(CalibrationTable.merge, tables)
    require_complete(table, prepared.layers)
    return table


def _first_batch(source: Source) -> Batch:
    example = next(iter(source.data.calibration), None)
    if example is None:
        raise DataError("calibration data: there are no samples; calibrate on some that look like the real input")
    return example


def _tuned_for(recipe: Recipe, graph: Graph, example: Batch) -> list[Batch]:
    """The batches that the runtime is tuned for: the sizes that will be timed."""
    if not graph.batch_is_dynamic:
        return [example]
    return [timing.resized(example, size) for size in recipe.benchmark.batch_sizes if size <= MOST_TUNED_SAMPLES]


def plan_for(
    recipe: Recipe, graph: Graph, choice: Choice, module: Model, example: Batch, outliers: Outliers = NO_OUTLIERS
) -> Plan:
    """The plan for a captured graph, with what this machine decides filled in."""
    imperative = recipe.mode.kind == "imperative" and isinstance(module, nn.Module)
    plan = make_plan(
        graph,
        recipe.qconfig,
        recipe.layers,
        mode=recipe.mode.kind,
        kernel_of=choice.runtime.kernel_of,
        reduce_range=recipe.qconfig.reduce_range is True,
        swappable=called_modules(module, example) if imperative else None,
        recipe_name=recipe.name,
        left_float=outliers.left_float,
        policy=recipe.policy,
    )
    return replace(plan, notes=(*plan.notes, *choice.runtime.notes()))


def measure(
    recipe: Recipe,
    source: Source,
    program: Program,
    compiled: Compiled,
    graph: Graph | None,
    call: Callable[..., Any],
    progress: Progress,
    work: Work | None = None,
    workers: Workers = ONLY,
) -> dict[str, Any]:
    """The `accuracy` and `benchmark` sections, as far as the recipe enables them."""
    sections: dict[str, Any] = {}
    inputs = "" if work is None else _inputs(program, source)
    float_model = source.float_model()
    if recipe.evaluate.enabled:
        sections["accuracy"] = _evaluated(source, program, call, progress, work, workers)
        if recipe.evaluate.per_layer and graph is not None:
            with progress.stage("layers") as stage:
                update = stage.update
                layers = _kept(work, "layers", inputs, lambda: _layer_errors(graph, compiled, source, update))
            sections["accuracy"] = {**sections["accuracy"], **layers}
    if recipe.benchmark.enabled:
        with progress.stage("benchmark", alone=True) as stage:
            sections["benchmark"] = _kept(
                work,
                "benchmark",
                inputs + json.dumps(environment()),
                lambda: _benchmark(recipe, source, program, compiled, float_model, call, stage.update),
            )
    return sections


def _evaluated(
    source: Source, program: Program, call: Callable[..., Any], progress: Progress, work: Work | None, workers: Workers
) -> dict[str, Any]:
    """The comparison with float over all batches, each worker taking its part."""
    part = workers.part(source.data.evaluation)
    inputs = "" if work is None else _inputs(program, source)
    with progress.stage("evaluate") as stage:
        known = None if work is None else workers.from_first(lambda: work.get("accuracy", inputs))
        if known is not None:
            return known
        tallies = workers.gather(
            lambda: tally(
                source.float_model(),
                call,
                part,
                metric=source.data.metric,
                outputs=source.model.outputs,
                first=part.first,
                progress=stage.update,
            )
        )
    accuracy = judge_tallies(each for own in tallies for each in own)
    if work is not None and workers.is_first:
        work.put("accuracy", inputs, accuracy)
    return accuracy


def _kept(work: Work | None, name: str, inputs: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`compute()`, or what an interrupted run has kept of it; kept for the next one if this is interrupted."""
    if work is None:
        return compute()
    product = work.get(name, inputs)
    if product is None:
        product = compute()
        work.put(name, inputs, product)
    return product


def _inputs(program: Program, source: Source) -> str:
    """What figures depend on besides the recipe: the int8 model and the data."""
    digest = hashlib.sha256(weights_bytes(program))
    digest.update(json.dumps([program.to_json(), source.data.identity], sort_keys=True).encode())
    return digest.hexdigest()


def judge(recipe: Recipe, results: Mapping[str, Any]) -> dict[str, Any]:
    """The `gates` and `verdict` sections."""
    gates = evaluate_gates(recipe.gates, results)
    return {"gates": [vars(gate) for gate in gates], "verdict": verdict(gates)}


# --- sensitivity and search


def analyse(recipe: Recipe, source: Source, progress: Progress, work: Work | None = None) -> dict[str, Any]:
    """Each layer's sensitivity, from the cache as far as it was measured before: see `measure_sensitivity`."""
    bench = _workbench(recipe, source, progress, work)
    with (
        timing.threads(recipe.benchmark.threads),
        _sensitivity_cache(recipe, source, bench) as journal,
        progress.stage("sensitivity") as stage,
    ):
        found = measure_sensitivity(bench, bench.start, journal, progress=stage.update)
    return {"recipe": recipe.name, "samples": recipe.sensitivity.samples, "resumed": journal.resumed, **found}


def _workbench(
    recipe: Recipe, source: Source, progress: Progress, work: Work | None, *, judges: bool = False
) -> Workbench:
    """capture → calibrate, for any number of settings. `judges`: float also runs over the evaluation data."""
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    example, module = _first_batch(source), source.model.module
    checkpoint, kept = _checkpoint(work), _kept_algorithms(recipe, source, choice, work)
    with progress.stage("capture") as stage:
        stage.expect(likely_seconds(module, recipe.mode))
        original = _graph_of(recipe, module, example)

    def variants_of(algorithms: tuple[Algorithm, ...]) -> Variants:
        asked = recipe.model_copy(update={"algorithms": algorithms})
        graph, applied, imperative = _rewritten(asked, source, choice, example, original, progress, kept)
        material = _material(recipe, source, graph)
        variants = Variants(
            graph,
            source.data.calibration,
            lambda qconfig, layers: plan_for(
                asked.model_copy(update={"qconfig": qconfig, "layers": dict(layers)}), graph, choice, module, example
            ),
            lambda prepared, table: refine(
                algorithms, prepared, table, material, progress.stage, kept.numbers(prepared)
            ),
            rewritten=applied,
            imperative=imperative,
            key=asked.calibration_key(),
            checkpoint=checkpoint if algorithms == recipe.algorithms else None,
            checkpoint_every_s=recipe.calibrate.checkpoint_every_s,
            resume=recipe.calibrate.resume,
        )
        with progress.stage("calibrate") as stage:
            variants.calibrate(recipe.qconfig, recipe.layers, stage.update)
        return variants

    measured = {"metric": source.data.metric, "outputs": source.model.outputs}
    with progress.stage("float") as stage:
        ranked = _last(source.data.calibration, recipe.sensitivity.samples, original.batch_is_dynamic)
        ranking = Yardstick(source.float_model(), ranked, **measured)
        judging = None
        if judges:
            judging = Yardstick(source.float_model(), source.data.evaluation, **measured, progress=stage.update)
    start = Setting(recipe.algorithms, recipe.qconfig, recipe.layers)
    size = recipe.benchmark.batch_sizes[0]
    timed = timing.resized(example, size) if original.batch_is_dynamic else example
    return Workbench(variants_of, choice, start, timed, ranking, judging)


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


def _sensitivity_cache(recipe: Recipe, source: Source, bench: Workbench) -> Journal:
    """The journal of a model's sensitivities, in the user's cache: later runs on the same model and data read it."""
    key = _measurement_key(recipe, source, bench, {"last_samples": recipe.sensitivity.samples})
    return Journal(cache_folder() / "sensitivity" / f"{key[:32]}.jsonl", key)


def _measurement_key(recipe: Recipe, source: Source, bench: Workbench, more: Mapping[str, Any]) -> str:
    """sha256 of all that measurements depend on: recipe, model, data, machine."""
    found, choice = environment(), bench.choice
    depends_on = {
        "calibration": recipe.calibration_key(),
        "model": bench.variants(bench.start).graph.digest,
        "data": source.data.identity,
        "runtime": [choice.runtime.name, choice.device],
        "timed": [recipe.benchmark.batch_sizes[0], recipe.benchmark.threads],
        "machine": {name: found[name] for name in ("quantflow", "torch", "cpu", "isa", "cores")},
        **more,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _tuned(
    recipe: Recipe,
    source: Source,
    progress: Progress,
    work: Work | None,
    overrides: Sequence[str],
    baseline: Mapping[str, Any] | None,
    destination: Path | None,
) -> Quantized:
    """The search of `quantflow.search.steps`, and the model of the recipe that it finds."""
    began = time.perf_counter()
    bench = _workbench(recipe, source, progress, work, judges=True)
    limits = {"tune": recipe.tune.model_dump(mode="json", exclude={"time_budget_s"})}
    key = _measurement_key(recipe, source, bench, {**limits, "last_samples": recipe.sensitivity.samples})
    file = None if destination is None else _tune_journal(destination)

    def ready(setting: Setting, progress: Progress) -> Built:
        model, variant = bench.variants(setting), bench.variant(setting)
        return _made_ready(recipe, model.graph, variant, model.imperative, bench.choice, _first_batch(source), progress)

    def save(trial: Trial) -> None:
        if destination is not None:
            _best_so_far(recipe, source, bench, trial, overrides).save(destination)

    with (
        timing.threads(recipe.benchmark.threads),
        Journal(file, key) as journal,
        _sensitivity_cache(recipe, source, bench) as cache,
    ):
        earlier_s = journal.spent_s
        with progress.stage("verify"):
            shown = Progress(report.make_console(), quiet=True)
            verified = journal.measure("verify", lambda: _warmed(ready(bench.start, shown)).to_json())
        with progress.stage("search") as stage:
            outcome = Search(
                bench,
                lambda setting, before_each: measure_sensitivity(
                    bench, setting, cache, SEARCHED, before_each=before_each
                ),
                recipe.tune,
                journal,
                reserve_s=RESERVE * (verified["seconds"] + _measuring_s(recipe, progress)),
                spent_s=lambda: earlier_s + time.perf_counter() - began,
                on_best=save,
                progress=stage.update,
            ).run(bench.start)
        found = _tuned_recipe(recipe, outcome.best.setting)
        section = _tune_section(recipe, outcome, journal)
        attached = {TUNE_JOURNAL: journal.content()}
        notices = [journal.notice] if journal.notice else []
        built = ready(outcome.best.setting, progress)
        if found.algorithms:
            built, differing = _as_rerun(recipe, found, source, bench, built, progress)
            notices += differing
        return _finished(
            found, source, built, progress, overrides,
            baseline=baseline, sections={"tune": section}, notices=notices, attached=attached,
        )  # fmt: skip


def _warmed(built: Built) -> Warmup:
    assert built.warmup is not None, "this process is the only worker"
    return built.warmup


def _checkpoint(work: Work | None) -> Path | None:
    """Where one process alone keeps the state of its calibration."""
    return None if work is None else work.checkpoint(ONLY.rank, ONLY.count)


def _as_rerun(
    recipe: Recipe, found: Recipe, source: Source, bench: Workbench, built: Built, progress: Progress
) -> tuple[Built, list[str]]:
    """The model that the found recipe itself makes, if it keeps the limits as well as the search's; else the search's.

    Algorithms act on the plan they are given, so with further layers in float they may come to other numbers.
    """
    again = build(found, source, progress)
    kept = all(gate.passed for gate in judged(recipe.tune.subject_to, bench.judge(again.call)))
    if kept:
        return again, []
    return built, [
        "the search's own program was kept: the recipe found, run by itself, misses a limit by a little, because its "
        "algorithms come to other numbers with layers in float"
    ]


def _tune_journal(destination: Path) -> Path:
    """Beside the artifact while the search goes on, then in it."""
    return destination.with_name(f".{destination.name}.{TUNE_JOURNAL}")


def _tuned_recipe(recipe: Recipe, setting: Setting) -> Recipe:
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


def _best_so_far(recipe: Recipe, source: Source, bench: Workbench, trial: Trial, overrides: Sequence[str]) -> Record:
    """What a search has while it goes on: complete, measured against float, and not yet verified or benchmarked."""
    found, made = _tuned_recipe(recipe, trial.setting), bench.variant(trial.setting)
    results = {
        **_opening(found, source, made.plan, made.program, bench.choice, overrides),
        "accuracy": trial.accuracy,
        "notices": [*source.notices, *made.plan.notes, "the search was not over when this was saved: the best so far"],
    }
    results |= judge(found, results)
    return Record(found.to_dict(), made.plan.to_json(), made.table, made.program, results)


def _measuring_s(recipe: Recipe, progress: Progress) -> float:
    """Seconds that the final evaluation and benchmark will take, from the float pass and the recipe's rounds."""
    settings = recipe.benchmark
    float_s = sum(float(stage["seconds"]) for stage in progress.stages if stage["name"] == "float")
    rounds = len(settings.batch_sizes) * settings.rounds * 2 * settings.min_round_ms / 1e3
    return (2 * float_s if recipe.evaluate.enabled else 0.0) + (rounds if settings.enabled else 0.0)


def _tune_section(recipe: Recipe, outcome: Outcome, journal: Journal) -> dict[str, Any]:
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


# --- tasks of the command line


def run_task(recipe: Recipe, overrides: Sequence[str]) -> int:
    """Carry out `recipe.task` and return the exit code (0 passed, 3 a gate failed).

    Raises:
        QuantflowError: with the exit code of its class.
    """
    tasks = {
        "run": _run,
        "plan": _plan,
        "inspect": _inspect,
        "report": _report,
        "compare": _compare,
        "schema": _schema,
        "evaluate": _again,
        "benchmark": _again,
        "doctor": _doctor,
        "selftest": _selftest,
        "sensitivity": _sensitivity,
        "tune": _run,
    }
    if rank_and_count()[0] > 0 and recipe.task != "run":
        return EXIT_PASSED  # the first worker's business
    return tasks[recipe.task](recipe, overrides)


def run(recipe: Recipe, overrides: Sequence[str] = (), workers: Workers = ONLY) -> Quantized:
    """The main job of a recipe, saved to its output folder: what `python -m quantflow recipe=…` does.

    What an interrupted run of the same recipe has finished is used, unless `recipe.resume` is false.

    Raises:
        QuantflowError: with the exit code of its class.
    """
    console = report.make_console(plain=recipe.report.plain)
    destination = Path(recipe.output or f"outputs/{recipe.name}")
    check_destination(destination)
    choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    baseline = _baseline(recipe)
    work = Work(destination, recipe.work_key(), resume=recipe.resume)
    with (
        Progress(console, quiet=recipe.report.quiet, expected=_earlier_times(recipe, destination)) as progress,
        _seeded(recipe.seed),
        _nothing_left_on_error(work),
    ):
        with progress.stage("load") as stage:
            stage.expect(LOAD_S)
            source = load_source(recipe, stage.update)
        report.print_notices(console, source.notices)
        model = execute(recipe, source, progress, work, overrides, workers, baseline, destination)
        report.print_notices(console, work.notices)
    _remember_times(recipe, progress)
    with Progress(console, quiet=recipe.report.quiet) as progress, progress.stage("save"):
        saved = model.record.save(destination)
    work.remove()
    _tune_journal(destination).unlink(missing_ok=True)
    report.print_summary(console, model.results, artifact=_shown(saved), quiet=recipe.report.quiet)
    return model


def load_source(recipe: Recipe, update: Update | None = None) -> Source:
    """Model and data of a recipe; random weights get BatchNorm statistics from the calibration data."""
    if recipe.model is None:
        raise UsageError("model: is required; choose one (model=torchvision model.name=resnet50) or a recipe that does")
    model = load_model(recipe.model, recipe.seed, update)
    data = load_data(recipe.data, model.preprocess, recipe.seed)
    if model.batchnorm_to_estimate and isinstance(model.module, nn.Module):
        estimate_batchnorm(model.module, data.calibration, update)
    return Source(model, data)


def _run(recipe: Recipe, overrides: Sequence[str]) -> int:
    if recipe.tune.subject_to.is_set and rank_and_count()[1] > 1:
        raise UsageError("tune: a search measures time and runs in one process; start it without torchrun")
    with joined() as workers:
        if not workers.is_first:
            _assist(recipe, workers)
            return EXIT_PASSED
        model = run(recipe, overrides, workers)
    return EXIT_GATE if model.results["verdict"] == FAILED else EXIT_PASSED


def _assist(recipe: Recipe, workers: Workers) -> None:
    """What every worker but the first does of a run, silently: its parts of the calibration and of the evaluation."""
    work = Work(Path(recipe.output or f"outputs/{recipe.name}"), recipe.work_key())
    with Progress(report.make_console(), quiet=True) as progress, _seeded(recipe.seed):
        with progress.stage("load"):
            source = load_source(recipe)
        built = build(recipe, source, progress, work, workers)
        if recipe.evaluate.enabled:
            _evaluated(source, built.program, built.call, progress, work, workers)


def _plan(recipe: Recipe, _overrides: Sequence[str]) -> int:
    assert recipe.model is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    with _seeded(recipe.seed):
        model = load_model(recipe.model, recipe.seed)
        report.print_notices(console, model.notices)
        example = _example(model) or next(iter(load_data(recipe.data, model.preprocess, recipe.seed).calibration))
        plan = plan_for(recipe, _graph_of(recipe, model.module, example), choice, model.module, example)
    report.print_plan(console, plan.to_json()["rows"])
    report.print_notices(console, plan.notes)
    console.print(Text(f"runtime {choice.runtime.name} on {choice.device} ({choice.reason})"))
    return EXIT_PASSED


def _again(recipe: Recipe, overrides: Sequence[str]) -> int:
    """Evaluate or benchmark an artifact once more, and judge it by its gates."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact)
    stored = Recipe.from_dict({**overlay(record.recipe, overrides), "task": "run", "artifact": None})
    _require_own_code_named(stored, record, overrides)
    only = {
        "evaluate": stored.evaluate.model_copy(update={"enabled": recipe.task == "evaluate"}),
        "benchmark": stored.benchmark.model_copy(update={"enabled": recipe.task == "benchmark"}),
    }
    stored = stored.model_copy(update=only)
    with Progress(console, quiet=stored.report.quiet) as progress, _seeded(stored.seed):
        with progress.stage("load"):
            source = load_source(stored)
            model = load(recipe.artifact, runtime=stored.runtime.kind, device=stored.device.kind)
            compiled = model.compiled
            graph = None
        if recipe.task == "evaluate" and stored.evaluate.per_layer:
            example = next(iter(source.data.calibration))
            graph, _, _ = captured(stored, source, compiled.choice, example, progress)
        try:
            fresh = measure(stored, source, record.program, compiled, graph, _computing(compiled), progress)
        except VerificationError as error:
            raise UsageError(
                f"model: not the float model that '{recipe.artifact}' was made from ({error}); name that one"
            ) from error
    results = {**record.results, **fresh, "environment": environment()}
    earlier = (n for n in record.results.get("notices", ()) if not n.startswith(timing.UNSTEADY_NOTICE))
    results["notices"] = [*earlier, *timing.unsteady(_timed(results))]
    results |= judge(stored, results)
    if (baseline := _baseline(recipe)) is not None:
        results["baseline"] = beside(baseline, results)
    add_files(Path(recipe.artifact), replace(record, results=results).result_files())
    report.print_summary(console, results, artifact=recipe.artifact, quiet=stored.report.quiet)
    return EXIT_GATE if results["verdict"] == FAILED else EXIT_PASSED


def _timed(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """One entry per batch size that was timed."""
    configs: Sequence[Mapping[str, Any]] = (results.get("benchmark") or {}).get("configs", ())
    return configs


def _computing(compiled: Compiled) -> Callable[..., Any]:
    """The int8 model of an artifact; what its program does on input is the artifact's fault, not ours."""

    def call(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ArtifactError(f"program.json: it can't be computed on this input ({reason})") from error

    return call


def _inspect(recipe: Recipe, _overrides: Sequence[str]) -> int:
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact)
    report.print_plan(console, record.plan["rows"])
    console.print(Text(f"{len(record.program.nodes)} nodes, {len(record.program.int8_nodes())} int8 layers"))
    report.print_summary(console, record.results, artifact=recipe.artifact)
    return EXIT_PASSED


def _report(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Write an artifact's report again from its results, beside a baseline where one is named, and print it."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact)
    if (baseline := _baseline(recipe)) is not None:
        record = replace(record, results={**record.results, "baseline": beside(baseline, record.results)})
    add_files(Path(recipe.artifact), record.result_files())
    report.print_summary(console, record.results, artifact=recipe.artifact)
    return EXIT_PASSED


def _compare(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Hold a candidate's artifact against a baseline's, and write what changed to a folder of its own."""
    assert recipe.baseline is not None, "the schema asks for it"
    assert recipe.candidate is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    destination = Path(recipe.output or "outputs/compare")
    for place in (recipe.baseline, recipe.candidate):
        if destination.exists() and Path(place).exists() and destination.samefile(place):
            raise UsageError(f"output: '{destination}' is one of the artifacts compared; choose another output=")
    check_destination(destination)
    records = (Record.load(recipe.baseline), Record.load(recipe.candidate))
    results = compare(*records, recipe.compare, (recipe.baseline, recipe.candidate))
    files = {
        "compare.json": report.to_json(results),
        "compare.md": report.comparison(results).encode(),
        SUMMARY: report.comparison(results, every_layer=False).encode(),
        JUNIT: report.junit(results),
    }
    saved = write_artifact(destination, files, notices=results["notices"])
    report.print_comparison(console, results, saved=_shown(saved), quiet=recipe.report.quiet)
    return EXIT_GATE if results["verdict"] == FAILED else EXIT_PASSED


def _schema(_recipe: Recipe, _overrides: Sequence[str]) -> int:
    print(json.dumps(recipe_json_schema(group_choices()), indent=1))
    return EXIT_PASSED


def _sensitivity(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Measure every layer, print the ranking and write it for plots."""
    console = report.make_console(plain=recipe.report.plain)
    destination = Path(recipe.output or f"outputs/{recipe.name}.sensitivity.json")
    work = Work(destination, recipe.work_key(), resume=recipe.resume)
    with (
        Progress(console, quiet=recipe.report.quiet) as progress,
        _seeded(recipe.seed),
        _nothing_left_on_error(work),
    ):
        with progress.stage("load") as stage:
            stage.expect(LOAD_S)
            source = load_source(recipe, stage.update)
        report.print_notices(console, source.notices)
        found = analyse(recipe, source, progress, work)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(report.to_json(plot_ready(found)))
        partial.replace(destination)
    except OSError as error:
        raise UsageError(f"output: '{destination}' can't be written ({error.strerror}); choose another") from error
    work.remove()
    report.print_sensitivity(console, found)
    console.print(Text(f"saved in {_shown(destination)}"))
    return EXIT_PASSED


def _doctor(recipe: Recipe, _overrides: Sequence[str]) -> int:
    report.print_findings(report.make_console(plain=recipe.report.plain), diagnose())
    return EXIT_PASSED


def _selftest(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Check the native runtime on this machine's own device: 0 all agree, 3 something does not.

    Raises:
        UnavailableError: the device is not here, with the devices found.
    """
    console = report.make_console(plain=recipe.report.plain)
    choice = choose_runtime("native", recipe.device.kind)
    backends = native_devices.backends_of(choice.device)
    passed = True
    for backend in backends:
        with Progress(console, quiet=recipe.report.quiet) as progress, progress.stage(f"selftest {backend}") as stage:
            rows = selftest(backend, stage.update)
        report.print_selftest(console, backend, rows)
        passed = passed and all(row.passed for row in rows)
    return EXIT_PASSED if passed else EXIT_GATE


def _require_own_code_named(stored: Recipe, record: Record, overrides: Sequence[str]) -> None:
    """An artifact never makes its reader import code: the user names it again on the command line."""
    for section in ("model", "data"):
        spec = getattr(stored, section)
        if spec.kind == "given":
            raise UsageError(
                f"{section}: this artifact was made in Python from an object that is not in it; name the float "
                f"{section} on the command line, as in {section}=entry {section}.entry=package.module:callable"
            )
        if spec.kind == "entry" and not any(o.partition("=")[0] in (section, f"{section}.entry") for o in overrides):
            raise UsageError(
                f"{section}: the artifact names code ('{record.recipe[section]['entry']}'), which is not run "
                f"unless you say so: add {section}=entry {section}.entry={record.recipe[section]['entry']}"
            )


# --- sections of the results


def _int8_proof(built: Built, source: Source) -> dict[str, Any]:
    """Count int8 layers in what really runs, and show that its output is not float's.

    Raises:
        NothingQuantizedError: nothing runs in int8, or the output equals float's to the last bit.
    """
    runs = built.compiled.runner.int8_layers()
    if built.module is not None:
        from quantflow.stages.imperative import Int8Layer

        called = called_modules(built.module, next(iter(source.data.calibration)))
        runs = sum(called.get(name, 0) for name, m in built.module.named_modules() if isinstance(m, Int8Layer))
    if runs == 0:
        raise NothingQuantizedError("int8 proof: no int8 layer runs in the converted model; nothing was quantized")
    batch = (
        timing.resized(next(iter(source.data.calibration)), 1)
        if built.graph.batch_is_dynamic
        else next(iter(source.data.calibration))
    )
    difference = evaluate(source.float_model(), built.call, [batch])
    constant = difference["float_max_abs"] == 0
    if difference["identical"] and not constant:
        raise NothingQuantizedError(
            "int8 proof: the converted model's output equals the float model's to the last bit, so int8 can't have run"
        )
    return {
        "int8_layers": built.plan.int8_layers,
        "int8_layers_run": runs - built.plan.second_terms,
        "core_layers": built.plan.core_layers,
        "coverage": built.plan.int8_coverage,
        "output_differs": not difference["identical"],
    }


def _layer_errors(graph: Graph, compiled: Compiled, source: Source, update: Update) -> dict[str, Any]:
    """`per_layer`: each layer's error with those before it, and its own; `histograms` of the worst layers."""
    first = next(iter(source.data.evaluation))
    batch = timing.resized(first, min(first.size, LAYER_SAMPLES)) if graph.batch_is_dynamic else first
    program = compiled.program
    names = {node.name: str(node.meta.get("layer", node.name)) for node in graph.fx.nodes}
    computed = {
        node.output: node.name for node in program.nodes if node.op not in ("quantize", "dequantize", "size", "shape")
    }

    def float_run(batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> None:
        interpret(
            graph,
            bind(graph.inputs, batch.args, batch.kwargs),
            lambda node, value: (
                on_value(computed[node.name], value) if _is_real(value) and node.name in computed else None
            ),
        )

    def int8_run(batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> None:
        for done, (name, value) in enumerate(compiled.trace(bind(program.inputs, batch.args, batch.kwargs)), start=1):
            update(done, 2 * len(program.nodes))
            if name in computed and name in names and _is_real(value):
                on_value(computed[name], value)

    rows = compare_layers(float_run, int8_run, [batch])
    own, histograms = own_errors(
        graph,
        compiled,
        timing.resized(batch, min(batch.size, OWN_SAMPLES)) if graph.batch_is_dynamic else batch,
        lambda done, total: update(total + done, 2 * total),
    )
    for row in rows:
        if row["name"] in own:
            row["own_sqnr_db"] = own[row["name"]].sqnr_db
    return {"per_layer": rows, "histograms": histograms}


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _benchmark(
    recipe: Recipe,
    source: Source,
    program: Program,
    compiled: Compiled,
    float_model: Callable[..., Any],
    call: Callable[..., Any],
    update: Update,
) -> dict[str, Any]:
    settings = recipe.benchmark
    first = next(iter(source.data.evaluation))
    sizes = settings.batch_sizes if program.batch_is_dynamic else (first.size,)
    total, configs = len(sizes) * settings.rounds, []
    with timing.threads(settings.threads) as threads, torch.inference_mode():
        for done, size in enumerate(sizes):
            batch = timing.resized(first, size)
            timings = timing.interleaved(
                {
                    "float": lambda b=batch: float_model(*b.args, **b.kwargs),  # type: ignore[misc]
                    "int8": lambda b=batch: call(*b.args, **b.kwargs),  # type: ignore[misc]
                },
                rounds=settings.rounds,
                min_round_ms=settings.min_round_ms,
                progress=lambda r, _, done=done: update(done * settings.rounds + r, total),  # type: ignore[misc]
            )
            configs.append(timing.comparison(size, timings))
        per_layer = None
        if settings.per_layer:
            batch = timing.resized(first, sizes[0])
            repeats = int(PER_LAYER_MS / max(configs[0]["int8"]["median_ms"], 1e-3))
            inputs = bind(program.inputs, batch.args, batch.kwargs)
            per_layer = compiled.layer_times(inputs, max(1, min(MOST_REPEATS, repeats)))
    int8_bytes = len(weights_bytes(program))
    float_bytes = _float_bytes(source.model.module)
    section = {
        "threads": threads,
        "rounds": settings.rounds,
        "float": "torch float32, eager",
        "configs": configs,
        "size": {
            "float_bytes": float_bytes,
            "int8_bytes": int8_bytes,
            "ratio": int8_bytes / float_bytes if float_bytes else None,
        },
        "peak_memory_bytes": timing.peak_memory_bytes(),
    }
    return section | ({"per_layer": per_layer} if per_layer is not None else {})


def _float_bytes(module: Model) -> int:
    state: Mapping[str, torch.Tensor] = (
        module.state_dict if isinstance(module, torch.export.ExportedProgram) else module.state_dict()
    )
    return sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))


def _model_section(model: LoadedModel) -> dict[str, Any]:
    module = model.module
    state = module.state_dict if isinstance(module, torch.export.ExportedProgram) else dict(module.named_parameters())
    return {
        "name": model.name,
        "weights_requested": model.weights_requested,
        "weights_used": model.weights_used,
        "parameters": sum(t.numel() for t in state.values()),
        "float_bytes": _float_bytes(module),
    }


def _runtime_section(choice: Choice) -> dict[str, str]:
    return {"requested": choice.requested, "chosen": choice.runtime.name, "reason": choice.reason}


def _graph_text(recipe: Recipe, built: Built, source: Source) -> str:
    """TorchScript's own graph where the result is one or runs as one, else a line per node of the program."""
    is_script = recipe.mode.kind == "torchscript"
    script = as_script(built.compiled) if is_script else getattr(built.compiled.runner, "script", None)
    if script is None:
        return (
            "\n".join(f"{node.output} = {node.fused_name}({', '.join(node.refs())})" for node in built.program.nodes)
            + "\n"
        )
    batch = (
        timing.resized(next(iter(source.data.calibration)), 1)
        if built.graph.batch_is_dynamic
        else next(iter(source.data.calibration))
    )
    with torch.inference_mode():
        return str(script.graph_for(*bind(built.program.inputs, batch.args, batch.kwargs)))


# --- small things


def _example(model: LoadedModel) -> Batch | None:
    """Input of the right form without data: zeros are enough for a structure."""
    if isinstance(model.preprocess, ImagePreprocess):
        return Batch(args=(torch.zeros(2, model.preprocess.channels, model.preprocess.size, model.preprocess.size),))
    if isinstance(model.preprocess, TextPreprocess):
        return Batch(args=model.preprocess.encode(["a", "b"]))
    return None


@contextlib.contextmanager
def _nothing_left_on_error(work: Work) -> Iterator[None]:
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


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator seeded for the run and put back afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _baseline(recipe: Recipe) -> dict[str, Any] | None:
    """Read before anything is written: the baseline may be what the output folder held so far."""
    return None if recipe.report.baseline is None else read_baseline(recipe.report.baseline)


def _earlier_times(recipe: Recipe, directory: Path) -> dict[str, float]:
    """Stage → seconds, of this machine's last run on the model, and of the one whose artifact is in the output folder.

    Nothing of what can't be read.
    """
    times: dict[str, float] = {}
    for file in (_times_file(recipe), directory / RESULTS):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            times |= report.stage_times(report.from_json(file.read_bytes()))
    return times


def _remember_times(recipe: Recipe, progress: Progress) -> None:
    """For the next run on the same model, whatever else differs in its recipe."""
    with contextlib.suppress(ArtifactError):
        write_whole(_times_file(recipe), report.to_json({"stages": progress.stages}))


def _times_file(recipe: Recipe) -> Path:
    settings = recipe.to_dict()
    depends_on = json.dumps({section: settings[section] for section in ("model", "data", "mode")}, sort_keys=True)
    return cache_folder() / "stages" / f"{hashlib.sha256(depends_on.encode()).hexdigest()[:16]}.json"


def _shown(path: Path) -> str:
    """Relative to the working folder where that is shorter."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
