"""Drowned operands: an int8 addition or concatenation with an operand far smaller than the others.

One scale serves the whole result, so what is small in it falls between two codes. Of an operand x_i of y = join(x_1, …)

    kept_i = 10 log10(sum x_i^2 / sum e_i^2)

is measured, e_i the error of the rounded result: of x_i's own part of a concatenation, of the whole sum in an addition.
A join that keeps less than LEAST_DB of an operand which by itself would have GAIN_DB more stays float, where somebody
gains from that: a reader that computes in float or takes a part; of a concatenation, also whoever reads the operand
itself, which has the common scale otherwise. An int8 layer that reads the whole rounds it to one scale all the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from quantflow.algorithms.outcome import Material, db
from quantflow.algorithms.simulate import on_grid
from quantflow.ir.graph import Graph, op_name
from quantflow.ir.ops import MOVING_OPS
from quantflow.ir.plan import Plan, PlannedUnit
from quantflow.ir.units import ADD, CAT, CORE, SIZE
from quantflow.numerics.affine import QParams, activation_qparams
from quantflow.numerics.observers import AbstractObserver, make_observer

#: A join is measured on at most this many samples: all operands are held at once.
SAMPLES = 8
#: Below this an operand is lost; what it has by itself must be this much more.
LEAST_DB, GAIN_DB = 10.0, 6.0
#: How many joins a notice names.
LISTED = 5

_PARTS = ("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow")


def drowned(graph: Graph, plan: Plan, material: Material) -> dict[str, str]:
    """Joins that had better stay float, by layer, with the reason."""
    readers = _Readers(plan)
    joins = {place: p for p in plan.units if (place := _place(p)) is not None and readers.gain(p)}
    if not joins:
        return {}
    operands = {operand for p in joins.values() for operand in _operands(p)}
    kept = operands | joins.keys() | {p.unit.output for p in joins.values()}
    roots = {plan.codes[node.name] for node in kept if node.name in plan.codes}
    shared = {root: make_observer(plan.specs[root]) for root in roots}
    own = {node: make_observer(plan.specs[plan.codes[node.name]]) for node in operands if node.name in plan.codes}
    observed: set[str | fx.Node] = set()
    values: list[dict[fx.Node, torch.Tensor]] = []

    def on_value(node: fx.Node, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
            return
        if not bool(value.isfinite().all()):
            return
        root = plan.codes.get(node.name)
        if root in shared:
            shared[root].observe(value)
            observed.add(root)
        if node in own:
            own[node].observe(value)
            observed.add(node)
        if node in kept:
            values[-1][node] = value.clone()  # a later op may write to it

    with torch.inference_mode():
        for batch in material.first(SAMPLES):
            values.append({})
            material.passes.run(graph, batch, on_value)
        grids = {root: _qparams(plan, observer) for root, observer in shared.items() if root in observed}
        alone = {node: _qparams(plan, observer) for node, observer in own.items() if node in observed}
        found = {}
        for place, planned in joins.items():
            lost = _lost(plan, place, planned, values, grids, alone)
            if lost is not None:
                found[str(place.meta["layer"])] = lost
    return found


def drowned_notice(left_float: Mapping[str, str]) -> tuple[str, ...]:
    """What a user must hear of the joins that stay float."""
    if not left_float:
        return ()
    named = "; ".join(f"{layer}: {reason}" for layer, reason in list(left_float.items())[:LISTED])
    more = f"; and {len(left_float) - LISTED} more" if len(left_float) > LISTED else ""
    joins, first = "join stays" if len(left_float) == 1 else "joins stay", next(iter(left_float))
    return (f"{len(left_float)} {joins} float ({named}{more}); layers: {{{first}: int8}} overrules that",)


def _lost(
    plan: Plan,
    place: fx.Node,
    planned: PlannedUnit,
    values: list[dict[fx.Node, torch.Tensor]],
    grids: Mapping[str, QParams],
    alone: Mapping[fx.Node, QParams],
) -> str | None:
    """Why the join loses an operand; None where it loses none."""
    output, own_sum = planned.unit.output, planned.unit.anchor if planned.unit.residual is not None else None
    if any(n.name in plan.codes and plan.codes[n.name] not in grids for n in (output, *_operands(planned))):
        return None
    worst = None
    for operand in dict.fromkeys(_operands(planned)):
        signal = noise = least = 0.0
        for seen in values:
            if operand not in seen or output not in seen:
                return None
            x = seen[operand]
            if planned.unit.kind == CAT:
                error = on_grid(x, grids[plan.codes[operand.name]]) - x
            else:

                def rounded(n: fx.Node, seen: Mapping[fx.Node, torch.Tensor] = seen) -> torch.Tensor:
                    return seen[n] if n is own_sum else on_grid(seen[n], grids[plan.codes[n.name]])

                args, kwargs = fx.map_arg(place.args, rounded), fx.map_arg(place.kwargs, rounded)
                result = place.target(*args, **kwargs)  # type: ignore[operator]
                if output is place and planned.writes_codes:
                    result = on_grid(result, grids[plan.codes[output.name]])
                error = result - seen[place]
            signal += float(x.double().square().sum())
            noise += float(error.double().square().sum())
            if operand in alone:
                least += float((on_grid(x, alone[operand]) - x).double().square().sum())
        kept = db(signal, noise)
        if (
            signal > 0
            and kept < LEAST_DB
            and db(signal, least) >= kept + GAIN_DB
            and (worst is None or kept < worst[0])
        ):
            worst = kept, str(operand.meta["layer"])
    if worst is None:
        return None
    return f"int8 would keep {worst[0]:.1f} dB of its operand {worst[1]}, which is small beside the others"


def _place(planned: PlannedUnit) -> fx.Node | None:
    """The node of an int8 addition or concatenation; None for anything else."""
    unit = planned.unit
    if not planned.is_int8:
        return None
    if unit.kind == CORE and unit.residual is not None:
        return next(node for node in unit.nodes if node is not unit.anchor)
    return unit.anchor if unit.kind in (ADD, CAT) else None


def _operands(planned: PlannedUnit) -> tuple[fx.Node, ...]:
    unit = planned.unit
    return unit.inputs if unit.residual is None else (unit.anchor, unit.residual)


def _qparams(plan: Plan, observer: AbstractObserver) -> QParams:
    spec, (low, high) = observer.spec, observer.range()
    return activation_qparams(low, high, dtype=spec.dtype, qscheme=spec.qscheme, reduce_range=plan.reduce_range)


class _Readers:
    """Who reads which value of a plan, and how."""

    def __init__(self, plan: Plan) -> None:
        self._owner = {node: p for p in plan.units for node in p.unit.nodes}

    def gain(self, join: PlannedUnit) -> bool:
        """Whether somebody gains where the join is float."""
        is_cat = join.unit.kind == CAT
        if self._in_float(join.unit.output, parts=is_cat):
            return True
        held = (value for operand in join.unit.inputs for value in self._back(operand))
        return is_cat and any(self._by_itself(value, join) for value in held)

    def _in_float(self, value: fx.Node, *, parts: bool) -> bool:
        """Whether the value is read in float, or a part of it is where `parts` says that this counts."""
        for user in value.users:
            if user.op == "output" or user.target is operator.getitem:
                return True
            reader = self._owner.get(user)
            if reader is None or reader.unit.kind == SIZE or reader.unit.output is value:
                continue
            if not reader.is_int8 or (parts and op_name(user) in _PARTS):
                return True
            if reader.unit.kind in MOVING_OPS and self._in_float(reader.unit.output, parts=parts):
                return True
        return False

    def _back(self, value: fx.Node) -> Iterator[fx.Node]:
        """The value and what it was moved from, which have its scale."""
        yield value
        producer = self._owner.get(value)
        if producer is not None and producer.is_int8 and producer.unit.kind in MOVING_OPS and producer.unit.kind != CAT:
            yield from self._back(producer.unit.inputs[0])

    def _by_itself(self, value: fx.Node, join: PlannedUnit) -> bool:
        """Whether the value has a reader beside the join, and what only moves it there."""
        for user in value.users:
            reader = self._owner.get(user)
            if reader is join or (reader is not None and reader.unit.kind == SIZE):
                continue
            if reader is None or not reader.is_int8 or reader.unit.kind not in MOVING_OPS:
                return True
            if self._in_float(reader.unit.output, parts=True):
                return True
            if reader.unit.kind != CAT and self._by_itself(reader.unit.output, join):
                return True
        return False
