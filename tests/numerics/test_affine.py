"""The affine formula, as properties."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.numerics.affine import (
    ACTIVATION_RANGE,
    MAX_REDUCTION,
    MIN_SCALE,
    WEIGHT_RANGE,
    QParams,
    activation_qparams,
    dequantize,
    dequantize_weight,
    float32,
    quantize,
    quantize_weight,
    weight_scale,
)

DTYPES = st.sampled_from(["int8", "uint8"])
QSCHEMES = st.sampled_from(["symmetric", "affine"])
VALUES = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)
SCALES = st.floats(min_value=2.0**-100, max_value=2.0**100, width=32)


@st.composite
def qparams(draw: st.DrawFn) -> QParams:
    dtype = draw(DTYPES)
    return QParams(dtype, draw(SCALES), draw(st.integers(*ACTIVATION_RANGE[dtype])))


@st.composite
def observed(draw: st.DrawFn) -> tuple[torch.Tensor, QParams]:
    """Values and the qparams of their own range."""
    x = torch.tensor(draw(st.lists(VALUES, min_size=1, max_size=30)))
    low, high = x.min().item(), x.max().item()
    return x, activation_qparams(low, high, dtype=draw(DTYPES), qscheme=draw(QSCHEMES))


@given(observed())
def test_error_inside_the_range_is_half_a_step(case: tuple[torch.Tensor, QParams]) -> None:
    x, chosen = case
    error = (x.double() - dequantize(quantize(x, chosen), chosen).double()).abs()
    # The zero point is rounded too, which moves an affine range by up to half a step; 1e-4 of a step is float32's.
    slack = 1.0 if chosen.zero_point not in (*chosen.range, 0, 128) else 0.5
    assert error.max() <= chosen.scale * (slack + 1e-4)
    inner = (x / chosen.scale + chosen.zero_point > chosen.range[0]) & (
        x / chosen.scale + chosen.zero_point < chosen.range[1]
    )
    assert (error[inner] <= chosen.scale * (0.5 + 1e-4)).all()


@given(qparams())
def test_every_code_survives_the_round_trip(chosen: QParams) -> None:
    qmin, qmax = chosen.range
    q = torch.arange(qmin, qmax + 1).to(chosen.torch_dtype)
    assert torch.equal(quantize(dequantize(q, chosen), chosen), q)


@given(qparams())
def test_zero_is_exact(chosen: QParams) -> None:
    q = quantize(torch.zeros(3), chosen)
    assert q.tolist() == [chosen.zero_point] * 3
    assert dequantize(q, chosen).tolist() == [0.0] * 3


@given(qparams())
def test_non_finite_values_saturate(chosen: QParams) -> None:
    qmin, qmax = chosen.range
    q = quantize(torch.tensor([math.nan, math.inf, -math.inf]), chosen)
    assert q.tolist() == [qmax, qmax, qmin]


def test_ties_round_to_even() -> None:
    q = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), QParams("int8", 1.0, 0))
    assert q.tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(
    ("dtype", "qscheme", "scale", "zero_point"),
    [
        ("int8", "symmetric", 2 / 127, 0),
        ("uint8", "symmetric", 2 / 127, 128),
        ("int8", "affine", 3 / 255, -128 + 85),
        ("uint8", "affine", 3 / 255, 85),
    ],
)
def test_the_four_codings_of_minus_one_to_two(dtype: str, qscheme: str, scale: float, zero_point: int) -> None:
    chosen = activation_qparams(-1.0, 2.0, dtype=dtype, qscheme=qscheme)
    assert chosen == QParams(dtype, float32(scale), zero_point)


def test_reduce_range_halves_the_codes() -> None:
    assert activation_qparams(-1, 2, dtype="int8", qscheme="symmetric", reduce_range=True).scale == float32(2 / 63)
    assert activation_qparams(-1, 2, dtype="uint8", qscheme="affine", reduce_range=True).scale == float32(3 / 127)


@given(low=VALUES, width=st.floats(0, 2.0**100, width=32), dtype=DTYPES, qscheme=QSCHEMES, reduce_range=st.booleans())
def test_any_finite_range_has_legal_qparams(
    low: float, width: float, dtype: str, qscheme: str, reduce_range: bool
) -> None:
    chosen = activation_qparams(low, low + width, dtype=dtype, qscheme=qscheme, reduce_range=reduce_range)
    assert chosen.scale >= MIN_SCALE
    assert chosen.scale == float32(chosen.scale)
    assert qscheme == "affine" or chosen.zero_point == {"int8": 0, "uint8": 128}[dtype]


@pytest.mark.parametrize("qscheme", ["symmetric", "affine"])
@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-40])
def test_a_range_without_extent_gets_scale_one(qscheme: str, high: float) -> None:
    chosen = activation_qparams(0.0, high, dtype="int8", qscheme=qscheme)
    assert chosen.scale == 1
    assert quantize(torch.zeros(2), chosen).tolist() == [chosen.zero_point] * 2


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan), (0.0, math.inf)])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="finite and ordered"):
        activation_qparams(low, high, dtype="int8", qscheme="affine")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        QParams("int8", scale, 0)


@pytest.mark.parametrize(("dtype", "zero_point"), [("int8", 128), ("int8", -129), ("uint8", -1), ("uint8", 256)])
def test_a_zero_point_without_a_code_is_refused(dtype: str, zero_point: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        QParams(dtype, 1.0, zero_point)


WEIGHTS = st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=5).map(torch.tensor)


@given(WEIGHTS)
def test_weight_error_is_half_a_step_per_channel(weight: torch.Tensor) -> None:
    scale = weight_scale(weight.abs().amax(1))
    q = quantize_weight(weight, scale, 0)
    error = (weight.double() - dequantize_weight(q, scale, 0).double()).abs()
    assert q.min() >= WEIGHT_RANGE[0]
    assert q.max() <= WEIGHT_RANGE[1]
    assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()


@given(WEIGHTS)
def test_per_channel_with_one_channel_is_per_tensor(weight: torch.Tensor) -> None:
    row = weight.reshape(1, -1)
    per_tensor, per_channel = weight_scale(row.abs().amax()), weight_scale(row.abs().amax(1))
    assert torch.equal(per_tensor.reshape(1), per_channel)
    q = quantize_weight(row, per_channel, 0)
    assert torch.equal(quantize_weight(row, per_tensor, None), q)
    assert torch.equal(dequantize_weight(q, per_tensor, None), dequantize_weight(q, per_channel, 0))


@given(WEIGHTS)
def test_negating_a_weight_negates_its_codes(weight: torch.Tensor) -> None:
    scale = weight_scale(weight.abs().amax())
    assert torch.equal(quantize_weight(-weight, scale, None), -quantize_weight(weight, scale, None))


def test_a_zero_channel_gets_scale_one() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -127.0]])
    scale = weight_scale(weight.abs().amax(1))
    assert scale.tolist() == [1.0, 1.0]
    assert quantize_weight(weight, scale, 0).tolist() == [[0, 0], [1, -127]]


def test_channels_may_lie_on_any_axis() -> None:
    weight, scale = torch.randn(3, 4, 2), torch.rand(4) + 0.1
    along_one = quantize_weight(weight, scale, 1)
    assert torch.equal(along_one, quantize_weight(weight.transpose(0, 1), scale, 0).transpose(0, 1))


@pytest.mark.parametrize(("dtype", "zero_point"), [("uint8", 0), ("uint8", 255), ("int8", -128), ("int8", 127)])
def test_the_longest_reduction_fits_int32(dtype: str, zero_point: int) -> None:
    chosen = QParams(dtype, 1.0, zero_point)
    extreme = max(chosen.range, key=lambda q: abs(q - zero_point)) - zero_point
    assert abs(extreme) == 255
    assert MAX_REDUCTION * abs(extreme) * WEIGHT_RANGE[1] < 2**31
    assert (MAX_REDUCTION + 1) * abs(extreme) * WEIGHT_RANGE[1] >= 2**31


@pytest.mark.parametrize("scale", [0.1, 1e-3, 0.06287593706074843])
def test_a_scale_is_the_float32_that_kernels_hold(scale: float) -> None:
    assert QParams("int8", scale, 0).scale == float(torch.tensor(scale, dtype=torch.float32))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-60, 1e300, math.inf, math.nan])
def test_a_scale_that_float32_does_not_hold_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"positive and finite in float32, got {scale}")):
        QParams("int8", scale, 0)
