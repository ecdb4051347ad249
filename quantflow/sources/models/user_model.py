"""A model from the user's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantflow.errors import ModelError
from quantflow.numerics.seed import seeded
from quantflow.sources.data.entry import call_entry, import_entry
from quantflow.sources.models.loaded import LoadedModel, eval_mode


def load_entry(entry: str, kwargs: dict[str, Any], seed: int) -> LoadedModel:
    """Calls `package.module:callable` under the recipe's seed and puts the model it returns in eval mode.

    A name that already is a model is taken as it is.

    Raises:
        ModelError: the entry can't be imported, raises, or returns something that is no model.
    """
    target = import_entry(entry, "model.entry", ModelError)
    kinds = (nn.Module, torch.export.ExportedProgram)
    if isinstance(target, kinds):
        if kwargs:
            raise ModelError(f"model.kwargs: '{entry}' already is a model and takes none; found {', '.join(kwargs)}")
        model = target
    else:
        with seeded(seed):
            model = call_entry(target, kwargs, entry, "model.entry", ModelError)
    if not isinstance(model, kinds):
        raise ModelError(
            f"model.entry: '{entry}' returned {type(model).__qualname__}; expected torch.nn.Module, "
            "torch.jit.ScriptModule or torch.export.ExportedProgram"
        )
    return LoadedModel(
        module=eval_mode(model) if isinstance(model, nn.Module) else model,
        name=entry.partition(":")[2],
        weights_used=f"as {entry} made them",
        notices=(f"model.entry ran the user's own code: {entry}",),
    )
