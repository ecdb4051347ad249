"""The program that QDQ nodes can express: the same layers, in forms that int8 kernels of other runtimes take.

Kernels such as QLinearConv read and write one dtype, take no residual, and no activation between the sum and its
codes:

- int8 codes are shifted by 128 to uint8, which changes no number: on x86 onnxruntime computes int8 activations in
  float;
- codes that can't be negative use all 256 levels, so that rounding to them is the activation: with the same scale, or
  with scale * 127 / 255 where the activation has an upper bound;
- a convolution's residual becomes a node of its own, and the sum before it gets codes. What lies outside
  [low_y - high_r, high_y - low_r] ends beyond the codes of y whatever r is, so that saturation there changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from quantflow.ir.ops import MOVING_OPS
from quantflow.ir.program import Node, Program, Ref, Value
from quantflow.numerics.affine import INT8, UINT8, QParams, float32

#: Codes of int8 and uint8 that mean the same are so far apart.
SHIFT = 128
#: The value of a split layer's sum, behind the layer's own name.
SUM = ".sum"

#: The zero point of symmetric codes.
_MIDDLE = {INT8: 0, UINT8: SHIFT}

Range = tuple[float, float]


def expressible(program: Program, measured: Mapping[str, Range] | None = None) -> Program:
    """The program in QDQ's forms. What they can't express at all is left for the writer to refuse.

    Args:
        measured: layer's output → (least, largest) number of its sum before the residual; that sum's codes cover no
            more.
    """
    values = _recoded(program)
    nodes: list[Node] = []
    for node in program.nodes:
        moved = _with_codes(program, values, node)
        if (low_high := _sum_range(program, node)) is None:
            nodes.append(moved)
            continue
        low, high = low_high
        if measured is not None and node.output in measured:
            low, high = max(low, measured[node.output][0]), min(high, measured[node.output][1])
        name = node.output + SUM
        values[name] = Value(_covering(min(low, 0.0), max(high, 0.0)))
        nodes.append(replace(moved, output=name, args=(moved.args[0], None), epilogue=None))
        added = replace(moved, name=f"{node.name}.add", op="add", args=(Ref(name), moved.args[1]), attrs={})
        nodes.append(added)
    return replace(program, nodes=tuple(nodes), values=values)


def split_layers(program: Program) -> list[Node]:
    """The layers whose residual becomes a node of its own."""
    return [node for node in program.nodes if _sum_range(program, node) is not None]


def clamp_changes_codes(node: Node, q: QParams) -> bool:
    """Whether the codes with the node's activation are others than those that rounding to `q` gives by itself."""
    if node.epilogue is None:
        return False
    if node.epilogue.bounds is None:
        return True
    low, high = node.epilogue.bounds
    qmin, qmax = q.range
    below = math.isinf(low) or round(low / q.scale) + q.zero_point <= qmin
    above = math.isinf(high) or round(high / q.scale) + q.zero_point >= qmax
    return not (below and above)


def _coded(program: Program, node: Node) -> Iterator[str]:
    """The coded values among a node's output and operands."""
    for name in (node.output, *node.refs()):
        value = program.values.get(name)
        if value is not None and value.qparams is not None:
            yield name


def _recoded(program: Program) -> dict[str, Value]:
    """Every value with the codes that it gets; those that share them because elements are moved still do."""
    group = {name: name for name, value in program.values.items() if value.qparams is not None}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for node in program.nodes:
        if node.op in MOVING_OPS:
            first, *others = _coded(program, node)
            for other in others:
                group[root(other)] = root(first)
    members: dict[str, list[str]] = {}
    for name in group:
        members.setdefault(root(name), []).append(name)
    makers, nonnegative = {node.output: node for node in program.nodes}, _nonnegative(program)
    values = dict(program.values)
    for names in members.values():
        q = _known(program, names[0])
        fresh = QParams(UINT8, q.scale, q.zero_point + (SHIFT if q.dtype == INT8 else 0))
        if q.zero_point == _MIDDLE[q.dtype] and nonnegative.issuperset(names):
            tops = [_bounds(makers[name])[1] for name in names if name in makers and makers[name].op not in MOVING_OPS]
            is_bounded = any(top < q.scale * 255 for top in tops)
            scale = float32(q.scale * 127 / 255) if is_bounded else q.scale
            fresh = QParams(UINT8, scale, 0)
        for name in names:
            values[name] = Value(fresh)
    return values


def _nonnegative(program: Program) -> frozenset[str]:
    """The coded values that are never below zero."""
    found: set[str] = set()
    for node in program.nodes:
        operands, epilogue = [name for name in _coded(program, node) if name != node.output], node.epilogue
        keeps = node.op in (*MOVING_OPS, "avg_pool", "add", "mul") and operands and found.issuperset(operands)
        if epilogue is not None:
            keeps = epilogue.is_nonnegative or (keeps and epilogue.keeps_nonnegative)
        value = program.values.get(node.output)
        if keeps or (value is not None and value.is_nonnegative):
            found.add(node.output)
    return frozenset(found)


def _known(program: Program, name: str) -> QParams:
    q = program.values[name].qparams
    assert q is not None, "only coded values are asked for"
    return q


def _bounds(node: Node) -> Range:
    bounds = None if node.epilogue is None else node.epilogue.bounds
    return bounds or (-math.inf, math.inf)


def _reach(program: Program, name: str) -> Range:
    """The least and the largest number that a value's codes stand for."""
    q = _known(program, name)
    low, high = q.range
    low = q.zero_point if name in _nonnegative(program) else low
    return (low - q.zero_point) * q.scale, (high - q.zero_point) * q.scale


def _sum_range(program: Program, node: Node) -> Range | None:
    """Between which numbers the sum before a residual matters; None where it need not be split."""
    if node.op != "conv" or not isinstance(node.args[1], Ref):
        return None
    held = [program.values.get(name) for name in (node.output, node.args[1].name)]
    if any(value is None or value.qparams is None for value in held):
        return None
    if node.epilogue is not None and node.epilogue.bounds is None:
        return None
    (low, high), (low_r, high_r) = _reach(program, node.output), _reach(program, node.args[1].name)
    least, most = _bounds(node)
    return max(low, least) - high_r, min(high, most) - low_r


def _covering(low: float, high: float) -> QParams:
    scale = float32((high - low) / 255) or 1.0
    return QParams(UINT8, scale, min(max(round(-low / scale), 0), 255))


def _with_codes(program: Program, values: Mapping[str, Value], node: Node) -> Node:
    """The node with the codes among its own numbers as the new ones."""
    if node.op not in MOVING_OPS or not isinstance(node.args[0], Ref):
        return node
    before, after = _known(program, node.args[0].name), values[node.args[0].name].qparams
    assert after is not None

    def code(q: float) -> int:
        qmin, qmax = after.range
        return min(max(round((q - before.zero_point) * before.scale / after.scale) + after.zero_point, qmin), qmax)

    if node.op == "clamp":
        return replace(node, attrs={key: code(q) for key, q in node.attrs.items()})
    if "pad" in node.target:
        args: list[Any] = list(node.args)
        at = {"constant_pad_nd": 2, "pad": 3}.get(node.target.partition(".")[0], len(args))
        if len(args) > at and args[at] is not None:
            args[at] = code(args[at])
        kwargs = {key: code(x) if key == "value" and x is not None else x for key, x in node.kwargs.items()}
        return replace(node, args=tuple(args), kwargs=kwargs)
    return node
