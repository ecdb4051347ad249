"""Formulas that Triton kernels share: activations, and real numbers to codes."""

from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 * 2**23: added to a float32 below 2**22 it rounds that half to even, on every device alike.
ROUNDER = 12582912.0
_ROUNDER = tl.constexpr(ROUNDER)
#: Its bits: those of ROUNDER + i are BITS + i.
BITS = tl.constexpr(0x4B400000)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
#: Activation → its number in a kernel. Clamps are one: they take their bounds.
NONE, CLAMP = 0, 1
ACTIVATION_NUMBERS = {
    "relu": CLAMP, "hardtanh": CLAMP, "hardswish": 2, "hardsigmoid": 3, "silu": 4, "sigmoid": 5, "gelu": 6,
    "gelu_tanh": 7, "leaky_relu": 8, "tanh": 9,
}  # fmt: skip


@triton.jit
def tanh(x):
    """tanh(x) = 1 - 2 / (exp(2 x) + 1); exact at both infinities."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def gelu(r):
    """r * Phi(r), Phi that of the normal distribution, within 4e-6 * (1 + |gelu|); NaN stays NaN.

    Phi(u) = 1/2 + u * P(t), t = 2 u^2 / 4.9^2 - 1, fitted to the largest error on |u| <= 4.9, beyond which Phi is 0 or
    1. Behind a product an exponential and a quotient per number would take longer than the product itself.
    """
    u = tl.minimum(tl.maximum(r, -4.9), 4.9)
    t = u * u * 0.0832986256 - 1.0
    h = t * -0.000883526576 + 0.00258140918
    h = h * t - 0.00325185223
    h = h * t + 0.00461697392
    h = h * t - 0.00937538873
    h = h * t + 0.0158495829
    h = h * t - 0.0227710996
    h = h * t + 0.0309675224
    h = h * t - 0.0405424461
    h = h * t + 0.0522419922
    h = h * t - 0.071623385
    h = h * t + 0.144230887
    return tl.maximum(r, -4.9, propagate_nan=tl.PropagateNan.ALL) * (u * h + 0.5)


#: Activations for codes only → how far they are off; the first whose codes allow that is taken (see `short_gelu`).
GELU, SHORT_GELUS = ACTIVATION_NUMBERS["gelu"], {10: 1.7e-4, 11: 5e-5}


@triton.jit
def short_gelu(r, IS_SHORTEST: tl.constexpr):
    """r * Phi(r) for a finite r, within 1.7e-4 in 7 terms (the shortest), 5e-5 in 9, half of it rounding.

    Phi(r) = 1/2 + r * P(r^2), cut at 0 and 1. P's first term is positive and it was fitted so that what lies beyond a
    cut stays there, so that r needs no bounds.
    """
    t = r * r
    if IS_SHORTEST:
        h = t * 2.47795928e-08 - 1.69807134e-06
        h = h * t + 4.98746291e-05
        h = h * t - 0.0008320346
        h = h * t + 0.00885678717
        h = h * t - 0.0647517732
        h = h * t + 0.398006463
    else:
        h = t * 3.61809287e-11 - 3.79346356e-09
        h = h * t + 1.7540615e-07
        h = h * t - 4.74856169e-06
        h = h * t + 8.45379223e-05
        h = h * t - 0.00105645647
        h = h * t + 0.00964782017
        h = h * t - 0.0660838891
        h = h * t + 0.398765422
    return r * tl.clamp(r * h + 0.5, 0.0, 1.0)


@triton.jit
def activated(r, first, second, ACTIVATION: tl.constexpr):
    """The activation of that number; NaN stays NaN. `first` and `second` are its numbers."""
    if ACTIVATION == 1:
        r = tl.where(r < first, first, r)
        r = tl.where(r > second, second, r)
    elif ACTIVATION == 2:
        r = r * tl.minimum(tl.maximum(r + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == 3:
        r = tl.where(r != r, r, tl.minimum(tl.maximum(r + 3.0, 0.0), 6.0) / 6.0)
    elif ACTIVATION == 4:
        r = r / (1.0 + tl.exp(-r))
    elif ACTIVATION == 5:
        r = 1.0 / (1.0 + tl.exp(-r))
    elif ACTIVATION == 6:
        r = gelu(r)
    elif ACTIVATION == 7:
        r = 0.5 * r * (1.0 + tanh((r + 0.044715 * r * r * r) * _SQRT_2_OVER_PI))
    elif ACTIVATION == 8:
        r = tl.where(r < 0.0, r * first, r)
    elif ACTIVATION == 9:
        r = tanh(r)
    elif ACTIVATION >= 10:
        r = short_gelu(r, ACTIVATION == 10)
    return r


@triton.jit
def to_codes(steps, low, high, zero_point):
    """clamp(round_half_even(steps)) + zero_point in the low byte of an int32; NaN is high, as the lesser of the two is.

    The bounds are whole, so that the order is free. Conversions are slow on every card: the sum with the rounder has
    the whole number in its low bits.
    """
    steps = tl.maximum(tl.minimum(steps, high), low)
    return (steps + _ROUNDER).to(tl.int32, bitcast=True) + zero_point


@triton.jit
def small_to_float(i):
    """An int32 of less than 2**22 in magnitude as float32, without a conversion."""
    return (i + BITS).to(tl.float32, bitcast=True) - _ROUNDER


@triton.jit
def finished(
    acc, scale, bias, added, y,
    residual_scale, residual_zero_point, first, second, inverse_scale, low, high, zero_point,
    IS_SMALL: tl.constexpr, IN_STEPS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    IS_CENTERED: tl.constexpr,
):  # fmt: skip
    """What y holds for exact sums: scaled, biased, the residual added, activated, and coded unless y holds floats.

        IN_STEPS 1   t = fma(acc, scale, bias);  t = fma(q_r - zp_r, residual_scale, t);  codes of t, within [low, high]
        IN_STEPS 2   the same t as a share of [low, high]: where that is cut at 0 and 1, which costs nothing, it is
                     first * t + second whose low byte is the code
        IN_STEPS 0   r = acc * scale + bias + residual;  codes of activation(r) * inverse_scale
        IN_STEPS -1  the same; activation(r) * inverse_scale + low is a share of the range, `high` codes long from
                     `zero_point` on. Not for an r that may be NaN.

    RESIDUAL: 0 none, `added` is 1 codes, 2 floats. IS_SMALL: sums are less than 2**22 in magnitude, and `acc` is BITS
    more than they are.
    IS_CENTERED: the zero point is 0.
    """
    sums = acc.to(tl.float32, bitcast=True) - _ROUNDER if IS_SMALL else acc.to(tl.float32)
    r = tl.fma(sums, scale, bias)
    if RESIDUAL == 1:
        q = (added.to(tl.int32) + (BITS - residual_zero_point)).to(tl.float32, bitcast=True) - _ROUNDER
        r = tl.fma(q, residual_scale + tl.zeros_like(r), r)
    elif RESIDUAL == 2:
        r += added.to(tl.float32)
    if IN_STEPS <= 0:
        r = activated(r, first, second, ACTIVATION)
    if y.dtype.element_ty.is_floating():
        return r
    elif IN_STEPS == 2:
        share = tl.clamp(r, 0.0, 1.0)
        code = tl.fma(share, first + tl.zeros_like(r), second + tl.zeros_like(r))
        return code.to(tl.int32, bitcast=True).to(y.dtype.element_ty)
    elif IN_STEPS == -1:
        share = tl.clamp(tl.fma(r, inverse_scale + tl.zeros_like(r), low + tl.zeros_like(r)), 0.0, 1.0)
        code = tl.fma(share, high + tl.zeros_like(r), _ROUNDER + zero_point + tl.zeros_like(r))
        return code.to(tl.int32, bitcast=True).to(y.dtype.element_ty)
    else:
        if IN_STEPS == 0:
            r = r * inverse_scale
        return to_codes(r, low, high, 0 if IS_CENTERED else zero_point).to(y.dtype.element_ty)
