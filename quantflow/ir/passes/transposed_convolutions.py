"""A transposed convolution is an ordinary one with a channel per phase, and the phases put side by side.

With stride s, output o takes the taps w[t] for which o + p - t d is a multiple of s: s sets of taps, by what (o + p)
leaves over of s. In one dimension, with w' the kernel with its d - 1 zeros between taps, K = d (k - 1) + 1 wide:

    y[o] = sum_i x[i] w'[o + p - i s]
    M    = ceil(K / s)                                          taps of a phase
    W_r  = (w'[r + s (M - 1)], …, w'[r + s], w'[r])             0 beyond w'
    P    = max(0, M - 1 - floor(p / s), floor((K + op - 1 - p) / s))
    z    = conv(x, W, padding P): z_r[j] is what stands at place s (j + M - 1 - P) + r, before p places are cut off

The places cut off in front of and behind z, side by side, do not depend on the size of x:

    p - s (M - 1 - P)    and    s (2 P - M + 2) - K - op + 2 p - (the former)

A dimension with s = 1 has one phase, and its kernel keeps its dilation. Channels lie phase by phase in every group, so
that what moves is a run of channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from quantflow.ir.activations import as_epilogue
from quantflow.ir.graph import Graph, arguments, copied, is_aten, only_user, op_name
from quantflow.ir.ops import TRANSPOSED
from quantflow.ir.passes.fold_batchnorm import channels_swapped
from quantflow.ir.passes.normalize import add_constant

aten = torch.ops.aten

#: (op, its arguments behind the tensor).
Move = tuple[torch._ops.OpOverload, tuple[Any, ...]]
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class Phases:
    """What a transposed convolution is, beside the ordinary one that computes its phases.

    Attributes:
        op: its own name: "conv_transpose2d".
        stride: phases per dimension.
        groups: groups of channels, in each of which these lie phase by phase.
        channels: channels of the result.
        cropped: per dimension, the places cut off in front and behind, of the phases side by side.
        padding, output_padding, dilation: its own.
    """

    op: str
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels: int
    cropped: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Phases of all dimensions."""
        return prod(self.stride)

    def moves(self) -> list[Move]:
        """(batch, groups x phases x channels per group, …) → (batch, channels, …), one op after another.

        Through (batch, …, channels): where codes lie channels-last, one copy of whole runs of channels.
        """
        dims, moves = len(self.stride), []
        if self.count > 1:
            split = [self.groups, *self.stride, self.channels // self.groups]
            sizes = range(dims + 3, 2 * dims + 3)
            by_place = [axis for pair in zip(sizes, range(2, dims + 2), strict=True) for axis in pair]
            moves = [
                (aten.unflatten.int, (1, split)),
                (aten.permute.default, ([0, *by_place, 1, dims + 2],)),
                *((aten.flatten.using_ints, (axis, axis + 1)) for axis in range(1, dims + 2)),
                (aten.permute.default, ([0, dims + 1, *range(1, dims + 1)],)),
            ]
        for axis, (front, behind) in enumerate(self.cropped, start=2):
            if front or behind:
                moves.append((aten.slice.Tensor, (axis, front, -behind if behind else None)))
        return moves

    def put_together(self, z: torch.Tensor) -> torch.Tensor:
        """`moves` on the phases' tensor: the transposed convolution's result."""
        for op, args in self.moves():
            z = op(z, *args)
        return z


@dataclass(frozen=True)
class _Dimension:
    """One dimension's numbers; the names are the module's: kernel, stride, padding, output_padding, dilation."""

    k: int
    s: int
    p: int
    op: int
    d: int

    @property
    def span(self) -> int:
        return self.d * (self.k - 1) + 1

    @property
    def taps(self) -> int:
        return -(-self.span // self.s)

    @property
    def padding(self) -> int:
        return max(0, self.taps - 1 - self.p // self.s, (self.span + self.op - 1 - self.p) // self.s)

    @property
    def cropped(self) -> tuple[int, int]:
        front = self.p - self.s * (self.taps - 1 - self.padding)
        both = self.s * (2 * self.padding - self.taps + 2) - self.span - self.op + 2 * self.p
        return front, both - front


def transposed_to_convolutions(graph: Graph) -> Graph:
    """Write every transposed convolution with constant weights as an ordinary one and data movement.

    An activation that alone reads the result, and that one kernel computes with the sums, moves in front of the data
    movement. Both keep their names. What a convolution came from is its `meta["transposed"]`, a `Phases`.
    """
    nodes = [node for node in graph.fx.nodes if is_aten(node, *TRANSPOSED)]
    if all(why_not(node) for node in nodes):
        return graph
    found = replace(graph, fx=copied(graph.fx), constants=dict(graph.constants))
    constants = found.constants
    assert isinstance(constants, dict)
    for node in list(found.fx.nodes):
        if is_aten(node, *TRANSPOSED) and not why_not(node):
            _rewrite(found.fx, constants, node)
    for node in reversed(found.fx.nodes):
        if node.op == "get_attr" and not node.users:
            found.fx.erase_node(node)
    used = {node.target for node in found.fx.nodes if node.op == "get_attr"}
    return replace(found, constants={name: value for name, value in constants.items() if name in used})


def why_not(node: fx.Node) -> str:
    """Why a transposed convolution can't be written as an ordinary one; empty if it can."""
    a = arguments(node)
    for role in ("weight", "bias"):
        if isinstance(a[role], fx.Node) and a[role].op != "get_attr":
            return f"its {role} is computed at run time, not a constant"
    for role in ("stride", "padding", "output_padding", "dilation"):
        if not all(isinstance(v, int) for v in _spread(a[role], 1)):
            return f"its {role} is computed at run time, not a constant"
    dims = _dimensions(node)
    if len(a["weight"].meta["shape"]) != dims + 2 or len(a["input"].meta.get("shape", ())) != dims + 2:
        return "its input has no batch dimension"
    return ""


def _rewrite(graph: fx.Graph, constants: dict[str, torch.Tensor], node: fx.Node) -> None:
    a, dims, layer = arguments(node), _dimensions(node), str(node.meta["layer"])
    weight = channels_swapped(constants[str(a["weight"].target)], a["groups"])
    settings = [_spread(a[role], dims) for role in ("stride", "padding", "output_padding", "dilation")]
    each = [_Dimension(*numbers) for numbers in zip(weight.shape[2:], *settings, strict=True)]
    phases = Phases(
        op_name(node),
        *(tuple(numbers) for numbers in settings),
        groups=a["groups"],
        channels=weight.shape[0],
        cropped=tuple(d.cropped for d in each),
    )
    values = {"weight": _phase_weights(weight, each, a["groups"])}
    if a["bias"] is not None:
        bias = constants[str(a["bias"].target)].reshape(a["groups"], 1, -1)
        values["bias"] = bias.expand(-1, phases.count, -1).reshape(-1)
    named = {role: add_constant(graph, constants, node, f"{layer}.phases_{role}", v) for role, v in values.items()}
    for constant in named.values():
        constant.meta["layer"] = str(constant.target)
    x = a["input"]
    dilation = [d.d if d.s == 1 else 1 for d in each]
    taps = [d.k if d.s == 1 else d.taps for d in each]
    args = (x, named["weight"], named.get("bias"), [1] * dims, [d.padding for d in each], dilation, a["groups"])
    batch, _, *sizes = x.meta["shape"]
    grown = [
        _plus(size, 2 * d.padding - step * (tap - 1))
        for size, d, step, tap in zip(sizes, each, dilation, taps, strict=True)
    ]
    shape = (batch, phases.channels * phases.count, *grown)
    with graph.inserting_before(node):
        last = graph.call_function(_CONVOLUTIONS[dims], args)
    last.meta = {**node.meta, "shape": shape, "transposed": phases}

    replaced = node
    activation = only_user(node)
    if activation is not None and as_epilogue(activation) is not None and activation.args[0] is node:
        with graph.inserting_before(node):
            last = graph.call_function(activation.target, (last, *activation.args[1:]), dict(activation.kwargs))
        last.meta = {**activation.meta, "shape": shape}
        replaced = activation

    for index, (op, rest) in enumerate(phases.moves()):
        shape = _moved(shape, op, rest)
        with graph.inserting_before(node):
            last = graph.call_function(op, (last, *rest))
        last.meta = {"dtype": node.meta.get("dtype"), "shape": shape, "layer": f"{layer}.phases.{index}"}
    last.meta["shape"] = node.meta["shape"]
    replaced.replace_all_uses_with(last)
    for old in dict.fromkeys((replaced, node)):
        graph.erase_node(old)


def _phase_weights(weight: torch.Tensor, each: Sequence[_Dimension], groups: int) -> torch.Tensor:
    """(out_channels, in_channels / groups, …) → (groups x phases x out_channels per group, …), by the formulas."""
    inner = weight.shape[1]
    phases = []
    for place in itertools.product(*(range(d.s) for d in each)):
        phase = weight
        for axis, (r, d) in enumerate(zip(place, each, strict=True), start=2):
            phase = _taps_of_phase(phase, axis, r, d)
        phases.append(phase.reshape(groups, -1, *phase.shape[1:]))
    return torch.stack(phases, 1).reshape(-1, inner, *phases[0].shape[3:]).contiguous()


def _taps_of_phase(weight: torch.Tensor, axis: int, r: int, d: _Dimension) -> torch.Tensor:
    if d.s == 1:
        return weight.flip(axis)
    shape = list(weight.shape)
    shape[axis] = d.s * d.taps
    dense = weight.new_zeros(shape)
    dense.index_copy_(axis, torch.arange(d.k, device=weight.device) * d.d, weight)
    return dense.index_select(axis, r + d.s * torch.arange(d.taps - 1, -1, -1, device=weight.device))


def _moved(shape: tuple[int | None, ...], op: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[int | None, ...]:
    """The shape behind one move."""
    if op is aten.unflatten.int:
        return (*shape[: args[0]], *args[1], *shape[args[0] + 1 :])
    if op is aten.permute.default:
        return tuple(shape[axis] for axis in args[0])
    if op is aten.flatten.using_ints:
        first, second = shape[args[0]], shape[args[1]]
        joined = first * second if isinstance(first, int) and isinstance(second, int) else None
        return (*shape[: args[0]], joined, *shape[args[1] + 1 :])
    axis, front, end = args
    return (*shape[:axis], _plus(shape[axis], (end or 0) - front), *shape[axis + 1 :])


def _plus(size: int | None, more: int) -> int | None:
    return size + more if isinstance(size, int) else None


def _dimensions(node: fx.Node) -> int:
    return TRANSPOSED.index(op_name(node)) + 1


def _spread(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values
