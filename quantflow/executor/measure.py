"""Float beside int8: the accuracy of the whole and of each layer; the time that both take is `contest`'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantflow.analysis.layer_errors import float_source, own_errors
from quantflow.executor.contest import benchmark
from quantflow.executor.run import Run
from quantflow.executor.source import Source, Update, cut
from quantflow.host.environment import environment
from quantflow.host.memory import reused_memory
from quantflow.host.place import exact_float32
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, interpret
from quantflow.ir.ops import COMPUTING_OPS
from quantflow.ir.program import Program
from quantflow.numerics.affine import QParams
from quantflow.stages.compile import Compiled
from quantflow.stages.evaluate import ErrorSum, compare_layers, judge, tally, tensors
from quantflow.stages.record import weights_bytes
from quantflow.store.run_folder import Work

#: Errors per layer are measured on at most this many samples: all of the model's values are held at once.
LAYER_SAMPLES = 4
#: The captured graph stands for the float model on a batch if it gives what that gives of the first sample.
LEAST_CHECKED_DB = 90.0

Call = Callable[..., Any]


def measure(run: Run, compiled: Compiled, graph: Graph | None, call: Call) -> dict[str, Any]:
    """The `accuracy` and `benchmark` sections, as far as the recipe enables them."""
    sections: dict[str, Any] = {}
    recipe, work, program = run.recipe, run.work, compiled.program
    inputs = "" if work is None else _inputs(program, run.source)
    if recipe.evaluate.enabled:
        sections["accuracy"] = evaluated(run, compiled, call, graph)
        if recipe.evaluate.per_layer and graph is not None:
            with run.progress.stage("layers") as stage:
                update = stage.update
                layers = _kept(work, "layers", inputs, lambda: _layer_errors(run, graph, compiled, update))
            sections["accuracy"] = {**sections["accuracy"], **layers}
    if recipe.benchmark.enabled:
        with run.progress.stage("benchmark", alone=True) as stage:
            sections["benchmark"] = _kept(
                work,
                "benchmark",
                inputs + json.dumps(environment()),
                lambda: benchmark(run, compiled, call, stage.update),
            )
    return sections


@reused_memory()
@exact_float32()
def evaluated(run: Run, compiled: Compiled, call: Call, graph: Graph | None = None) -> dict[str, Any]:
    """The comparison with float over all batches, each worker taking its part.

    Args:
        call: takes its inputs where `run.int8_place` says.
        graph: the float model's, which may stand for it on a batch that it has just computed.
    """
    source, work, workers = run.source, run.work, run.workers
    part = workers.part(source.data.evaluation)
    inputs = "" if work is None else _inputs(compiled.program, source)
    with run.progress.stage("evaluate") as stage:
        known = None if work is None else workers.from_first(lambda: work.get("accuracy", inputs))
        if known is not None:
            return known
        tallies = workers.gather(
            lambda: tally(
                _float_of(run, graph),
                call,
                part,
                metric=source.data.metric,
                outputs=source.model.outputs,
                first=part.first,
                places=(run.place, run.int8_place(compiled.runner)),
                progress=stage.update,
            )
        )
    accuracy = judge(each for own in tallies for each in own)
    if work is not None and workers.is_first:
        work.put("accuracy", inputs, accuracy)
    return accuracy


def _float_of(run: Run, graph: Graph | None) -> Call:
    """The float model; of the batch that its graph has just computed, what that gave, if the model agrees."""
    model = run.source.float_model(run.place)
    if graph is None or run.recipe.mode.kind != "export" or run.source.model.original is not None:
        return model  # a trace has one of several paths, and float32 is not what another dtype gives

    def called(*args: Any, **kwargs: Any) -> Any:
        batch = Batch(args, kwargs)
        output = run.passes.output(graph, batch)
        first = batch if output is None else cut(batch, 1, graph)
        found = model(*first.args, **first.kwargs)
        if first is batch:
            return found
        return output if _begins_with(output, found, batch.size, first.size) else model(*args, **kwargs)

    return called


def _begins_with(whole: Any, first: Any, batch: int, samples: int) -> bool:
    """Whether the first samples of one output are another one, but for the order of float sums."""
    expected, found = dict(tensors(first)), dict(tensors(whole))
    if expected.keys() != found.keys() or any(not x.dim() or len(x) != batch for x in found.values()):
        return False
    error = ErrorSum()
    for path, x in expected.items():
        y = found[path][:samples]
        if y.dtype is not x.dtype or y.shape != x.shape or not (x.is_floating_point() or torch.equal(x, y)):
            return False
        error.add(x, y)
    return error.sqnr_db >= LEAST_CHECKED_DB


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


@reused_memory()
@exact_float32()
def _layer_errors(run: Run, graph: Graph, compiled: Compiled, update: Update) -> dict[str, Any]:
    """`per_layer`: each layer's error with those before it, and its own; `histograms` of the worst layers."""
    whole = next(iter(run.source.data.evaluation))
    batch = cut(whole, LAYER_SAMPLES, graph)
    held = run.passes.held(graph, whole)
    floats = None if held is None else _of_first_samples(held, graph, compiled.program, whole, batch.size)
    run.passes.forget()
    graph = graph.at(run.place)
    if floats is None:
        floats = _computed(graph, batch)
    program, place = compiled.program, run.int8_place(compiled.runner)
    names = {node.name: str(node.meta.get("layer", node.name)) for node in graph.fx.nodes}
    computed = {
        node.output: node.name for node in program.nodes if node.op not in ("quantize", "dequantize", "size", "shape")
    }
    steps, done = 2 * len(program.nodes), 0

    def float_run(_: Batch, on_value: Callable[[str, torch.Tensor], None]) -> None:
        for name, value in floats.items():
            if _is_real(value) and name in computed:
                on_value(computed[name], value)

    def int8_run(batch: Batch, on_value: Callable[[str, torch.Tensor, QParams | None], None]) -> None:
        nonlocal done
        for index, value in compiled.runner.trace(_bound(compiled, batch, place)):
            done += 1
            update(done, steps)
            name = program.nodes[index].output
            qparams = compiled.coding(name)
            if name in computed and name in names and (_is_real(value) or qparams is not None):
                on_value(computed[name], value, qparams)

    rows = compare_layers(float_run, int8_run, [batch])
    own, histograms = own_errors(graph, compiled, floats, lambda more, _: update(done + more, steps))
    for row in rows:
        if row["name"] in own:
            row["own_sqnr_db"] = own[row["name"]].sqnr_db
    return {"per_layer": rows, "histograms": histograms}


def _computed(graph: Graph, batch: Batch) -> dict[str, Any]:
    """Node name → value of a batch."""
    found: dict[str, Any] = {}
    with torch.inference_mode():
        interpret(graph, bind(graph, batch.args, batch.kwargs), lambda node, value: found.update({node.name: value}))
    return found


def _of_first_samples(
    values: Mapping[str, Any], graph: Graph, program: Program, batch: Batch, samples: int
) -> dict[str, Any] | None:
    """What errors are taken of, of a batch's values the rows of its first samples; None where that can't be told."""
    if samples == batch.size:
        return dict(values)
    if any(not isinstance(size, int) for item in graph.inputs for size in item.shape[1:]):
        return None
    shapes = {node.name: node.meta.get("shape") for node in graph.fx.nodes}
    found: dict[str, Any] = {}
    read = {name for node in program.nodes if node.op in COMPUTING_OPS for name in node.refs()}
    for name in {*read, *(node.output for node in program.nodes)}:
        source = float_source(name)
        if source not in values:
            continue
        value, shape = values[source], shapes[source]
        if not isinstance(value, torch.Tensor) or shape is None:
            if name in read:
                return None
            continue
        # Nothing but the batch varies, so that a size that varies and is the batch's counts samples.
        varying = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
        if varying not in ([], [0]) or (varying and value.shape[0] != batch.size):
            return None
        found[source] = value[:samples] if varying else value
    return found


def _bound(compiled: Compiled, batch: Batch, place: torch.device) -> list[torch.Tensor]:
    given = batch.at(place)
    return compiled.bound(given.args, given.kwargs)


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
