"""Which values of a graph may be divided by one factor per channel, and which constants that changes.

Linear ops write and read channels. Between them, ops with f(s x) = s f(x) for s > 0 keep factors apart, and so does an
addition whose operands share their factors. Everything else is an obstacle: the values it touches stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from quantflow.ir.activations import HOMOGENEOUS
from quantflow.ir.graph import Graph, arguments, is_aten, op_name
from quantflow.ir.ops import AVERAGES, LINEARS, POOLS
from quantflow.ir.plan import Plan

_HOMOGENEOUS = (
    *HOMOGENEOUS, "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", *POOLS, *(name for name in AVERAGES if name != "mean"),
)  # fmt: skip
_CLAMPS = ("relu6", "hardtanh", "clamp", "clamp_max", "minimum")
_FLATTENS = ("flatten", "reshape", "squeeze")


@dataclass
class ChannelSet:
    """Values that must share their factors: one per channel.

    Attributes:
        size: channels.
        values: in execution order.
        writers, readers: the ops that can absorb a factor.
        clips: clamps to a number, which is no longer the same clamp after rescaling.
        bounds: (value, constant that clamps it channel by channel): rescaled with the values.
        obstacle: why the values can't be rescaled; empty when they can.
    """

    size: int
    values: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    clips: list[fx.Node] = field(default_factory=list)
    bounds: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    obstacle: str = ""

    @property
    def title(self) -> str:
        """The layers that write the channels."""
        names = [str(node.meta["layer"]) for node in self.writers]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more" if names else "-"


def find_sets(
    graph: Graph, plan: Plan, algorithm: str, fixed: frozenset[str]
) -> tuple[list[ChannelSet], dict[fx.Node, int]]:
    """The sets of channels, and the axis along which each value's channels lie.

    Args:
        algorithm: layers that `plan` closes to it are left alone.
        fixed: constants that may not change.
    """
    finder = _Finder(graph, plan, algorithm, fixed)
    for node in graph.fx.nodes:
        finder.visit(node)
    return finder.sets(), finder.axes


class _Finder:
    """Union-find over the values."""

    def __init__(self, graph: Graph, plan: Plan, algorithm: str, fixed: frozenset[str]) -> None:
        self.constants = graph.constants
        self.nodes = list(graph.fx.nodes)
        self.fixed = fixed
        self.refused = {node for p in plan.units if not p.allows(algorithm) for node in p.unit.nodes}
        self.axes: dict[fx.Node, int] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.obstacles: dict[fx.Node, str] = {}
        self.ops: dict[fx.Node, fx.Node] = {}
        self.clips: dict[fx.Node, fx.Node] = {}
        self.bounds: list[tuple[fx.Node, fx.Node]] = []

    def visit(self, node: fx.Node) -> None:
        values = [n for n in node.all_input_nodes if n.op != "get_attr" and "shape" in n.meta]
        if node.op == "placeholder":
            self.obstacles[node] = "it is an input of the model"
        elif node.op == "output":
            self.obstacles |= dict.fromkeys(values, "it is an output of the model")
        elif node.op != "call_function" or not values or is_aten(node, "sym_size", "sym_numel"):
            return
        elif node in self.refused:
            self._stop(node, values, "the recipe says so")
        elif (axes := self._absorbs(node, values[0])) is not None:
            read, self.axes[node] = axes
            self.ops[node] = values[0]
            if values[0] in self.axes and self.axes[values[0]] != read:
                self.obstacles[values[0]] = f"{node.meta['layer']} reads it along another axis"
        elif (axis := self._keeps(node, values)) is not None:
            self.axes[node] = axis
            for value in values:
                self.parent[self._find(value)] = self._find(node)
        else:
            self._stop(node, values, f"{node.meta['layer']} does not keep channels apart")

    def _stop(self, node: fx.Node, values: list[fx.Node], reason: str) -> None:
        for value in (*values, node):
            self.obstacles.setdefault(value, reason)

    def _find(self, node: fx.Node) -> fx.Node:
        while self.parent.setdefault(node, node) is not node:
            node = self.parent[node]
        return node

    def _absorbs(self, node: fx.Node, x: fx.Node) -> tuple[int, int] | None:
        """(axis it reads, axis it writes) of an op whose constants can take up factors on both sides."""
        if is_aten(node, *LINEARS):
            used = [node.args[1], *(b for b in node.args[2:3] if b is not None)]
            if not self._own(used) or self.constants[str(node.args[1].target)].dtype is not torch.float32:  # type: ignore[union-attr]
                return None
            last = len(node.meta["shape"]) - 1
            return (last, last) if op_name(node) == "linear" else (1, 1)
        if is_aten(node, "batch_norm"):
            a = arguments(node)
            used = [a[name] for name in ("weight", "bias", "running_mean")]
            return (1, 1) if self._own(used) and not a["training"] and x in self.axes else None
        if is_aten(node, "mul", "div") and x is node.args[0] and x in self.axes:
            factor = node.args[1]
            return (self.axes[x],) * 2 if self._own([factor]) and self._per_channel(factor, x) else None
        return None

    def _own(self, used: list[Any]) -> bool:
        """Constants that nothing else reads and that may change."""
        return all(
            isinstance(n, fx.Node) and n.op == "get_attr" and len(n.users) == 1 and str(n.target) not in self.fixed
            for n in used
        )

    def _per_channel(self, constant: Any, x: fx.Node) -> bool:
        """A number per channel, or one for all, in a shape that broadcasts against x."""
        shape, axis, size = list(self.constants[str(constant.target)].shape), self.axes[x], x.meta["shape"]
        full = [1] * (len(size) - len(shape)) + shape
        return len(full) == len(size) and all(n == 1 or (d == axis and n == size[d]) for d, n in enumerate(full))

    def _keeps(self, node: fx.Node, values: list[fx.Node]) -> int | None:
        """The axis of the op's channels if it passes factors on, else None."""
        x = values[0]
        if x not in self.axes:
            return None
        axis, shape = self.axes[x], x.meta["shape"]
        if is_aten(node, *_CLAMPS):
            return axis if len(values) == 1 and self._clamps(node, x) else None
        if is_aten(node, "add", "sub"):
            alike = len(values) == 2 and all(
                v in self.axes and self.axes[v] == axis and len(v.meta["shape"]) == len(shape) for v in values
            )
            return axis if alike and values[1].meta["shape"][axis] == shape[axis] else None
        if is_aten(node, "constant_pad_nd", "pad"):
            a = arguments(node)
            zeros = a.get("mode", "constant") == "constant" and not a.get("value")
            return axis if zeros and axis == 1 and len(a["pad"]) <= 2 * (len(shape) - 2) else None
        if is_aten(node, *_HOMOGENEOUS):
            return axis if axis == 1 or is_aten(node, *HOMOGENEOUS) else None
        if is_aten(node, "mean"):
            a = arguments(node)
            dims = {d % len(shape) for d in a.get("dim") or ()}
            return axis - (0 if a["keepdim"] else sum(d < axis for d in dims)) if dims and axis not in dims else None
        if is_aten(node, *_FLATTENS):
            features = node.meta["shape"][1:]
            inner = [n for n in shape[1:] if isinstance(n, int)]
            whole = len(features) == 1 and len(inner) == len(shape) - 1 and axis == 1
            return 1 if whole and features[0] == torch.Size(inner).numel() else None
        return None

    def _clamps(self, node: fx.Node, x: fx.Node) -> bool:
        """A clamp to [0 or -inf, m]; m a number, or a constant per channel."""
        low: Any = None
        if is_aten(node, "minimum", "clamp_max"):
            high: Any = node.args[1]
        elif is_aten(node, "relu6"):
            low, high = 0, 6
        else:
            a = arguments(node)
            low, high = (a["min_val"], a["max_val"]) if is_aten(node, "hardtanh") else (a.get("min"), a.get("max"))
        if isinstance(low, fx.Node):
            if low.op != "get_attr" or bool(self.constants[str(low.target)].any()):
                return False
        elif low not in (0, None, float("-inf")):
            return False
        if isinstance(high, fx.Node):
            if not self._own([high]) or not self._per_channel(high, x):
                return False
            self.bounds.append((x, high))
        elif high is not None and high != float("inf"):
            self.clips[node] = x
        return True

    def sets(self) -> list[ChannelSet]:
        found: dict[fx.Node, ChannelSet] = {}
        for node in self.nodes:
            if node not in self.axes and node not in self.obstacles:
                continue
            axis = self.axes.get(node)
            size = node.meta["shape"][axis] if axis is not None and "shape" in node.meta else None
            s = found.setdefault(self._find(node), ChannelSet(size or 0))
            s.values.append(node)
            s.obstacle = s.obstacle or self.obstacles.get(node, "")
            if node in self.ops:
                s.writers.append(node)
        for op, value in self.ops.items():
            if (s := found.get(self._find(value))) is not None:
                s.readers.append(op)
        for clip, value in self.clips.items():
            found[self._find(value)].clips.append(clip)
        for value, bound in self.bounds:
            found[self._find(value)].bounds.append((value, bound))
        for s in found.values():
            sizes = {v.meta["shape"][self.axes[v]] for v in s.writers}
            if len(sizes) != 1 or not isinstance(next(iter(sizes)), int):
                s.obstacle = s.obstacle or "its writers differ in their channels"
            else:
                s.size = sizes.pop()
        return list(found.values())
