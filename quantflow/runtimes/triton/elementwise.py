"""Quantize, dequantize, and sums and products of two coded tensors. Offsets are of (outer, middle, inner) positions."""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.cards import await_earlier
from quantflow.runtimes.triton.formulas import activated, small_to_float, to_codes


@triton.jit
def quantize(x, y, count, inverse_scale, low, high, zero_point, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Codes of `count` numbers that lie as their codes shall lie."""
    await_earlier(CHAINED)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, to_codes(r * inverse_scale, low, high, zero_point).to(y.dtype.element_ty), mask=at < count)


@triton.jit
def quantize_moved(
    x, y, POSITIONS, CHANNELS, X_N, X_P, X_C, inverse_scale, low, high, zero_point,
    BP: tl.constexpr, BC: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Codes of (outer, POSITIONS, CHANNELS), dense, of numbers with any strides: NCHW to channels-last."""
    await_earlier(CHAINED)
    outer = tl.program_id(2).to(tl.int64)
    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (p < POSITIONS)[:, None] & (c < CHANNELS)[None, :]
    r = tl.load(x + outer * X_N + p[:, None] * X_P + c[None, :] * X_C, mask=mask, other=0.0).to(tl.float32)
    q = to_codes(r * inverse_scale, low, high, zero_point).to(y.dtype.element_ty)
    tl.store(y + outer * POSITIONS * CHANNELS + p[:, None] * CHANNELS + c[None, :], q, mask=mask)


@triton.jit
def quantize_framed(
    x, y, IN_H, IN_W, X_N, X_C, X_H, X_W, OUT_H, OUT_W, PAD_H, PAD_W, inverse_scale, low, high, zero_point,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Codes of images of up to 4 channels, padded to 4 and framed by the zero point: (n, OUT_H, OUT_W, 4)."""
    await_earlier(CHAINED)
    row, c = tl.program_id(0), tl.arange(0, 4)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, iw = (row // OUT_H).to(tl.int64), w - PAD_W
    ih = row % OUT_H - PAD_H + tl.zeros_like(w)
    inside = ((ih >= 0) & (ih < IN_H) & (iw >= 0) & (iw < IN_W))[:, None] & (c < CHANNELS)[None, :]
    at = n * X_N + (ih * X_H + iw * X_W)[:, None] + c[None, :] * X_C
    r = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    q = to_codes(r * inverse_scale, low, high, zero_point).to(y.dtype.element_ty)
    tl.store(y + (row.to(tl.int64) * OUT_W + w[:, None]) * 4 + c[None, :], q, mask=(w < OUT_W)[:, None])


@triton.jit
def dequantize(x, y, count, scale, zero_point, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """x' = (q - zero_point) * scale, as the codes lie, in the type of y."""
    await_earlier(CHAINED)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(x + at, mask=at < count, other=0).to(tl.int32) - zero_point
    tl.store(y + at, small_to_float(q) * scale, mask=at < count)


@triton.jit
def pair(
    a, b, y, count, MIDDLE, INNER, A_N, A_P, A_C, B_N, B_P, B_C,
    a_scale, a_zero_point, b_scale, b_zero_point, first, second, inverse_scale, low, high, zero_point,
    IS_PRODUCT: tl.constexpr, IS_DENSE: tl.constexpr, IS_WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """r = a + b or a * b of what the codes stand for, activated; codes, or floats. y is dense.

    IS_DENSE: a and b lie as y does. Else element (n, p, c) of each is at n * N + p * P + c * C; 0 repeats.
    """
    await_earlier(CHAINED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if IS_WIDE:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    if IS_DENSE:
        a_at, b_at = at, at
    else:
        c = at % INNER
        t = at // INNER
        p = t % MIDDLE
        n = t // MIDDLE
        a_at = n * A_N + p * A_P + c * A_C
        b_at = n * B_N + p * B_P + c * B_C
    u = small_to_float(tl.load(a + a_at, mask=mask, other=0).to(tl.int32) - a_zero_point) * a_scale
    v = small_to_float(tl.load(b + b_at, mask=mask, other=0).to(tl.int32) - b_zero_point) * b_scale
    r = u * v if IS_PRODUCT else u + v
    r = activated(r, first, second, ACTIVATION)
    if y.dtype.element_ty.is_floating():
        tl.store(y + at, r, mask=mask)
    else:
        tl.store(y + at, to_codes(r * inverse_scale, low, high, zero_point).to(y.dtype.element_ty), mask=mask)
