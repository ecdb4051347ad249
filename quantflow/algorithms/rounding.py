"""Rounding weights anew, layer after layer: what `gptq` and `adaround` share.

Each sees H of its layer (see `gram.py`) on the inputs that the int8 layers before it give, and returns codes. The mean
of what is left goes into the bias. The last part of the samples is held out: a layer keeps the codes it had where new
ones are no better there. With `refit` those that are better are then found again, on all samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from quantflow.algorithms.gram import MAX_WINDOW, Gram, gram_of, grouped
from quantflow.algorithms.outcome import Change, Material, Outcome, db
from quantflow.algorithms.simulate import Layer, shared_weight, walk, weight_shape
from quantflow.ir.plan import PlannedUnit
from quantflow.numerics.affine import WEIGHT_RANGE
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import LayerNumbers, Refined, float_numbers

MEASURE = "SQNR of the layer's output on held-out samples, dB, from rounding its weight alone"
#: One batch in so many only judges.
HELD_OUT = 4

#: (H, weight, scale, codes so far) → codes; all (groups, outputs, k), scale (groups, outputs, 1), H (groups, k, k).
Solve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Limits(Protocol):
    """The settings that every rounding has."""

    @property
    def samples(self) -> int: ...
    @property
    def refit(self) -> bool: ...
    @property
    def max_seconds(self) -> float: ...


def round_layers(
    name: str, limits: Limits, prepared: Prepared, refined: Refined, material: Material, solve: Solve
) -> tuple[Refined, Outcome]:
    """New codes and biases for every int8 linear op that allows it, in order of execution."""
    changes: list[Change] = []
    skipped: list[tuple[str, str]] = []
    late: list[str] = []
    generator = torch.Generator().manual_seed(material.seed)
    end = time.monotonic() + limits.max_seconds

    def on_layer(layer: Layer) -> LayerNumbers | None:
        planned, before = layer.planned, refined.layers[layer.name]
        if reason := _why_not(planned, name):
            skipped.append((layer.name, reason))
            return None
        if time.monotonic() > end:
            late.append(layer.name)
            return None
        judges = max(1, len(layer.inputs) // HELD_OUT)
        fit = gram_of(layer, layer.inputs[:-judges] or layer.inputs, generator)
        held_out = gram_of(layer, layer.inputs[-judges:], generator)
        whole, bias = float_numbers(prepared.graph, planned)
        where = fit.h.device
        weight = grouped(planned, whole).to(where)
        codes = grouped(planned, before.codes).to(where, torch.float32)
        scale = before.scale.to(where).expand(whole.shape[0]).reshape(*weight.shape[:2], 1)
        found = solve(fit.h, weight, scale, codes)
        signal, was, now = (
            float(form(held_out.h, w).sum()) for w in (weight, codes * scale - weight, found * scale - weight)
        )
        kept = now < was
        note = "" if kept else "kept the codes it had: new ones were no better on held-out samples"
        changes.append(Change(layer.name, db(signal, was), db(signal, min(was, now)), note))
        if kept and limits.refit:
            fit = gram_of(layer, layer.inputs, generator)
            found = solve(fit.h, weight, scale, found)
        return _with_bias(before, found, found * scale - weight, fit, bias) if kept else None

    result = walk(prepared, refined, material.first(limits.samples), on_layer, material.update, material.place)
    stopped = f"{name}: stopped after max_seconds={limits.max_seconds:g}; {len(late)} layers keep the codes they had"
    return result, Outcome(MEASURE, tuple(changes), tuple(skipped), (stopped,) if late else ())


def _with_bias(
    before: LayerNumbers, codes: torch.Tensor, difference: torch.Tensor, gram: Gram, bias: torch.Tensor | None
) -> LayerNumbers:
    """b' = b - (w' - w) mean(x)."""
    shift = -(difference * gram.mean.unsqueeze(1)).sum(2).reshape(-1).cpu()
    codes = codes.reshape(before.codes.shape).to(torch.int8).cpu()
    return replace(before, codes=codes, bias=shift if bias is None else bias + shift)


def _why_not(planned: PlannedUnit, algorithm: str) -> str:
    """Why a layer's weight stays as it is; empty if it may be rounded anew."""
    if not planned.allows(algorithm):
        return "the recipe says so"
    if shared_weight(planned):
        return "another op reads its weight"
    window = torch.Size(weight_shape(planned)[1:]).numel()
    return f"a window of {window} values is too large (at most {MAX_WINDOW})" if window > MAX_WINDOW else ""


def form(h: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """d H d^T per output: (groups, outputs, k) → (groups, outputs)."""
    return ((difference @ h) * difference).sum(-1)


def damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping mean(diag H) I: inputs that were never seen to vary still have a weight."""
    level = damping * h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    return h + level.reshape(-1, 1, 1) * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)


def nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest codes, still floating point."""
    return (weight / scale).round().clamp(*WEIGHT_RANGE)
