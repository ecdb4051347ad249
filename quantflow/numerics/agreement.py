"""When two runtimes agree: the one rule for codes that differ, used by tests and by warm-up.

Given the same input codes, a kernel may differ from the reference by one code, and only where the reference's value
before rounding lies within `TIE_CODES` of the tie between the two codes (`TRANSCENDENTAL_TIE_CODES` behind an
activation that libraries approximate). Everything else is a bug.
"""

from __future__ import annotations

import math

import torch

TIE_CODES, TRANSCENDENTAL_TIE_CODES = 1e-3, 1e-2


def disagreement(
    expected: torch.Tensor, actual: torch.Tensor, unrounded: torch.Tensor | None, tolerance_codes: float
) -> tuple[int, float]:
    """How many codes differ where rounding can't explain it.

    A difference is legal if |expected - actual| = 1 and |unrounded - (expected + actual) / 2| <= tolerance_codes.

    Args:
        expected: the reference's codes, int8 or uint8.
        actual: the codes in question; another dtype or shape makes every element illegal.
        unrounded: the reference's r / scale + zero_point, of the codes' shape; None where the op only moves codes,
            which makes every difference illegal.
        tolerance_codes: how far from a tie a difference is still legal.

    Returns:
        (illegal differences, the largest distance from a tie among all differences in codes: 0 without any,
        inf where the distance is not known).
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return max(expected.numel(), 1), math.inf
    differs = expected != actual
    count = int(differs.sum())
    if not count:
        return 0, 0.0
    if unrounded is None:
        return count, math.inf
    a, b = expected[differs].to(torch.float64), actual[differs].to(torch.float64)
    distance = (unrounded[differs].to(torch.float64) - (a + b) / 2).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    legal = ((a - b).abs() == 1) & (distance <= tolerance_codes)
    return int((~legal).sum()), distance.max().item()
