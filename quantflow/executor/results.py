"""What the results say of a run, and the model that carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from quantflow.analysis.baseline import beside
from quantflow.analysis.fused_graph import fused_graph
from quantflow.analysis.joins import join_notices
from quantflow.analysis.poor_output import poor_output_notices
from quantflow.errors import NothingQuantizedError
from quantflow.executor.built import Built
from quantflow.executor.contest import notices_of
from quantflow.executor.measure import measure
from quantflow.executor.placed import card_section
from quantflow.executor.run import Run
from quantflow.executor.source import Source, cut
from quantflow.host.environment import environment
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import interpret
from quantflow.ir.plan import Plan
from quantflow.ir.program import Program
from quantflow.quantized import Quantized, as_script
from quantflow.runtimes import Choice
from quantflow.schema import Recipe
from quantflow.stages import benchmark as timing
from quantflow.stages.evaluate import evaluate
from quantflow.stages.gates import evaluate_gates, verdict
from quantflow.stages.imperative import int8_calls
from quantflow.stages.record import Record


@dataclass(frozen=True)
class Addition:
    """What a search adds to the results of the model that it found."""

    sections: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


NOTHING_ADDED = Addition()


def finished(
    run: Run, built: Built, baseline: Mapping[str, Any] | None = None, added: Addition = NOTHING_ADDED
) -> Quantized:
    """Measured, judged and with its record."""
    progress, warm = run.progress, built.verified()
    results: dict[str, Any] = {
        **opening(run, built.plan, built.program),
        "calibration": {
            "batches": built.table.batches,
            "samples": built.table.samples,
            "seconds": next((s["seconds"] for s in progress.stages if s["name"] == "calibrate"), None),
            "resumed": built.table.resumed_batches > 0,
            "workers": run.workers.count,
        },
        "algorithms": [applied.to_json() for applied in built.algorithms],
        "joins": [vars(join) for join in built.joins],
        "outliers": [each.to_json() for each in built.outliers.found],
        "warmup": warm.to_json(),
        "runtime": _runtime_section(built.compiled.choice),
    }
    layers_run = _int8_layers_run(built, run.source)
    measured = measure(run, built.compiled, built.graph, built.call_at(run.int8_place(built.compiled.runner)))
    results["int8_proof"] = _int8_proof(built, run.source, layers_run, measured.get("accuracy"))
    results |= added.sections
    results |= measured
    results["notices"] = [
        *run.source.notices,
        *poor_output_notices(results.get("accuracy")),
        *built.plan.notes,
        *built.outliers.notices,
        *join_notices(built.joins),
        *built.table.notices,
        *(notice for applied in built.algorithms for notice in applied.outcome.notices),
        *warm.notices,
        *timing.unsteady(timed(results)),
        *notices_of(results.get("benchmark") or {}),
        *([] if run.work is None else run.work.notices),
        *added.notices,
    ]
    results["resumed"] = [] if run.work is None else run.work.resumed
    results |= judged(run.recipe, results)
    if baseline is not None:
        results["baseline"] = beside(baseline, results)
    results["stages"] = progress.stages
    graph_text = _graph_text(run, built) if run.recipe.report.graph_dump else None
    record = Record(
        run.recipe.to_dict(), built.plan.to_json(), built.table, built.program, results, graph_text, added.files
    )
    return built.model(record)


def opening(run: Run, plan: Plan, program: Program) -> dict[str, Any]:
    """What the results say before anything is measured."""
    return {**of_run(run), **card_section(run), "plan": plan.to_json()["rows"], "graph": fused_graph(program)}


def of_run(run: Run) -> dict[str, Any]:
    """What was asked, on what, where."""
    recipe, choice = run.recipe, run.choice
    return {
        "format": 1,
        "recipe": {
            "name": recipe.name,
            "description": recipe.description,
            "hash": recipe.hash(),
            "overrides": list(run.overrides),
            "settings": recipe.to_dict(),
        },
        "environment": environment(),
        "model": _model_section(run.source),
        "data": run.source.data.identity,
        "mode": recipe.mode.kind,
        "device": choice.device,
        "runtime": _runtime_section(choice),
    }


def _runtime_section(choice: Choice) -> dict[str, Any]:
    return {
        "requested": choice.requested,
        "chosen": choice.runtime.name,
        "reason": choice.reason,
        "float": choice.floats,
        "float_reason": choice.floats_reason,
    }


def judged(recipe: Recipe, results: Mapping[str, Any]) -> dict[str, Any]:
    """The `gates` and `verdict` sections."""
    gates = evaluate_gates(recipe.gates, results)
    return {"gates": [vars(gate) for gate in gates], "verdict": verdict(gates)}


def timed(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """One entry per batch size that was timed."""
    configs: Sequence[Mapping[str, Any]] = (results.get("benchmark") or {}).get("configs", ())
    return configs


def _int8_layers_run(built: Built, source: Source) -> int:
    """How many int8 layers there are in what really runs.

    Raises:
        NothingQuantizedError: none.
    """
    runs = built.compiled.runner.int8_layers()
    if built.module is not None:
        runs = int8_calls(built.module, source.first_batch)
    if runs == 0:
        raise NothingQuantizedError("int8 proof: no int8 layer runs in the converted model; nothing was quantized")
    return runs


def _int8_proof(built: Built, source: Source, layers_run: int, accuracy: Mapping[str, Any] | None) -> dict[str, Any]:
    """Show that the output of what runs, or a layer's, is not float's.

    Args:
        accuracy: the comparison with float on the evaluation data, where there was one.

    Raises:
        NothingQuantizedError: output and layers equal float's to the last bit.
    """
    return {
        "int8_layers": built.plan.int8_layers,
        "int8_layers_run": layers_run - built.plan.second_terms + built.plan.int8_tables,
        "core_layers": built.plan.core_layers,
        "coverage": built.plan.int8_coverage,
        "float_layers": [{"name": row.name, "op": row.op, "reason": row.reason} for row in built.plan.float_layers],
        "output_differs": (accuracy is not None and not accuracy["identical"]) or _output_differs(built, source),
    }


def _output_differs(built: Built, source: Source) -> bool:
    """Whether the output on calibration data is another than float's.

    Raises:
        NothingQuantizedError: it is the same, and so is every layer's own.
    """
    # Classes, flags and constants may well be the same; then the layers' own results have to differ. In one sample of a
    # small model those may all be cut off at 0.
    for batch in (cut(source.first_batch, 1, built.graph), source.first_batch):
        difference = evaluate(source.float_model(), built.call, [batch])
        if not difference["identical"] or _some_layer_differs(built, batch):
            return not difference["identical"]
    raise NothingQuantizedError(
        "int8 proof: the converted model's output, and every int8 layer's own, equals the float model's to the "
        "last bit, so int8 can't have run"
    )


def _some_layer_differs(built: Built, batch: Batch) -> bool:
    """Whether an int8 layer's result is another than float's, or none can be: all of their weights are zero."""
    program = built.program
    layers = {n.output for n in program.int8_nodes() if bool(program.tensors[n.attrs["weight"]].any())}
    floats: dict[str, torch.Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node.name in layers:
            floats[node.name] = value.clone()

    with torch.inference_mode():
        interpret(built.graph, bind(program, batch.args, batch.kwargs), keep)
        return not layers or any(
            name in floats and not torch.equal(value, floats[name])
            for name, value in built.compiled.trace(bind(program, batch.args, batch.kwargs))
        )


def _model_section(source: Source) -> dict[str, Any]:
    model, module = source.model, source.model.module
    state = module.state_dict if isinstance(module, torch.export.ExportedProgram) else dict(module.named_parameters())
    return {
        "name": model.name,
        "weights_requested": model.weights_requested,
        "weights_used": model.weights_used,
        "parameters": sum(t.numel() for t in state.values()),
        "float_bytes": source.float_bytes(),
    }


def _graph_text(run: Run, built: Built) -> str:
    """TorchScript's own graph where the result is one or runs as one, else a line per node of the program."""
    is_script = run.recipe.mode.kind == "torchscript"
    script = as_script(built.compiled) if is_script else built.compiled.runner.script
    if script is None:
        return (
            "\n".join(f"{node.output} = {node.fused_name}({', '.join(node.refs())})" for node in built.program.nodes)
            + "\n"
        )
    batch = cut(run.source.first_batch, 1, built.graph)
    with torch.inference_mode():
        return str(script.graph_for(*bind(built.program, batch.args, batch.kwargs)))
