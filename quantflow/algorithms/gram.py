"""A layer's squared error as a quadratic form of its weight, independent of how many samples it was measured on.

For one output channel with weight w, on windows x (k values each, as the int8 layer sees them) of P places:

    1/P sum_p ((w' - w) x_p + b' - b)^2 = (w' - w) H (w' - w)^T            with b' = b + (w - w') mean(x)
    H = 1/P sum_p (x_p - mean(x)) (x_p - mean(x))^T

so the bias that takes up the mean error is part of the form. Every place's window would be too many in large maps:
places are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantflow.algorithms.simulate import Layer, weight_shape
from quantflow.ir.graph import arguments
from quantflow.ir.plan import PlannedUnit

#: Windows per sample, and in all per value of a window: enough for a well-conditioned H.
WINDOWS_PER_SAMPLE = 256
#: A window of so many values would need a larger H than is worth it (4 bytes times its square).
MAX_WINDOW = 8192


@dataclass(frozen=True)
class Gram:
    """H and mean(x) by group.

    Attributes:
        h: (groups, k, k) float32, centered.
        mean: (groups, k) float32.

    """

    h: torch.Tensor
    mean: torch.Tensor

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """The form at w' - w: (groups, outputs, k) → (groups, outputs)."""
        return ((difference @ self.h) * difference).sum(-1)


def grouped(planned: PlannedUnit, weight: torch.Tensor) -> torch.Tensor:
    """A weight as (groups, outputs per group, k)."""
    groups = int(arguments(planned.unit.anchor).get("groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def gram_of(layer: Layer, inputs: Sequence[torch.Tensor], generator: torch.Generator) -> Gram:
    """H of the layer on these inputs (a batch each)."""
    total: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    count = 0
    for x in inputs:
        windows = windows_of(layer.planned, x, generator)
        ones = windows.sum(1, dtype=torch.float64)
        square = (windows.transpose(1, 2) @ windows).double()
        total = square if total is None else total.add_(square)
        mean = ones if mean is None else mean.add_(ones)
        count += windows.shape[1]
    assert total is not None, "a layer has a batch"
    assert mean is not None
    mean = mean / max(count, 1)
    h = total / max(count, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)
    return Gram(h.float(), mean.float())


def windows_of(planned: PlannedUnit, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(groups, places, k) of one batch: what a row of the weight is multiplied with, in places that are drawn."""
    node = planned.unit.anchor
    if planned.unit.op == "linear":
        rows = x.reshape(1, -1, x.shape[-1])
        return rows[:, _drawn(rows.shape[1], WINDOWS_PER_SAMPLE * x.shape[0], generator)]
    a = arguments(node)
    kernel = weight_shape(planned)[2:]
    dims = len(kernel)
    stride, padding, dilation = (_spread(a[key], dims) for key in ("stride", "padding", "dilation"))
    edges = [edge for p in reversed(padding) for edge in (p, p)]
    padded = torch.nn.functional.pad(x, edges) if any(edges) else x
    sizes = [(padded.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(dims)]
    places = _drawn(torch.Size(sizes).numel(), WINDOWS_PER_SAMPLE, generator)
    index: list[torch.Tensor] = []
    for d in reversed(range(dims)):
        index.insert(0, places % sizes[d] * stride[d])
        places = places // sizes[d]
    for d in range(dims):
        steps = torch.arange(kernel[d]) * dilation[d]
        shape = [1] * dims
        shape[d] = -1
        index[d] = index[d].reshape(-1, *[1] * dims) + steps.reshape(1, *shape)
    found = padded[(slice(None), slice(None), *torch.broadcast_tensors(*index))]  # (batch, channels, places, *kernel)
    groups = int(a["groups"])
    batch, channels, count = found.shape[:3]
    found = found.reshape(batch, groups, channels // groups, count, -1)
    return found.permute(1, 0, 3, 2, 4).reshape(groups, batch * count, -1)


def _drawn(places: int, wanted: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of that many places, all of them where there are no more."""
    if places <= wanted:
        return torch.arange(places)
    return torch.randint(places, (wanted,), generator=generator)


def _spread(value: object, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return values * dims if len(values) == 1 else values
