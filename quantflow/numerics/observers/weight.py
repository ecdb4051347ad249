"""The range of a weight, per channel or whole: the largest |w| that keeps its code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from quantflow.numerics.affine import dequantize_weight, quantize_weight, weight_scale
from quantflow.numerics.observers.abstract import extremes

if TYPE_CHECKING:
    from quantflow.schema import WeightSpec

#: mse: steps of the grid of shrink factors over (0, 1], and how often it is refined around the best one.
STEPS = 8
REFINEMENTS = 2
SMALLEST_FACTOR = 1 / STEPS ** (1 + REFINEMENTS)


def weight_max_abs(weight: torch.Tensor, spec: WeightSpec, channel_axis: int | None) -> torch.Tensor:
    """What `weight_scale` divides by 127.

        minmax:     max |w|
        mse:        the a max |w|, 0 < a <= 1, with the smallest sum (w - Q(w))^2, to 1/512
        percentile: the smallest |w| with spec.percentile percent of its channel at or below it

    Args:
        weight: floating point, any shape, not empty.
        channel_axis: the axis of output channels; None takes the whole tensor as one channel.

    Returns:
        float32, shape (channels,), or () when channel_axis is None or spec.granularity is "per_tensor".

    Raises:
        ValueError: "NaN" or "Inf" when the weight holds one, or when it is empty.
    """
    if weight.numel() == 0:
        raise ValueError(f"the weight of shape {tuple(weight.shape)} is empty")
    axis = channel_axis if spec.granularity == "per_channel" else None
    x = weight.detach().to(torch.float32)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    extremes(x.reshape(-1))  # refuses NaN and Inf
    max_abs = WEIGHT_OBSERVERS[spec.observer](rows, spec)
    return max_abs.reshape(()) if axis is None else max_abs


def _minmax(rows: torch.Tensor, spec: WeightSpec) -> torch.Tensor:  # noqa: ARG001
    return torch.maximum(rows.amax(1), -rows.amin(1))


def _mse(rows: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    max_abs = _minmax(rows, spec)
    best, best_error, reach = torch.ones_like(max_abs), _squared_error(rows, max_abs), 1.0
    for _ in range(1 + REFINEMENTS):
        center = best
        for step in range(STEPS, -STEPS - 1, -1):
            factor = (center + reach * step / STEPS).clamp(SMALLEST_FACTOR, 1.0)
            if torch.equal(factor, center):
                continue
            error = _squared_error(rows, max_abs * factor)
            better = error < best_error
            best, best_error = torch.where(better, factor, best), torch.where(better, error, best_error)
        reach /= STEPS
    return max_abs * best


def _squared_error(rows: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    scale = weight_scale(max_abs)
    error = rows - dequantize_weight(quantize_weight(rows, scale, 0), scale, 0)
    return error.square_().sum(1)


def _percentile(rows: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    rank = math.ceil(spec.percentile / 100 * rows.shape[1])
    return rows.abs().kthvalue(rank, dim=1).values


#: Name in WeightSpec.observer → function of (channels, k) rows.
WEIGHT_OBSERVERS: dict[str, Callable[[torch.Tensor, WeightSpec], torch.Tensor]] = {
    "minmax": _minmax,
    "mse": _mse,
    "percentile": _percentile,
}
