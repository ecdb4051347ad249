"""Attention in half precision with codes of its result: softmax(q k^T * scale + mask) v, block by block of the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.cards import await_earlier
from quantflow.runtimes.triton.formulas import to_codes


@triton.jit(do_not_specialize=["LQ", "HEADS", "zero_point"])
def attention(
    q, k, v, mask, out, LQ, LK, HEADS, Q_B, Q_H, Q_L, K_B, K_H, K_L, V_B, V_H, V_L, M_B, M_H, M_Q, M_K, O_B, O_H, O_L,
    scale, inverse_scale, low, high, zero_point,
    MASK: tl.constexpr, HAS_ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr, IN_FLOAT32: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BM queries of one head. `scale` is that of exp2: log2(e) is in it.

    MASK: 0 none, 1 bytes that are 0 where nothing is looked at, 2 floats that are added; HAS_ROWS: not the same for all
    queries. Rows that look at nothing give 0. WIDTH numbers of a query lie side by side, BD is the power of two above;
    V_WIDTH and BV are those of a value.
    IN_FLOAT32: for Triton's interpreter, which multiplies the bits of bfloat16.
    """
    await_earlier(CHAINED)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // HEADS, head % HEADS
    om, on = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    od, ov = tl.arange(0, BD), tl.arange(0, BV)
    m = tl.minimum(om, LQ - 1).to(tl.int64)
    q_at = b * Q_B + h * Q_H + m[:, None] * Q_L + od[None, :]
    queries = tl.load(q + q_at) if WIDTH == BD else tl.load(q + q_at, mask=(od < WIDTH)[None, :], other=0.0)
    if IN_FLOAT32:
        queries = queries.to(tl.float32)
    most = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    stop = LK
    if IS_CAUSAL:
        stop = tl.minimum(LK, tl.program_id(0) * BM + BM)
    for start in range(0, stop, BN):
        at = start + on
        n = tl.minimum(at, LK - 1).to(tl.int64)
        k_at = b * K_B + h * K_H + n[None, :] * K_L + od[:, None]
        keys = tl.load(k + k_at) if WIDTH == BD else tl.load(k + k_at, mask=(od < WIDTH)[:, None], other=0.0)
        s = tl.dot(queries, keys.to(queries.dtype)) * scale
        seen = (at < LK)[None, :]
        if IS_CAUSAL:
            seen = seen & (at[None, :] <= om[:, None])
        if MASK > 0:
            # Places side by side are loaded in words, which those of `n`, held inside, would not be.
            m_at = b * M_B + h * M_H + at[None, :] * M_K
            inside = (at < LK)[None, :]
            if HAS_ROWS:
                m_at = m_at + m[:, None] * M_Q
                inside = inside & (om >= 0)[:, None]
            if MASK == 1:
                seen = seen & (tl.load(mask + m_at, mask=inside, other=0) != 0)
            else:
                s += tl.load(mask + m_at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, 1))
        # Where nothing was looked at so far, there is no difference of infinities.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(p, 1)
        v_at = b * V_B + h * V_H + n[:, None] * V_L + ov[None, :]
        values = tl.load(v + v_at) if V_WIDTH == BV else tl.load(v + v_at, mask=(ov < V_WIDTH)[None, :], other=0.0)
        weights = p.to(values.dtype)
        if IN_FLOAT32:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        acc = tl.dot(weights, values, acc * fade[:, None])
        most = higher
    r = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    codes = to_codes(r * inverse_scale, low, high, zero_point).to(out.dtype.element_ty)
    o_at = b * O_B + h * O_H + om[:, None].to(tl.int64) * O_L + ov[None, :]
    tl.store(out + o_at, codes, mask=(om < LQ)[:, None] & (ov < V_WIDTH)[None, :])
