"""A histogram that merges exactly, shared by the observers that look at more than the extremes.

The grid is tied to powers of two, never to the data: with M = 2^k the smallest power above max|x|,

    width = 2^(k-12),   bin(x) = trunc(x / width) in [-4095, 4095]

so bin 0 is (-width, width) and every other bin is one width wide on its side of zero. Growing k by one maps
bin b to trunc(b / 2): pairs of bins become one, no count is ever split, and the result is the same in
whatever order the batches came. Dividing by a power of two is exact in float32, and truncation (unlike floor)
stays right when a tiny quotient underflows to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch

from quantflow.numerics.affine import SYMMETRIC
from quantflow.numerics.observers.abstract import (
    AbstractObserver,
    Sketch,
    extremes,
    extremes_of,
    flat,
    require_state,
)

if TYPE_CHECKING:
    from quantflow.schema import ActivationSpec

#: Bins on either side of bin 0, which is stored at this index.
ZERO_BIN = 2**12 - 1
BINS = 2 * ZERO_BIN + 1
#: k is at least this, so that 1 / width is a float32; smaller numbers all count as zero, and a range that
#: small gets scale 1 anyway.
MIN_EXPONENT = -112
#: Values per pass: the temporary codes stay in the L2 cache.
CHUNK = 2**18
#: And on a card, whose bins are float32: each stays an exact integer.
CARD_CHUNK = 2**23


@dataclass(frozen=True)
class Points:
    """The occupied bins as weighted values, in ascending order; float64 tensors of one shape (n,).

    Attributes:
        value: what a bin's members are taken to be: its centre (0 for bin 0), moved into the observed range.
        low, high: the bin's edges, moved into the observed range.
        count: members of the bin.
        below: members of all bins before it.
    """

    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    count: torch.Tensor

    @cached_property
    def below(self) -> torch.Tensor:
        return self.count.cumsum(0) - self.count

    @property
    def total(self) -> float:
        return self.count.sum().item()

    def magnitudes(self) -> Points:
        """The same points with |value|."""
        low, high = self.low.abs(), self.high.abs()
        order = self.value.abs().argsort(stable=True)
        outer = torch.maximum(low, high)[order]
        return Points(self.value.abs()[order], torch.minimum(low, high)[order], outer, self.count[order])


@dataclass(frozen=True, eq=False)
class Distribution:
    """Counts on the grid above, with the exact extremes.

    Attributes:
        exponent: k.
        counts: int64, shape (8191,); bin b is at index b + 4095.
        low, high: exact minimum and maximum; (inf, -inf) when nothing was counted.
    """

    exponent: int
    counts: torch.Tensor
    low: float
    high: float

    @classmethod
    def empty(cls) -> Distribution:
        return cls(MIN_EXPONENT, torch.zeros(BINS, dtype=torch.int64), math.inf, -math.inf)

    @classmethod
    def of(cls, x: torch.Tensor) -> Distribution:
        """The distribution of a non-empty floating-point tensor of any shape; ValueError on NaN or Inf."""
        row = flat(x)
        low, high = extremes(row)
        exponent = _exponent(max(-low, high))
        per_unit = 2.0 ** (12 - exponent)
        counts = torch.zeros(BINS, dtype=torch.int64)
        for chunk in torch.split(row, CHUNK):
            counts += torch.bincount((chunk * per_unit).to(torch.int16).add_(ZERO_BIN), minlength=BINS).cpu()
        return cls(exponent, counts, low, high)

    @classmethod
    def sketch(cls, x: torch.Tensor) -> Sketch:
        """The extremes and counts of a non-empty floating-point tensor, without waiting for them.

        Of one that holds NaN or Inf the counts mean nothing.
        """
        row = flat(x)
        ends = extremes_of(row)
        # As `_exponent`: frexp gives the smallest k with max|x| < 2^k; 0 for 0, which any k holds.
        largest = ends.abs().amax()
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent, MIN_EXPONENT).clamp_min(MIN_EXPONENT)
        # 2^(12 - k) to the bit, which a card's exp2 does not promise.
        per_unit = ((1023 + 12 - exponent).to(torch.int64) << 52).view(torch.float64)
        counts = torch.zeros(BINS, dtype=torch.int32, device=x.device)
        for chunk in torch.split(row, CARD_CHUNK):
            bins = (chunk * per_unit).trunc_()
            counts += torch.histc(bins, BINS, -ZERO_BIN - 0.5, ZERO_BIN + 0.5).to(torch.int32)
        return Sketch(ends, counts)

    @classmethod
    def of_sketch(cls, low: float, high: float, counts: torch.Tensor) -> Distribution:
        """The distribution of the tensor behind a sketch."""
        return cls(_exponent(max(-low, high)), counts.to(torch.int64), low, high)

    @property
    def width(self) -> float:
        """Bin width, in the unit of x."""
        return 2.0 ** (self.exponent - 12)

    def merged(self, other: Distribution) -> Distribution:
        """The distribution of both data sets together, exactly."""
        exponent = max(self.exponent, other.exponent)
        counts = self._counts_at(exponent) + other._counts_at(exponent)
        return Distribution(exponent, counts, min(self.low, other.low), max(self.high, other.high))

    def points(self) -> Points:
        """The occupied bins."""
        index = self.counts.nonzero().flatten()
        bins = (index - ZERO_BIN).to(torch.float64)
        low = torch.where(bins > 0, bins, bins - 1) * self.width
        high = torch.where(bins < 0, bins, bins + 1) * self.width
        low, value, high = (edge.clamp(self.low, self.high) for edge in (low, (low + high) / 2, high))
        return Points(value, low, high, self.counts[index].to(torch.float64))

    def _counts_at(self, exponent: int) -> torch.Tensor:
        shift = exponent - self.exponent
        if shift == 0:
            return self.counts
        index = self.counts.nonzero().flatten()
        bins = index - ZERO_BIN
        bins = bins.sign() * (bins.abs() >> min(shift, 63))
        return torch.zeros_like(self.counts).index_add_(0, bins + ZERO_BIN, self.counts[index])


class AbstractDistributionObserver(AbstractObserver):
    """An observer whose range is a function of the distribution of everything it saw."""

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        self.distribution = Distribution.empty()

    @property
    def is_empty(self) -> bool:
        return self.distribution.low > self.distribution.high

    @property
    def is_symmetric(self) -> bool:
        """Only the larger of |low| and |high| will matter."""
        return self.spec.qscheme == SYMMETRIC

    def observe(self, x: torch.Tensor) -> None:
        if x.numel():
            self.distribution = self.distribution.merged(Distribution.of(x))

    def sketch(self, x: torch.Tensor) -> Sketch:
        return Distribution.sketch(x)

    def take(self, low: float, high: float, counts: torch.Tensor | None) -> None:
        assert counts is not None, "its sketch has them"
        self.distribution = self.distribution.merged(Distribution.of_sketch(low, high, counts))

    def merge(self, other: Self) -> Self:
        self._require_mergeable(other)
        merged = type(self)(self.spec)
        merged.distribution = self.distribution.merged(other.distribution)
        return merged

    def state(self) -> dict[str, torch.Tensor]:
        found = self.distribution
        return {
            "counts": found.counts,
            "exponent": torch.tensor(found.exponent, dtype=torch.int64),
            "range": torch.tensor([found.low, found.high], dtype=torch.float32),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        require_state(
            state, {"counts": (torch.int64, [BINS]), "exponent": (torch.int64, []), "range": (torch.float32, [2])}
        )
        low, high = state["range"].tolist()
        exponent, counts = int(state["exponent"]), state["counts"].clone()
        if bool((counts < 0).any()) or bool(counts.any()) != (low <= high):
            raise ValueError("counts are negative or do not belong to the range")
        if low <= high and exponent != _exponent(max(-low, high)):
            raise ValueError(f"exponent {exponent} does not belong to the range [{low}, {high}]")
        self.distribution = Distribution(exponent, counts, low, high)

    def clip(self, threshold: float) -> tuple[float, float]:
        """Both ends of the observed range, each moved into [-threshold, threshold]."""
        low, high = self.distribution.low, self.distribution.high
        return max(min(low, threshold), -threshold), min(max(high, -threshold), threshold)


def _exponent(max_abs: float) -> int:
    """The smallest k >= MIN_EXPONENT with max_abs < 2^k."""
    return max(math.frexp(max_abs)[1], MIN_EXPONENT) if max_abs else MIN_EXPONENT
