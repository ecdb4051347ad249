"""The range that holds a given share of the values."""

from __future__ import annotations

import math

import torch

from quantflow.numerics.observers.distribution import AbstractDistributionObserver, Points


class PercentileObserver(AbstractDistributionObserver):
    """Keeps the middle `spec.percentile` percent of the values, to the resolution of a histogram bin.

    symmetric: the smallest threshold with that share of |x| at or below it.
    affine:    (100 - percentile) / 2 percent of the values are cut at either end.
    100 is exactly minmax.

    Source: ONNX Runtime's percentile calibration.
    """

    def range(self) -> tuple[float, float]:
        self._require_observed()
        points, share = self.distribution.points(), self.spec.percentile / 100
        if self.is_symmetric:
            return self.clip(_threshold(points.magnitudes(), share))
        both = (1 + share) / 2
        mirrored = Points(-points.value.flip(0), -points.high.flip(0), -points.low.flip(0), points.count.flip(0))
        return -_threshold(mirrored, both), _threshold(points, both)


def _threshold(points: Points, share: float) -> float:
    """The upper edge of the first point with at least `share` of all members at or below it."""
    needed = math.ceil(share * points.total)
    position = int(torch.searchsorted(points.count.cumsum(0), needed))
    return points.high[position].item()
