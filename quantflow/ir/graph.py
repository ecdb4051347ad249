"""The one intermediate representation: an FX graph of functional ATen ops with named constants.

Every capture (export, torchscript, imperative) ends here, and everything after capture is shared.

Conventions, kept by `quantflow.capture` and relied on everywhere:
    * ops are `torch.ops.aten.*` overloads, operators of other libraries (known by full name, "my::gelu", and float),
      `operator` functions on sizes, or `operator.getitem`; none of them mutates its arguments;
    * `get_attr` nodes name an entry of `Graph.constants` (dots and all);
    * every node carries `meta["layer"]` (a unique, human-readable name); ops with a weight carry `meta["owner"]`, the
      module that weight belongs to; tensor-valued nodes carry `meta["shape"]` (ints, None where the size
      varies) and `meta["dtype"]`.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import fx

from quantflow.host.place import CPU
from quantflow.ir.calls import Arguments, Input, Limit

#: Ops whose weight, their second argument, names them.
_WEIGHTED = (
    "conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm",
)  # fmt: skip
#: Functions on sizes that may appear in a graph; the loader of a program accepts no others.
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "pow", "abs",
        "and_", "or_", "getitem",
    )
} | {
    "max": max, "min": min, "int": int, "sym_max": max, "sym_min": min, "sym_float": float, "round": round,
    "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc,
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A captured model.

    Attributes:
        fx: the graph; placeholders are the inputs in order, the output node's argument follows `outputs`.
        constants: parameters, buffers and folded values by name, float32 unless the model says otherwise.
        inputs: one entry per placeholder.
        batch_is_dynamic: False when the model could only be captured for the example's batch size.
        notes: what capture had to do that a user should know.
        arguments: where the inputs lie among the model's arguments; None: they are these.
        limits: what the sizes of a call must fulfil.
        structure: what the model returns, as a tree over the graph's outputs (`ir.structure`); None: these, as nested.
        place: where the constants lie, and where it computes.
    """

    fx: fx.Graph
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[Input, ...]
    batch_is_dynamic: bool = True
    notes: tuple[str, ...] = field(default=())
    arguments: Arguments | None = None
    limits: tuple[Limit, ...] = ()
    structure: Any = None
    place: torch.device = CPU

    def at(self, place: torch.device) -> Graph:
        """The same nodes, computed on another device."""
        if place == self.place:
            return self
        return replace(self, constants={name: x.to(place) for name, x in self.constants.items()}, place=place)

    def with_notes(self, *notes: str) -> Graph:
        return replace(self, notes=(*self.notes, *notes))

    @property
    def digest(self) -> str:
        """sha256 of the ops and of every constant."""
        digest = hashlib.sha256(str(self).encode())
        for name, tensor in sorted(self.constants.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __str__(self) -> str:
        return "\n".join(node.format_node() or "" for node in self.fx.nodes)


def is_aten(node: fx.Node, *names: str) -> bool:
    """Whether the node calls one of the named ATen ops, whatever the overload."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace == "aten" and op_name(node) in names


def op_name(node: fx.Node) -> str:
    """`aten.conv2d.default` → "conv2d", `my.gelu.default` → "my::gelu"; other callables by their own name; placeholders
    and constants by kind."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return node.op


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes, names and descriptions."""
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, values))
    for old, new in values.items():
        new.meta = dict(old.meta)
    return copy


def only_user(node: fx.Node) -> fx.Node | None:
    """The one op that reads the node's value; None if several do, or the model returns it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by schema name, with the schema's defaults filled in (ATen ops only)."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the inputs it is the last to read: what an interpreter may free after running it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    frees: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        frees.setdefault(node, []).append(used)
    return frees


def interpret(
    graph: Graph,
    inputs: Iterable[torch.Tensor],
    on_value: Callable[[fx.Node, Any], None] | None = None,
) -> Any:
    """Run the graph in float, freeing each value after its last use.

    Args:
        inputs: one tensor per placeholder, in order, on whatever device.
        on_value: called with every computed node and its value.

    Returns:
        The model's output, in its own structure.
    """
    values: dict[fx.Node, Any] = {}
    frees = last_uses(graph.fx)
    remaining = iter(inputs)
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = laid_out(next(remaining).to(graph.place))
        elif node.op == "get_attr":
            values[node] = graph.constants[node.target]
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = call(node, values.__getitem__, graph.place)
        if on_value is not None:
            on_value(node, values[node])
        for dead in frees.get(node, ()):
            del values[dead]
    raise ValueError("the graph has no output node")


def call(node: fx.Node, read: Callable[[fx.Node], Any], place: torch.device = CPU) -> Any:
    """What a node computes from the values that it reads, on the device where they lie."""
    args, kwargs = fx.map_arg(node.args, read), dict(fx.map_arg(node.kwargs, read))
    if place != CPU:  # capture wrote down the CPU
        args = tuple(place if isinstance(value, torch.device) else value for value in args)
        kwargs |= {name: place for name, value in kwargs.items() if isinstance(value, torch.device)}
        if _makes_from_nothing(node.target):
            kwargs["device"] = place
    return node.target(*args, **kwargs)  # type: ignore[operator]


@cache
def _makes_from_nothing(target: Any) -> bool:
    """Whether an op has no tensor whose device it could take."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema.arguments
    return any(a.name == "device" for a in schema) and not any("Tensor" in str(a.type) for a in schema)


def laid_out(x: torch.Tensor) -> torch.Tensor:
    """Images channels-last, which float convolutions are up to twice as fast on; other inputs as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def float_leaves(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output, in the order of its structure."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def floating_outputs(graph: Graph, run: Callable[[Callable[[fx.Node, Any], None]], Any]) -> list[torch.Tensor]:
    """What a run gives in floating point; of a model that returns integers and flags only, what these follow from.

    Args:
        run: computes the graph's output, and calls its argument with every node and its value.
    """
    watched, kept = _last_floating(graph), dict[fx.Node, Any]()

    def keep(node: fx.Node, value: Any) -> None:
        if node in watched:
            kept[node] = value

    output = run(keep)
    return float_leaves(output) or [kept[node] for node in graph.fx.nodes if node in kept]


def _last_floating(graph: Graph) -> set[fx.Node]:
    """The nearest floating values from the output backwards."""
    found, seen = set[fx.Node](), set[fx.Node]()
    pending = list(graph.fx.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        dtype = node.meta.get("dtype")
        if node.op == "call_function" and dtype is not None and dtype.is_floating_point:
            found.add(node)
        else:
            pending += node.all_input_nodes
    return found


def name_layers(graph: fx.Graph) -> None:
    """Give every computed node a unique `meta["layer"]`: the module's own name where one op stands for it.

    Linear ops are named after their weight ("layer1.0.conv1.weight" → "layer1.0.conv1"), everything else after
    the module it was called in ("layer1.0" + "add"), numbered from the second use on.
    """
    taken: set[str] = set()

    def claim(node: fx.Node, wanted: str) -> None:
        name, count = wanted, 0
        while name in taken:
            count += 1
            name = f"{wanted}_{count}"
        taken.add(name)
        node.meta["layer"] = name

    weighted = [n for n in graph.nodes if _weight_of(n) is not None]
    for node in weighted:
        node.meta["owner"] = _layer_of_weight(_weight_of(node) or "")
        claim(node, node.meta["owner"])
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            claim(node, str(node.target))
        elif node.op == "get_attr":
            node.meta["layer"] = str(node.target)
        elif node not in weighted:
            module = node.meta.get("module", "")
            leaf = module.rsplit(".", 1)[-1]
            own = bool(module) and (op_name(node) in leaf.lower() or node.meta.get("module_is_leaf", False))
            claim(node, module if own else ".".join(filter(None, (module, op_name(node)))))


def _weight_of(node: fx.Node) -> str | None:
    if not is_aten(node, *_WEIGHTED):
        return None
    # A BatchNorm without weights is known by its running mean.
    owned = node.args[1:4:2] if is_aten(node, "batch_norm") else node.args[1:2]
    return next((str(n.target) for n in owned if isinstance(n, fx.Node) and n.op == "get_attr"), None)


def _layer_of_weight(weight: str) -> str:
    for suffix in (".weight", "_weight", ".running_mean"):
        if weight.endswith(suffix) and len(weight) > len(suffix):
            return weight[: -len(suffix)]
    return weight
