"""BatchNorm statistics for models whose weights were drawn, not trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized

import torch
from torch import nn

from quantflow.errors import DataError
from quantflow.ir.batch import Batch


def estimate_batchnorm(
    module: nn.Module, batches: Iterable[Batch], progress: Callable[[int, int | None], None] | None = None
) -> None:
    """Replaces every BatchNorm's running statistics by their plain average over the batches, in place.

        mean = 1/N * sum_i mean_i,    var = 1/N * sum_i var_i      over N batches

    Without it, random weights give activations that grow or vanish with depth. Batches of a single sample are left
    out where there are larger ones: their variance says nothing.

    Args:
        progress: called with (batches done, batches or None) after each batch.

    Raises:
        DataError: no batch, or a BatchNorm sees a single value per channel.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    with _measuring(layers), torch.no_grad():
        single: Batch | None = None
        count = 0
        total = len(batches) if isinstance(batches, Sized) else None
        for done, batch in enumerate(batches, start=1):
            if batch.size == 1 and single is None:
                single = batch
            if batch.size > 1:
                _forward(module, batch)
                count += 1
            if progress is not None:
                progress(done, total)
        if count == 0:
            if single is None:
                raise DataError("BatchNorm statistics can't be estimated: there is no calibration batch")
            _forward(module, single)


def _forward(module: nn.Module, batch: Batch) -> None:
    try:
        module(*batch.args, **batch.kwargs)
    except ValueError as problem:
        if "more than 1 value per channel" not in str(problem):
            raise
        raise DataError(
            f"BatchNorm statistics can't be estimated from batches of {batch.size}: {problem}; "
            "set data.batch_size=2 or more"
        ) from problem


@contextlib.contextmanager
def _measuring(layers: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        yield
    finally:
        for layer, momentum, training in before:
            layer.momentum = momentum
            layer.train(training)
