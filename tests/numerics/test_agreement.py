"""The rule for codes that differ."""

from __future__ import annotations

import math

import pytest
import torch

from quantflow.numerics.agreement import TIE_CODES, disagreement


def codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def test_equal_codes_agree_without_knowing_the_value() -> None:
    assert disagreement(codes(1, -128, 127), codes(1, -128, 127), None, 0.0) == (0, 0.0)
    assert disagreement(codes(), codes(), None, 0.0) == (0, 0.0)


@pytest.mark.parametrize(
    ("expected", "actual", "unrounded", "illegal"),
    [
        (2, 3, 2.4995, 0),
        (2, 3, 2.498, 1),
        (-3, -2, -2.5004, 0),
        (2, 1, 2.4999, 1),  # next to a tie, but not to the tie between these two
        (2, 4, 3.0, 1),
        (127, 126, 127.5, 1),  # saturated: the tie at 127.5 is not between 126 and 127
        (127, -128, math.nan, 1),
        (127, 126, math.inf, 1),
    ],
)
def test_one_code_next_to_a_tie_is_legal(expected: int, actual: int, unrounded: float, illegal: int) -> None:
    found, distance = disagreement(codes(expected), codes(actual), torch.tensor([unrounded]), TIE_CODES)
    assert found == illegal
    assert not illegal or distance > TIE_CODES or abs(expected - actual) > 1


def test_moved_codes_may_not_differ_at_all() -> None:
    assert disagreement(codes(1, 2), codes(1, 3), None, 1.0) == (1, math.inf)


def test_another_shape_or_dtype_is_illegal() -> None:
    assert disagreement(codes(1, 2), codes(1), None, 1.0) == (2, math.inf)
    assert disagreement(codes(1, 2), codes(1, 2).view(torch.uint8), None, 1.0) == (2, math.inf)
