"""What each int8 addition, product and concatenation costs by itself, and which conversions it spares.

The error is that of the op alone: its operands are the float model's, rounded to their codes, and so is its result,

    y' = Q(Q(a) + Q(b)),   sqnr_db = 10 log10(sum y^2 / sum (y - y')^2)

An operand that exists as codes anyway would have to be dequantized for a float op, and a result that is read as codes
quantized after it: those are the conversions that it spares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.units import ADD, CAT, MUL
from quantflow.numerics.affine import dequantize, quantize
from quantflow.stages.evaluate import ErrorSum
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined

#: Below this an op alone is named in a notice: it would bound the whole model's accuracy.
LOW_DB = 20.0

#: What an int8 join costs is measured on at most this many samples: all operands are held at once.
JOIN_SAMPLES = 8


@dataclass(frozen=True)
class Join:
    """One int8 op of several activations. `op`: add, mul or cat; `fused`: a sum inside a linear op's kernel."""

    layer: str
    op: str
    fused: bool
    sqnr_db: float
    saved_conversions: int


def join_costs(
    prepared: Prepared, refined: Refined, batches: Sequence[Batch], place: torch.device = CPU
) -> tuple[Join, ...]:
    """Measure every int8 add, mul and cat of the plan on float batches, in execution order, on a device."""
    plan = prepared.plan
    written = {p.unit.output.name for p in plan.units if p.is_int8 and p.writes_codes}
    places = {_place(p): p for p in plan.units if p.is_int8 and _operands(p)}
    if not places or prepared.observed_module is not None:
        return ()
    errors, graph = {node: ErrorSum() for node in places}, prepared.graph.at(place)
    for batch in batches:
        kept: dict[fx.Node, torch.Tensor] = {}
        wanted = {operand for p in places.values() for operand in _operands(p)}

        def on_value(
            node: fx.Node, value: Any, kept: dict[fx.Node, torch.Tensor] = kept, wanted: set[fx.Node] = wanted
        ) -> None:
            if node in wanted:
                kept[node] = value
            if node in places:
                errors[node].add(value, _rounded(node, places[node], kept, prepared, refined))

        with torch.inference_mode():
            prepared.passes.run(graph, batch, on_value)
    joins = []
    for node, planned in places.items():
        saved = sum(operand.name in written for operand in _operands(planned)) + planned.writes_codes
        op = planned.unit.kind if planned.unit.residual is None else ADD
        is_fused = planned.unit.residual is not None
        joins.append(Join(str(node.meta["layer"]), op, is_fused, errors[node].sqnr_db, saved))
    return tuple(joins)


def join_notices(joins: Sequence[Join]) -> tuple[str, ...]:
    """The ops that are below LOW_DB by themselves."""
    low = sorted((join for join in joins if join.sqnr_db < LOW_DB), key=lambda join: join.sqnr_db)
    if not low:
        return ()
    named = ", ".join(f"{join.layer} {join.sqnr_db:.1f} dB" for join in low[:5])
    return (
        f"{len(low)} int8 {'op' if len(low) == 1 else 'ops'} of several activations keep less than {LOW_DB:.0f} dB by "
        f"themselves ({named}); layers: {{{low[0].layer}: float}} or policy: {{{low[0].op}: float}} leaves them float",
    )


def _operands(planned: PlannedUnit) -> tuple[fx.Node, ...]:
    """The activations that the op joins; none where the unit is no join."""
    if planned.unit.residual is not None:
        return (_summand(planned), planned.unit.residual)
    return planned.unit.inputs if planned.unit.kind in (ADD, MUL, CAT) else ()


def _place(planned: PlannedUnit) -> fx.Node:
    """The node of the op itself."""
    return (
        next(n for n in planned.unit.nodes if n is not planned.unit.anchor)
        if planned.unit.residual
        else (planned.unit.anchor)
    )


def _summand(planned: PlannedUnit) -> fx.Node:
    """What a linear op with a residual adds it to: its own result, which is not rounded."""
    return planned.unit.anchor


def _rounded(
    node: fx.Node, planned: PlannedUnit, kept: dict[fx.Node, torch.Tensor], prepared: Prepared, refined: Refined
) -> torch.Tensor:
    codes = prepared.plan.codes
    own = _summand(planned) if planned.unit.residual is not None else None

    def on_codes(value: torch.Tensor, name: str) -> torch.Tensor:
        qparams = refined.qparams[codes[name]]
        return dequantize(quantize(value, qparams), qparams)

    def operand(n: fx.Node) -> Any:
        return kept[n] if n is own else on_codes(kept[n], n.name)

    result: torch.Tensor = node.target(*fx.map_arg(node.args, operand), **fx.map_arg(node.kwargs, operand))  # type: ignore[operator]
    # With an activation behind it, what is written is the activation's result.
    return on_codes(result, node.name) if planned.writes_codes and node is planned.unit.output else result
