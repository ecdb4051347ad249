"""model → Graph, in one of three modes; everything after this is shared."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from quantflow.capture.export import at_least_two, capture_export
from quantflow.capture.flat import Flat, Form, form_of, tensor_names, without_autocast
from quantflow.capture.place import line_of
from quantflow.capture.sizes import Sizes, find_sizes, shorter
from quantflow.capture.torchscript import capture_torchscript
from quantflow.capture.untouched import untouched
from quantflow.errors import CaptureError, DataError, ModelError, cause_line
from quantflow.host.memory import uncollected
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.calls import BATCH, Limit
from quantflow.ir.graph import Graph, interpret
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.passes.recurrent import IN_MODULES, split_recurrent
from quantflow.ir.passes.transposed_convolutions import transposed_to_convolutions
from quantflow.ir.structure import plain
from quantflow.schema import ModeSettings
from quantflow.stages.calibrate import named_samples
from quantflow.stages.imperative import called_modules

Model = nn.Module | torch.jit.ScriptModule | torch.export.ExportedProgram

#: What torch.export takes in a process, and per module: within a quarter of the times of five tested networks of 118 to
#: 213 modules, and of one of 5, on a core of a Xeon with AMX. Traces differ by a factor of ten.
EXPORT_FIRST_S, EXPORT_MODULE_S = 1.5, 0.02
#: What tracing or scripting takes: 1.0 to 1.1 s for networks of 68 to 213 modules on a core of a Xeon.
SCRIPT_S = 1.0


def capture(
    model: Model,
    example: Batch,
    mode: ModeSettings,
    *,
    dynamic: Any = "none",
    batches: Sequence[Batch] = (),
    original: nn.Module | None = None,
) -> Graph:
    """The model's graph, normalized: BatchNorm folded where it directly follows a linear op, recurrent layers split.

    Transposed convolutions are written as ordinary ones.

    Args:
        example: one batch of real input.
        dynamic: which sizes vary: "auto" (those in which `batches` differ), "none", or {input: {dimension: name}}.
        batches: the data that sizes are found in.
        original: the model in the dtype that it was given in, where that is not float32.

    Raises:
        ModelError: weights that are not numbers, or not float32; no tensor in the output.
        DataError: the model itself fails on the example.
        RecipeError: `dynamic` names an input or a dimension that is not there.
        CaptureError: the model can't be captured in this mode; the message names the modes to try.
    """
    _require_float32(model)
    try:
        alike = [example, *(_alike(batch, example) for batch in batches[1:])] if dynamic != "none" else [example]
        names = tensor_names(model, example)
        sizes = find_sizes(dynamic, alike, names)
        _require_takes(original or model, sizes, alike, names)
        with without_autocast() as lowered, untouched(model), uncollected():
            graph = transposed_to_convolutions(_captured(model, example, mode, sizes, original))
            graph = split_recurrent(graph, IN_MODULES if mode.kind == "imperative" else "")
    except Exception:
        _require_runs(original or model, example)  # the model's own complaint says more than that of what captures it
        raise
    if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(graph.fx.output_node().args[0])):
        raise _no_output(model)
    if mode.kind != "export" or isinstance(model, torch.jit.ScriptModule):  # torch.export has written down its limits
        graph = _with_least_batch(graph, example)
    if lowered:
        places = ", ".join(dict.fromkeys(lowered))
        graph = graph.with_notes(f"autocast inside the model ({places}) was left out: layers read float32, then int8")
    return graph


def _require_takes(model: Model, sizes: Sizes, batches: Sequence[Batch], names: Sequence[str]) -> None:
    """
    Raises:
        DataError: the float model itself refuses the sizes of a batch; names the dimensions in which it differs.
    """
    run = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    for batch in sizes.others:
        if not any(batch is each for each in batches):
            continue
        try:
            with torch.no_grad():
                run(*batch.args, **batch.kwargs)
        except Exception as error:  # the user's code may raise anything
            where = line_of(error)
            differing = [
                f"dimension {dim} of {names[at]} is {x.shape[dim]} and was {y.shape[dim]} in the first batch"
                for at, (x, y) in enumerate(zip(batch.tensors, batches[0].tensors, strict=True))
                for dim in range(1, x.dim())
                if x.shape[dim] != y.shape[dim]
            ]
            index = next(i for i, each in enumerate(batches) if each is batch)
            raise DataError(
                f"calibration data: the model refuses batch {index} ({named_samples(batch)}): {cause_line(error)}"
                + (f" (at {where})" if where else "")
                + f"; {', '.join(differing)}; give every sample the shape that the model takes"
            ) from error


#: A model that regroups its batch is tried with so many samples.
_MOST_REGROUPED = 64


def _with_least_batch(graph: Graph, example: Batch) -> Graph:
    """With a limit where the model regroups the samples of a batch, so that only multiples of a number are legal."""
    if not graph.batch_is_dynamic or example.size < 2 or any(BATCH in limit.names for limit in graph.limits):
        return graph
    if example.head(1) is example or any(_runs(graph, example.head(size)) for size in (1, 2)):
        return graph
    for size in range(3, min(example.size, _MOST_REGROUPED) + 1):
        if _runs(graph, example.head(size)):
            limit = Limit(f"{BATCH} % {size} == 0", "found by trying, as the model regroups its samples")
            return replace(graph, limits=(*graph.limits, limit))
    return graph


def _runs(graph: Graph, batch: Batch) -> bool:
    try:
        with torch.no_grad():
            interpret(graph, bind(graph, batch.args, batch.kwargs))
    except Exception:  # noqa: BLE001 any op may raise anything
        return False
    return True


def _alike(batch: Batch, example: Batch) -> Batch:
    """The batch with its keywords in the order of the example's."""
    if batch.kwargs.keys() != example.kwargs.keys():
        return batch
    return replace(batch, kwargs={name: batch.kwargs[name] for name in example.kwargs})


def likely_seconds(model: Model, mode: ModeSettings) -> float:
    """About how long a capture will take."""
    if mode.kind == "torchscript" or not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return SCRIPT_S
    return EXPORT_FIRST_S + EXPORT_MODULE_S * sum(1 for _ in model.modules())


def _captured(model: Model, example: Batch, mode: ModeSettings, sizes: Sizes, original: nn.Module | None) -> Graph:
    is_script, is_exported = isinstance(model, torch.jit.ScriptModule), isinstance(model, torch.export.ExportedProgram)
    if mode.kind == "imperative" and (is_script or is_exported):
        found = "a ScriptModule" if is_script else "an ExportedProgram"
        raise CaptureError(
            f"mode: imperative swaps modules of an nn.Module, and the model is {found}; "
            f"use mode={'torchscript' if is_script else 'export'}"
        )
    if is_script and mode.kind == "export":
        graph = capture_torchscript(model, example, "trace", sizes)
        return fold_batch_norms(graph.with_notes("the model is a ScriptModule: its TorchScript graph was imported"))
    if is_exported:
        graph = capture_export(model, example, sizes)
        if mode.kind == "torchscript":
            graph = graph.with_notes(
                "the model is an ExportedProgram: it was taken over as it is, and becomes TorchScript"
            )
        return fold_batch_norms(graph)
    if is_script:
        return fold_batch_norms(capture_torchscript(model, example, mode.method, sizes))
    return _of_module(model, example, mode, sizes, original)


def _of_module(model: nn.Module, example: Batch, mode: ModeSettings, sizes: Sizes, original: nn.Module | None) -> Graph:
    """The graph of a module, by way of its tensors alone where its calls or results hold more than tensors."""
    form = _form(model.eval(), example, original)
    notes = [
        f"the model's {place.lstrip('.') or 'output'} is a cache of its past, which an int8 model has no use for: "
        "it is left out of the result (use_cache=False has the same effect)"
        for place in form.dropped
    ]
    if form.is_flat and form.returns_tensors and original is None:
        return _in_mode(model, model, example, mode, sizes, None)
    if mode.kind == "torchscript" and mode.method == "script":
        graph = _in_mode(model, model, example, mode, sizes, None)
        return replace(graph, arguments=None if form.is_flat else form.arguments)
    flat = Flat(model, example, form, upcast=original is not None)
    tensors = Batch(example.tensors)
    seen = Sizes(sizes.names, tuple(Batch(batch.tensors) for batch in sizes.others))
    graph = _in_mode(model, flat, tensors, mode, seen, flat.names)
    arguments = None if form.is_flat else form.arguments
    return replace(graph, arguments=arguments, structure=flat.structure()).with_notes(*notes)


def _form(model: nn.Module, example: Batch, original: nn.Module | None) -> Form:
    """From a small part of the example where the model takes it."""
    small = example.head(1)
    if small is not example:
        with contextlib.suppress(Exception):
            return form_of(model, small, original)
    return form_of(model, example, original)


def _in_mode(
    model: nn.Module,
    captured: nn.Module,
    example: Batch,
    mode: ModeSettings,
    sizes: Sizes,
    names: Sequence[str] | None,
) -> Graph:
    """
    Args:
        model: the user's own, which imperative mode looks at.
        captured: what is captured: the model, or its `Flat`.
    """
    if mode.kind == "export":
        return fold_batch_norms(capture_export(captured, example, sizes, names))
    if mode.kind == "torchscript":
        return fold_batch_norms(capture_torchscript(captured, example, mode.method, sizes, names))
    calls = called_modules(model, captured, example)
    try:
        graph = capture_export(captured, example, sizes, names)
    except CaptureError as error:
        graph = capture_torchscript(captured, example, "trace", sizes, names).with_notes(
            f"structure taken from a trace, because {error}; the module itself runs your code, a saved artifact runs "
            "the traced path"
        )
    return fold_batch_norms(graph, lambda linear, norm: calls.get(linear) == 1 and calls.get(norm) == 1)


def _require_float32(model: Model) -> None:
    named = model.named_parameters() if isinstance(model, nn.Module) else model.state_dict.items()
    for name, weight in named:
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"model: '{name}' has no shape yet; call a model with lazy layers once on real input before it is used"
            )
        if weight.is_meta:
            raise ModelError(f"model: '{name}' is on the meta device and holds no numbers; load its weights first")
        if weight.is_floating_point() and weight.dtype is not torch.float32:
            found = str(weight.dtype).removeprefix("torch.")
            raise ModelError(f"model: '{name}' is {found}; quantization starts from float32: call model.float()")
        if weight.is_floating_point() and weight.numel() and bool(weight.detach().aminmax().max.isnan()):
            raise ModelError(f"model: '{name}' holds NaN; check where the weights come from")


def _require_runs(model: Model, example: Batch) -> None:
    """Raises what the model itself does on the example, in words about the data."""
    run = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    try:
        with torch.no_grad():
            output = run(*example.args, **example.kwargs)
    except Exception as error:  # the user's code may raise anything
        found = [f"{name} {_shown(x)}" for name, x in example.named()]
        raise DataError(
            f"calibration data: the model fails on the first batch: {cause_line(error)}; found {', '.join(found)}; "
            "give it the inputs that it takes"
        ) from error
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(plain(output))):
        raise _no_output(model, type(output).__name__)


def _no_output(model: Model, kind: str = "nothing") -> ModelError:
    return ModelError(
        f"model: {type(model).__name__} returns no tensor that can be found (but {kind}); "
        "return tensors, or tuples, lists or dicts of them"
    )


def _shown(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


__all__ = [
    "SCRIPT_S",
    "Model",
    "at_least_two",
    "capture",
    "capture_export",
    "capture_torchscript",
    "find_sizes",
    "likely_seconds",
    "shorter",
]
