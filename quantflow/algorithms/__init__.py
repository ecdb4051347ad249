"""Accuracy algorithms: each takes products of earlier stages and returns better ones.

    rewrite(algorithms, graph, …)            → Graph      before calibration: another float model
    refine(algorithms, prepared, table, …)   → Refined    after it: other integers

Both run the recipe's algorithms in its order, and report what each one did. An algorithm finds its own places by the
graph's structure and leaves the rest alone, so one list fits convolutional nets and transformers.

To add one: its settings in `quantflow/schema/algorithms.py`, its file here, one line in a table below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from quantflow.algorithms.bias_correction import bias_correction
from quantflow.algorithms.equalize import equalize
from quantflow.algorithms.outcome import Change, Material, Outcome
from quantflow.calibrate import CalibrationTable
from quantflow.graph import Graph
from quantflow.plan import Plan
from quantflow.prepare import Prepared
from quantflow.refined import Refined, unrefined
from quantflow.schema import Algorithm

#: Before calibration: (settings, graph, plan, material) → (graph, outcome).
GRAPH_ALGORITHMS: dict[str, Callable[[Any, Graph, Plan, Material], tuple[Graph, Outcome]]] = {
    "equalize": equalize,
}
#: After calibration: (settings, prepared, refined, material) → (refined, outcome).
NUMBER_ALGORITHMS: dict[str, Callable[[Any, Prepared, Refined, Material], tuple[Refined, Outcome]]] = {
    "bias_correction": bias_correction,
}


class Stage(Protocol):
    """Where progress goes."""

    def update(self, done: int, total: int | None = None) -> None: ...


#: Opens the stage of that name: `Progress.stage`.
OpenStage = Callable[[str], AbstractContextManager[Stage]]


@dataclass(frozen=True)
class Applied:
    """One algorithm that ran."""

    settings: Algorithm
    seconds: float
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        settings = self.settings.model_dump(mode="json")
        return {"name": settings.pop("name"), "settings": settings, "seconds": self.seconds, **self.outcome.to_json()}


def rewrite(
    algorithms: Sequence[Algorithm],
    graph: Graph,
    plan_of: Callable[[Graph], Plan],
    material: Material,
    open_stage: OpenStage,
) -> tuple[Graph, tuple[Applied, ...]]:
    """The graph after those of the algorithms that act on it. `plan_of`: what would be decided about a graph."""
    applied = []
    for settings in algorithms:
        if settings.acts_on == "graph":
            with open_stage(settings.name) as stage:
                started = time.perf_counter()
                work = replace(material, update=stage.update)
                graph, outcome = GRAPH_ALGORITHMS[settings.name](settings, graph, plan_of(graph), work)
                applied.append(Applied(settings, time.perf_counter() - started, outcome))
    return graph, tuple(applied)


def refine(
    algorithms: Sequence[Algorithm],
    prepared: Prepared,
    table: CalibrationTable,
    material: Material,
    open_stage: OpenStage,
) -> tuple[Refined, tuple[Applied, ...]]:
    """The numbers after those of the algorithms that act on them; without any, the plain ones."""
    refined, applied = unrefined(prepared, table), []
    for settings in algorithms:
        if settings.acts_on == "numbers":
            with open_stage(settings.name) as stage:
                started = time.perf_counter()
                work = replace(material, update=stage.update)
                refined, outcome = NUMBER_ALGORITHMS[settings.name](settings, prepared, refined, work)
                applied.append(Applied(settings, time.perf_counter() - started, outcome))
    return refined, tuple(applied)


__all__ = ["GRAPH_ALGORITHMS", "NUMBER_ALGORITHMS", "Applied", "Change", "Material", "Outcome", "refine", "rewrite"]
