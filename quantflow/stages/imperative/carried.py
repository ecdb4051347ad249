"""What the captured graph and the module that it came from owe each other: constants that algorithms changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.stages.imperative.layers import copied_module


def called_modules(module: nn.Module, run: nn.Module, batch: Batch) -> dict[str, int]:
    """The modules in `module` that are called as modules → how often in one forward of `run`, which calls it."""
    counts: dict[str, int] = {}
    hooks = []
    for name, child in module.named_modules():
        hooks.append(child.register_forward_hook(_counter(counts, name)))
    try:
        with torch.inference_mode():
            run(*batch.args, **batch.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def _counter(counts: dict[str, int], name: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    return count


def fixed_constants(module: nn.Module, graph: Graph) -> frozenset[str]:
    """The constants that `carry_over` can't write back: those that are no parameter or buffer as they stand."""
    return frozenset(graph.constants.keys() - _carried(module, graph).keys())


def carry_over(module: nn.Module, original: Graph, rewritten: Graph) -> nn.Module:
    """The module with the constants in which `rewritten` differs from `original`; itself where none differs.

    A layer whose BatchNorm was folded gets the folded numbers, and the BatchNorm becomes Identity.
    """
    changed = {name: value for name, value in rewritten.constants.items() if value is not original.constants.get(name)}
    if not changed:
        return module
    copied, places = copied_module(module), _carried(module, original)
    folded = {f"{n.meta['layer']}.folded_weight": n for n in original.fx.nodes if "batch_norm" in n.meta}
    # A folded layer needs both of its numbers as soon as one of them changed.
    for name in [n for n in folded if n in changed or n.replace("folded_weight", "folded_bias") in changed]:
        for role in (name, name.replace("folded_weight", "folded_bias")):
            changed.setdefault(role, rewritten.constants[role])
        _replace(copied, folded[name].meta["batch_norm"], nn.Identity())
    for name, value in changed.items():
        owner, role = places[name]
        layer = copied.get_submodule(owner)
        if role in layer._buffers:
            layer.register_buffer(role, value)
        else:
            layer.register_parameter(role, nn.Parameter(value, requires_grad=False))
    return copied


def _carried(module: nn.Module, graph: Graph) -> dict[str, tuple[str, str]]:
    """Constant → (module, attribute) that holds it, or will once its BatchNorm is gone."""
    places: dict[str, tuple[str, str]] = {}
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name in graph.constants and graph.constants[name].shape == value.shape:
            owner, _, role = name.rpartition(".")
            places[name] = (owner, role)
    for node in graph.fx.nodes:
        if "batch_norm" in node.meta:
            for role in ("weight", "bias"):
                places[f"{node.meta['layer']}.folded_{role}"] = (str(node.meta["owner"]), role)
    return places


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)
