"""The only file that knows the order of the stages.

load → capture → plan → rewrite → prepare → calibrate → refine → convert → compile → warm up → evaluate → benchmark →
judge → save
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import nn

from quantflow import benchmark as timing
from quantflow import report
from quantflow.algorithms import Applied, Material, refine, rewrite
from quantflow.artifact import add_files, check_destination
from quantflow.calibrate import CalibrationTable, calibrate
from quantflow.capture import Model, capture, plain
from quantflow.compile import Compiled, compile_program
from quantflow.config import overlay
from quantflow.convert import convert
from quantflow.data import Batch, Data, ImagePreprocess, TextPreprocess, load_data
from quantflow.doctor import diagnose
from quantflow.environment import environment
from quantflow.errors import (
    EXIT_GATE,
    EXIT_PASSED,
    DataError,
    NothingQuantizedError,
    QuantflowError,
    UsageError,
    VerificationError,
)
from quantflow.evaluate import compare_layers, evaluate
from quantflow.gates import FAILED, evaluate_gates, verdict
from quantflow.graph import Graph, interpret
from quantflow.imperative import called_modules, carry_over, fixed_constants, swap_modules
from quantflow.journal import Journal
from quantflow.layer_sensitivity import SEARCHED, measure_sensitivity, plot_ready
from quantflow.models import LoadedModel, estimate_batchnorm, load_model
from quantflow.plan import Plan, make_plan
from quantflow.prepare import Prepared, bind, prepare
from quantflow.program import Program
from quantflow.quantized import Quantized, QuantizedModel, QuantizedModule, QuantizedScript, Record, load, weights_bytes
from quantflow.report import Progress
from quantflow.runtimes import Choice, choose_runtime, native_devices
from quantflow.schema import Algorithm, ConstraintSettings, Recipe
from quantflow.selftest import selftest
from quantflow.tune import Outcome, Search, Trial, judged
from quantflow.variants import Variant, Variants
from quantflow.warmup import Warmup, warmup
from quantflow.workbench import Setting, Workbench, Yardstick

#: Warm-up compares with the reference on this many samples: exact integer sums are slow.
VERIFIED_SAMPLES = 2
#: Variants of larger batches are not tried: that takes longer than a user would wait.
MOST_TUNED_SAMPLES = 64
#: SQNR per layer is measured on at most this many samples, for the same reason.
LAYER_SAMPLES = 8
#: A search keeps this many times the seconds that its end was measured to take.
RESERVE = 1.25
TUNE_JOURNAL = "tune.jsonl"

Update = Callable[[int, int | None], None]


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
    """The int8 side: every product of the stages up to warm-up."""

    graph: Graph
    plan: Plan
    table: CalibrationTable
    program: Program
    compiled: Compiled
    warmup: Warmup
    module: nn.Module | None
    algorithms: tuple[Applied, ...] = ()

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
    checkpoint: Path | None,
    overrides: Sequence[str],
    destination: Path | None = None,
) -> Quantized:
    """Every stage on a loaded source; the result carries its record and results.

    A recipe with limits in `tune.subject_to` is searched for first, and the result is that of the recipe found.

    Args:
        destination: where a search saves the best so far; None: nowhere.

    Raises:
        QuantflowError: any stage's own error.
    """
    if recipe.tune.subject_to.is_set:
        return _tuned(recipe, source, progress, checkpoint, overrides, destination)
    return _finished(recipe, source, build(recipe, source, progress, checkpoint), progress, overrides)


def _finished(
    recipe: Recipe,
    source: Source,
    built: Built,
    progress: Progress,
    overrides: Sequence[str],
    sections: Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
    attached: Mapping[str, bytes] | None = None,
) -> Quantized:
    """Measured, judged and with its record. A search adds its own sections, notices and files."""
    results: dict[str, Any] = {
        **_opening(recipe, source, built.plan, built.compiled.choice, overrides),
        "calibration": {
            "batches": built.table.batches,
            "samples": built.table.samples,
            "seconds": next((s["seconds"] for s in progress.stages if s["name"] == "calibrate"), None),
            "resumed": built.table.resumed_batches > 0,
        },
        "algorithms": [applied.to_json() for applied in built.algorithms],
        "warmup": built.warmup.to_json(),
    }
    results["int8_proof"] = _int8_proof(built, source)
    results |= sections or {}
    results |= measure(recipe, source, built.program, built.compiled, built.graph, built.call, progress)
    results["notices"] = [
        *source.notices,
        *built.plan.notes,
        *built.table.notices,
        *(notice for applied in built.algorithms for notice in applied.outcome.notices),
        *built.warmup.notices,
        *notices,
    ]
    results |= judge(recipe, results)
    results["stages"] = progress.stages
    graph_text = _graph_text(built, source) if recipe.report.graph_dump else None
    record = Record(
        recipe.to_dict(), built.plan.to_json(), built.table, built.program, results, graph_text, attached or {}
    )
    return built.model(record)


def _opening(recipe: Recipe, source: Source, plan: Plan, choice: Choice, overrides: Sequence[str]) -> dict[str, Any]:
    """What the results say before anything is measured."""
    return {
        "format": 1,
        "recipe": {"name": recipe.name, "hash": recipe.hash(), "overrides": list(overrides)},
        "environment": environment(),
        "model": _model_section(source.model),
        "data": source.data.identity,
        "mode": recipe.mode.kind,
        "device": choice.device,
        "runtime": _runtime_section(choice),
        "plan": plan.to_json()["rows"],
    }


def build(recipe: Recipe, source: Source, progress: Progress, checkpoint: Path | None = None) -> Built:
    """capture → plan → rewrite → prepare → calibrate → refine → convert → compile → warm up."""
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    example = _first_batch(source)
    module = source.model.module
    graph, rewritten, imperative = captured(recipe, source, choice, example, progress)
    with progress.stage("plan"):
        plan = plan_for(recipe, graph, choice, module, example)
    with progress.stage("prepare"):
        prepared: Prepared = prepare(graph, plan, imperative)
    with progress.stage("calibrate") as stage:
        table = calibrate(
            prepared,
            source.data.calibration,
            key=recipe.calibration_key(),
            checkpoint=checkpoint,
            checkpoint_every_s=recipe.calibrate.checkpoint_every_s,
            resume=recipe.calibrate.resume,
            progress=stage.update,
        )
    refined, improved = refine(recipe.algorithms, prepared, table, _material(recipe, source, graph), progress.stage)
    with progress.stage("convert"):
        program = convert(prepared, table, refined)
    variant = Variant(plan, table, program, (*rewritten, *improved))
    return _made_ready(recipe, graph, variant, imperative, choice, example, progress)


def _made_ready(
    recipe: Recipe,
    graph: Graph,
    variant: Variant,
    imperative: nn.Module | None,
    choice: Choice,
    example: Batch,
    progress: Progress,
) -> Built:
    """compile → warm up."""
    plan, program = variant.plan, variant.program
    with progress.stage("compile"):
        compiled = compile_program(program, choice)
        swapped = swap_modules(imperative, plan, program, choice.runtime.name) if imperative is not None else None
    with progress.stage("warm up") as stage:
        warm = warmup(
            compiled,
            timing.resized(example, min(VERIFIED_SAMPLES, example.size)) if graph.batch_is_dynamic else example,
            iterations=recipe.warmup.iterations,
            min_sqnr_db=recipe.warmup.min_sqnr_db,
            call=swapped,
            tuned_for=_tuned_for(recipe, graph, example),
            progress=stage.update,
        )
    return Built(graph, plan, variant.table, program, compiled, warm, swapped, variant.algorithms)


def captured(
    recipe: Recipe, source: Source, choice: Choice, example: Batch, progress: Progress
) -> tuple[Graph, tuple[Applied, ...], nn.Module | None]:
    """capture → rewrite: the graph that is quantized, and in imperative mode the module that computes the same."""
    with progress.stage("capture"):
        original = capture(source.model.module, example, recipe.mode)
    return _rewritten(recipe, source, choice, example, original, progress)


def _rewritten(
    recipe: Recipe, source: Source, choice: Choice, example: Batch, original: Graph, progress: Progress
) -> tuple[Graph, tuple[Applied, ...], nn.Module | None]:
    module = source.model.module
    imperative = module if recipe.mode.kind == "imperative" and isinstance(module, nn.Module) else None
    fixed = frozenset() if imperative is None else fixed_constants(imperative, original)
    graph, applied = rewrite(
        recipe.algorithms,
        original,
        lambda graph: plan_for(recipe, graph, choice, module, example),
        replace(_material(recipe, source, original), fixed=fixed),
        progress.stage,
    )
    return graph, applied, None if imperative is None else carry_over(imperative, original, graph)


def _material(recipe: Recipe, source: Source, graph: Graph) -> Material:
    return Material(source.data.calibration, graph.batch_is_dynamic, recipe.seed)


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


def plan_for(recipe: Recipe, graph: Graph, choice: Choice, module: Model, example: Batch) -> Plan:
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
) -> dict[str, Any]:
    """The `accuracy` and `benchmark` sections, as far as the recipe enables them."""
    sections: dict[str, Any] = {}
    float_model = source.float_model()
    if recipe.evaluate.enabled:
        with progress.stage("evaluate") as stage:
            sections["accuracy"] = evaluate(
                float_model,
                call,
                source.data.evaluation,
                metric=source.data.metric,
                outputs=source.model.outputs,
                progress=stage.update,
            )
        if recipe.evaluate.per_layer and graph is not None:
            with progress.stage("layers"):
                sections["accuracy"]["per_layer"] = _layer_errors(graph, compiled, source)
    if recipe.benchmark.enabled:
        with progress.stage("benchmark") as stage:
            sections["benchmark"] = _benchmark(recipe, source, program, compiled, float_model, call, stage.update)
    return sections


def judge(recipe: Recipe, results: Mapping[str, Any]) -> dict[str, Any]:
    """The `gates` and `verdict` sections."""
    gates = evaluate_gates(recipe.gates, results)
    return {"gates": [vars(gate) for gate in gates], "verdict": verdict(gates)}


# --- sensitivity and search


def analyse(recipe: Recipe, source: Source, progress: Progress, checkpoint: Path | None = None) -> dict[str, Any]:
    """Each layer's sensitivity, from the cache as far as it was measured before: see `measure_sensitivity`."""
    bench = _workbench(recipe, source, progress, checkpoint)
    with (
        timing.threads(recipe.benchmark.threads),
        _sensitivity_cache(recipe, source, bench) as journal,
        progress.stage("sensitivity") as stage,
    ):
        found = measure_sensitivity(bench, bench.start, journal, progress=stage.update)
    return {"recipe": recipe.name, "samples": recipe.sensitivity.samples, "resumed": journal.resumed, **found}


def _workbench(
    recipe: Recipe, source: Source, progress: Progress, checkpoint: Path | None, *, judges: bool = False
) -> Workbench:
    """capture → calibrate, for any number of settings. `judges`: float also runs over the evaluation data."""
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    example, module = _first_batch(source), source.model.module
    with progress.stage("capture"):
        original = capture(module, example, recipe.mode)

    def variants_of(algorithms: tuple[Algorithm, ...]) -> Variants:
        asked = recipe.model_copy(update={"algorithms": algorithms})
        graph, applied, imperative = _rewritten(asked, source, choice, example, original, progress)
        material = _material(recipe, source, graph)
        variants = Variants(
            graph,
            source.data.calibration,
            lambda qconfig, layers: plan_for(
                asked.model_copy(update={"qconfig": qconfig, "layers": dict(layers)}), graph, choice, module, example
            ),
            lambda prepared, table: refine(algorithms, prepared, table, material, progress.stage),
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
        ranked = list(_head(source.data.calibration, recipe.sensitivity.samples, original.batch_is_dynamic))
        ranking = Yardstick(source.float_model(), ranked, **measured)
        judging = None
        if judges:
            judging = Yardstick(source.float_model(), source.data.evaluation, **measured, progress=stage.update)
    start = Setting(recipe.algorithms, recipe.qconfig, recipe.layers)
    size = recipe.benchmark.batch_sizes[0]
    timed = timing.resized(example, size) if original.batch_is_dynamic else example
    return Workbench(variants_of, choice, start, timed, ranking, judging)


def _head(batches: Iterable[Batch], samples: int, can_cut: bool) -> Iterator[Batch]:
    """The first batches with that many samples, the last one cut where it can be."""
    for batch in batches:
        if samples <= 0:
            return
        yield batch.head(samples) if can_cut else batch
        samples -= batch.size


def _sensitivity_cache(recipe: Recipe, source: Source, bench: Workbench) -> Journal:
    """The journal of a model's sensitivities, in the user's cache: later runs on the same model and data read it."""
    key = _measurement_key(recipe, source, bench, {"samples": recipe.sensitivity.samples})
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Journal(base / "quantflow" / "sensitivity" / f"{key[:32]}.jsonl", key)


def _measurement_key(recipe: Recipe, source: Source, bench: Workbench, more: Mapping[str, Any]) -> str:
    """sha256 of all that measurements depend on: recipe, model, data, machine."""
    found, choice = environment(), bench.choice
    depends_on = {
        "calibration": recipe.calibration_key(),
        "model": bench.variants(bench.start).digest,
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
    checkpoint: Path | None,
    overrides: Sequence[str],
    destination: Path | None,
) -> Quantized:
    """The search of `quantflow.tune`, and the model of the recipe that it finds."""
    began = time.perf_counter()
    bench = _workbench(recipe, source, progress, checkpoint, judges=True)
    limits = {"tune": recipe.tune.model_dump(mode="json", exclude={"time_budget_s"})}
    key = _measurement_key(recipe, source, bench, {**limits, "samples": recipe.sensitivity.samples})
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
            verified = journal.measure("verify", lambda: ready(bench.start, shown).warmup.to_json())
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
        model = _finished(found, source, built, progress, overrides, {"tune": section}, notices, attached)
    return model


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
        **_opening(found, source, made.plan, bench.choice, overrides),
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
        "evaluate": _again,
        "benchmark": _again,
        "doctor": _doctor,
        "selftest": _selftest,
        "sensitivity": _sensitivity,
        "tune": _run,
    }
    return tasks[recipe.task](recipe, overrides)


def run(recipe: Recipe, overrides: Sequence[str] = ()) -> Quantized:
    """The main job of a recipe, saved to its output folder: what `python -m quantflow recipe=…` does.

    Raises:
        QuantflowError: with the exit code of its class.
    """
    console = report.make_console()
    destination = Path(recipe.output or f"outputs/{recipe.name}")
    check_destination(destination)
    choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    checkpoint = destination.with_name(f".{destination.name}.calibration.safetensors")
    with (
        Progress(console, quiet=recipe.report.quiet) as progress,
        _seeded(recipe.seed),
        _nothing_left_on_error(checkpoint),
    ):
        with progress.stage("load"):
            source = load_source(recipe)
        report.print_notices(console, source.notices)
        model = execute(recipe, source, progress, checkpoint, overrides, destination)
    saved = model.record.save(destination)
    for leftover in (checkpoint, _tune_journal(destination)):
        leftover.unlink(missing_ok=True)
    report.print_summary(console, model.results, artifact=_shown(saved), quiet=recipe.report.quiet)
    return model


def load_source(recipe: Recipe) -> Source:
    """Model and data of a recipe; random weights get BatchNorm statistics from the calibration data."""
    if recipe.model is None:
        raise UsageError("model: is required; choose one (model=torchvision model.name=resnet50) or a recipe that does")
    model = load_model(recipe.model, recipe.seed)
    data = load_data(recipe.data, model.preprocess, recipe.seed)
    if model.batchnorm_to_estimate and isinstance(model.module, nn.Module):
        estimate_batchnorm(model.module, data.calibration)
    return Source(model, data)


def _run(recipe: Recipe, overrides: Sequence[str]) -> int:
    model = run(recipe, overrides)
    return EXIT_GATE if model.results["verdict"] == FAILED else EXIT_PASSED


def _plan(recipe: Recipe, _overrides: Sequence[str]) -> int:
    assert recipe.model is not None, "the schema asks for it"
    console = report.make_console()
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind)
    with _seeded(recipe.seed):
        model = load_model(recipe.model, recipe.seed)
        report.print_notices(console, model.notices)
        example = _example(model) or next(iter(load_data(recipe.data, model.preprocess, recipe.seed).calibration))
        plan = plan_for(recipe, capture(model.module, example, recipe.mode), choice, model.module, example)
    report.print_plan(console, plan.to_json()["rows"])
    report.print_notices(console, plan.notes)
    console.print(Text(f"runtime {choice.runtime.name} on {choice.device} ({choice.reason})"))
    return EXIT_PASSED


def _again(recipe: Recipe, overrides: Sequence[str]) -> int:
    """Evaluate or benchmark an artifact once more, and judge it by its gates."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console()
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
            fresh = measure(stored, source, record.program, compiled, graph, compiled, progress)
        except VerificationError as error:
            raise UsageError(
                f"model: not the float model that '{recipe.artifact}' was made from ({error}); name that one"
            ) from error
    results = {**record.results, **fresh, "environment": environment()}
    results |= judge(stored, results)
    add_files(Path(recipe.artifact), replace(record, results=results).result_files())
    report.print_summary(console, results, artifact=recipe.artifact, quiet=stored.report.quiet)
    return EXIT_GATE if results["verdict"] == FAILED else EXIT_PASSED


def _inspect(recipe: Recipe, _overrides: Sequence[str]) -> int:
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console()
    record = Record.load(recipe.artifact)
    report.print_plan(console, record.plan["rows"])
    console.print(Text(f"{len(record.program.nodes)} nodes, {len(record.program.int8_nodes())} int8 layers"))
    report.print_summary(console, record.results, artifact=recipe.artifact)
    return EXIT_PASSED


def _report(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Write an artifact's report again from its results, and print it."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console()
    record = Record.load(recipe.artifact)
    add_files(Path(recipe.artifact), record.result_files())
    report.print_summary(console, record.results, artifact=recipe.artifact)
    return EXIT_PASSED


def _sensitivity(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Measure every layer, print the ranking and write it for plots."""
    console = report.make_console()
    destination = Path(recipe.output or f"outputs/{recipe.name}.sensitivity.json")
    checkpoint = destination.with_name(f".{destination.name}.calibration.safetensors")
    with (
        Progress(console, quiet=recipe.report.quiet) as progress,
        _seeded(recipe.seed),
        _nothing_left_on_error(checkpoint),
    ):
        with progress.stage("load"):
            source = load_source(recipe)
        report.print_notices(console, source.notices)
        found = analyse(recipe, source, progress, checkpoint)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(report.to_json(plot_ready(found)))
        partial.replace(destination)
    except OSError as error:
        raise UsageError(f"output: '{destination}' can't be written ({error.strerror}); choose another") from error
    checkpoint.unlink(missing_ok=True)
    report.print_sensitivity(console, found)
    console.print(Text(f"saved in {_shown(destination)}"))
    return EXIT_PASSED


def _doctor(_recipe: Recipe, _overrides: Sequence[str]) -> int:
    report.print_findings(report.make_console(), diagnose())
    return EXIT_PASSED


def _selftest(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Check the native runtime on this machine's own device: 0 all agree, 3 something does not.

    Raises:
        UnavailableError: the device is not here, with the devices found.
    """
    console = report.make_console()
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
        from quantflow.imperative import Int8Layer

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
        "int8_layers_run": runs,
        "core_layers": built.plan.core_layers,
        "coverage": built.plan.int8_coverage,
        "output_differs": not difference["identical"],
    }


def _layer_errors(graph: Graph, compiled: Compiled, source: Source) -> list[dict[str, Any]]:
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
        for name, value in compiled.trace(bind(program.inputs, batch.args, batch.kwargs)):
            if name in computed and name in names and _is_real(value):
                on_value(computed[name], value)

    return compare_layers(float_run, int8_run, [batch])


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
            per_layer = compiled.layer_times(bind(program.inputs, batch.args, batch.kwargs))
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


def _graph_text(built: Built, source: Source) -> str:
    script = getattr(built.compiled.runner, "script", None)
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
def _nothing_left_on_error(checkpoint: Path) -> Iterator[None]:
    """A run that can't be carried out takes its own checkpoint away; one that is interrupted or killed leaves it."""
    created = [path for path in (checkpoint, *checkpoint.parents) if not path.exists()]
    try:
        yield
    except QuantflowError:
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
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


def _shown(path: Path) -> str:
    """Relative to the working folder where that is shorter."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
