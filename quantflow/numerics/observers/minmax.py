"""The whole range that was seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch

from quantflow.numerics.observers.abstract import AbstractObserver, extremes, flat, require_state


class MinMaxObserver(AbstractObserver):
    """low = min x, high = max x over everything observed.

    Nothing is clipped, so one outlier sets the step of all the codes.
    """

    _low = math.inf
    _high = -math.inf

    @property
    def is_empty(self) -> bool:
        return self._low > self._high

    def observe(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        self.take(*extremes(flat(x)), None)

    def take(self, low: float, high: float, counts: torch.Tensor | None) -> None:  # noqa: ARG002 only the extremes
        self._low, self._high = min(self._low, low), max(self._high, high)

    def merge(self, other: Self) -> Self:
        self._require_mergeable(other)
        merged = type(self)(self.spec)
        merged._low, merged._high = min(self._low, other._low), max(self._high, other._high)
        return merged

    def range(self) -> tuple[float, float]:
        self._require_observed()
        return self._low, self._high

    def state(self) -> dict[str, torch.Tensor]:
        return {"range": torch.tensor([self._low, self._high], dtype=torch.float32)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        require_state(state, {"range": (torch.float32, [2])})
        low, high = state["range"].tolist()
        if not (low <= high or (low, high) == (math.inf, -math.inf)):
            raise ValueError(f"range [{low}, {high}] is reversed or NaN")
        self._low, self._high = low, high
