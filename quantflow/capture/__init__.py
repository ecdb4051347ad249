"""model → Graph, in one of three modes; everything after this is shared."""

from __future__ import annotations

import torch
from torch import nn

from quantflow.capture.export import at_least_two, capture_export, plain
from quantflow.capture.torchscript import capture_torchscript
from quantflow.data.batch import Batch
from quantflow.errors import CaptureError
from quantflow.graph import Graph
from quantflow.imperative import called_modules
from quantflow.passes.fold_batchnorm import fold_batch_norms
from quantflow.schema import ModeSettings

Model = nn.Module | torch.jit.ScriptModule | torch.export.ExportedProgram


def capture(model: Model, example: Batch, mode: ModeSettings) -> Graph:
    """The model's graph, normalized, with BatchNorm folded where it directly follows a linear op.

    Args:
        example: one batch of real input.

    Raises:
        CaptureError: the model can't be captured in this mode; the message names the modes to try.
    """
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


__all__ = ["Model", "at_least_two", "capture", "capture_export", "capture_torchscript", "plain"]
