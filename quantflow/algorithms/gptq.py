"""GPTQ: each weight is rounded knowing what the others' rounding did to the layer's output.

    minimize over integers q:  (s q - w) H (s q - w)^T      per output channel, H as in `gram.py`

Columns are rounded one after the other, and each one's error is handed to those still free,

    w_j -= (w_k - s q_k) U_kj / U_kk   for j > k,   U^T U = H^-1 (upper Cholesky factor)

then codes are improved one at a time as long as that lowers the form (coordinate descent).

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers";
the descent is that of Behdin et al. 2023, "QuantEase".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantflow.algorithms.outcome import Material, Outcome
from quantflow.algorithms.rounding import damped, form, nearest, round_layers
from quantflow.numerics.affine import WEIGHT_RANGE
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined

if TYPE_CHECKING:
    from quantflow.schema import GptqAlgorithm

#: Columns rounded before the rest of the matrix hears of it.
BLOCK = 64


def gptq(settings: GptqAlgorithm, prepared: Prepared, refined: Refined, material: Material) -> tuple[Refined, Outcome]:
    """Round the weights of every int8 linear op that may be changed, in order of execution."""

    def solve(h: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        h = damped(h, settings.damping)
        found = _descend(h, weight, scale, _compensated(h, weight, scale), settings.sweeps)
        better = form(h, found * scale - weight) <= form(h, codes * scale - weight)
        return torch.where(better.unsqueeze(-1), found, codes)

    return round_layers("gptq", settings, prepared, refined, material, solve)


def _compensated(h: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One pass over the columns with their errors handed on. Large diagonal entries first."""
    order = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    h = h[:, order][:, :, order]
    factor, info = torch.linalg.cholesky_ex(h)
    if bool(info.any()):
        return nearest(weight, scale)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    free = weight[..., order].clone()
    codes = torch.empty_like(free)
    for first in range(0, free.shape[-1], BLOCK):
        last = min(first + BLOCK, free.shape[-1])
        errors = torch.empty_like(free[..., first:last])
        for k in range(first, last):
            column = free[..., k]
            q = nearest(column, scale[..., 0])
            codes[..., k] = q
            error = (column - q * scale[..., 0]) / upper[:, k, k].unsqueeze(1)
            free[..., k:last] -= error.unsqueeze(-1) * upper[:, k, k:last].unsqueeze(1)
            errors[..., k - first] = error
        free[..., last:] -= errors @ upper[:, first:last, last:]
    result = torch.empty_like(codes)
    result[..., order] = codes
    return result


def _descend(
    h: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Each code in turn set to the best one, the others given."""
    codes = codes.clone()
    step = scale[..., 0]
    for _ in range(sweeps):
        slope = (codes * scale - weight) @ h  # half the form's gradient
        changed = False
        for first in range(0, codes.shape[-1], BLOCK):
            last = min(first + BLOCK, codes.shape[-1])
            moved = torch.zeros_like(codes[..., first:last])
            for k in range(first, last):
                wanted = codes[..., k] - slope[..., k] / (h[:, k, k].unsqueeze(1) * step)
                q = wanted.round().clamp(*WEIGHT_RANGE)
                delta = (q - codes[..., k]) * step
                codes[..., k] = q
                moved[..., k - first] = delta
                slope[..., k:last] += delta.unsqueeze(-1) * h[:, k, k:last].unsqueeze(1)
            if bool(moved.any()):
                changed = True
                slope[..., :first] += moved @ h[:, first:last, :first]
                slope[..., last:] += moved @ h[:, first:last, last:]
                # Columns of the block itself that were passed already.
                slope[..., first:last] = (codes[..., :] * scale - weight) @ h[:, :, first:last]
        if not changed:
            break
    return codes
