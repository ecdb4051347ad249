"""Error measures, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.numerics.measures import cosine, max_error, sqnr_db, top1_agreement


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1.0))
def test_sqnr_is_the_power_ratio(size: float, share: float) -> None:
    x = torch.full((10,), size, dtype=torch.float64)
    assert sqnr_db(x, x * (1 + share)) == pytest.approx(-20 * math.log10(share), abs=1e-3)


@pytest.mark.parametrize(
    ("reference", "actual", "expected"),
    [([1.0, 2.0], [1.0, 2.0], math.inf), ([0.0, 0.0], [0.0, 1.0], -math.inf), ([0.0], [0.0], math.inf)],
)
def test_sqnr_at_the_edges(reference: list[float], actual: list[float], expected: float) -> None:
    assert sqnr_db(torch.tensor(reference), torch.tensor(actual)) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sqnr_of_non_finite_values_is_nan(bad: float) -> None:
    assert math.isnan(sqnr_db(torch.tensor([bad]), torch.tensor([1.0])))
    assert math.isnan(sqnr_db(torch.tensor([1.0]), torch.tensor([bad])))


def test_sqnr_sees_a_wrong_scale_that_cosine_cannot() -> None:
    x = torch.randn(4, 8)
    assert cosine(x, 2 * x).min() == pytest.approx(1)
    assert sqnr_db(x, 2 * x) == pytest.approx(0)


def test_max_error() -> None:
    assert max_error(torch.tensor([1.0, -2.0]), torch.tensor([1.5, -5.0])) == 3
    assert max_error(torch.empty(0), torch.empty(0)) == 0


def test_cosine_is_per_row() -> None:
    a = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    b = torch.tensor([[[0.0, 3.0]], [[0.0, 1.0]]])
    assert cosine(a, b).tolist() == [0.0, 1.0]


def test_top1_agreement_is_the_share_of_rows() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0], [5.0, 0.0]])
    b = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [5.0, 0.0]])
    assert top1_agreement(a, b) == 0.75
