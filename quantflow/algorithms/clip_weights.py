"""Weight clipping: the scale per channel (or tensor) that minimises the squared error of the weights.

    minimize over a in (0, 1]:  sum (w - Q(w))^2  with scale = a max|w| / 127

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1 (MSE ranges); the search is that
of the weight observer `mse`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantflow.algorithms.outcome import Change, Material, Outcome
from quantflow.ir.units import CORE
from quantflow.numerics.measures import sqnr_db
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined, float_numbers, nearest_codes

if TYPE_CHECKING:
    from quantflow.schema import ClipWeightsAlgorithm

NAME = "clip_weights"


def clip_weights(
    _settings: ClipWeightsAlgorithm, prepared: Prepared, refined: Refined, material: Material
) -> tuple[Refined, Outcome]:
    """Scales, nearest codes and float biases anew: what a bias made good belonged to other codes."""
    changes, skipped = [], []
    layers = [p for p in prepared.plan.units if p.is_int8 and p.unit.kind == CORE]
    for done, planned in enumerate(layers, start=1):
        name = planned.unit.name
        if not planned.allows(NAME):
            skipped.append((name, "the recipe says so"))
            continue
        spec = planned.qconfig.weight.model_copy(update={"observer": "mse"})
        searching = replace(planned, qconfig=planned.qconfig.model_copy(update={"weight": spec}))
        before = refined.layers[name]
        after = nearest_codes(prepared.graph, searching)
        weight, _ = float_numbers(prepared.graph, planned)
        was, now = sqnr_db(weight, before.weight()), sqnr_db(weight, after.weight())
        if now > was:
            refined = refined.with_layer(name, after)
        changes.append(Change(name, was, max(was, now)))
        material.update(done, len(layers))
    return refined, Outcome("SQNR of the weight, dB", tuple(changes), tuple(skipped))
