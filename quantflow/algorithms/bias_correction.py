"""Bias correction: the bias takes up the mean of what quantization does to a layer's output.

    b' = b + E[y] - E[y']        per output channel, y float, y' int8

Two ways to take the expectation:

    fast  y' = W' x: rounding of the weights alone, on the float model's inputs. One float pass, all layers at once;
          E[W x] - E[W' x] = (W - W') E[x], with E[x] per input channel (a window's padding is left out).
    full  y' = W' x': on quantized inputs, layer after layer, each behind the corrected ones.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2;
the sequential form is that of Finkelstein et al. 2019, "Fighting Quantization Bias With Bias".
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from quantflow.algorithms.outcome import Change, Material, Outcome
from quantflow.algorithms.simulate import Layer, walk
from quantflow.ir.binding import bind
from quantflow.ir.graph import arguments, interpret
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.units import CORE
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import LayerNumbers, Refined, float_numbers

if TYPE_CHECKING:
    from quantflow.schema import BiasCorrectionAlgorithm

NAME = "bias_correction"
MEASURE = "largest mean error of a channel, in units of the layer's output"


def bias_correction(
    settings: BiasCorrectionAlgorithm, prepared: Prepared, refined: Refined, material: Material
) -> tuple[Refined, Outcome]:
    """Correct the bias of every int8 linear op that may be changed."""
    layers = [p for p in prepared.plan.units if p.is_int8 and p.unit.kind == CORE]
    skipped = tuple((p.unit.name, "the recipe says so") for p in layers if not p.allows(NAME))
    allowed = [p for p in layers if p.allows(NAME)]
    correct = _fast if settings.method == "fast" else _full
    refined, changes = correct(settings, prepared, refined, material, allowed)
    return refined, Outcome(MEASURE, tuple(changes), skipped)


def _full(
    settings: BiasCorrectionAlgorithm,
    prepared: Prepared,
    refined: Refined,
    material: Material,
    allowed: list[PlannedUnit],
) -> tuple[Refined, list[Change]]:
    names = {p.unit.name for p in allowed}
    changes: list[Change] = []

    def on_layer(layer: Layer) -> LayerNumbers | None:
        if layer.name not in names:
            return None
        axis, numbers = layer.channel_axis(), refined.layers[layer.name]
        shift = torch.zeros(numbers.codes.shape[0], dtype=torch.float64, device=material.place)
        count = 0
        for real, found in zip(layer.float_outputs, layer.run(numbers), strict=True):
            rows = (real - found).movedim(axis, 0).flatten(1)
            shift += rows.sum(1, dtype=torch.float64)
            count += rows.shape[1]
        corrected, change = _shifted(layer.name, numbers, shift.cpu() / max(count, 1))
        changes.append(change)
        return corrected

    return walk(prepared, refined, material.first(settings.samples), on_layer, material.update, material.place), changes


def _fast(
    settings: BiasCorrectionAlgorithm,
    prepared: Prepared,
    refined: Refined,
    material: Material,
    allowed: list[PlannedUnit],
) -> tuple[Refined, list[Change]]:
    graph = prepared.graph.at(material.place)
    axes = {p.unit.inputs[0]: -1 if p.unit.op == "linear" else 1 for p in allowed}
    sums: dict[fx.Node, torch.Tensor] = {}
    counts: dict[fx.Node, int] = {}

    def on_value(node: fx.Node, x: torch.Tensor) -> None:
        if node in axes:
            places = x.sum(tuple(range(2, x.dim()))) if axes[node] == 1 else x.flatten(0, -2)
            total = places.sum(0, dtype=torch.float64)
            sums[node] = sums.get(node, 0) + total
            counts[node] = counts.get(node, 0) + x.numel() // total.numel()

    batches = material.first(settings.samples)
    with torch.inference_mode():
        for done, batch in enumerate(batches, start=1):
            interpret(graph, bind(graph, batch.args, batch.kwargs), on_value)
            material.update(done, len(batches))
    changes = []
    for planned in allowed:
        node, numbers = planned.unit.inputs[0], refined.layers[planned.unit.name]
        mean = sums[node].cpu() / max(counts[node], 1)
        weight, bias = float_numbers(prepared.graph, planned)
        lost = (weight.double() - numbers.weight().double()).reshape(*weight.shape[:2], -1).sum(2)
        groups = arguments(planned.unit.anchor).get("groups", 1)
        per_group = lost.reshape(groups, -1, lost.shape[1]) @ mean.reshape(groups, -1, 1)
        # From the float bias on: what was corrected before is part of the shift.
        corrected, change = _shifted(planned.unit.name, replace(numbers, bias=bias), per_group.flatten())
        refined = refined.with_layer(planned.unit.name, corrected)
        changes.append(change)
    return refined, changes


def _shifted(name: str, numbers: LayerNumbers, shift: torch.Tensor) -> tuple[LayerNumbers, Change]:
    """The numbers with `shift` added to the bias; what is left of a mean error after it is 0 by construction."""
    shift = torch.nan_to_num(shift.float(), nan=0.0, posinf=0.0, neginf=0.0)
    bias = shift if numbers.bias is None else numbers.bias + shift
    return replace(numbers, bias=bias), Change(name, float(shift.abs().max()), 0.0)
