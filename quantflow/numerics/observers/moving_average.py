"""An exponential average of every batch's range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch

from quantflow.numerics.observers.abstract import AbstractObserver, extremes, flat, require_state

if TYPE_CHECKING:
    from quantflow.schema import ActivationSpec


class MovingAverageObserver(AbstractObserver):
    """low_n = (1 - c) low_(n-1) + c min x_n, high alike; the first batch starts the average.

    c is `spec.averaging_constant`. Unlike the other observers it depends on the order of the batches:
    `a.merge(b)` is what a sequence of a's batches, then b's, gives. To make that exact it keeps the two
    numbers of each batch and folds them when asked.

    Source: torch.ao.quantization.MovingAverageMinMaxObserver.
    """

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        self._ranges: list[tuple[float, float]] = []

    @property
    def is_empty(self) -> bool:
        return not self._ranges

    def observe(self, x: torch.Tensor) -> None:
        if x.numel():
            self.take(*extremes(flat(x)), None)

    def take(self, low: float, high: float, counts: torch.Tensor | None) -> None:  # noqa: ARG002 only the extremes
        self._ranges.append((low, high))

    def merge(self, other: Self) -> Self:
        self._require_mergeable(other)
        merged = type(self)(self.spec)
        merged._ranges = self._ranges + other._ranges
        return merged

    def range(self) -> tuple[float, float]:
        self._require_observed()
        low, high = self._ranges[0]
        new = self.spec.averaging_constant
        for batch_low, batch_high in self._ranges[1:]:
            low, high = (1 - new) * low + new * batch_low, (1 - new) * high + new * batch_high
        return low, high

    def state(self) -> dict[str, torch.Tensor]:
        return {"ranges": torch.tensor(self._ranges, dtype=torch.float32).reshape(-1, 2)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        require_state(state, {"ranges": (torch.float32, [-1, 2])})
        ranges = state["ranges"]
        if not (torch.isfinite(ranges).all() and (ranges[:, 0] <= ranges[:, 1]).all()):
            raise ValueError("ranges are reversed or not finite")
        self._ranges = [(low, high) for low, high in ranges.tolist()]
