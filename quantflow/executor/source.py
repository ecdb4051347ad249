"""The float side of a run: model and data, however they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantflow.capture import plain
from quantflow.errors import DataError, UsageError
from quantflow.ir.batch import Batch
from quantflow.schema import Recipe
from quantflow.sources.data import Data, load_data
from quantflow.sources.models import LoadedModel, estimate_batchnorm, load_model
from quantflow.stages.benchmark import resized

Update = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Source:
    """The float side of a run: model and data, however they were given."""

    model: LoadedModel
    data: Data

    @property
    def notices(self) -> tuple[str, ...]:
        return (*self.model.notices, *self.data.notices)

    @property
    def first_batch(self) -> Batch:
        """Of the calibration data: what the model is captured with.

        Raises:
            DataError: there is none.
        """
        example = next(iter(self.data.calibration), None)
        if example is None:
            raise DataError("calibration data: there are no samples; calibrate on some that look like the real input")
        return example

    def float_model(self) -> Callable[..., Any]:
        """The float model as a callable whose output has plain structure."""
        module = self.model.module
        run = module.module() if isinstance(module, torch.export.ExportedProgram) else module
        return lambda *args, **kwargs: plain(run(*args, **kwargs))

    def float_bytes(self) -> int:
        """Of the float model's parameters and buffers."""
        module = self.model.module
        state = module.state_dict if isinstance(module, torch.export.ExportedProgram) else module.state_dict()
        return sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))


def load_source(recipe: Recipe, update: Update | None = None) -> Source:
    """Model and data of a recipe; random weights get BatchNorm statistics from the calibration data."""
    if recipe.model is None:
        raise UsageError("model: is required; choose one (model=torchvision model.name=resnet50) or a recipe that does")
    model = load_model(recipe.model, recipe.seed, update)
    data = load_data(recipe.data, model.preprocess, recipe.seed)
    if model.batchnorm_to_estimate and isinstance(model.module, nn.Module):
        estimate_batchnorm(model.module, data.calibration, update)
    return Source(model, data)


def cut(batch: Batch, samples: int, *, is_dynamic: bool) -> Batch:
    """The first samples of a batch, at most so many; the whole batch where the model takes one size only."""
    return resized(batch, min(samples, batch.size)) if is_dynamic else batch
