"""A loaded model and everything later stages may ask about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from quantflow.sources.data.preprocess import ImagePreprocess, TextPreprocess

#: Called with (steps done, steps in all).
Progress = Callable[[int, int | None], None]


def eval_mode(module: nn.Module) -> nn.Module:
    """`module.eval()`; a frozen ScriptModule has no training flag left and stays as it is."""
    return module.eval() if hasattr(module, "training") else module


@dataclass(frozen=True)
class LoadedModel:
    """A float model, ready to be captured.

    Attributes:
        module: in eval mode, float32, on the CPU.
        name: short, for reports.
        preprocess: what the weights ask of raw inputs; None when unknown.
        weights_requested: as in the recipe, or "" where the model file holds its own.
        weights_used: what was loaded in the end.
        notices: what the user must be told, such as random weights.
        batchnorm_to_estimate: BatchNorm statistics are meaningless until `estimate_batchnorm` has run.
        outputs: what the first output is.
        original: the model in the dtype that it was given in, which results are compared with; None: `module` is it.
    """

    module: nn.Module | torch.jit.ScriptModule | torch.export.ExportedProgram
    name: str
    preprocess: ImagePreprocess | TextPreprocess | None = None
    weights_requested: str = ""
    weights_used: str = ""
    notices: tuple[str, ...] = ()
    batchnorm_to_estimate: bool = False
    outputs: Literal["logits", "embedding", "other"] = "other"
    original: nn.Module | None = None
