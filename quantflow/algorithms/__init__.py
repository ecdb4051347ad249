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
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from quantflow.algorithms.activation_scale import activation_scale
from quantflow.algorithms.adaround import adaround
from quantflow.algorithms.batchnorm import batchnorm
from quantflow.algorithms.bias_correction import bias_correction
from quantflow.algorithms.clip_weights import clip_weights
from quantflow.algorithms.equalize import equalize
from quantflow.algorithms.gptq import gptq
from quantflow.algorithms.guard import Effect, Guard
from quantflow.algorithms.outcome import Change, Material, Outcome, Rewriting
from quantflow.algorithms.outliers import NO_OUTLIERS, Outliers, find_outliers
from quantflow.algorithms.smooth import smooth
from quantflow.algorithms.unsigned import unsigned
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan
from quantflow.schema import Algorithm
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import Refined, unrefined

#: Before calibration: (settings, graph, plan, material) → parts of another graph.
GRAPH_ALGORITHMS: dict[str, Callable[[Any, Graph, Plan, Material], Rewriting]] = {
    "equalize": equalize,
    "smooth": smooth,
}
#: After calibration: (settings, prepared, refined, material) → (refined, outcome).
NUMBER_ALGORITHMS: dict[str, Callable[[Any, Prepared, Refined, Material], tuple[Refined, Outcome]]] = {
    "unsigned": unsigned,
    "activation_scale": activation_scale,
    "clip_weights": clip_weights,
    "bias_correction": bias_correction,
    "gptq": gptq,
    "adaround": adaround,
    "batchnorm": batchnorm,
}


class Stage(Protocol):
    """Where progress goes."""

    def update(self, done: int, total: int | None = None) -> None: ...


#: Opens the stage of that name: `Progress.stage`.
OpenStage = Callable[[str], AbstractContextManager[Stage]]


@dataclass(frozen=True)
class Applied:
    """One algorithm that ran. `effect`: on the whole model, where the guard measured it."""

    settings: Algorithm
    seconds: float
    outcome: Outcome
    effect: Effect | None = None

    def to_json(self) -> dict[str, Any]:
        settings = self.settings.model_dump(mode="json")
        return {
            "name": settings.pop("name"),
            "settings": settings,
            "seconds": self.seconds,
            "model": None if self.effect is None else asdict(self.effect),
            **self.outcome.to_json(),
        }


T = TypeVar("T")


class Keep(Protocol[T]):
    """Carries one algorithm out on a product of type T, or brings what it made of the same product before."""

    def __call__(
        self, settings: Algorithm, before: T, carry_out: Callable[[], tuple[T, Applied]]
    ) -> tuple[T, Applied]: ...


def afresh(_settings: Algorithm, _before: T, carry_out: Callable[[], tuple[T, Applied]]) -> tuple[T, Applied]:
    """Keeps nothing."""
    return carry_out()


def rewrite(
    algorithms: Sequence[Algorithm],
    graph: Graph,
    plan_of: Callable[[Graph], Plan],
    material: Material,
    open_stage: OpenStage,
    keep: Keep[Graph] = afresh,
) -> tuple[Graph, tuple[Applied, ...]]:
    """The graph after those of the algorithms that act on it. `plan_of`: what would be decided about a graph."""
    applied, guard = [], Guard(algorithms, graph, material)

    def carry_out(settings: Algorithm, graph: Graph, stage: Stage) -> tuple[Graph, Applied]:
        started = time.perf_counter()
        work = replace(guard.material, update=stage.update)
        rewriting = GRAPH_ALGORITHMS[settings.name](settings, graph, plan_of(graph), work)
        graph, outcome, effect = guard.rewritten(settings, graph, rewriting, plan_of)
        return graph, Applied(settings, time.perf_counter() - started, outcome, effect)

    for settings in algorithms:
        if settings.acts_on == "graph":
            with open_stage(settings.name) as stage:
                graph, done = keep(settings, graph, partial(carry_out, settings, graph, stage))
                applied.append(done)
    return graph, tuple(applied)


def refine(
    algorithms: Sequence[Algorithm],
    prepared: Prepared,
    table: CalibrationTable,
    material: Material,
    open_stage: OpenStage,
    keep: Keep[Refined] = afresh,
) -> tuple[Refined, tuple[Applied, ...]]:
    """The numbers after those of the algorithms that act on them; without any, the plain ones."""
    refined, applied, guard = unrefined(prepared, table), [], Guard(algorithms, prepared.graph, material)

    def carry_out(settings: Algorithm, refined: Refined, stage: Stage) -> tuple[Refined, Applied]:
        started = time.perf_counter()
        work = replace(guard.material, update=stage.update)
        found, outcome = NUMBER_ALGORITHMS[settings.name](settings, prepared, refined, work)
        refined, outcome, effect = guard.refined(settings, prepared, refined, found, outcome)
        return refined, Applied(settings, time.perf_counter() - started, outcome, effect)

    for settings in algorithms:
        if settings.acts_on == "numbers":
            with open_stage(settings.name) as stage:
                refined, done = keep(settings, refined, partial(carry_out, settings, refined, stage))
                applied.append(done)
    return refined, tuple(applied)


__all__ = [
    "GRAPH_ALGORITHMS",
    "NO_OUTLIERS",
    "NUMBER_ALGORITHMS",
    "Applied",
    "Change",
    "Keep",
    "Material",
    "Outcome",
    "Outliers",
    "afresh",
    "find_outliers",
    "refine",
    "rewrite",
]
