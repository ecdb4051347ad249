"""One captured model under many plans: each variant's program, all from one capture and shared calibrations.

Ranges do not depend on the plan: every value that some plan may hold as codes is observed in one pass over the data,
and a pass more is only made for a range that is to be measured in another way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantflow.calibrate import CalibrationTable, calibrate
from quantflow.convert import convert
from quantflow.data.batch import Batch
from quantflow.graph import Graph
from quantflow.observers import AbstractObserver
from quantflow.passes.units import find_units
from quantflow.plan import Plan
from quantflow.prepare import Prepared, prepare
from quantflow.program import Program
from quantflow.schema import ActivationSpec, LayerOverride, QConfig

#: `layers:` of a recipe.
Layers = Mapping[str, str | LayerOverride]
Range = tuple[str, ActivationSpec]


@dataclass(frozen=True)
class Variant:
    """What a run with these settings would make: plan, table and program are the ones it saves."""

    plan: Plan
    table: CalibrationTable
    program: Program


class Variants:
    """Builds variants of one model."""

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Batch],
        plan_of: Callable[[QConfig, Layers], Plan],
        *,
        key: str = "",
        checkpoint: Path | None = None,
        checkpoint_every_s: float = 5.0,
        resume: bool = True,
    ) -> None:
        """
        Args:
            batches: the calibration data.
            plan_of: the plan for a qconfig and layer settings on this graph.
            key, checkpoint, checkpoint_every_s, resume: as in `calibrate`, for the first pass.
        """
        self.graph = graph
        self.notices: tuple[str, ...] = ()
        self._batches = batches
        self._plan_of = plan_of
        self._options: dict[str, Any] = {
            "key": key,
            "checkpoint": checkpoint,
            "checkpoint_every_s": checkpoint_every_s,
            "resume": resume,
        }
        self._measured: dict[Range, AbstractObserver] = {}
        self._data: CalibrationTable | None = None

    def calibrate(
        self, qconfig: QConfig, layers: Layers, progress: Callable[[int, int | None], None] | None = None
    ) -> None:
        """Measure, in one pass, every range that a variant with more layers in float than these settings can need."""
        plan = self._plan_of(qconfig, layers)
        specs = {name: plan.specs[root] for name, root in plan.codes.items()}
        possible = [(name, specs.get(name, qconfig.activation)) for name in _codable(self.graph, plan)]
        self._measure(dict.fromkeys((*prepare(self.graph, plan).observed.items(), *possible)), progress)

    @property
    def digest(self) -> str:
        """sha256 of the captured model: its ops and every weight."""
        digest = hashlib.sha256(str(self.graph).encode())
        for name, tensor in sorted(self.graph.constants.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def build(self, qconfig: QConfig, layers: Layers) -> Variant:
        """The variant's products.

        Raises:
            QuantflowError: as `make_plan`, `calibrate` and `convert`.
        """
        plan = self._plan_of(qconfig, layers)
        prepared = prepare(self.graph, plan)
        self._measure(dict.fromkeys(prepared.observed.items()))
        assert self._data is not None
        observers = {name: self._measured[name, spec] for name, spec in prepared.observed.items()}
        table = replace(self._data, observers=observers)
        return Variant(plan, table, convert(prepared, table))

    def _measure(self, ranges: Mapping[Range, None], progress: Callable[[int, int | None], None] | None = None) -> None:
        missing = [found for found in ranges if found not in self._measured]
        if not missing:
            return
        table = calibrate(_Pass(self.graph, missing), self._batches, progress=progress, **self._options)
        self._options = {}
        self.notices += table.notices
        self._data = self._data or replace(table, observers={})
        self._measured |= {found: table.observers[str(index)] for index, found in enumerate(missing)}


class _Pass:
    """What one pass observes; a value may be measured in several ways at once. Values go by the range's number."""

    def __init__(self, graph: Graph, ranges: Sequence[Range]) -> None:
        names = {node.name: str(node.meta.get("layer", node.name)) for node in graph.fx.nodes}
        self.observed = {str(index): spec for index, (_, spec) in enumerate(ranges)}
        self.layers = {str(index): names[name] for index, (name, _) in enumerate(ranges)}
        self._numbers: dict[str, list[str]] = {}
        for index, (name, _) in enumerate(ranges):
            self._numbers.setdefault(name, []).append(str(index))
        self._model = Prepared(graph, _NO_PLAN, {name: spec for name, spec in ranges}, {})

    def run(self, batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> Any:
        """One float forward."""

        def on_named(name: str, x: torch.Tensor) -> None:
            for number in self._numbers[name]:
                on_value(number, x)

        return self._model.run(batch, on_named)


_NO_PLAN = Plan((), (), {}, {}, False)


def _codable(graph: Graph, plan: Plan) -> list[str]:
    """Values that are codes in this plan, or can be in one with fewer int8 layers: a sum may then stand alone again."""
    outputs = {unit.output for unit in find_units(graph)}
    int8 = [p.unit for p in plan.units if p.is_int8]
    nodes = [node for unit in int8 for node in (*unit.inputs, *(n for n in unit.nodes if n in outputs))]
    return list(dict.fromkeys(n.name for n in nodes if n.op != "get_attr" and n.meta.get("dtype") is torch.float32))
