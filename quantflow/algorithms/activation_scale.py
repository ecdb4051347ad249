"""Activation ranges by what the layers that read them compute.

    minimize over r:  sum over readers  || W (Q_r(x) - x) ||^2 / || W x ||^2

r is the measured range with its ends cut by factors from a grid; x are the float model's values. A quarter of the
samples is held out: a range that does not help there, too, is left as it was.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1, with the layer's output in
place of the tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import fx

from quantflow.algorithms.gram import grouped, windows_of
from quantflow.algorithms.outcome import Change, Material, Outcome, db
from quantflow.algorithms.simulate import on_grid
from quantflow.ir.binding import bind
from quantflow.ir.graph import interpret
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.units import CORE
from quantflow.numerics.affine import QParams, activation_qparams
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined, float_numbers

if TYPE_CHECKING:
    from quantflow.schema import ActivationScaleAlgorithm

NAME = "activation_scale"
MEASURE = "SQNR of what the readers of the activation compute, on held-out samples, dB"
#: Windows of each layer that are looked at, and values in them.
WINDOWS, VALUES = 4096, 4_000_000
#: One batch in so many only judges.
HELD_OUT = 4


def activation_scale(
    settings: ActivationScaleAlgorithm, prepared: Prepared, refined: Refined, material: Material
) -> tuple[Refined, Outcome]:
    """Better scales for the activations that int8 linear ops read."""
    plan = prepared.plan
    readers: dict[str, list[PlannedUnit]] = {}
    closed: set[str] = set()
    for p in plan.units:
        if p.is_int8 and p.unit.kind == CORE:
            root = plan.codes[p.unit.inputs[0].name]
            readers.setdefault(root, []).append(p)
            if not p.allows(NAME):
                closed.add(root)
    seen = _seen(settings, prepared, [p for found in readers.values() for p in found], material)
    changes, skipped = [], [(prepared.layers[root], "the recipe says so") for root in sorted(closed)]
    for root, units in readers.items():
        if root in closed:
            continue
        old, spec = refined.qparams[root], plan.specs[root]
        fit, held_out = ([(seen[p.unit.name][part], _rows(prepared, p, material)) for p in units] for part in (0, 1))
        qscheme = spec.qscheme if old.dtype == spec.dtype else "affine"  # the other dtype: made unsigned before
        ranged = partial(activation_qparams, dtype=old.dtype, qscheme=qscheme, reduce_range=plan.reduce_range)
        best = _searched(settings, old, qscheme == "symmetric", ranged, fit)
        was, now = (_error(held_out, qparams) for qparams in (old, best))
        if now < was:
            refined = refined.with_qparams(root, best)
        changes.append(Change(prepared.layers[root], db(len(units), was), db(len(units), min(was, now))))
    return refined, Outcome(MEASURE, tuple(changes), tuple(skipped))


Layers = list[tuple[torch.Tensor, torch.Tensor]]


def _searched(
    settings: ActivationScaleAlgorithm,
    old: QParams,
    is_symmetric: bool,
    ranged: Callable[[float, float], QParams],
    layers: Layers,
) -> QParams:
    """The best range: both ends cut alike where it is symmetric, else first the upper end, then the lower one."""
    qmin, qmax = old.range
    low, high = (qmin - old.zero_point) * old.scale, (qmax - old.zero_point) * old.scale
    factors = [1 - (1 - settings.smallest) * step / settings.steps for step in range(settings.steps + 1)]
    judged = {old: _error(layers, old)}

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        for ends in candidates:
            qparams = ranged(*ends)
            if qparams not in judged:
                judged[qparams] = _error(layers, qparams)
        return min(candidates, key=lambda ends: judged[ranged(*ends)])

    if is_symmetric:
        best([(-high * factor, high * factor) for factor in factors])
    else:
        _, high = best([(low, high * factor) for factor in factors])
        best([(low * factor, high) for factor in factors])
    return min(judged, key=judged.__getitem__)


def _error(layers: Layers, qparams: QParams) -> float:
    """Relative squared error, summed over the readers. Layers: windows (groups, places, k), weight by group."""
    total = 0.0
    for x, weight in layers:
        wanted = x @ weight.transpose(1, 2)
        signal = float(wanted.square().sum())
        noise = float(((on_grid(x, qparams) - x) @ weight.transpose(1, 2)).square().sum())
        total += noise / signal if signal > 0 else 0.0
    return total


def _rows(prepared: Prepared, planned: PlannedUnit, material: Material) -> torch.Tensor:
    return grouped(planned, float_numbers(prepared.graph, planned)[0]).to(material.place)


def _seen(
    settings: ActivationScaleAlgorithm, prepared: Prepared, units: list[PlannedUnit], material: Material
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Windows of every unit's float input: those to fit on, and those of the last batches."""
    graph, generator = prepared.graph.at(material.place), torch.Generator().manual_seed(material.seed)
    batches = material.first(settings.samples)
    parts: dict[str, list[torch.Tensor]] = {p.unit.name: [] for p in units}
    read: dict[fx.Node, list[PlannedUnit]] = {}
    for p in units:
        read.setdefault(p.unit.inputs[0], []).append(p)

    def on_value(node: fx.Node, x: torch.Tensor) -> None:
        for p in read.get(node, ()):
            windows = windows_of(p, x, generator)
            groups, places, k = windows.shape
            kept = max(1, min(WINDOWS, VALUES // (groups * k)) // len(batches))
            parts[p.unit.name].append(windows[:, :: max(1, places // kept)].clone())

    with torch.inference_mode():
        for done, batch in enumerate(batches, start=1):
            interpret(graph, bind(graph, batch.args, batch.kwargs), on_value)
            material.update(done, len(batches))
    judges = max(1, len(batches) // HELD_OUT)
    return {name: (torch.cat(w[:-judges] or w, 1), torch.cat(w[-judges:], 1)) for name, w in parts.items()}
