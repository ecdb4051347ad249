"""BatchNorm folding: a linear op followed by BatchNorm is a linear op with other numbers.

So is a convolution followed by `* scale + shift` with a constant per channel: a BatchNorm whose statistics are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from quantflow.ir.graph import Graph, arguments, is_aten, only_user, op_name
from quantflow.ir.ops import LINEARS, TRANSPOSED


@dataclass(frozen=True)
class _Norm:
    """What follows a linear op: its nodes in order, its layer, and its numbers as `fold_batch_norm` has them."""

    nodes: tuple[fx.Node, ...]
    layer: str
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


def fold_batch_norms(graph: Graph, may_fold: Callable[[str, str], bool] | None = None) -> Graph:
    """Fold every BatchNorm that directly follows a convolution or linear whose output nothing else reads.

    Args:
        may_fold: asked with the two modules' names; imperative mode refuses modules that are called twice, and folds
            modules alone: `* scale + shift` is code.
    """
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph.fx, values))
    for old, new in values.items():
        new.meta = dict(old.meta)
    constants = dict(graph.constants)

    for linear in list(copied.nodes):
        norm = _batch_norm(linear, constants) or (_scale_and_shift(linear, constants) if may_fold is None else None)
        if norm is None or (may_fold is not None and not may_fold(linear.meta["owner"], norm.nodes[-1].meta["owner"])):
            continue
        ops = arguments(linear)
        weight = constants[str(ops["weight"].target)]
        is_transposed = is_aten(linear, *TRANSPOSED)
        folded, bias = fold_batch_norm(
            channels_swapped(weight, ops["groups"]) if is_transposed else weight,
            _constant(ops["bias"], constants),
            gamma=norm.gamma,
            beta=norm.beta,
            mean=norm.mean,
            var=norm.var,
            eps=norm.eps,
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
        linear.meta["batch_norm"] = norm.layer
        norm.nodes[-1].replace_all_uses_with(linear)
        for node in reversed(norm.nodes):
            copied.erase_node(node)
    for node in reversed(copied.nodes):
        if node.op == "get_attr" and not node.users:
            copied.erase_node(node)
    used = {node.target for node in copied.nodes if node.op == "get_attr"}
    return replace(graph, fx=copied, constants={k: v for k, v in constants.items() if k in used})


def _constant(node: object, constants: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    return constants[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _batch_norm(linear: fx.Node, constants: Mapping[str, torch.Tensor]) -> _Norm | None:
    """The BatchNorm that can be folded into the op."""
    norm = only_user(linear)
    if norm is None or not _folds(linear, norm):
        return None
    a = arguments(norm)
    mean, var = _constant(a["running_mean"], constants), _constant(a["running_var"], constants)
    if mean is None or var is None:
        return None
    gamma, beta = _constant(a["weight"], constants), _constant(a["bias"], constants)
    return _Norm((norm,), str(norm.meta["layer"]), gamma, beta, mean, var, a["eps"])


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


def _scale_and_shift(conv: fx.Node, constants: Mapping[str, torch.Tensor]) -> _Norm | None:
    """`conv * scale + shift`, with constants of one number per channel."""
    if not is_aten(conv, *LINEARS, *TRANSPOSED) or op_name(conv) == "linear":
        return None
    bias = arguments(conv)["bias"]
    if _constant(conv.args[1], constants) is None or (bias is not None and _constant(bias, constants) is None):
        return None
    mul = only_user(conv)
    add = only_user(mul) if mul is not None else None
    if mul is None or add is None:
        return None
    scale, shift = _per_channel(mul, "mul", conv, constants), _per_channel(add, "add", mul, constants)
    if scale is None or shift is None:
        return None
    # One module of both alone gives its name; code in a module that holds more gives the addition's.
    module = add.meta.get("module")
    is_own = bool(module) and module == mul.meta.get("module") and not str(conv.meta["layer"]).startswith(module)
    layer = str(module if is_own else add.meta["layer"])
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return _Norm((mul, add), layer, scale, shift, zeros, ones, 0.0)


def _per_channel(node: fx.Node, name: str, x: fx.Node, constants: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The constant, (channels,), by which `name` changes x, a convolution's (batch, channels, …) result."""
    if not is_aten(node, name) or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    value = _constant(next((arg for arg in node.args if arg is not x), None), constants)
    shape = x.meta.get("shape")
    if value is None or shape is None or value.dtype != torch.float32 or value.dim() > len(shape):
        return None
    full = (*[1] * (len(shape) - value.dim()), *value.shape)
    wanted = tuple(shape[1] if dim == 1 else 1 for dim in range(len(shape)))
    return value.flatten() if full == wanted else None


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
