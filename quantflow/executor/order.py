"""The only file that knows the order of the stages.

    capture → plan → outliers → prepare → calibrate → refine → convert → compile → warm up → measure → judge

Algorithms that rewrite the float graph (equalize, smooth) act between capture and the plan that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from quantflow.algorithms import find_outliers, refine
from quantflow.analysis.joins import JOIN_SAMPLES, join_costs
from quantflow.errors import CaptureError, UnavailableError, first_line
from quantflow.executor.built import Built, Converted, Observable
from quantflow.executor.parts import execute_in_parts, why_after_all, why_in_parts
from quantflow.executor.placed import placed
from quantflow.executor.results import finished
from quantflow.executor.run import Run
from quantflow.executor.steps import calibrated, captured, leading_on, plan_for, ready, rewritten, without_drowned
from quantflow.host.memory import reused_memory
from quantflow.host.place import exact_float32
from quantflow.ir.graph import Graph
from quantflow.quantized import Quantized, QuantizedParts
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.convert import convert
from quantflow.stages.prepare import prepare


def execute(run: Run, baseline: Mapping[str, Any] | None = None) -> Quantized | QuantizedParts:
    """Every stage on a loaded source, as a whole or in parts; the result carries its record and results.

    Args:
        baseline: another artifact's figures, for the report.

    Raises:
        QuantflowError: any stage's own error; UnavailableError where a card's memory does not do.
    """
    try:
        return _executed(run, baseline)
    except torch.OutOfMemoryError as error:
        device, stage = run.choice.device, run.progress.stages[-1]["name"] if run.progress.stages else "load"
        raise UnavailableError(
            f"device: {device} has too little memory, after the stage '{stage}' ({first_line(error)}); use smaller "
            "batches (data.batch_size, benchmark.batch_sizes), fewer samples for the algorithms, or device=cpu"
        ) from error


def _executed(run: Run, baseline: Mapping[str, Any] | None) -> Quantized | QuantizedParts:
    why = why_in_parts(run)
    if not why:
        try:
            return as_a_whole(run, baseline)
        except CaptureError as error:
            why = why_after_all(run)
            if not why:
                raise leading_on(run, error) from error
    return execute_in_parts(run, why, as_a_whole, baseline)


def as_a_whole(run: Run, baseline: Mapping[str, Any] | None = None) -> Quantized:
    """Every stage on a loaded source, as one program."""
    built = build(run)
    return finished(replace(run, place=built.place), built, baseline)


@reused_memory()
@exact_float32()
def build(run: Run) -> Built:
    """Every stage up to warm-up.

    Workers calibrate together and convert the merged table each for itself; the first one verifies and tunes.
    """
    example = run.source.first_batch
    observable = observed(run, captured(run, example))
    with run.progress.stage("calibrate") as shown:
        table = calibrated(run, observable.at_its_place(), shown.update)
    return completed(run, observable, table)


@exact_float32()
def observed(run: Run, original: Graph) -> Observable:
    """From the captured graph to the model that calibration observes: algorithms that rewrite it, plan, prepare."""
    recipe, stage = run.recipe, run.progress.stage
    example = run.source.first_batch
    run, original = placed(run, original, example)
    graph, applied, module = rewritten(run, original, example, run.kept_algorithms())
    with stage("plan"):
        plan = plan_for(run, graph, example)
    with stage("outliers") as shown:
        material = replace(run.material(graph), update=shown.update)
        outliers = find_outliers(recipe.outliers, graph, plan, material)
        if outliers.left_float:
            plan = plan_for(run, graph, example, outliers)
        plan, _ = without_drowned(run, graph, example, plan, material, outliers)
    with stage("prepare"):
        prepared = replace(prepare(graph, plan, module, run.stands_for), passes=run.passes)
    return Observable(prepared, module, applied, outliers, run.place)


@exact_float32()
def completed(run: Run, observable: Observable, table: CalibrationTable) -> Built:
    """From what was measured to what runs: refine, convert, compile, warm up."""
    run = replace(run, place=observable.place)
    recipe, stage, prepared = run.recipe, run.progress.stage, observable.prepared
    graph, example, kept = prepared.graph, run.source.first_batch, run.kept_algorithms()
    material = run.material(graph)
    refined, improved = refine(recipe.algorithms, prepared, table, material, stage, kept.numbers(prepared))
    joins = ()
    if recipe.evaluate.enabled and recipe.evaluate.per_layer:
        joins = join_costs(prepared, refined, material.first(JOIN_SAMPLES), run.place)
    with stage("convert"):
        program = convert(prepared, table, refined)
    converted = Converted(prepared.plan, table, program, (*observable.algorithms, *improved))
    built = ready(run, graph, converted, observable.module, example)
    return replace(built, outliers=observable.outliers, joins=joins, place=run.place)
