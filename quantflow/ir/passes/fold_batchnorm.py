"""BatchNorm folding: a linear op followed by BatchNorm is a linear op with other numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from quantflow.ir.graph import Graph, arguments, is_aten, only_user, op_name
from quantflow.ir.ops import LINEARS, TRANSPOSED


def fold_batch_norms(graph: Graph, may_fold: Callable[[str, str], bool] | None = None) -> Graph:
    """Fold every BatchNorm that directly follows a convolution or linear whose output nothing else reads.

    Args:
        may_fold: asked with the two modules' names; imperative mode refuses modules that are called twice.
    """
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph.fx, values))
    for old, new in values.items():
        new.meta = dict(old.meta)
    constants = dict(graph.constants)

    def constant(node: object) -> torch.Tensor | None:
        return constants[str(node.target)] if isinstance(node, fx.Node) else None

    for linear in list(copied.nodes):
        norm = only_user(linear)
        if (
            norm is None
            or not _folds(linear, norm)
            or (may_fold is not None and not may_fold(linear.meta["owner"], norm.meta["owner"]))
        ):
            continue
        ops, stats = arguments(linear), arguments(norm)
        weight, mean, var = constant(ops["weight"]), constant(stats["running_mean"]), constant(stats["running_var"])
        if weight is None or mean is None or var is None:
            continue
        is_transposed = is_aten(linear, *TRANSPOSED)
        folded, bias = fold_batch_norm(
            channels_swapped(weight, ops["groups"]) if is_transposed else weight,
            constant(ops["bias"]),
            gamma=constant(stats["weight"]),
            beta=constant(stats["bias"]),
            mean=mean,
            var=var,
            eps=stats["eps"],
        )
        if is_transposed:
            folded = channels_swapped(folded, ops["groups"])
        layer = linear.meta["layer"]
        for index, (role, value) in enumerate((("weight", folded), ("bias", bias)), start=1):
            name = f"{layer}.folded_{role}"
            constants[name] = value
            with copied.inserting_before(linear):
                node = copied.get_attr(name)
            node.meta = {"shape": tuple(value.shape), "dtype": value.dtype, "layer": name}
            linear.args = (*linear.args[:index], node, *linear.args[index + 1 :])
        linear.meta["batch_norm"] = norm.meta["layer"]
        norm.replace_all_uses_with(linear)
        copied.erase_node(norm)
    for node in reversed(copied.nodes):
        if node.op == "get_attr" and not node.users:
            copied.erase_node(node)
    used = {node.target for node in copied.nodes if node.op == "get_attr"}
    return replace(graph, fx=copied, constants={k: v for k, v in constants.items() if k in used})


def _folds(linear: fx.Node, norm: fx.Node) -> bool:
    if not is_aten(linear, *LINEARS, *TRANSPOSED) or not is_aten(norm, "batch_norm"):
        return False
    a, weight = arguments(norm), linear.args[1]
    constants = (weight, a["running_mean"], a["running_var"])
    if (
        norm.args[0] is not linear
        or a["training"]
        or not all(isinstance(c, fx.Node) and c.op == "get_attr" for c in constants)
    ):
        return False
    # BatchNorm normalises dimension 1; a linear op's features lie there only for (batch, features).
    return op_name(linear) != "linear" or len(linear.meta.get("shape", ())) == 2


def channels_swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(in_channels, out_channels / groups, …), as transposed convolutions hold it ↔ (out_channels, in / groups, …)."""
    first, second, *kernel = weight.shape
    split = weight.reshape(groups, first // groups, second, *kernel)
    return split.transpose(1, 2).reshape(groups * second, first // groups, *kernel)


def fold_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w' = w * gamma / sqrt(var + eps);  b' = (b - mean) * gamma / sqrt(var + eps) + beta.

    Computed in float64, so that folding costs no accuracy.

    Args:
        weight: (out_channels, …) float32.
        bias: (out_channels,) or None.
        gamma, beta, mean, var: (out_channels,), None meaning 1 and 0.

    Returns:
        (weight', bias') in float32.
    """
    mean64, var64 = mean.double(), var.double()
    factor = torch.rsqrt(var64 + eps)
    if gamma is not None:
        factor = factor * gamma.double()
    shift = (bias.double() if bias is not None else 0.0) - mean64
    folded_bias = shift * factor + (beta.double() if beta is not None else 0.0)
    folded = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.float(), folded_bias.float()
