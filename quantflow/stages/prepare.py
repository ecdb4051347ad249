"""prepare(graph, plan) → Prepared: the float model with an observer on every value that will become codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from quantflow.errors import DataError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, Input, interpret
from quantflow.ir.units import CAT, CLAMP, MAX_POOL, SHAPE
from quantflow.schema import ActivationSpec
from quantflow.stages.plan import Plan


@dataclass(frozen=True)
class Prepared:
    """What calibration runs.

    Attributes:
        observed: value name → how its range is measured. Values that only pass codes on are not observed.
        layers: value name → layer name, for messages.
        observed_module: imperative mode: the user's module with observers in place; None runs the graph.
    """

    graph: Graph
    plan: Plan
    observed: Mapping[str, ActivationSpec]
    layers: Mapping[str, str]
    observed_module: nn.Module | None = None

    def run(self, batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> Any:
        """One float forward; `on_value` sees every observed value."""
        if self.observed_module is not None:
            from quantflow.stages.imperative import run_observed

            return run_observed(self.observed_module, batch, on_value)

        def forward(node: fx.Node, value: Any) -> None:
            if node.name in self.observed:
                on_value(node.name, value)

        return interpret(self.graph, bind(self.graph.inputs, batch.args, batch.kwargs), forward)


def prepare(graph: Graph, plan: Plan, module: nn.Module | None = None) -> Prepared:
    """Decide which values to observe; in imperative mode, put observers into a copy of `module`."""
    derived = {p.unit.output.name for p in plan.units if p.is_int8 and p.unit.kind in (CAT, CLAMP, MAX_POOL, SHAPE)}
    observed = {name: plan.specs[root] for name, root in plan.codes.items() if name not in derived}
    layers = {node.name: str(node.meta.get("layer", node.name)) for node in graph.fx.nodes}
    observed_module = None
    if module is not None:
        from quantflow.stages.imperative import insert_observers

        observed_module = insert_observers(module, plan)
    return Prepared(graph, plan, observed, layers, observed_module)


def bind(inputs: tuple[Input, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The call's tensors in the order of the program's inputs.

    Raises:
        DataError: too few or too many arguments, an unknown keyword, or something that is not a tensor.
    """
    remaining, named, bound = list(args), dict(kwargs), []
    for item in inputs:
        name = item.keyword or item.name
        if name in named:
            bound.append(named.pop(name))
        elif remaining:
            bound.append(remaining.pop(0))
        else:
            raise DataError(f"input '{name}' is missing; the model takes ({_expected(inputs)})")
    if remaining or named:
        extra = f"{len(remaining)} more positional" if remaining else f"unknown keyword {', '.join(named)}"
        raise DataError(f"the call has {extra} arguments; the model takes ({_expected(inputs)})")
    for item, value in zip(inputs, bound, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"input '{item.keyword or item.name}' is a {type(value).__name__}, not a tensor")
        if value.dim() != len(item.shape):
            raise DataError(
                f"input '{item.keyword or item.name}' has shape {tuple(value.shape)}; "
                f"the model takes {_shape(item.shape)}"
            )
        for found, wanted in zip(value.shape, item.shape, strict=True):
            if wanted is not None and found != wanted:
                raise DataError(
                    f"input '{item.keyword or item.name}' has shape {tuple(value.shape)}; "
                    f"the model was captured for {_shape(item.shape)}"
                )
        if _name(value.dtype) != item.dtype:
            raise DataError(
                f"input '{item.keyword or item.name}' is {_name(value.dtype)}; the model takes {item.dtype}"
            )
    return bound


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(inputs: tuple[Input, ...]) -> str:
    return ", ".join(f"{i.keyword or i.name}: {i.dtype}{_shape(i.shape)}" for i in inputs)


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
