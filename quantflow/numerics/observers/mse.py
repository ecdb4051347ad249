"""The range with the smallest squared error, by grid search."""

from __future__ import annotations

from itertools import product

from quantflow.numerics.observers.distribution import AbstractDistributionObserver
from quantflow.numerics.observers.squared_error import Range, SquaredError

#: Steps of the grid over (0, 1]; each refinement divides the step by this again, around the best point.
STEPS = 8
REFINEMENTS = 2


class MSEObserver(AbstractDistributionObserver):
    """argmin over 0 < a, b <= 1 of E[(x - Q(x))^2] with the range (a low, b high), to 1/512.

    symmetric: a = b. affine: a and b apart; an end that is not on its own side of zero has no factor, since
    the range is widened to hold zero.
    """

    def range(self) -> tuple[float, float]:
        self._require_observed()
        error = SquaredError(self.distribution.points(), self.spec)
        best, reach = (1.0, 1.0), 1.0
        for _ in range(1 + REFINEMENTS):
            grid = self._grid(best, reach)
            _, position = error.best([self._shrunk(*factors) for factors in grid])
            best = grid[position]
            reach /= STEPS
        return self._shrunk(*best)

    def _shrunk(self, low_factor: float, high_factor: float) -> Range:
        low, high = self.distribution.low, self.distribution.high
        if self.is_symmetric:
            return self.clip(high_factor * max(-low, high))
        return low_factor * min(low, 0.0), high_factor * max(high, 0.0)

    def _grid(self, center: tuple[float, float], reach: float) -> list[tuple[float, float]]:
        """Factor pairs within `reach` of the centre, the widest range first."""
        low_factors, high_factors = (_factors(middle, reach) for middle in center)
        if self.is_symmetric:
            return list(zip(low_factors, high_factors, strict=True))
        if self.distribution.low >= 0:
            low_factors = [1.0]
        if self.distribution.high <= 0:
            high_factors = [1.0]
        return list(product(low_factors, high_factors))


def _factors(center: float, reach: float) -> list[float]:
    steps = (center + reach * step / STEPS for step in range(STEPS, -STEPS - 1, -1))
    return [factor for factor in steps if 0 < factor <= 1]
