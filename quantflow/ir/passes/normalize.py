"""Bring every capture's graph to one vocabulary, and evaluate what does not depend on the input.

Nothing here changes what the model computes in float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from quantflow.ir.graph import Graph, arguments, copied, is_aten, name_layers, op_name
from quantflow.ir.passes.index_grids import indexes_to_views

aten = torch.ops.aten

#: In inference these return their first argument, or a copy that a functional graph has no use for.
_IDENTITIES = frozenset(
    [
        "dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "alias", "detach",
        "detach_", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "lift", "identity",
    ]
)  # fmt: skip
_CHECKS = frozenset(
    [
        "_assert_async", "_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range",
        "sym_constrain_range_for_size",
    ]
)  # fmt: skip
_RANDOM = frozenset(
    [
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "normal", "multinomial",
        "empty", "empty_like",
    ]
)  # fmt: skip
#: Factories that read only dtype and device from their tensor argument.
_NEW = {"new_zeros": aten.zeros, "new_ones": aten.ones, "new_full": aten.full, "new_empty": aten.zeros}
#: Convolutions with padding="same", by their spatial dimensions, and their arguments in order.
_CONV_PADDING = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
#: Where a slice ends that has no end.
_END = 2**63 - 1
#: A folded constant may not be larger than this many elements unless its inputs already were.
_FOLD_LIMIT = 1 << 22


def simplify(graph: Graph) -> Graph:
    """Normalize ops, fold constants, drop dead code and unused constants."""
    simple, constants = copied(graph.fx), dict(graph.constants)
    for step in (_remove_checks, _remove_identities, _normalize_batch_norm, _normalize_convolutions, _reshape_views):
        step(simple, constants)
    _fold_constants(simple, constants)
    indexes_to_views(simple, constants)
    _normalize_linears(simple, constants)
    _remove_identities(simple, constants)
    simple.eliminate_dead_code()
    for node in reversed(simple.nodes):
        if node.op == "get_attr" and not node.users:
            simple.erase_node(node)
    used = {node.target for node in simple.nodes if node.op == "get_attr"}
    name_layers(simple)
    return replace(graph, fx=simple, constants={k: v for k, v in constants.items() if k in used})


def rewrite(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Make the node another op with the same value."""
    node.target, node.args, node.kwargs = target, args, {}


def add_constant(
    graph: fx.Graph, constants: dict[str, torch.Tensor], before: fx.Node, name: str, value: torch.Tensor
) -> fx.Node:
    """A new named constant, visible from `before` on."""
    unique, count = name, 0
    while unique in constants:
        count += 1
        unique = f"{name}_{count}"
    constants[unique] = value
    with graph.inserting_before(before):
        node = graph.get_attr(unique)
    node.meta = {"shape": tuple(value.shape), "dtype": value.dtype}
    return node


def _remove_checks(graph: fx.Graph, _constants: dict[str, torch.Tensor]) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in _CHECKS:
            graph.erase_node(node)


def _remove_identities(graph: fx.Graph, _constants: dict[str, torch.Tensor]) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        same_dtype = is_aten(node, "to", "_to_copy", "type_as") and node.meta.get("dtype") == source.meta.get("dtype")
        no_move = is_aten(node, "expand", "reshape", "slice") and _same_static_shape(node, source)
        if is_aten(node, *_IDENTITIES) or (same_dtype and "dtype" in node.meta) or no_move or _is_full_slice(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _is_full_slice(node: fx.Node) -> bool:
    """`x[:]`, whatever the size of x."""
    if not is_aten(node, "slice"):
        return False
    a = arguments(node)
    return a["start"] in (None, 0) and a["end"] in (None, _END) and a["step"] == 1


def _same_static_shape(a: fx.Node, b: fx.Node) -> bool:
    shape = a.meta.get("shape")
    return shape is not None and None not in shape and shape == b.meta.get("shape")


def _normalize_batch_norm(graph: fx.Graph, _constants: dict[str, torch.Tensor]) -> None:
    for node in list(graph.nodes):
        if is_aten(node, "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm"):
            a = arguments(node)
            with graph.inserting_before(node):
                single = graph.call_function(
                    aten.batch_norm.default,
                    (
                        a["input"],
                        a["weight"],
                        a["bias"],
                        a["running_mean"],
                        a["running_var"],
                        False,
                        0.1,
                        a["eps"],
                        False,
                    ),
                )
            single.meta = dict(node.meta)
            for user in list(node.users):
                if user.target is operator.getitem and user.args[1] == 0:
                    single.meta.update(user.meta)
                    user.replace_all_uses_with(single)
                    graph.erase_node(user)
            if not node.users:
                graph.erase_node(node)


def _normalize_convolutions(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    for node in list(graph.nodes):
        if is_aten(node, "_convolution", "convolution"):
            a = arguments(node)
            dims = len(a["stride"])
            if a["transposed"]:
                target = {
                    1: aten.conv_transpose1d.default,
                    2: aten.conv_transpose2d.input,
                    3: aten.conv_transpose3d.input,
                }[dims]
                tail = (a["stride"], a["padding"], a["output_padding"], a["groups"], a["dilation"])
            else:
                target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[dims]
                tail = (a["stride"], a["padding"], a["dilation"], a["groups"])
            rewrite(node, target, (a["input"], a["weight"], a["bias"], *tail))
            continue
        if is_aten(node, "_convolution_mode"):  # what TorchScript makes of padding="same"
            a = arguments(node)
            target = _CONV_PADDING[len(a["weight"].meta["shape"]) - 2]
            rewrite(node, target, tuple(a[name] for name in _CONV_ARGUMENTS))
        if is_aten(node, "conv1d", "conv2d", "conv3d") and isinstance(arguments(node)["padding"], str):
            _explicit_padding(graph, constants, node)


def _explicit_padding(graph: fx.Graph, constants: dict[str, torch.Tensor], node: fx.Node) -> None:
    """padding="same" or "valid" as numbers; an uneven "same" becomes a zero pad in front of the convolution."""
    a = arguments(node)
    dims = {"conv1d": 1, "conv2d": 2, "conv3d": 3}[op_name(node)]
    weight = a["weight"]
    if not isinstance(weight, fx.Node) or weight.target not in constants:
        return
    dilation = _spread(a["dilation"], dims)
    kernel = constants[str(weight.target)].shape[2:]
    total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    x = a["input"]
    if any(t % 2 for t in total):
        pads = [p for t in reversed(total) for p in (t // 2, t - t // 2)]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (x, pads, 0.0))
        padded.meta = {k: v for k, v in node.meta.items() if k == "module"}
        shape = x.meta.get("shape", ())
        grown = [None if s is None else s + t for s, t in zip(shape[-dims:], total, strict=True)]
        padded.meta |= {"shape": (*shape[:-dims], *grown), "dtype": x.meta.get("dtype")}
        x, total = padded, [0] * dims
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[dims]
    rewrite(node, target, (x, weight, a["bias"], a["stride"], [t // 2 for t in total], a["dilation"], a["groups"]))


def _spread(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _reshape_views(graph: fx.Graph, _constants: dict[str, torch.Tensor]) -> None:
    """`view` insists on strides; our kernels return channels-last tensors, so every view becomes a reshape."""
    for node in graph.nodes:
        if is_aten(node, "view", "_unsafe_view", "view_copy") and isinstance(node.args[1], (list, tuple)):
            rewrite(node, aten.reshape.default, (node.args[0], node.args[1]))


def _fold_constants(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    known: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            known[node] = constants[str(node.target)]
        if node.op != "call_function" or op_name(node) in _RANDOM:
            continue
        if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
            continue
        if "::" in op_name(node) and torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        if op_name(node) in _NEW and all(isinstance(s, int) for s in node.args[1]):
            a, dtype = arguments(node), node.meta.get("dtype", torch.float32)
            fill = {"new_zeros": 0, "new_empty": 0, "new_ones": 1}.get(op_name(node), a.get("fill_value"))
            value = torch.full(a["size"], fill, dtype=dtype)
        elif all(source in known for source in node.all_input_nodes):
            with torch.no_grad():
                args = fx.map_arg(node.args, known.__getitem__)
                kwargs = {k: v for k, v in fx.map_arg(node.kwargs, known.__getitem__).items() if k != "device"}
                value = node.target(*args, **kwargs)
        else:
            continue
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            continue
        if _elements(value) > max([_FOLD_LIMIT, *(_elements(known[s]) for s in node.all_input_nodes if s in known)]):
            continue
        known[node] = value
    for node, value in known.items():
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        if all(user in known for user in node.users):
            continue
        value = value.detach()
        owned = value.clone() if not value.is_contiguous() or value.untyped_storage().nbytes() > value.nbytes else value
        node.replace_all_uses_with(add_constant(graph, constants, node, _origin(node), owned))


def _elements(value: torch.Tensor | Sequence[torch.Tensor]) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else sum(part.numel() for part in value)


def _origin(node: fx.Node) -> str:
    """The constant that a folded value was made from first; made from none, a name of its own."""
    source = node
    while source.op != "get_attr" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return str(source.target) if source.op == "get_attr" else f"folded.{node.name}"


def _normalize_linears(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """addmm(b, x, W), mm(x, W) and matmul(x, W) with a constant 2-D W are linear(x, W.T, b)."""

    def transposed(node: fx.Node, weight: Any) -> fx.Node | None:
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        value = constants[str(weight.target)]
        if value.dim() != 2 or not value.is_floating_point():
            return None
        return add_constant(graph, constants, node, str(weight.target), value.t().contiguous())

    for node in list(graph.nodes):
        if is_aten(node, "mm", "matmul") and (weight := transposed(node, node.args[1])):
            rewrite(node, aten.linear.default, (node.args[0], weight, None))
        elif is_aten(node, "addmm"):
            a = arguments(node)
            bias = a["self"]
            one_dim = isinstance(bias, fx.Node) and bias.op == "get_attr" and constants[str(bias.target)].dim() == 1
            if a["alpha"] == 1 and a["beta"] == 1 and one_dim and (weight := transposed(node, a["mat2"])):
                rewrite(node, aten.linear.default, (a["mat1"], weight, bias))
