"""The range with the smallest squared error among those that trim the tails, value by value."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from quantflow.numerics.observers.distribution import AbstractDistributionObserver, Points
from quantflow.numerics.observers.squared_error import Range, SquaredError

#: Share of the values that one step trims, at most; a step trims at least one occupied bin.
STEP_SHARE = 1e-5
#: Trimming goes on while one of this many further steps still lowers the error.
PATIENCE = 64


class HistogramObserver(AbstractDistributionObserver):
    """Trims a little off one end at a time, and keeps the trim with the smallest E[(x - Q(x))^2].

    A step drops STEP_SHARE of the values from the end where that moves the range further.
    symmetric: from the top of |x|.

    Source: the search of torch.ao.quantization.HistogramObserver, with the error taken for the codes that
    the range will really have.
    """

    def range(self) -> tuple[float, float]:
        self._require_observed()
        points = self.distribution.points()
        error = SquaredError(points, self.spec)
        trims: Iterator[Range]
        if self.is_symmetric:
            trims = (self.clip(high) for _, high in _trims(points.magnitudes(), both_ends=False))
        else:
            trims = _trims(points, both_ends=True)
        best = self.distribution.low, self.distribution.high
        best_error, _ = error.best([best])
        while chunk := list(islice(trims, PATIENCE)):
            found_error, position = error.best(chunk)
            if found_error >= best_error:
                break
            best_error, best = found_error, chunk[position]
        return best


def _trims(points: Points, *, both_ends: bool) -> Iterator[Range]:
    """Ever narrower ranges of the points, down to a single bin."""
    low, high, value = points.low.tolist(), points.high.tolist(), points.value.tolist()
    count, step = points.count.tolist(), STEP_SHARE * points.total
    first, last = 0, len(value) - 1
    while first < last:
        next_first, next_last = first + 1, last - 1
        trimmed = count[first]
        while next_first < last and trimmed + count[next_first] <= step:
            trimmed += count[next_first]
            next_first += 1
        trimmed = count[last]
        while next_last > first and trimmed + count[next_last] <= step:
            trimmed += count[next_last]
            next_last -= 1
        if both_ends and value[next_first] - value[first] > value[last] - value[next_last]:
            first = next_first
        else:
            last = next_last
        yield low[first], high[last]
