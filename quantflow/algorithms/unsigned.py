"""Unsigned codes: activations that are never negative use all 256 codes instead of 128.

    q = clamp(round(x / s), 0, 255),   s = max(x) / 255        in place of [-128, 127] and max(x) / 127

The quantization stays symmetric, with zero point 0, and 8 bits wide, and the step is half as large: 6 dB less rounding
noise in what a ReLU writes. That x >= 0 is known from the graph alone, so no data can be clipped at 0.

Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference: A whitepaper",
section 2.2, the unsigned case of the symmetric quantizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantflow.algorithms.outcome import Change, Material, Outcome
from quantflow.ir.plan import nonnegative_values
from quantflow.numerics.affine import QParams, activation_qparams
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined

if TYPE_CHECKING:
    from quantflow.schema import UnsignedAlgorithm

NAME = "unsigned"
MEASURE = "step of the codes, in units of the activation"


def unsigned(
    _settings: UnsignedAlgorithm, prepared: Prepared, refined: Refined, _material: Material
) -> tuple[Refined, Outcome]:
    """uint8 codes with zero point 0 for every symmetric int8 activation that the graph keeps from being negative."""
    plan, nonnegative = prepared.plan, nonnegative_values(prepared.plan)
    signed = {root for name, root in plan.codes.items() if name not in nonnegative}
    kept = {plan.codes[p.unit.output.name] for p in plan.units if p.writes_codes and not p.allows(NAME)}
    as_unsigned = activation_qparams(0, 1, dtype="uint8", qscheme="affine", reduce_range=plan.reduce_range)
    as_signed = activation_qparams(0, 1, dtype="int8", qscheme="symmetric", reduce_range=plan.reduce_range)
    finer = as_unsigned.scale / as_signed.scale
    changes: list[Change] = []
    for root, before in refined.qparams.items():
        if before.dtype != "int8" or before.zero_point != 0 or root in signed | kept:
            continue
        after = QParams("uint8", before.scale * finer, 0)
        refined = refined.with_qparams(root, after)
        changes.append(Change(prepared.layers[root], before.scale, after.scale))
    skipped = tuple((prepared.layers[root], "the recipe says so") for root in sorted(kept - signed))
    return refined, Outcome(MEASURE, tuple(changes), skipped)
