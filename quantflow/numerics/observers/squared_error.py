"""What a range costs: the expected squared error of coding a distribution with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from quantflow.numerics.affine import QParams, activation_qparams
from quantflow.numerics.observers.distribution import Points

if TYPE_CHECKING:
    from quantflow.schema import ActivationSpec

Range = tuple[float, float]


class SquaredError:
    """sum_i count_i (x_i - Q(x_i))^2 over the points, for many candidate ranges at once.

    With levels r_j and the decision thresholds halfway between them, the points between two thresholds all
    become one level, and their share of the sum follows from prefix sums of count, count x and count x^2:

        sum_j [S2] - 2 r_j [S1] + r_j^2 [S0]

    so a candidate costs 256 look-ups, however many bins are occupied.
    """

    def __init__(self, points: Points, spec: ActivationSpec) -> None:
        self._spec = spec
        self._value = points.value
        moments = [points.count, points.count * points.value, points.count * points.value.square()]
        self._prefix = [torch.nn.functional.pad(moment.cumsum(0), (1, 0)) for moment in moments]

    def of(self, ranges: Iterable[Range]) -> torch.Tensor:
        """Errors of the candidate ranges, float64, shape (candidates,)."""
        dtype, qscheme = self._spec.dtype, self._spec.qscheme
        qparams = [activation_qparams(low, high, dtype=dtype, qscheme=qscheme) for low, high in ranges]
        levels = torch.stack([_levels(item) for item in qparams])
        thresholds = (levels[:, 1:] + levels[:, :-1]) / 2
        index = torch.searchsorted(self._value, thresholds)
        index = torch.nn.functional.pad(index, (1, 0))
        index = torch.nn.functional.pad(index, (0, 1), value=self._value.numel())
        count, first, second = (prefix[index].diff(dim=1) for prefix in self._prefix)
        return (second - 2 * levels * first + levels.square() * count).sum(1)

    def best(self, ranges: list[Range]) -> tuple[float, int]:
        """The smallest error and the position of its range; the first of equals."""
        errors = self.of(ranges)
        position = int(errors.argmin())
        return errors[position].item(), position


def _levels(qparams: QParams) -> torch.Tensor:
    """Every real number that has a code, ascending: float64, shape (256,)."""
    qmin, qmax = qparams.range
    return (torch.arange(qmin, qmax + 1, dtype=torch.float64) - qparams.zero_point) * qparams.scale
