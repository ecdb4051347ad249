"""The one affine formula. Everything that turns reals into codes, or codes into reals, goes through here.

    q  = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)
    x' = (q - zero_point) * scale

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", eq. 1, with symmetric weights in [-127, 127].
"""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass

import torch

INT8 = "int8"
UINT8 = "uint8"
SYMMETRIC = "symmetric"
AFFINE = "affine"

#: dtype name → (qmin, qmax) of activations.
ACTIVATION_RANGE: dict[str, tuple[int, int]] = {INT8: (-128, 127), UINT8: (0, 255)}
#: Weights use the symmetric part of int8 only, so that -w is always representable.
WEIGHT_RANGE: tuple[int, int] = (-127, 127)
TORCH_DTYPE: dict[str, torch.dtype] = {INT8: torch.int8, UINT8: torch.uint8}

#: The longest reduction whose sum of (uint8 code) * (weight code) fits int32: K * 255 * 127 < 2**31.
#: A zero point of 255 is the worst case too: |q - zero_point| <= 255.
MAX_REDUCTION = (2**31 - 1) // (255 * 127)

#: Below this a float32 scale would be subnormal and 1 / scale would overflow.
MIN_SCALE = 2.0**-126


@dataclass(frozen=True)
class QParams:
    """How one tensor is coded.

    Attributes:
        dtype: "int8" or "uint8".
        scale: real units per code step, > 0; rounded to float32 and held in a Python float.
        zero_point: the code of the real 0.
    """

    dtype: str
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        qmin, qmax = self.range
        scale = float32(self.scale)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite in float32, got {self.scale}")
        object.__setattr__(self, "scale", scale)
        if not qmin <= self.zero_point <= qmax:
            raise ValueError(f"zero_point {self.zero_point} is outside {self.dtype}'s [{qmin}, {qmax}]")

    @property
    def range(self) -> tuple[int, int]:
        """(qmin, qmax) of the dtype."""
        return ACTIVATION_RANGE[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.dtype]


def float32(value: float) -> float:
    """The float32 nearest to `value`, as a Python float: scales are float32 everywhere."""
    return c_float(value).value


def quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax).

    Args:
        x: float32, any shape. +Inf and NaN saturate to qmax, -Inf to qmin.

    Returns:
        int8 or uint8 codes of x's shape.
    """
    qmin, qmax = qparams.range
    q = (x / qparams.scale).round_()
    if qparams.zero_point:
        q.add_(qparams.zero_point)
    return q.nan_to_num_(nan=qmax, posinf=qmax, neginf=qmin).clamp_(qmin, qmax).to(qparams.torch_dtype)


def dequantize(q: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """x' = (q - zero_point) * scale, in float32, of q's shape."""
    x = q.to(torch.float32, copy=True)
    return x.sub_(qparams.zero_point).mul_(qparams.scale)


def activation_qparams(low: float, high: float, *, dtype: str, qscheme: str, reduce_range: bool = False) -> QParams:
    """Codes for an activation whose values lie in [low, high].

    symmetric: scale = max(|low|, |high|) / 127, zero_point 0 (int8) or 128 (uint8).
    affine:    the range is widened to hold 0; scale = (high - low) / 255,
               zero_point = qmin + round(-low / scale).
    An all-zero tensor gets scale 1.

    Args:
        low, high: observed range, finite, low <= high.
        reduce_range: use 7 bits (63 and 127 steps), for runtimes whose u8*s8 products saturate in int16.

    Raises:
        ValueError: if the range is not finite or is reversed.
    """
    if not (low <= high and abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"an activation's range must be finite and ordered, got [{low}, {high}]")
    qmin, _ = ACTIVATION_RANGE[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if qscheme == SYMMETRIC:
        steps = 63 if reduce_range else 127
        scale = _safe_scale(max(-low, high) / steps)
        return QParams(dtype, scale, 0 if dtype == INT8 else 128)
    steps = 127 if reduce_range else 255
    scale = _safe_scale((high - low) / steps)
    offset = round(-low / scale)
    return QParams(dtype, scale, qmin + min(max(offset, 0), 255))


def weight_scale(max_abs: torch.Tensor) -> torch.Tensor:
    """scale = max|w| / 127 per entry, float32; 1 where max|w| is 0.

    Args:
        max_abs: shape (channels,) or (), finite, >= 0.
    """
    scale = (max_abs.to(torch.float64) / WEIGHT_RANGE[1]).to(torch.float32)
    return torch.where(scale < MIN_SCALE, torch.ones_like(scale), scale)


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """Symmetric int8 codes in [-127, 127].

    Args:
        weight: float32, any shape.
        scale: () or (1,) for one scale, else (weight.shape[channel_axis],).
        channel_axis: None for per-tensor.

    Returns:
        int8 codes of weight's shape.
    """
    q = torch.round(weight / _along(scale, weight.dim(), channel_axis))
    return q.clamp_(*WEIGHT_RANGE).to(torch.int8)


def dequantize_weight(q: torch.Tensor, scale: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """w' = q * scale, float32, of q's shape."""
    return q.to(torch.float32) * _along(scale, q.dim(), channel_axis)


def _along(scale: torch.Tensor, dims: int, channel_axis: int | None) -> torch.Tensor:
    if channel_axis is None:
        return scale.reshape(())
    shape = [1] * dims
    shape[channel_axis] = -1
    return scale.reshape(shape)


def _safe_scale(scale: float) -> float:
    scale = float32(scale)
    return 1.0 if scale < MIN_SCALE else scale
