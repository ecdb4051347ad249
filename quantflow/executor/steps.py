"""The stages that take more than one call, as one function each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from quantflow.algorithms import NO_OUTLIERS, Applied, Outliers, rewrite
from quantflow.algorithms.drowned import drowned, drowned_notice
from quantflow.algorithms.kept import KeptAlgorithms
from quantflow.algorithms.outcome import Material
from quantflow.capture import capture, find_sizes, likely_seconds, shorter
from quantflow.capture.export import OTHER_MODES
from quantflow.errors import CaptureError, DataError, QuantflowError
from quantflow.executor.built import Built, Converted
from quantflow.executor.parts import why_in_parts
from quantflow.executor.run import Run
from quantflow.executor.source import Update, cut, takes
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph
from quantflow.ir.passes.int8_embeddings import int8_embeddings
from quantflow.ir.plan import Plan
from quantflow.ir.program import Program
from quantflow.runtimes import Choice
from quantflow.schema import ModeSettings
from quantflow.stages.benchmark import resized
from quantflow.stages.calibrate import CalibrationTable, calibrate, require_complete
from quantflow.stages.compile import Compiled, compile_program
from quantflow.stages.evaluate import evaluate
from quantflow.stages.imperative import carry_over, fixed_constants, not_reached, run_module, swap_modules
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import Prepared
from quantflow.stages.warmup import warmup

#: Warm-up compares with the reference on this many samples: exact integer sums are slow.
VERIFIED_SAMPLES = 2
#: Variants of larger batches are not tried: that takes longer than a user would wait.
MOST_TUNED_SAMPLES = 64
NO_JOINS: Mapping[str, str] = {}
#: What `policy.float: auto` takes in place of float32, and what it may cost.
HALF, MOST_HALF_COST_DB = "bfloat16", 1.0


def captured(run: Run, example: Batch) -> Graph:
    """The captured graph, as a stage that is shown."""
    with run.progress.stage("capture") as stage:
        stage.expect(likely_seconds(run.source.model.module, run.recipe.mode))
        return graph_of(run, example)


def graph_of(run: Run, example: Batch) -> Graph:
    """The captured graph, with what the policy asks for before anything is planned.

    Raises:
        CaptureError: the model can't be captured, or only its parts can.
    """
    if why := why_in_parts(run):
        raise CaptureError(
            f"mode: the model can't be captured as a whole ({why}); task=run and quantflow.quantize quantize it in "
            "parts, which the other tasks can't: name them a submodule as the model"
        )
    source = run.source
    graph = capture(
        source.model.module,
        example,
        run.recipe.mode,
        dynamic=run.recipe.dynamic,
        batches=source.data.of_own_shapes,
        original=source.model.original,
    )
    return int8_embeddings(graph) if run.recipe.policy.embedding == "int8" else graph


def leading_on(run: Run, error: CaptureError) -> CaptureError:
    """The error, which names other modes only where they take the model: both of them take a trace's graph."""
    before, names_others, _ = str(error).partition(OTHER_MODES)
    if not names_others:
        return error
    traced = run.recipe.model_copy(update={"mode": ModeSettings(kind="torchscript")})
    try:
        graph_of(replace(run, recipe=traced), run.source.first_batch)
    except QuantflowError as other:
        return CaptureError(
            f"{before}; a trace, which mode=torchscript and mode=imperative take, fails as well: {other}. Quantize "
            "submodules that can be captured: parts=[…], or model.part = quantflow.quantize(model.part, its inputs)"
        )
    return error


def rewritten(
    run: Run, original: Graph, example: Batch, kept: KeptAlgorithms
) -> tuple[Graph, tuple[Applied, ...], nn.Module | None]:
    """The graph that is quantized, what algorithms did to it, and in imperative mode the module that computes it."""
    module = run.swapped
    fixed = frozenset() if module is None else fixed_constants(module, original)
    graph, applied = rewrite(
        run.recipe.algorithms,
        original,
        lambda graph: plan_for(run, graph, example),
        replace(run.material(original), fixed=fixed, may_insert=module is None),
        run.progress.stage,
        kept.graphs(),
    )
    return graph, applied, None if module is None else carry_over(module, original, graph)


def plan_for(
    run: Run, graph: Graph, example: Batch, outliers: Outliers = NO_OUTLIERS, joins: Mapping[str, str] = NO_JOINS
) -> Plan:
    """The plan for a captured graph, with what this machine decides filled in.

    Args:
        joins: additions and concatenations that measurements say must stay float, with the reason.
    """
    recipe, runtime = run.recipe, run.choice.runtime

    def plan_with(unreachable: Mapping[str, str]) -> Plan:
        return make_plan(
            graph,
            recipe.qconfig,
            recipe.layers,
            mode=recipe.mode.kind,
            kernel_of=runtime.kernel_of,
            reduce_range=recipe.qconfig.reduce_range is True,
            recipe_name=recipe.name,
            left_float={**outliers.left_float, **joins},
            unreachable=unreachable,
            policy=recipe.policy,
        )

    unreachable: dict[str, str] = {}
    plan = plan_with(unreachable)
    if run.swapped is not None:
        # What is left float changes what is fused with what, and so what else can be reached.
        seen = cut(example, VERIFIED_SAMPLES, graph)
        while missing := not_reached(run.swapped, graph, plan, seen, run.stands_for).items() - unreachable.items():
            unreachable |= dict(missing)
            plan = plan_with(unreachable)
    return replace(plan, notes=(*plan.notes, *runtime.notes()))


def without_drowned(
    run: Run, graph: Graph, example: Batch, plan: Plan, material: Material, outliers: Outliers = NO_OUTLIERS
) -> tuple[Plan, dict[str, str]]:
    """The plan with joins that would lose an operand left float, and these with the reason.

    What they share a scale with is looked at again.
    """
    left: dict[str, str] = {}
    while found := {layer: why for layer, why in drowned(graph, plan, material).items() if layer not in left}:
        left |= found
        plan = plan_for(run, graph, example, outliers, left)
    return replace(plan, notes=(*plan.notes, *drowned_notice(left))), left


def calibrated(run: Run, prepared: Prepared, update: Update) -> CalibrationTable:
    """The table of all batches: each worker's part, merged in order, which is what one worker gets of the whole."""
    recipe, workers = run.recipe, run.workers
    part = workers.part(run.source.data.calibration)

    def own() -> CalibrationTable:
        return calibrate(
            prepared,
            part,
            key=recipe.calibration_key(),
            checkpoint=run.checkpoint(),
            checkpoint_every_s=recipe.calibrate.checkpoint_every_s,
            resume=recipe.calibrate.resume,
            first=None if workers.count == 1 else part.first,
            ahead=prepared.place,
            progress=update,
        )

    if workers.count == 1:
        return own()
    states = workers.gather(lambda: own().to_bytes())
    tables = [CalibrationTable.from_bytes(state, f"worker {rank}'s table") for rank, state in enumerate(states)]
    table = functools.reduce(CalibrationTable.merge, tables)
    require_complete(table, prepared.layers)
    return table


def ready(run: Run, graph: Graph, converted: Converted, module: nn.Module | None, example: Batch) -> Built:
    """compile → warm up, which is the first worker's."""
    plan, program = converted.plan, converted.program
    with run.progress.stage("compile"):

        def swap(compiled: Compiled) -> nn.Module | None:
            """The module with the program's layers in it."""
            if module is None:
                return None
            return swap_modules(module, graph, plan, program, compiled.runner, run.stands_for)

        compiled = compile_program(program, _settled(run, graph, program, example, swap))
        swapped = swap(compiled)
    warm = None
    if run.workers.is_first:
        with run.progress.stage("warm up") as stage:
            warm = warmup(
                compiled,
                cut(example, VERIFIED_SAMPLES, graph),
                iterations=run.recipe.warmup.iterations,
                min_sqnr_db=run.recipe.warmup.min_sqnr_db,
                call=None if swapped is None else _served(compiled, swapped),
                others=[cut(other, VERIFIED_SAMPLES, graph) for other in other_sizes(run, graph, example)],
                tuned_for=_tuned_for(run, graph, example),
                alone=run.progress.alone,
                progress=stage.update,
            )
    return Built(graph, plan, converted.table, program, compiled, warm, swapped, converted.algorithms)


def _settled(
    run: Run, graph: Graph, program: Program, example: Batch, swap: Callable[[Compiled], nn.Module | None]
) -> Choice:
    """The run's choice with `policy.float: auto` decided: bfloat16 where it costs less than MOST_HALF_COST_DB."""
    choice = run.choice
    if choice.floats != "auto":
        return choice

    def full(reason: str) -> Choice:
        return replace(choice, floats="float32", floats_reason=f"policy.float=auto: {reason}")

    if HALF not in choice.runtime.halves:
        return full(f"runtime {choice.runtime.name} computes floats in float32")
    half = compile_program(program, replace(choice, floats=HALF))
    if not half.runner.halves:
        return full(f"nothing between int8 layers is held in {HALF}")
    batch = [cut(example, VERIFIED_SAMPLES, graph)]
    ours, theirs = (
        evaluate(run.source.float_model(), _served(each, swap(each)), batch)["sqnr_db"]
        for each in (half, compile_program(program, full("")))
    )
    if ours is None or theirs is None:
        return full("the model's output is no float, whose error could be compared")
    found = f"{ours:.1f} dB to the float model in {HALF}, {theirs:.1f} dB in float32"
    if not ours >= theirs - MOST_HALF_COST_DB:  # NaN costs too much
        return full(found)
    return replace(choice, floats=HALF, floats_reason=f"policy.float=auto: {found}")


def _served(compiled: Compiled, swapped: nn.Module | None) -> Callable[..., Any]:
    """What the user calls."""
    return compiled if swapped is None else lambda *args, **kwargs: run_module(swapped, args, kwargs)


def other_sizes(run: Run, graph: Graph, example: Batch) -> list[Batch]:
    """A batch of other sizes than the example's, where sizes vary: from the data, or the example cut."""
    varying = {
        (at, dim): size
        for at, item in enumerate(graph.inputs)
        for dim, size in enumerate(item.shape)
        # A mask's batch may have a name of its own, and is still that of the other inputs.
        if isinstance(size, str) and not (dim == 0 and example.tensors[at].shape[0] == example.size)
    }
    if not varying:
        return []
    seen = find_sizes("auto", [example, *run.source.data.of_own_shapes[1:]], [item.name for item in graph.inputs])
    for other in seen.others or (shorter(example, varying),):
        with contextlib.suppress(DataError):
            bind(graph, other.args, other.kwargs)
            return [other]
    return []


def _tuned_for(run: Run, graph: Graph, example: Batch) -> list[Batch]:
    """The batches that the runtime is tuned for: the sizes that will be timed."""
    if not graph.batch_is_dynamic:
        return [example]
    sizes = (size for size in run.recipe.benchmark.batch_sizes if size <= MOST_TUNED_SAMPLES)
    return [resized(example, size) for size in sizes if takes(graph, example, size)]
