"""One captured model under many plans: each variant's program, all from one capture and shared calibrations.

Ranges do not depend on the plan: every value that some plan may hold as codes is observed in one pass over the data,
and a pass more is only made for a range that is to be measured in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantflow.algorithms import Applied
from quantflow.executor.built import Converted
from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan
from quantflow.ir.units import find_units
from quantflow.numerics.observers import AbstractObserver
from quantflow.schema import ActivationSpec, LayerOverride, QConfig
from quantflow.stages.calibrate import CalibrationTable, calibrate
from quantflow.stages.convert import convert
from quantflow.stages.prepare import Prepared, prepare
from quantflow.stages.refined import LayerNumbers, Refined, unrefined

#: `layers:` of a recipe.
Layers = Mapping[str, str | LayerOverride]
#: What the algorithms make of a plan's numbers, and what each of them did.
Refine = Callable[[Prepared, CalibrationTable], tuple[Refined, tuple[Applied, ...]]]
Range = tuple[str, ActivationSpec]


def _as_measured(prepared: Prepared, table: CalibrationTable) -> tuple[Refined, tuple[Applied, ...]]:
    return unrefined(prepared, table), ()


class Variants:
    """Builds variants of one model.

    Without algorithms a variant is what a run with its settings makes, to the bit. With them, a variant in which some
    layers are changed keeps the numbers that they gave the others: they do not run again for it.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Batch],
        plan_of: Callable[[QConfig, Layers], Plan],
        refine: Refine = _as_measured,
        *,
        rewritten: tuple[Applied, ...] = (),
        imperative: nn.Module | None = None,
        key: str = "",
        checkpoint: Path | None = None,
        checkpoint_every_s: float = 5.0,
        resume: bool = True,
        place: torch.device = CPU,
    ) -> None:
        """
        Args:
            batches: the calibration data.
            plan_of: the plan for a qconfig and layer settings on this graph.
            refine: the algorithms that act on numbers.
            rewritten: those that acted on the graph.
            imperative: imperative mode: the module that computes what the graph does.
            key, checkpoint, checkpoint_every_s, resume: as in `calibrate`, for the first pass.
            place: where the float model computes.
        """
        self.graph = graph
        self._place = place
        self.imperative = imperative
        self._batches = batches
        self._plan_of = plan_of
        self._refine = refine
        self._rewritten = rewritten
        self._refined: dict[str, tuple[Refined, Refined, tuple[Applied, ...]]] = {}
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

    def build(self, qconfig: QConfig, layers: Layers, changed: Layers | None = None) -> Converted:
        """The variant's products.

        Args:
            changed: layers, by exact name, that differ from `layers`; they may be float, or have weights in two terms.

        Raises:
            QuantflowError: as `make_plan`, `calibrate` and `convert`.
        """
        prepared, table = self._prepared(qconfig, {**layers, **(changed or {})})
        plain, refined, improved = self._numbers(qconfig, layers)
        if changed:
            refined = _carried_over(plain, refined, unrefined(prepared, table))
        return Converted(prepared.plan, table, convert(prepared, table, refined), (*self._rewritten, *improved))

    def _numbers(self, qconfig: QConfig, layers: Layers) -> tuple[Refined, Refined, tuple[Applied, ...]]:
        """Before and after the algorithms, without changed layers; the last are kept: algorithms take time."""
        key = repr((qconfig, list(layers.items())))
        if key not in self._refined:
            prepared, table = self._prepared(qconfig, layers)
            self._refined = {key: (unrefined(prepared, table), *self._refine(prepared, table))}
        return self._refined[key]

    def _prepared(self, qconfig: QConfig, layers: Layers) -> tuple[Prepared, CalibrationTable]:
        prepared = prepare(self.graph, self._plan_of(qconfig, layers))
        self._measure(dict.fromkeys(prepared.observed.items()))
        assert self._data is not None
        observers = {name: self._measured[name, spec] for name, spec in prepared.observed.items()}
        return prepared, replace(self._data, observers=observers)

    def _measure(self, ranges: Mapping[Range, None], progress: Callable[[int, int | None], None] | None = None) -> None:
        missing = [found for found in ranges if found not in self._measured]
        if not missing:
            return
        table = calibrate(_Pass(self.graph.at(self._place), missing), self._batches, progress=progress, **self._options)
        self._options = {}
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


def _carried_over(plain: Refined, better: Refined, other: Refined) -> Refined:
    """Another plan's numbers with all that algorithms changed in this one's from plain to better."""
    qparams = {root: q for root, q in better.qparams.items() if q != plain.qparams[root]}
    return Refined(
        {root: qparams.get(root, own) for root, own in other.qparams.items()},
        {
            name: better.layers[name] if _differ(plain.layers[name], better.layers[name]) else own
            for name, own in other.layers.items()
        },
    )


def _differ(a: LayerNumbers, b: LayerNumbers) -> bool:
    pairs = (a.codes, b.codes), (a.scale, b.scale), (a.bias, b.bias)
    return any((x is None) is not (y is None) or (x is not None and not torch.equal(x, y)) for x, y in pairs)


def _codable(graph: Graph, plan: Plan) -> list[str]:
    """Values that are codes in this plan, or can be in one with fewer int8 layers: a sum may then stand alone again."""
    outputs = {unit.output for unit in find_units(graph)}
    int8 = [p.unit for p in plan.units if p.is_int8]
    nodes = [node for unit in int8 for node in (*unit.inputs, *(n for n in unit.nodes if n in outputs))]
    return list(dict.fromkeys(n.name for n in nodes if n.op != "get_attr" and n.meta.get("dtype") is torch.float32))
