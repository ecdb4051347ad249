"""Weight ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.numerics.affine import dequantize_weight, quantize_weight, weight_scale
from quantflow.numerics.observers import WEIGHT_OBSERVERS, weight_max_abs
from quantflow.schema import WeightSpec

ALL = pytest.mark.parametrize("name", sorted(WEIGHT_OBSERVERS))


def squared_error(weight: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    scale = weight_scale(max_abs)
    return (weight - dequantize_weight(quantize_weight(weight, scale, 0), scale, 0)).square().flatten(1).sum(1)


@ALL
@pytest.mark.parametrize("axis", [0, 1, 3, -1])
def test_shape_is_one_number_per_channel(name: str, axis: int) -> None:
    weight = torch.randn(3, 4, 2, 5)
    found = weight_max_abs(weight, WeightSpec(observer=name), axis)
    assert found.shape == (weight.shape[axis],)
    alone = weight_max_abs(weight.select(axis, 1), WeightSpec(observer=name), None)
    assert alone.shape == ()
    assert found[1].item() == pytest.approx(alone.item(), rel=1e-6)


@ALL
def test_per_tensor_ignores_the_axis(name: str) -> None:
    weight, spec = torch.randn(3, 8), WeightSpec(observer=name, granularity="per_tensor")
    assert torch.equal(weight_max_abs(weight, spec, 0), weight_max_abs(weight, spec, None))
    per_channel = weight_max_abs(weight.reshape(1, -1), WeightSpec(observer=name), 0)
    assert torch.equal(weight_max_abs(weight, spec, 0).reshape(1), per_channel)


@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_minmax_is_the_largest_magnitude(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    assert torch.equal(weight_max_abs(weight, WeightSpec(), 0), weight.abs().amax(1))


def test_mse_is_as_good_as_a_fine_grid() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(4, 20_000), 8 * torch.ones(4, 1)], 1) * torch.tensor([[1.0], [0.1], [10.0], [0.0]])
    found = weight_max_abs(weight, WeightSpec(observer="mse"), 0)
    largest = weight.abs().amax(1)
    grid = torch.stack([squared_error(weight, largest * step / 400) for step in range(1, 401)])
    assert (squared_error(weight, found) <= grid.amin(0) * 1.1).all()
    assert (squared_error(weight, found) <= squared_error(weight, largest)).all()
    assert (found[:3] < largest[:3]).all()
    assert found[3] == 0


@pytest.mark.parametrize(("percentile", "expected"), [(100.0, 100.0), (99.0, 99.0), (90.5, 91.0), (51.0, 51.0)])
def test_percentile_is_an_order_statistic(percentile: float, expected: float) -> None:
    weight = torch.arange(1.0, 101.0)[torch.randperm(100)].neg().reshape(1, 4, 25)
    assert weight_max_abs(weight, WeightSpec(observer="percentile", percentile=percentile), 0).tolist() == [expected]


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(name: str, bad: float) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="NaN" if math.isnan(bad) else "Inf"):
        weight_max_abs(weight, WeightSpec(observer=name), 0)


@ALL
def test_an_empty_weight_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        weight_max_abs(torch.empty(0, 3), WeightSpec(observer=name), 0)


def test_the_table_and_the_schema_name_the_same_observers() -> None:
    legal = WeightSpec.model_json_schema()["properties"]["observer"]["enum"]
    assert sorted(legal) == sorted(WEIGHT_OBSERVERS)
