"""Each observer's range against a slow and obvious computation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.numerics.affine import activation_qparams, dequantize, quantize
from quantflow.numerics.observers.distribution import BINS, ZERO_BIN, Distribution
from quantflow.numerics.observers.entropy import _divergence
from quantflow.numerics.observers.squared_error import SquaredError
from quantflow.schema import ActivationSpec
from tests.numerics.observers.strategies import NUMBERS, TENSORS, observed

SHAPES = ("gauss", "relu", "laplace", "outlier", "shifted", "negative")


def sample(shape: str) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(4000)
    return {
        "gauss": x,
        "relu": x.relu(),
        "laplace": x * x.abs(),
        "outlier": torch.cat([x, torch.tensor([20.0])]),
        "shifted": x + 10,
        "negative": -x.abs() - 1,
    }[shape]


def squared_error(x: torch.Tensor, range_: tuple[float, float], spec: ActivationSpec) -> float:
    qparams = activation_qparams(*range_, dtype=spec.dtype, qscheme=spec.qscheme)
    return (x.double() - dequantize(quantize(x, qparams), qparams).double()).square().sum().item()


@given(st.lists(TENSORS, min_size=1, max_size=4))
def test_minmax_is_the_exact_range(batches: list[torch.Tensor]) -> None:
    x = torch.cat(batches)
    assert observed(ActivationSpec(observer="minmax"), batches).range() == (x.min().item(), x.max().item())


def test_moving_average_follows_its_formula() -> None:
    spec = ActivationSpec(observer="moving_average", averaging_constant=0.25)
    batches = [torch.tensor([-1.0, 4.0]), torch.tensor([-3.0, 2.0]), torch.tensor([0.0, 8.0])]
    low = (-1 * 0.75 + -3 * 0.25) * 0.75
    high = (4 * 0.75 + 2 * 0.25) * 0.75 + 8 * 0.25
    assert observed(spec, batches).range() == pytest.approx((low, high))
    assert observed(spec.model_copy(update={"averaging_constant": 1.0}), batches).range() == (0, 8)


@given(st.lists(TENSORS, min_size=1, max_size=3))
def test_the_distribution_counts_every_value_in_its_bin(batches: list[torch.Tensor]) -> None:
    distribution = Distribution.empty()
    for x in batches:
        distribution = distribution.merged(Distribution.of(x))
    values = torch.cat(batches).tolist()
    bins = [math.trunc(value / distribution.width) for value in values]
    expected = torch.bincount(torch.tensor(bins) + ZERO_BIN, minlength=BINS)
    assert torch.equal(distribution.counts, expected)
    assert (distribution.low, distribution.high) == (min(values), max(values))


@given(NUMBERS)
def test_points_lie_within_the_data(value: float) -> None:
    points = Distribution.of(torch.tensor([value])).points()
    assert points.value.tolist() == [value] or value == 0
    assert points.low.tolist() == points.high.tolist() == points.value.tolist()


def test_chunks_are_counted_like_the_whole() -> None:
    x = torch.randn(2**20 + 3)
    halves = Distribution.of(x[:999]).merged(Distribution.of(x[999:]))
    assert torch.equal(Distribution.of(x).counts, halves.counts)
    assert int(halves.counts.sum()) == x.numel()


@pytest.mark.parametrize("qscheme", ["symmetric", "affine"])
@pytest.mark.parametrize("shape", SHAPES)
def test_expected_error_is_close_to_the_real_one(shape: str, qscheme: str) -> None:
    x, spec = sample(shape), ActivationSpec(qscheme=qscheme)
    ranges = [(x.min().item() * factor, x.max().item() * factor) for factor in (1.0, 0.7, 0.3)]
    expected = SquaredError(Distribution.of(x).points(), spec).of(ranges).tolist()
    assert expected == pytest.approx([squared_error(x, range_, spec) for range_ in ranges], rel=0.05)


@pytest.mark.parametrize("qscheme", ["symmetric", "affine"])
@pytest.mark.parametrize("observer", ["mse", "histogram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_searches_come_close_to_brute_force(shape: str, observer: str, qscheme: str) -> None:
    x, spec = sample(shape), ActivationSpec(observer=observer, qscheme=qscheme)
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    factors = [step / 40 for step in range(1, 41)]
    pairs = [(a, a) for a in factors] if qscheme == "symmetric" else [(a, b) for a in factors for b in factors]
    ends = sorted({(a * low, b * high) for a, b in pairs})
    best = min(squared_error(x, end, spec) for end in ends)
    found = squared_error(x, observed(spec, [x]).range(), spec)
    assert found <= best * 1.1
    assert found <= squared_error(x, (low, high), spec) * 1.001


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_percentile_is_an_order_statistic_to_one_bin(shape: str, percentile: float) -> None:
    x, width = sample(shape), Distribution.of(sample(shape)).width

    def at(values: torch.Tensor, share: float) -> float:
        return values.sort().values[math.ceil(share * values.numel()) - 1].item()

    spec = ActivationSpec(observer="percentile", percentile=percentile, qscheme="symmetric")
    low, high = observed(spec, [x]).range()
    assert max(-low, high) == pytest.approx(at(x.abs(), percentile / 100), abs=width)

    low, high = observed(spec.model_copy(update={"qscheme": "affine"}), [x]).range()
    both = (1 + percentile / 100) / 2
    assert high == pytest.approx(at(x, both), abs=width)
    assert low == pytest.approx(-at(-x, both), abs=width)
    if percentile == 100:
        assert (low, high) == (x.min().item(), x.max().item())


def slow_divergence(counts: list[float], start: int, stop: int, levels: int) -> float:
    """KL as in the papers: build P and Q, then sum."""
    p = counts[start:stop]
    q = [0.0] * len(p)
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[stop:])
    edges = [len(p) * level // levels for level in range(levels + 1)]
    for first, last in pairwise(edges):
        held = [index for index in range(first, last) if p[index] > 0]
        for index in held:
            q[index] = sum(counts[start + first : start + last]) / len(held)
    total_p, total_q = sum(p), sum(q)
    terms = [(a / total_p, b / total_q) for a, b in zip(p, q, strict=True) if a > 0]
    return math.inf if any(b == 0 for _, b in terms) else sum(a * math.log(a / b) for a, b in terms)


@given(st.lists(st.integers(0, 9), min_size=12, max_size=40), st.integers(0, 4), st.integers(0, 4))
@settings(deadline=None)
def test_divergence_is_kullback_and_leiblers(counts: list[int], start: int, cut: int) -> None:
    stop, levels = len(counts) - cut, 4
    if sum(counts[start:stop]) == 0:
        return
    found = _divergence(torch.tensor(counts, dtype=torch.float64), torch.tensor([start]), torch.tensor([stop]), levels)
    assert found.item() == pytest.approx(slow_divergence([float(c) for c in counts], start, stop, levels), abs=1e-9)


@pytest.mark.parametrize("qscheme", ["symmetric", "affine"])
def test_entropy_cuts_a_lone_outlier_and_little_else(qscheme: str) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200_000), torch.tensor([50.0])])
    low, high = observed(ActivationSpec(observer="entropy", qscheme=qscheme), [x]).range()
    assert 3 < high < 10
    assert -6 < low < -3


@pytest.mark.parametrize("observer", ["histogram", "mse", "percentile", "entropy"])
def test_clipping_observers_beat_minmax_on_outliers(observer: str) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100_000), torch.tensor([10.0])])
    spec = ActivationSpec(observer=observer)
    assert squared_error(x, observed(spec, [x]).range(), spec) < squared_error(x, (-5.0, 10.0), spec)
