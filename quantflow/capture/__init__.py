"""model → Graph, in one of three modes; everything after this is shared."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from quantflow.capture.export import at_least_two, capture_export, plain
from quantflow.capture.torchscript import capture_torchscript
from quantflow.errors import CaptureError, DataError, ModelError, cause_line
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.schema import ModeSettings
from quantflow.stages.imperative import called_modules

Model = nn.Module | torch.jit.ScriptModule | torch.export.ExportedProgram

#: What torch.export takes in a process, and per module: within a quarter of the times of five tested networks of 118 to
#: 213 modules, and of one of 5, on a core of a Xeon with AMX. Traces differ by a factor of ten.
EXPORT_FIRST_S, EXPORT_MODULE_S = 1.5, 0.02
#: What tracing or scripting takes: 1.0 to 1.1 s for networks of 68 to 213 modules on a core of a Xeon.
SCRIPT_S = 1.0


def capture(model: Model, example: Batch, mode: ModeSettings) -> Graph:
    """The model's graph, normalized, with BatchNorm folded where it directly follows a linear op.

    Args:
        example: one batch of real input.

    Raises:
        ModelError: weights that are not numbers, or not float32; no tensor in the output.
        DataError: the model itself fails on the example.
        CaptureError: the model can't be captured in this mode; the message names the modes to try.
    """
    _require_float32(model)
    try:
        graph = _captured(model, example, mode)
    except Exception:
        _require_runs(model, example)  # the model's own complaint says more than that of what captures it
        raise
    if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(graph.fx.output_node().args[0])):
        raise _no_output(model)
    return graph


def likely_seconds(model: Model, mode: ModeSettings) -> float:
    """About how long a capture will take."""
    if mode.kind == "torchscript" or not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return SCRIPT_S
    return EXPORT_FIRST_S + EXPORT_MODULE_S * sum(1 for _ in model.modules())


def _captured(model: Model, example: Batch, mode: ModeSettings) -> Graph:
    is_script, is_exported = isinstance(model, torch.jit.ScriptModule), isinstance(model, torch.export.ExportedProgram)
    if mode.kind == "imperative":
        if is_script or is_exported:
            found = "a ScriptModule" if is_script else "an ExportedProgram"
            raise CaptureError(
                f"mode: imperative swaps modules of an nn.Module, and the model is {found}; "
                f"use mode={'torchscript' if is_script else 'export'}"
            )
        return _capture_modules(model, example)
    if is_script and mode.kind == "export":
        graph = capture_torchscript(model, example, "trace")
        return fold_batch_norms(graph.with_notes("the model is a ScriptModule: its TorchScript graph was imported"))
    if is_exported or mode.kind == "export":
        graph = capture_export(model, example)
        if mode.kind == "torchscript":
            graph = graph.with_notes(
                "the model is an ExportedProgram: it was taken over as it is, and becomes TorchScript"
            )
        return fold_batch_norms(graph)
    return fold_batch_norms(capture_torchscript(model, example, mode.method))


def _capture_modules(model: nn.Module, example: Batch) -> Graph:
    calls = called_modules(model, example)
    try:
        graph = capture_export(model, example)
    except CaptureError as error:
        graph = capture_torchscript(model, example, "trace").with_notes(
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
        if weight.is_floating_point() and bool(weight.isnan().any()):
            raise ModelError(f"model: '{name}' holds NaN; check where the weights come from")


def _require_runs(model: Model, example: Batch) -> None:
    """Raises what the model itself does on the example, in words about the data."""
    run = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    try:
        with torch.no_grad():
            output = run(*example.args, **example.kwargs)
    except Exception as error:  # the user's code may raise anything
        found = [f"input {i} {_form(x)}" for i, x in enumerate(example.args)]
        found += [f"{name} {_form(x)}" for name, x in example.kwargs.items()]
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


def _form(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


__all__ = [
    "SCRIPT_S",
    "Model",
    "at_least_two",
    "capture",
    "capture_export",
    "capture_torchscript",
    "likely_seconds",
    "plain",
]
