"""Pooling of codes in channels-last memory: maxima, and means as exact integer sums."""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.cards import await_earlier
from quantflow.runtimes.triton.formulas import to_codes


@triton.jit
def mean_written(total, divisor, scale, inverse_scale, low, high, out_zero_point, y):
    """The mean of codes less their zero point, times the scale; coded unless y holds floats."""
    r = tl.div_rn(total.to(tl.float32), divisor) * scale
    if y.dtype.element_ty.is_floating():
        return r
    else:
        return to_codes(r * inverse_scale, low, high, out_zero_point).to(y.dtype.element_ty)


@triton.jit
def pool_tap(
    found, x, tap, n, d_start, d_stop, h_start, h_stop, v_start, v_stop, c, inside, C, IN_D, IN_H, IN_W,
    STEP_D, STEP_H, STEP_W, zero_point, MOST_H: tl.constexpr, MOST_W: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    """Maxima, or sums, with one tap taken in."""
    iw = v_start + (tap % MOST_W) * STEP_W
    ih = h_start + ((tap // MOST_W) % MOST_H) * STEP_H
    iz = d_start + (tap // (MOST_W * MOST_H)) * STEP_D
    mask = ((iz < d_stop) & (ih < h_stop) & (iw < v_stop))[:, None] & inside[None, :]
    at = (((n * IN_D + iz) * IN_H + ih) * IN_W + iw) * C
    if IS_MEAN:
        q = tl.load(x + at[:, None] + c[None, :], mask=mask, other=0).to(tl.int32)
        return found + tl.where(mask, q - zero_point, 0)
    else:
        lowest = 0 if x.dtype.element_ty == tl.uint8 else -128
        q = tl.load(x + at[:, None] + c[None, :], mask=mask, other=lowest).to(tl.int32)
        return tl.maximum(found, q)


@triton.jit(do_not_specialize=["M", "IN_D", "IN_H", "IN_W", "OUT_D", "OUT_H", "OUT_W", "zero_point", "out_zero_point"])
def pool(
    x, y, windows, M, C, IN_D, IN_H, IN_W, OUT_D, OUT_H, OUT_W, STEP_D, STEP_H, STEP_W,
    zero_point, scale, inverse_scale, low, high, out_zero_point,
    MOST_D: tl.constexpr, MOST_H: tl.constexpr, MOST_W: tl.constexpr, IS_UNROLLED: tl.constexpr,
    IS_MEAN: tl.constexpr, IS_WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Windows over up to three dimensions.

    `windows` holds for each output index of each dimension where its window starts and stops inside x, and what the
    number of its elements counts as; MOST is the most taps of a window, STEP the distance between two.
    """
    await_earlier(CHAINED)
    om, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    m, inside = tl.minimum(om, M - 1), c < C
    if IS_WIDE:
        m = m.to(tl.int64)
    v = m % OUT_W
    t = m // OUT_W
    h = t % OUT_H
    t = t // OUT_H
    d = t % OUT_D
    n = t // OUT_D
    d_row, h_row, v_row = windows + d * 3, windows + (OUT_D + h) * 3, windows + (OUT_D + OUT_H + v) * 3
    d_start, d_stop = tl.load(d_row), tl.load(d_row + 1)
    h_start, h_stop = tl.load(h_row), tl.load(h_row + 1)
    v_start, v_stop = tl.load(v_row), tl.load(v_row + 1)
    found = tl.full((BM, BC), 0 if IS_MEAN else -128, tl.int32)
    if IS_UNROLLED:
        for tap in tl.static_range(MOST_D * MOST_H * MOST_W):
            found = pool_tap(
                found, x, tap, n, d_start, d_stop, h_start, h_stop, v_start, v_stop, c, inside, C, IN_D, IN_H, IN_W,
                STEP_D, STEP_H, STEP_W, zero_point, MOST_H, MOST_W, IS_MEAN,
            )  # fmt: skip
    else:
        for tap in range(MOST_D * MOST_H * MOST_W):
            found = pool_tap(
                found, x, tap, n, d_start, d_stop, h_start, h_stop, v_start, v_stop, c, inside, C, IN_D, IN_H, IN_W,
                STEP_D, STEP_H, STEP_W, zero_point, MOST_H, MOST_W, IS_MEAN,
            )  # fmt: skip
    mask = (om < M)[:, None] & inside[None, :]
    offsets = m[:, None] * C + c[None, :]
    if IS_MEAN:
        divisor = (tl.load(d_row + 2) * tl.load(h_row + 2) * tl.load(v_row + 2)).to(tl.float32)
        value = mean_written(
            found, divisor[:, None] + tl.zeros_like(found).to(tl.float32), scale, inverse_scale, low, high,
            out_zero_point, y,
        )  # fmt: skip
        tl.store(y + offsets, value, mask=mask)
    else:
        tl.store(y + offsets, found.to(y.dtype.element_ty), mask=mask)


@triton.jit
def mean(
    x, y, REDUCED, INNER, X_N, X_R, X_C, zero_point, scale, inverse_scale, low, high, out_zero_point,
    BR: tl.constexpr, BC: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Means of (outer, REDUCED, INNER) over the middle; y is (outer, INNER), dense."""
    await_earlier(CHAINED)
    outer = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.int32)
    for start in range(0, REDUCED, BR):
        r = start + tl.arange(0, BR)
        mask = (r < REDUCED)[:, None] & (c < INNER)[None, :]
        q = tl.load(x + outer * X_N + r[:, None] * X_R + c[None, :] * X_C, mask=mask, other=0).to(tl.int32)
        total += tl.sum(tl.where(mask, q - zero_point, 0), 0)
    divisor = tl.zeros((BC,), tl.float32) + REDUCED
    value = mean_written(total, divisor, scale, inverse_scale, low, high, out_zero_point, y)
    tl.store(y + outer * INNER + c, value, mask=c < INNER)
