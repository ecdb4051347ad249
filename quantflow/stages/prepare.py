"""prepare(graph, plan) → Prepared: the float model with an observer on every value that will become codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.float_passes import NOTHING_HELD, FloatPasses
from quantflow.ir.graph import Graph
from quantflow.ir.ops import MOVING_OPS
from quantflow.ir.plan import Plan
from quantflow.ir.units import makes_values
from quantflow.schema import ActivationSpec


@dataclass(frozen=True)
class Prepared:
    """What calibration runs.

    Attributes:
        observed: value name → how its range is measured. Values that only pass codes on are not observed, unless they
            bring numbers of their own: what stands around a padded tensor, or a clamp's bound.
        layers: value name → layer name, for messages.
        observed_module: imperative mode: the user's module with observers in place; None runs the graph.
        place: where it computes.
        passes: what runs the graph.
    """

    graph: Graph
    plan: Plan
    observed: Mapping[str, ActivationSpec]
    layers: Mapping[str, str]
    observed_module: nn.Module | None = None
    place: torch.device = CPU
    passes: FloatPasses = NOTHING_HELD

    def at(self, place: torch.device) -> Prepared:
        """The same, computed on another device; the module is moved there."""
        if place == self.place:
            return self
        module = self.observed_module
        if module is not None:
            from quantflow.stages.imperative import moved

            module = moved(module, place)
        return replace(
            self,
            graph=self.graph.at(place) if module is None else self.graph,
            observed_module=module,
            place=place,
        )

    def run(self, batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> Any:
        """One float forward of a batch on the CPU or in its place; `on_value` sees every observed value."""

        def observed(name: str, value: Any) -> None:
            if name in self.observed:
                on_value(name, value)

        if self.observed_module is not None:
            from quantflow.stages.imperative import run_observed

            return run_observed(self.observed_module, batch.at(self.place), observed)
        return self.passes.run(self.graph, batch, lambda node, value: observed(node.name, value))


def prepare(
    graph: Graph, plan: Plan, module: nn.Module | None = None, stands_for: torch.dtype = torch.float32
) -> Prepared:
    """Decide which values to observe; in imperative mode, put observers into a copy of `module`.

    Args:
        stands_for: the dtype of the model that the module is a float32 copy of.
    """
    derived = {
        p.unit.output.name for p in plan.units if p.is_int8 and p.unit.kind in MOVING_OPS and not makes_values(p.unit)
    }
    observed = {name: plan.specs[root] for name, root in plan.codes.items() if name not in derived}
    layers = {node.name: str(node.meta.get("layer", node.name)) for node in graph.fx.nodes}
    observed_module = None
    if module is not None:
        from quantflow.stages.imperative import insert_observers

        observed_module = insert_observers(module, graph, plan, stands_for)
    return Prepared(graph, plan, observed, layers, observed_module)
