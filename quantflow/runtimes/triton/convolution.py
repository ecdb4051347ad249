"""Convolutions and linears of codes as one implicit GEMM over channels-last memory, and depthwise convolutions.

    y[n, o, p, q, k] = finish(sum over taps and c of (x[n, o', p', q', c] - zp_x) * w[k, tap, c])

Codes are summed as int8 (those of uint8 with 128 less); what the zero point adds is a constant per output channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.cards import await_earlier
from quantflow.runtimes.triton.formulas import BITS, finished


@triton.jit
def signed(codes):
    """uint8 codes less 128, as int8; int8 codes as they are."""
    if codes.dtype == tl.uint8:
        return (codes ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return codes


#: Numbers that kernels are not compiled anew for; those that tell how memory is aligned are not among them.
_GEOMETRY = [
    "IN_D", "IN_H", "IN_W", "OUT_D", "OUT_H", "OUT_W", "STRIDE_D", "STRIDE_H", "STRIDE_W", "PAD_D",
    "PAD_H", "PAD_W", "DILATION_D", "DILATION_H", "DILATION_W", "padding_code", "residual_zero_point", "zero_point",
]  # fmt: skip


@triton.jit(do_not_specialize=["M", "BLOCKS", "ITERATIONS", "TAPS_H", "TAPS_W", *_GEOMETRY])
def convolution(
    x, w, scale, bias, correction, residual, y, work, arrived,
    M, N, C, BLOCKS, TAPS_H, TAPS_W, ITERATIONS,
    IN_D, IN_H, IN_W, OUT_D, OUT_H, OUT_W, X_N, X_D, X_H, X_W, W_ROW, Y_ROW,
    STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W, DILATION_D, DILATION_H, DILATION_W,
    padding_code, residual_scale, residual_zero_point, first, second, inverse_scale, low, high, zero_point,
    inverse_columns,
    IS_LINEAR: tl.constexpr, IS_DEEP: tl.constexpr, IS_PADDED: tl.constexpr, ONE_TAP: tl.constexpr,
    ONE_BLOCK: tl.constexpr, RUN: tl.constexpr, ALIGNED: tl.constexpr, W_ALIGNED: tl.constexpr, EVEN_C: tl.constexpr,
    EVEN_N: tl.constexpr, BY_ROWS: tl.constexpr, ZERO_PADDING: tl.constexpr, HAS_CORRECTION: tl.constexpr,
    IS_WIDE: tl.constexpr, IS_SMALL: tl.constexpr, IN_STEPS: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    IS_CENTERED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One tile of BM positions by BN output channels of one group; `ITERATIONS` blocks of BK along taps and channels.

    ONE_TAP: of a kernel without padding. RUN: taps of so many channels each lie behind each other in a block, C counts
    all of them, and there is no padding. IS_LINEAR: with stride 1, too: rows of x are rows of y. SPLIT programs share a
    tile's iterations: they add into `work`, and the last to arrive finishes and leaves zeros behind. BY_ROWS: programs
    follow each other along columns, `inverse_columns` is one over their number. ONE_BLOCK: a single iteration.
    """
    pid, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    if BY_ROWS:  # half a step away from where rounding could matter
        pm = ((pid + 0.5) * inverse_columns).to(tl.int32)
        pn = pid - pm * columns
    else:  # neighbours share rows of x and columns of w, so that both stay in the cache
        block = pid // (GROUP * columns)
        high_rows = min(rows - block * GROUP, GROUP)
        pm = block * GROUP + (pid % (GROUP * columns)) % high_rows
        pn = (pid % (GROUP * columns)) // high_rows
    om, on, ok = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows beyond the last repeat it: what they give is not stored, and loads need no mask.
    m = tl.minimum(om, M - 1)
    if IS_WIDE:
        m = m.to(tl.int64)
    if IS_LINEAR:
        base = m * X_W
        d, h, v = m, m, m
    else:
        v = m % OUT_W
        t = m // OUT_W
        h = t % OUT_H
        t = t // OUT_H
        if IS_DEEP:
            d = (t % OUT_D) * STRIDE_D - PAD_D
            t = t // OUT_D
        else:
            d = m
        v = v * STRIDE_W - PAD_W
        h = h * STRIDE_H - PAD_H
        base = t * X_N + h * X_H + v * X_W
        if IS_DEEP:
            base += d * X_D
    # What the compiler can't see: rows begin at multiples of this, so that they are loaded in words.
    base = tl.multiple_of(base + group * C, ALIGNED)
    n = on if EVEN_N else tl.minimum(on, N - 1)
    w_base = tl.multiple_of((group * N + n) * W_ROW, W_ALIGNED)
    mask = (om < M)[:, None] & ((on >= 0) if EVEN_N else (on < N))[None, :]
    offsets = om[:, None] * Y_ROW + (group * N + on)[None, :]
    if IS_WIDE:
        offsets = om.to(tl.int64)[:, None] * Y_ROW + (group * N + on)[None, :]
    # What the end needs is asked for before the sums, which hide the wait.
    scales, biases = tl.load(scale + group * N + n)[None, :], tl.load(bias + group * N + n)[None, :]
    await_earlier(CHAINED)
    added = biases
    if RESIDUAL == 1:
        added = tl.load(residual + offsets, mask=mask, other=0)
    elif RESIDUAL == 2:
        added = tl.load(residual + offsets, mask=mask, other=0.0)
    share = tl.cdiv(ITERATIONS, SPLIT)
    # Sums of few bits begin as the bits of a float32 that has them behind its ones.
    acc = tl.full((BM, BN), BITS if IS_SMALL and SPLIT == 1 else 0, tl.int32)
    for i in range(split * share if SPLIT > 1 else 0, 1 if ONE_BLOCK else min(split * share + share, ITERATIONS)):
        if RUN > 0:
            c = i * BK + ok
            tap = c // RUN
            move = (tap // TAPS_W) * DILATION_H * X_H + (tap % TAPS_W) * DILATION_W * X_W
            x_at = base[:, None] + (tl.multiple_of(move, ALIGNED) + c % RUN)[None, :]
            w_at = w_base[None, :] + c[:, None]
            inside = om[:, None] >= 0
        elif ONE_TAP:
            c = i * BK + ok
            x_at = base[:, None] + c[None, :]
            w_at = w_base[None, :] + c[:, None]
            inside = om[:, None] >= 0
        else:
            tap = i // BLOCKS
            c = (i - tap * BLOCKS) * BK + ok
            s = tap % TAPS_W
            r = tap // TAPS_W
            if IS_DEEP:
                z = r // TAPS_H
                r = r % TAPS_H
                move = z * DILATION_D * X_D + r * DILATION_H * X_H + s * DILATION_W * X_W
            else:
                z = 0
                move = r * DILATION_H * X_H + s * DILATION_W * X_W
            x_at = (base + tl.multiple_of(move, ALIGNED))[:, None] + c[None, :]
            w_at = (w_base + tl.multiple_of(tap * C, W_ALIGNED))[None, :] + c[:, None]
            if IS_PADDED:
                ih, iw = h + r * DILATION_H, v + s * DILATION_W
                fits = (ih >= 0) & (ih < IN_H) & (iw >= 0) & (iw < IN_W)
                if IS_DEEP:
                    iz = d + z * DILATION_D
                    fits = fits & (iz >= 0) & (iz < IN_D)
                inside = fits[:, None]
            else:
                inside = om[:, None] >= 0
        if EVEN_C:
            b = tl.load(w + w_at)
            if not IS_PADDED:
                a = tl.load(x + x_at)
            elif ZERO_PADDING:
                a = tl.load(x + x_at, mask=inside, other=0)
            else:
                a = tl.load(x + x_at, mask=inside, other=padding_code)
        else:
            # Behind the last channel the weight is 0, whatever x holds there.
            b = tl.load(w + w_at, mask=(c < C)[:, None], other=0)
            a = tl.load(x + x_at, mask=inside & (c < C)[None, :], other=padding_code)
        acc = tl.dot(signed(a), b, acc, out_dtype=tl.int32)
    is_last = True
    if SPLIT > 1:
        tile = group * (rows * columns) + pid
        place = work + tile.to(tl.int64) * (BM * BN) + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.atomic_add(place, acc, sem="relaxed")
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            acc = tl.load(place, cache_modifier=".cg")
            # What one thread reads, another may clear.
            tl.debug_barrier()
            tl.store(place, tl.zeros((BM, BN), tl.int32))
            tl.store(arrived + tile, 0)
    if is_last:
        if HAS_CORRECTION:
            acc += tl.load(correction + group * N + n)[None, :]
        if IS_SMALL and SPLIT > 1:
            acc += BITS
        value = finished(
            acc, scales, biases, added, y, residual_scale, residual_zero_point, first, second, inverse_scale, low, high,
            zero_point, IS_SMALL, IN_STEPS, RESIDUAL, ACTIVATION, IS_CENTERED,
        )  # fmt: skip
        tl.store(y + offsets, value, mask=mask)


@triton.jit
def depthwise_tap(
    acc, x, w, tap, n, d, h, v, c, inside, C, IN_D, IN_H, IN_W, DILATION_D, DILATION_H, DILATION_W, padding_code,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
):  # fmt: skip
    """The sums with one tap's products added."""
    s = tap % TAPS_W
    r = (tap // TAPS_W) % TAPS_H
    z = tap // (TAPS_W * TAPS_H)
    iz, ih, iw = d + z * DILATION_D, h + r * DILATION_H, v + s * DILATION_W
    fits = (iz >= 0) & (iz < IN_D) & (ih >= 0) & (ih < IN_H) & (iw >= 0) & (iw < IN_W)
    at = (((n * IN_D + iz) * IN_H + ih) * IN_W + iw) * C
    a = signed(tl.load(x + at[:, None] + c[None, :], mask=fits[:, None] & inside[None, :], other=padding_code))
    b = tl.load(w + tap * C + c, mask=inside, other=0)
    return acc + a.to(tl.int32) * b.to(tl.int32)[None, :]


@triton.jit(do_not_specialize=["M", *_GEOMETRY])
def depthwise(
    x, w, scale, bias, correction, residual, y,
    M, C, IN_D, IN_H, IN_W, OUT_D, OUT_H, OUT_W,
    STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W, DILATION_D, DILATION_H, DILATION_W,
    padding_code, residual_scale, residual_zero_point, first, second, inverse_scale, low, high, zero_point,
    TAPS: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, IS_UNROLLED: tl.constexpr,
    HAS_CORRECTION: tl.constexpr, IS_WIDE: tl.constexpr, IS_SMALL: tl.constexpr, IN_STEPS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTERED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """BM positions by BN channels, each with a filter of its own; w is (taps, channels)."""
    await_earlier(CHAINED)
    om, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    m, inside = tl.minimum(om, M - 1), c < C
    if IS_WIDE:
        m = m.to(tl.int64)
    v = m % OUT_W
    t = m // OUT_W
    h = t % OUT_H
    t = t // OUT_H
    d = (t % OUT_D) * STRIDE_D - PAD_D
    n = t // OUT_D
    v = v * STRIDE_W - PAD_W
    h = h * STRIDE_H - PAD_H
    mask = (om < M)[:, None] & inside[None, :]
    offsets = m[:, None] * C + c[None, :]
    scales = tl.load(scale + c, mask=inside, other=0.0)[None, :]
    biases = tl.load(bias + c, mask=inside, other=0.0)[None, :]
    added = biases
    if RESIDUAL == 1:
        added = tl.load(residual + offsets, mask=mask, other=0)
    elif RESIDUAL == 2:
        added = tl.load(residual + offsets, mask=mask, other=0.0)
    acc = tl.full((BM, BN), BITS if IS_SMALL else 0, tl.int32)
    if IS_UNROLLED:
        for tap in tl.static_range(TAPS):
            acc = depthwise_tap(
                acc, x, w, tap, n, d, h, v, c, inside, C, IN_D, IN_H, IN_W, DILATION_D, DILATION_H, DILATION_W,
                padding_code, TAPS_H, TAPS_W,
            )  # fmt: skip
    else:
        for tap in range(TAPS):
            acc = depthwise_tap(
                acc, x, w, tap, n, d, h, v, c, inside, C, IN_D, IN_H, IN_W, DILATION_D, DILATION_H, DILATION_W,
                padding_code, TAPS_H, TAPS_W,
            )  # fmt: skip
    if HAS_CORRECTION:
        acc += tl.load(correction + c, mask=inside, other=0)[None, :]
    value = finished(
        acc, scales, biases, added, y, residual_scale, residual_zero_point, first, second, inverse_scale, low, high,
        zero_point, IS_SMALL, IN_STEPS, RESIDUAL, ACTIVATION, IS_CENTERED,
    )  # fmt: skip
    tl.store(y + offsets, value, mask=mask)
