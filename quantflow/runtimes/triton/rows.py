"""Layer norm of rows, with what stands before and behind it: a sum of two tensors, and codes."""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.cards import await_earlier
from quantflow.runtimes.triton.formulas import to_codes


@triton.jit(do_not_specialize=["INNER", "zero_point"])
def layer_norm(
    x, added, weight, bias, total, normal, codes, INNER, WIDTH, X_OUTER, X_INNER, A_OUTER, A_INNER,
    C_OUTER, C_INNER, epsilon, inverse_scale, low, high, zero_point,
    ADDS: tl.constexpr, WRITES_TOTAL: tl.constexpr, WRITES_NORMAL: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One row (outer, inner): n = (s - mean) / sqrt(variance + epsilon) * weight + bias, s = x + added.

    Codes of n are written, n and s where they are read by others, which are dense.
    """
    await_earlier(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // INNER, row % INNER
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    s = tl.load(x + outer * X_OUTER + inner * X_INNER + at, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        s += tl.load(added + outer * A_OUTER + inner * A_INNER + at, mask=mask, other=0.0).to(tl.float32)
    if WRITES_TOTAL:
        tl.store(total + row * WIDTH + at, s, mask=mask)
    mean = tl.sum(s, 0) / WIDTH
    centered = tl.where(mask, s - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centered * centered, 0) / WIDTH + epsilon)
    gain = tl.load(weight + at, mask=mask, other=0.0)
    n = centered / deviation * gain + tl.load(bias + at, mask=mask, other=0.0)
    if WRITES_NORMAL:
        tl.store(normal + row * WIDTH + at, n, mask=mask)
    q = to_codes(n * inverse_scale, low, high, zero_point).to(codes.dtype.element_ty)
    tl.store(codes + outer * C_OUTER + inner * C_INNER + at, q, mask=mask)
