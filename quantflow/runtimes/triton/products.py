"""Products of two coded activations, batched: acc = sum over k of (q_a - zp_a) * (q_b - zp_b), exactly."""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.cards import await_earlier
from quantflow.runtimes.triton.convolution import signed
from quantflow.runtimes.triton.formulas import to_codes


@triton.jit
def matmul(
    a, b, y, M, N, K, A_B, A_M, A_K, B_B, B_K, B_N, a_blank, b_blank, a_zero_point, b_zero_point,
    scale, inverse_scale, low, high, zero_point, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """(M, K) by (K, N) for each of a batch; y is dense. Zero points are those of the codes as `signed` gives them.

    `*_blank` is the code that `signed` makes 0.
    """
    await_earlier(CHAINED)
    columns = tl.cdiv(N, BN)
    om = (tl.program_id(0) // columns) * BM + tl.arange(0, BM)
    on = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    batch = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.int32)
    a_sum, b_sum = tl.zeros((BM,), tl.int32), tl.zeros((BN,), tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a_mask = (om < M)[:, None] & (k < K)[None, :]
        b_mask = (k < K)[:, None] & (on < N)[None, :]
        u = signed(tl.load(a + batch * A_B + om[:, None] * A_M + k[None, :] * A_K, mask=a_mask, other=a_blank))
        v = signed(tl.load(b + batch * B_B + k[:, None] * B_K + on[None, :] * B_N, mask=b_mask, other=b_blank))
        acc = tl.dot(u, v, acc, out_dtype=tl.int32)
        a_sum += tl.sum(u.to(tl.int32), 1)
        b_sum += tl.sum(v.to(tl.int32), 0)
    acc += K * a_zero_point * b_zero_point - (a_sum * b_zero_point)[:, None] - (b_sum * a_zero_point)[None, :]
    r = acc.to(tl.float32) * scale
    mask = (om < M)[:, None] & (on < N)[None, :]
    at = batch * M * N + om[:, None] * N + on[None, :]
    if y.dtype.element_ty.is_floating():
        tl.store(y + at, r, mask=mask)
    else:
        tl.store(y + at, to_codes(r * inverse_scale, low, high, zero_point).to(y.dtype.element_ty), mask=mask)
