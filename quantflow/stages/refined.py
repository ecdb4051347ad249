"""Refined: every number that the integer program will hold, before it is written.

`unrefined` rounds each weight to its nearest code; the algorithms of `quantflow.algorithms` make better ones of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import fx

from quantflow.errors import CalibrationError
from quantflow.ir.graph import Graph, arguments
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.units import CORE, RECURRENCE
from quantflow.numerics.affine import QParams, activation_qparams, dequantize_weight, quantize_weight, weight_scale
from quantflow.numerics.observers import weight_max_abs
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.prepare import Prepared


@dataclass(frozen=True)
class LayerNumbers:
    """One int8 linear op.

    Attributes:
        codes: int8, the weight's shape.
        scale: (1,) or (out_channels,) float32.
        bias: (out_channels,) float32, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    @property
    def axis(self) -> int | None:
        """The axis along which scales differ."""
        return 0 if self.scale.numel() > 1 else None

    def weight(self) -> torch.Tensor:
        """What the codes stand for, float32."""
        return dequantize_weight(self.codes, self.scale, self.axis)


@dataclass(frozen=True)
class Refined:
    """The numbers of a program.

    Attributes:
        qparams: scale and zero point by the value that decides them (the values of `Plan.codes`).
        layers: int8 convolutions and linears by unit name.
    """

    qparams: Mapping[str, QParams]
    layers: Mapping[str, LayerNumbers]

    def with_layer(self, name: str, numbers: LayerNumbers) -> Refined:
        return replace(self, layers={**self.layers, name: numbers})

    def with_qparams(self, root: str, qparams: QParams) -> Refined:
        return replace(self, qparams={**self.qparams, root: qparams})


def unrefined(prepared: Prepared, table: CalibrationTable) -> Refined:
    """Ranges as measured, weights rounded to the nearest code, biases as they are.

    Raises:
        CalibrationError: the table lacks a value that the plan needs, or a weight or bias holds NaN or Inf.
    """
    layers = {
        p.unit.name: nearest_codes(prepared.graph, p)
        for p in prepared.plan.units
        if p.is_int8 and p.unit.kind in (CORE, RECURRENCE)
    }
    return Refined(measured_qparams(prepared, table), layers)


def measured_qparams(prepared: Prepared, table: CalibrationTable) -> dict[str, QParams]:
    """Root value → qparams, from the merged observers of all values that share them."""
    plan = prepared.plan
    members: dict[str, list[str]] = {}
    for value in prepared.observed:
        members.setdefault(plan.codes[value], []).append(value)
    qparams = {}
    for root, values in members.items():
        missing = [value for value in values if value not in table.observers]
        if missing:
            raise CalibrationError(f"layer {prepared.layers[missing[0]]}: the calibration table has no entry for it")
        merged = reduce(lambda a, b: a.merge(b), (table.observers[value] for value in values))
        spec = plan.specs[root]
        low, high = merged.range()
        qparams[root] = activation_qparams(
            low, high, dtype=spec.dtype, qscheme=spec.qscheme, reduce_range=plan.reduce_range
        )
    return qparams


def nearest_codes(graph: Graph, planned: PlannedUnit) -> LayerNumbers:
    """A linear op's weight rounded to the nearest code, in the range that its observer chose."""
    unit, spec = planned.unit, planned.qconfig.weight
    weight, bias = float_numbers(graph, planned)
    axis = 0 if spec.granularity == "per_channel" else None
    try:
        scale = weight_scale(weight_max_abs(weight, spec, axis)).reshape(-1)
    except ValueError as error:
        raise CalibrationError(f"layer {unit.name}: its weight holds {error}") from error
    if bias is not None and not bool(bias.isfinite().all()):
        raise CalibrationError(f"layer {unit.name}: its bias holds NaN or Inf")
    return LayerNumbers(quantize_weight(weight, scale, axis), scale, bias)


def float_numbers(graph: Graph, planned: PlannedUnit) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear op's float weight and bias."""
    ops = arguments(planned.unit.anchor)
    weight, bias = ops["weight"], ops["bias"]
    assert isinstance(weight, fx.Node), "the plan keeps other layers float"
    return graph.constants[str(weight.target)], None if bias is None else graph.constants[str(bias.target)]


def left_over(weight: torch.Tensor, first: LayerNumbers) -> LayerNumbers:
    """What a weight's codes leave over, w - scale * q, as int8 codes of its own: w = scale * q + scale' * q' nearly."""
    low = weight - first.weight()
    axis = first.axis
    largest = low.abs().flatten(1).amax(1) if axis == 0 else low.abs().amax().reshape(1)
    scale = weight_scale(largest)
    return LayerNumbers(quantize_weight(low, scale, axis), scale, None)


def left_over_qparams(first: QParams) -> QParams:
    """Codes for what rounding to other codes leaves over of a value: at most half a step of these."""
    half = first.scale / 2
    return activation_qparams(-half, half, dtype="int8", qscheme="symmetric")
