"""BatchNorm re-estimation, after folding: an int8 layer's output gets back the mean and spread that float's has.

    y'' = (y' - mean(y')) rho + mean(y),   rho = std(y) / std(y')       per channel, y float, y' int8
    that is  scale_w'' = rho scale_w,  b'' = (b' - mean(y')) rho + mean(y)

Re-estimating the running statistics on the int8 model alone would also teach the model that calibration data are not
training data. Measuring both models on the same data leaves what quantization changed: mean'' = mean + (mean(y') -
mean(y)), var'' = var var(y') / var(y). Only layers into which a BatchNorm was folded are touched, in order of
execution. A weight with one scale for all channels can't take up rho: there the mean alone is corrected.

Source: Sun et al. 2019, "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", section
3.2, which re-tunes the statistics of a quantized model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantflow.algorithms.outcome import Change, Material, Outcome, db
from quantflow.algorithms.simulate import Layer, shared_weight, walk
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import LayerNumbers, Refined

if TYPE_CHECKING:
    from quantflow.schema import BatchNormAlgorithm

NAME = "batchnorm"
#: rho stays within 1 / MOST and MOST: a channel that nearly died would be blown up.
MOST = 2.0


def batchnorm(
    settings: BatchNormAlgorithm, prepared: Prepared, refined: Refined, material: Material
) -> tuple[Refined, Outcome]:
    """New weight scales and biases behind folded BatchNorms."""
    changes: list[Change] = []
    skipped: list[tuple[str, str]] = []

    def on_layer(layer: Layer) -> LayerNumbers | None:
        if "batch_norm" not in layer.planned.unit.anchor.meta:
            skipped.append((layer.name, "no BatchNorm was folded into it"))
            return None
        if not layer.planned.allows(NAME) or shared_weight(layer.planned):
            why = "another op reads its weight" if layer.planned.allows(NAME) else "the recipe says so"
            skipped.append((layer.name, why))
            return None
        before = refined.layers[layer.name]
        real, found = (_rows(layer, list(y)) for y in (layer.float_outputs, layer.run(before)))
        mean, mean_found = real.mean(1, keepdim=True), found.mean(1, keepdim=True)
        rho = (real - mean).square().mean(1).sqrt() / (found - mean_found).square().mean(1).sqrt()
        rho = torch.nan_to_num(rho, nan=1.0, posinf=1.0).clamp(1 / MOST, MOST)
        if before.scale.numel() == 1:
            rho = torch.ones_like(rho)
        bias = torch.zeros_like(rho) if before.bias is None else before.bias.to(rho.device)
        bias = (bias - mean_found.flatten()) * rho + mean.flatten()
        signal = float(real.square().sum())
        after = (found - mean_found) * rho.unsqueeze(1) + mean
        was, now = (float((real - y).square().sum()) for y in (found, after))
        changes.append(Change(layer.name, db(signal, was), db(signal, min(was, now))))
        if not now < was:
            return None
        return replace(before, scale=before.scale * rho[: before.scale.numel()].cpu(), bias=bias.cpu())

    result = walk(prepared, refined, material.first(settings.samples), on_layer, material.update, material.place)
    return result, Outcome("SQNR of the layer's output, dB", tuple(changes), tuple(skipped))


def _rows(layer: Layer, outputs: list[torch.Tensor]) -> torch.Tensor:
    """(channels, everything else), float32."""
    axis = layer.channel_axis()
    return torch.cat([y.movedim(axis, 0).flatten(1) for y in outputs], 1)
