"""Recurrent layers split into what can be int8: the input's product for all steps at once, and the steps themselves.

    aten.lstm(x, …)  →  linear(x, W_ih, b_ih + b_hh)  →  quantflow.lstm_steps(gates, W_hh, …)   per layer and direction

The linear is like any other to everything after. Outputs and last states are put together as ATen returns them. What is
not split keeps its ATen op, with the reason in `meta["float_reason"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from quantflow.ir.graph import Graph, arguments, copied, is_aten, op_name
from quantflow.ir.passes.normalize import add_constant
from quantflow.ir.recurrence import CELLS, SUFFIX

aten = torch.ops.aten

IN_MODULES = "recurrent modules stay the user's own float modules in imperative mode (mode=export quantizes them)"


def split_recurrent(graph: Graph, why_float: str = "") -> Graph:
    """Split every LSTM, GRU and RNN with constant weights.

    Args:
        why_float: a reason to split none.
    """
    if not any(is_aten(node, *CELLS) for node in graph.fx.nodes):
        return graph
    split = replace(graph, fx=copied(graph.fx), constants=dict(graph.constants))
    for node in [node for node in split.fx.nodes if is_aten(node, *CELLS)]:
        _name(split.fx, node)
        reason = why_float or _why_float(node, split.constants)
        if reason:
            node.meta["float_reason"] = reason
        else:
            _Splitter(split, node).run()
    split.fx.eliminate_dead_code()
    used = {node.target for node in split.fx.nodes if node.op == "get_attr"}
    return replace(split, constants={name: value for name, value in split.constants.items() if name in used})


def _name(graph: fx.Graph, node: fx.Node) -> None:
    """Give the op its module's name, which zeros for its first state may have taken."""
    weights = _flat(node.args[2 if _has_steps(node) else 3])
    first = weights[0] if weights else None
    if not isinstance(first, fx.Node) or first.op != "get_attr" or ".weight_ih" not in str(first.target):
        return
    owner = str(first.target).rpartition(".")[0]
    for other in graph.nodes:
        if other.meta.get("layer") == owner and other.op == "call_function" and other.meta.get("owner") is None:
            other.meta["layer"], node.meta["layer"] = node.meta["layer"], owner
            break
    node.meta["owner"] = owner


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _has_steps(node: fx.Node) -> bool:
    """Whether all sequences have one length: overload `input`, not `data`, which takes packed ones."""
    return getattr(node.target, "_overloadname", "") == "input"


def _why_float(node: fx.Node, constants: Any) -> str:
    """Why the op stays as it is; empty if it is split."""
    name = op_name(node)
    if not _has_steps(node):
        return f"{name} of packed sequences, whose lengths differ, has no int8 form"
    a = arguments(node)
    if a["train"] and a["dropout"]:
        return f"{name} was captured in training mode, with dropout between its layers"
    weights, per_part = _flat(a["params"]), 4 if a["has_biases"] else 2
    parts = a["num_layers"] * (2 if a["bidirectional"] else 1)
    if len(weights) != parts * per_part:
        return f"{name} with a projection of its state (proj_size) has no int8 form"
    for weight in weights:
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "a weight of it is computed at run time, not a constant"
        if constants[str(weight.target)].dtype is not torch.float32:
            return f"a weight of it is {constants[str(weight.target)].dtype}, not float32"
    x = a["input"]
    if x.meta.get("dtype") is not torch.float32 or len(x.meta.get("shape", ())) != 3:
        return "its input is no float32 tensor of three dimensions"
    users = {user.target for user in node.users}
    return "" if users <= {operator.getitem} else "its results are not taken apart"


@dataclass(frozen=True)
class _Part:
    """One layer in one direction: "l0", "l1_reverse"; its weights and the states that it starts from."""

    label: str
    is_reverse: bool
    weights: list[fx.Node]
    h0: fx.Node | None
    c0: fx.Node | None


class _Splitter:
    """Writes one recurrent op's nodes in front of it, and has its readers read them."""

    def __init__(self, graph: Graph, node: fx.Node) -> None:
        assert isinstance(graph.constants, dict)
        self._graph, self._constants, self._node = graph.fx, graph.constants, node
        self._cell = op_name(node)
        self._a = arguments(node)
        self._owner = str(node.meta.get("owner") or node.meta["layer"])
        self._taken = {str(n.meta.get("layer")) for n in graph.fx.nodes}
        self._hidden = self._constants[str(self._a["params"][1].target)].shape[1]

    def run(self) -> None:
        a, batch_first = self._a, self._a["batch_first"]
        x = a["input"]
        if batch_first:
            x = self._call("transpose", aten.transpose.int, (x, 0, 1), _swapped(x.meta["shape"]))
        last_h: list[fx.Node] = []
        last_c: list[fx.Node] = []
        directions = 2 if a["bidirectional"] else 1
        for layer in range(a["num_layers"]):
            outputs = []
            for direction in range(directions):
                output, h, c = self._steps(x, self._part(layer, direction, directions))
                outputs.append(output)
                last_h += h
                last_c += c
            x = outputs[0]
            if directions == 2:
                shape = (*x.meta["shape"][:2], 2 * self._hidden)
                x = self._call(f"cat_l{layer}", aten.cat.default, (outputs, -1), shape)
        if batch_first:
            x = self._call("output", aten.transpose.int, (x, 0, 1), _swapped(x.meta["shape"]))
        results: dict[int, Callable[[], fx.Node]] = {
            0: lambda: x,
            1: lambda: self._stacked("h_n", last_h),
            2: lambda: self._stacked("c_n", last_c),
        }
        for user in list(self._node.users):
            user.replace_all_uses_with(results[user.args[1]]())  # type: ignore[index]
            self._graph.erase_node(user)
        self._graph.erase_node(self._node)

    def _part(self, layer: int, direction: int, directions: int) -> _Part:
        a, index = self._a, layer * directions + direction
        per_part = 4 if a["has_biases"] else 2
        states = list(a["hx"]) if self._cell == "lstm" else [a["hx"]]
        label = f"l{layer}" + ("_reverse" if direction else "")
        first = [self._first(state, index, f"{name}_{label}") for name, state in zip("hc", states, strict=False)]
        weights = list(a["params"][index * per_part : (index + 1) * per_part])
        return _Part(label, bool(direction), weights, first[0], first[1] if len(first) > 1 else None)

    def _first(self, state: fx.Node, index: int, name: str) -> fx.Node | None:
        """A part's share of h0 or c0; None where that is zeros, of whatever batch."""
        if is_aten(state, "zeros", "zeros_like", "new_zeros"):
            return None
        if state.op == "get_attr" and not bool(self._constants[str(state.target)].any()):
            return None
        return self._call(f"first_{name}", aten.select.int, (state, 0, index), state.meta["shape"][1:])

    def _steps(self, x: fx.Node, part: _Part) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
        """(outputs, [last h], [last c] of an LSTM)."""
        w_ih, w_hh, *biases = part.weights
        of_x, of_h = self._biases([self._constants[str(bias.target)] for bias in biases], part.label)
        shape = (*x.meta["shape"][:2], w_ih.meta["shape"][0])
        gates = self._call(f"ih_{part.label}", aten.linear.default, (x, w_ih, of_x), shape)
        gates.meta["owner"] = self._owner
        steps, is_lstm = x.meta["shape"][0], self._cell == "lstm"
        rows = steps + 1 if is_lstm and steps is not None else steps
        operator_ = getattr(torch.ops.quantflow, self._cell + SUFFIX).default
        states = self._call(
            f"hh_{part.label}",
            operator_,
            (gates, w_hh, of_h, part.h0, part.c0, part.is_reverse),
            (rows, *shape[1:2], self._hidden),
        )
        states.meta["owner"] = self._owner
        state = (shape[1], self._hidden)
        last = 0 if part.is_reverse else -2 if is_lstm else -1
        h = self._call(f"h_{part.label}", aten.select.int, (states, 0, last), state)
        if not is_lstm:
            return states, [h], []
        outputs = self._call(f"output_{part.label}", aten.slice.Tensor, (states, 0, 0, -1), (steps, *state))
        return outputs, [h], [self._call(f"c_{part.label}", aten.select.int, (states, 0, -1), state)]

    def _biases(self, biases: list[torch.Tensor], label: str) -> tuple[fx.Node | None, fx.Node | None]:
        """The bias of the input's product, and that of a GRU's n, which r multiplies with the state's product."""
        if not biases:
            return None, None
        of_x, of_h = biases
        if self._cell != "gru":
            return self._constant(f"bias_{label}", of_x + of_h), None
        inner = of_h[2 * self._hidden :].clone()
        both = of_x + torch.cat([of_h[: 2 * self._hidden], torch.zeros_like(inner)])
        return self._constant(f"bias_{label}", both), self._constant(f"bias_n_{label}", inner)

    def _constant(self, name: str, value: torch.Tensor) -> fx.Node:
        node = add_constant(self._graph, self._constants, self._node, f"{self._owner}.{name}", value)
        node.meta["layer"] = node.target
        return node

    def _stacked(self, name: str, states: list[fx.Node]) -> fx.Node:
        shape = (len(states), *states[0].meta["shape"])
        if len(states) == 1:
            return self._call(name, aten.unsqueeze.default, (states[0], 0), shape)
        return self._call(name, aten.stack.default, (states, 0), shape)

    def _call(self, name: str, target: Any, args: tuple[Any, ...], shape: tuple[int | None, ...]) -> fx.Node:
        with self._graph.inserting_before(self._node):
            node = self._graph.call_function(target, args)
        layer, count = f"{self._owner}.{name}", 0
        while layer in self._taken:
            count += 1
            layer = f"{self._owner}.{name}_{count}"
        self._taken.add(layer)
        module = {key: value for key, value in self._node.meta.items() if key in ("module", "module_is_leaf")}
        node.meta = {**module, "layer": layer, "shape": tuple(shape), "dtype": torch.float32}
        return node


def _swapped(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return (shape[1], shape[0], *shape[2:])
