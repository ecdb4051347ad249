"""AdaRound: whether each weight is rounded up or down is learned, for what the layer computes.

    w' = s clamp(floor(w / s) + h(V), -127, 127),    h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    minimize over V:  (w' - w) H (w' - w)^T + lambda sum (1 - |2 h(V) - 1|^beta)

by Adam, beta falling from 20 to 2 so that h settles at 0 or 1. The squared error is the quadratic form of `gram.py`, so
that a step costs the same however many samples H was measured on; the activation behind the layer is left out of it.

Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equations 20 to 24.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from quantflow.algorithms.outcome import Material, Outcome
from quantflow.algorithms.rounding import damped, form, round_layers
from quantflow.numerics.affine import WEIGHT_RANGE
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined

if TYPE_CHECKING:
    from quantflow.schema import AdaroundAlgorithm

#: The stretched sigmoid's ends (zeta, gamma), its regularizer's exponents, and the share of steps before it sets in.
ZETA, GAMMA = 1.1, -0.1
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM = 0.2
_MOMENTS = (0.9, 0.999)


def adaround(
    settings: AdaroundAlgorithm, prepared: Prepared, refined: Refined, material: Material
) -> tuple[Refined, Outcome]:
    """Round the weights of every int8 linear op that may be changed, in order of execution."""

    def solve(h: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        h = damped(h, settings.damping)
        found = _learned(h, weight / scale, settings)
        better = form(h, found * scale - weight) <= form(h, codes * scale - weight)
        return torch.where(better.unsqueeze(-1), found, codes)

    return round_layers("adaround", settings, prepared, refined, material, solve)


def _learned(h: torch.Tensor, target: torch.Tensor, settings: AdaroundAlgorithm) -> torch.Tensor:
    """Codes for `target` = w / s. H is divided by its mean diagonal, so that lambda means the same everywhere."""
    h = h / h.diagonal(dim1=1, dim2=2).mean(1).reshape(-1, 1, 1)
    floor = target.floor()
    v = torch.logit(((target - floor - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4))
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(1, settings.iterations + 1):
        sigmoid = v.sigmoid()
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        soft = stretched.clamp(0, 1)
        codes = floor + soft
        gradient = 2 * (codes.clamp(*WEIGHT_RANGE) - target) @ h
        done = step / settings.iterations
        if done > WARM:
            # Cosine from the first beta to the last.
            progress = (done - WARM) / (1 - WARM)
            beta = LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1 + math.cos(progress * math.pi))
            away = 2 * soft - 1
            gradient -= settings.regularization * 2 * beta * away.abs().pow(beta - 1) * away.sign()
        gradient *= (ZETA - GAMMA) * sigmoid * (1 - sigmoid)
        gradient *= (stretched > 0) & (stretched < 1)
        mean.mul_(_MOMENTS[0]).add_(gradient, alpha=1 - _MOMENTS[0])
        square.mul_(_MOMENTS[1]).addcmul_(gradient, gradient, value=1 - _MOMENTS[1])
        corrected = square.div(1 - _MOMENTS[1] ** step).sqrt_().add_(1e-8)
        v -= settings.learning_rate / (1 - _MOMENTS[0] ** step) * mean / corrected
    up = (v.sigmoid() * (ZETA - GAMMA) + GAMMA) >= 0.5
    return (floor + up).clamp(*WEIGHT_RANGE)
