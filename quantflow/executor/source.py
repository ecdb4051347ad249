"""The float side of a run: model and data, however they were given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantflow.errors import DataError, UsageError
from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.binding import sizes_of
from quantflow.ir.calls import BATCH, fitting
from quantflow.ir.graph import Graph
from quantflow.ir.program import Program
from quantflow.ir.structure import plain
from quantflow.schema import Recipe
from quantflow.sources.data import Data, load_data
from quantflow.sources.data.samples import hash_of, identity_of
from quantflow.sources.models import LoadedModel, estimate_batchnorm, load_model, usable
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

    def float_model(self, place: torch.device = CPU) -> Callable[..., Any]:
        """The float model as a callable whose output has plain structure; on a card, a copy of it there."""
        run = self.float_module(place)
        return lambda *args, **kwargs: plain(run(*args, **kwargs))

    def float_module(self, place: torch.device = CPU) -> nn.Module:
        """The float model itself, in the dtype it was given in; on a card, a copy of it there."""
        module = self.model.original or self.model.module
        if isinstance(module, torch.export.ExportedProgram):
            if place != CPU:
                from torch.export.passes import move_to_device_pass

                module = move_to_device_pass(copy.deepcopy(module), place)
            return module.module()
        return module if place == CPU else copy.deepcopy(module).to(place)

    def float_bytes(self) -> int:
        """Of the float model's parameters and buffers."""
        module = self.model.module
        state = module.state_dict if isinstance(module, torch.export.ExportedProgram) else module.state_dict()
        return sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))


def load_source(recipe: Recipe, update: Update | None = None) -> Source:
    """Model and data of a recipe; random weights get BatchNorm statistics from the calibration data."""
    if recipe.model is None:
        raise UsageError("model: is required; choose one (model=torchvision model.name=resnet50) or a recipe that does")
    model = usable(load_model(recipe.model, recipe.seed, update))
    data = load_data(recipe.data, model.preprocess, recipe.seed)
    if model.batchnorm_to_estimate and isinstance(model.module, nn.Module):
        estimate_batchnorm(model.module, data.calibration, update)
    return Source(model, data)


def given(model: LoadedModel, calibration: Sequence[Batch], evaluation: Sequence[Batch]) -> Source:
    """The user's own objects as what a recipe's model and data come to."""
    parts = {"calibration": _identity(calibration), "evaluation": _identity(evaluation)}
    return Source(model, Data(calibration, evaluation, identity_of("given", parts)))


def _identity(batches: Sequence[Batch]) -> tuple[list[str], str]:
    ids = [
        name
        for index, b in enumerate(batches)
        for name in (b.ids or tuple(f"batch {index}.{row}" for row in range(b.size)))
    ]
    return ids, hash_of(tensor for b in batches for tensor in b.tensors)


def cut(batch: Batch, samples: int, model: Graph | Program) -> Batch:
    """The first samples of a batch, as few as the model takes from `samples` on; all where it takes one size only."""
    if not model.batch_is_dynamic:
        return batch
    samples = min(samples, batch.size)
    if model.limits:
        samples = fitting(model.limits, sizes_of(model, batch), samples, batch.size)
    return resized(batch, samples)


def takes(model: Graph | Program, batch: Batch, samples: int) -> bool:
    """Whether the model takes so many samples of what the batch holds."""
    if not model.limits:
        return True
    sizes = {**sizes_of(model, batch), BATCH: samples}
    return all(limit.holds(sizes) for limit in model.limits)
