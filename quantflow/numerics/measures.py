"""How far an int8 result is from its float counterpart."""

from __future__ import annotations

import math

import torch


def sqnr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to quantization-noise ratio, 10 log10(sum x^2 / sum (x - x')^2), in dB.

    Both tensors are of one shape. Identical tensors give inf, a zero reference with noise -inf,
    and a non-finite value anywhere gives nan.
    """
    reference, actual = reference.detach().to(torch.float64), actual.detach().to(torch.float64)
    signal = reference.square().sum().item()
    noise = (reference - actual).square().sum().item()
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def max_error(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """max |x - x'|, in the tensors' own unit; 0 for empty tensors."""
    if reference.numel() == 0:
        return 0.0
    return (reference.detach().to(torch.float64) - actual.detach().to(torch.float64)).abs().max().item()


def cosine(reference: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Cosine between corresponding rows, shape (batch,); everything after the first dimension is one row."""
    a = reference.detach().to(torch.float64).flatten(1)
    b = actual.detach().to(torch.float64).flatten(1)
    return torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-30)


def top1_agreement(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Share of rows (last dimension = classes) whose largest entry is the same."""
    return (reference.argmax(-1) == actual.argmax(-1)).to(torch.float64).mean().item()
