"""What a plan holds: which units of a graph run in int8, on which values, and the reason for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantflow.ir.activations import as_epilogue
from quantflow.ir.graph import op_name
from quantflow.ir.units import CLAMP, CORE, RECURRENCE, SHAPE, Unit, pad_fill
from quantflow.schema import ActivationSpec, QConfig

INT8, FLOAT32 = "int8", "float"
IMPERATIVE = "imperative"


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan, as printed and saved."""

    name: str
    op: str
    precision: str
    group: tuple[str, ...]
    kernel: str
    qparams: str
    reason: str


@dataclass(frozen=True)
class PlannedUnit:
    """A unit with the decisions about it. `without`: the algorithms that leave it alone."""

    unit: Unit
    is_int8: bool
    writes_codes: bool
    qconfig: QConfig
    reason: str
    without: frozenset[str] = frozenset()

    def allows(self, algorithm: str) -> bool:
        """Whether the algorithm of that name may change the layer."""
        return not self.without & {algorithm, "all"}


@dataclass(frozen=True)
class Plan:
    """Every decision, before any data was seen.

    Attributes:
        rows: one per layer; data movement and size arithmetic have none.
        units: the decisions in execution order.
        codes: for every value that is ever held as codes, the name of the value whose qparams it uses.
        specs: for each of those, how its range is measured.
        exact: values that some layer reads in two terms; what computes them does not round them to codes.
        reduce_range: whether activations use 7 bits.
        notes: what a user should know about capture and plan.
    """

    rows: tuple[PlanRow, ...]
    units: tuple[PlannedUnit, ...]
    codes: Mapping[str, str]
    specs: Mapping[str, ActivationSpec]
    reduce_range: bool
    notes: tuple[str, ...] = ()
    exact: frozenset[str] = frozenset()

    @property
    def core_layers(self) -> int:
        """Layers with weights: convolutions, linears, recurrent layers, products with a parameter, embeddings."""
        return sum(p.unit.has_weights for p in self.units)

    @property
    def int8_layers(self) -> int:
        """Those of them that run in int8."""
        return self.int8_products + self.int8_tables

    @property
    def int8_products(self) -> int:
        """Convolutions, linears and recurrent steps that run in int8."""
        return sum(p.unit.kind in (CORE, RECURRENCE) and p.is_int8 for p in self.units)

    @property
    def int8_tables(self) -> int:
        """Embeddings whose table is held in int8."""
        return sum(p.unit.is_int8_table for p in self.units)

    @property
    def float_layers(self) -> tuple[PlanRow, ...]:
        """The layers with weights that stay float, each with its reason."""
        units = {p.unit.name for p in self.units if p.unit.has_weights and not (p.is_int8 or p.unit.is_int8_table)}
        return tuple(row for row in self.rows if row.name in units)

    @property
    def second_terms(self) -> int:
        """Products that int8 layers with weights or inputs in two terms take beside their own."""
        layers = [p.qconfig for p in self.units if p.unit.kind == CORE and p.is_int8]
        return sum((q.weight.terms == 2) + (q.input_terms == 2) for q in layers)

    @property
    def int8_coverage(self) -> float:
        """int8_layers / core_layers, 0 where there are none."""
        return self.int8_layers / self.core_layers if self.core_layers else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "codes": dict(self.codes),
            "reduce_range": self.reduce_range,
            "notes": list(self.notes),
        }


def nonnegative_values(plan: Plan) -> frozenset[str]:
    """The values that int8 units compute and that are never negative, whatever the data."""
    found: set[str] = set()
    for planned in plan.units:
        unit, node = planned.unit, planned.unit.anchor
        epilogue = as_epilogue(node) if unit.kind == CLAMP else unit.epilogue
        operands = unit.kind != CORE and bool(unit.inputs) and all(value.name in found for value in unit.inputs)
        if unit.kind == SHAPE and op_name(node) in ("constant_pad_nd", "pad"):
            operands = operands and pad_fill(node) >= 0
        if epilogue is not None:
            operands = epilogue.is_nonnegative or (operands and epilogue.keeps_nonnegative)
        if operands and planned.is_int8:
            found.add(unit.output.name)
    return frozenset(found)
