"""How far one tensor is from another, in one pass of the native library over both."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch

from quantflow.errors import UnavailableError
from quantflow.numerics.affine import QParams
from quantflow.runtimes import native_library as lib

_Sums = ctypes.c_double * 4


def error_sums(
    reference: torch.Tensor, actual: torch.Tensor, qparams: QParams | None = None
) -> tuple[float, float, float, float] | None:
    """(sum x^2, sum (x - x')^2, max |x|, max |x - x'|), added up in float64.

    Args:
        reference: x, any memory layout.
        actual: x' of that shape, or with `qparams` its codes.

    Returns:
        None where the library can't say: it is not there, x or x' is not float32 on the CPU, or holds NaN or Inf.
    """
    dtype = torch.float32 if qparams is None else qparams.torch_dtype
    if not (reference.is_cpu and actual.is_cpu and reference.dtype == torch.float32 and actual.dtype == dtype):
        return None
    if reference.is_neg() or actual.is_neg() or not _is_there():
        return None
    order = sorted(range(reference.dim()), key=reference.stride, reverse=True)
    x, y = reference.permute(order).contiguous(), actual.permute(order).contiguous()
    sums = _Sums()
    scale, zero_point = (1.0, 0) if qparams is None else (qparams.scale, qparams.zero_point)
    lib.call(
        "qf_error_sums", x.data_ptr(), y.data_ptr(), lib.DTYPES[dtype], scale, zero_point, x.numel(),
        ctypes.addressof(sums),
    )  # fmt: skip
    signal, noise, largest, largest_error = sums
    return (signal, noise, largest, largest_error) if math.isfinite(noise) else None


@cache
def _is_there() -> bool:
    try:
        lib.library()
    except UnavailableError:
        return False
    return True
