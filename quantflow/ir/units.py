"""Group a graph's nodes into units: what one kernel could compute.

A unit is a linear op (or an addition, or a product) with the activation fused behind it, or a single node.
Finding units is pure analysis; `quantflow.stages.plan` decides which of them run in int8.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from quantflow.ir.activations import Epilogue, as_epilogue
from quantflow.ir.graph import Graph, arguments, is_aten, only_user, op_name
from quantflow.ir.ops import AVERAGES, FLOAT_LAYERS, LINEARS, LOOKUPS, OPS, POOLS, PRODUCTS, SHAPES, TRANSPOSED
from quantflow.ir.passes.transposed_convolutions import why_not
from quantflow.ir.recurrence import BOUNDED, cell_of

#: They read a tensor's shape, which does not depend on how its values are held.
_SIZES = ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset")

_PADS = ("constant_pad_nd", "pad")

#: Kinds. Those with an int8 form are named as their op in a program is; CORE is a convolution or a linear.
CORE, MATMUL, RECURRENCE, ADD, MUL, CAT, MAX_POOL, AVG_POOL, CLAMP, SHAPE, FLOAT, SIZE = (
    "core", "matmul", "recurrence", "add", "mul", "cat", "max_pool", "avg_pool", "clamp", "shape", "float", "size",
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Nodes that one kernel can compute.

    Attributes:
        kind: what it is (CORE, ADD, …).
        nodes: in execution order; the last one's value is the unit's output.
        anchor: the node that names the unit.
        inputs: activation operands, in order; none for RECURRENCE, whose operands and result are always float32.
        epilogue: the fused activation, if any.
        residual: for CORE, the other operand of a fused addition.
        float_reason: why it has no int8 form; empty when it has one.
        has_weights: whether it multiplies by weights or looks them up: what int8 coverage counts. Weights per element,
            as a LayerNorm's, are not among them.
        is_int8_table: a float op that looks up weights held in int8.
    """

    kind: str
    nodes: tuple[fx.Node, ...]
    anchor: fx.Node
    inputs: tuple[fx.Node, ...]
    epilogue: Epilogue | None = None
    residual: fx.Node | None = None
    float_reason: str = ""
    has_weights: bool = False
    is_int8_table: bool = False

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        return str(self.anchor.meta["layer"])

    @property
    def op(self) -> str:
        return op_name(self.anchor)

    @property
    def layer_type(self) -> str:
        """The op as the model has it: a transposed convolution computes as an ordinary one."""
        phases = self.anchor.meta.get("transposed")
        return self.op if phases is None else str(phases.op)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names this unit stands for, a folded BatchNorm's included."""
        folded = self.anchor.meta.get("batch_norm")
        names = [str(node.meta["layer"]) for node in self.nodes]
        return (names[0], folded, *names[1:]) if folded else tuple(names)


def find_units(graph: Graph) -> list[Unit]:
    """Every computed node in exactly one unit, in the order of the units' outputs.

    An activation is fused where nothing else reads the value in front of it.
    """
    taken: set[fx.Node] = set()
    units: list[Unit] = []
    for node in graph.fx.nodes:
        if node.op != "call_function" or node in taken:
            continue
        unit = _weighed(_classify(node, graph.constants), graph.constants)
        if unit.kind in (CORE, ADD, MUL):
            unit = _grow(unit)
        taken.update(unit.nodes)
        units.append(unit)
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    return sorted(units, key=lambda unit: order[unit.output])


def fuse_residual(add: Unit, core: Unit, residual: fx.Node) -> Unit:
    """core followed by `+ residual` (and the addition's own activation) as one unit."""
    return replace(core, nodes=(*core.nodes, *add.nodes), epilogue=add.epilogue, residual=residual)


def makes_values(unit: Unit) -> bool:
    """Whether an op that moves codes may also give numbers that its input's range, which holds 0, does not contain."""
    if unit.kind == SHAPE and is_aten(unit.anchor, *_PADS):
        return pad_fill(unit.anchor) != 0
    bounds = getattr(as_epilogue(unit.anchor), "bounds", None) if unit.kind == CLAMP else None
    return bounds is not None and not min(bounds) <= 0 <= max(bounds)


def pad_fill(node: fx.Node) -> float:
    """What a constant pad puts around its operand."""
    return float(arguments(node).get("value") or 0.0)


def _grow(unit: Unit) -> Unit:
    user = only_user(unit.output)
    epilogue = as_epilogue(user) if user is not None else None
    return replace(unit, nodes=(*unit.nodes, user), epilogue=epilogue) if user is not None and epilogue else unit


def _weighed(unit: Unit, constants: Mapping[str, torch.Tensor]) -> Unit:
    """The unit with what is known of its weights."""
    node = unit.anchor
    if unit.kind in (CORE, RECURRENCE) or is_aten(node, *FLOAT_LAYERS):
        return replace(unit, has_weights=True)
    if is_aten(node, *LOOKUPS):
        table = _constant_behind(node.args[0], constants)
        is_table = table is not None and table.dim() == 2 and not node.meta.get("is_scale")
        is_int8 = is_table and table is not None and table.dtype is torch.int8
        is_weight = is_table and table is not None and (is_int8 or table.is_floating_point())
        reason = "its table is int8, one scale per row" if is_int8 else unit.float_reason
        return replace(unit, has_weights=is_weight, is_int8_table=is_int8, float_reason=reason)
    places = PRODUCTS.get(unit.op, ()) if is_aten(node, *PRODUCTS) else ()
    given = [node.args[place] for place in places if place < len(node.args)]
    operands = [each for value in given for each in (value if isinstance(value, (list, tuple)) else (value,))]
    weights = [_constant_behind(operand, constants) for operand in operands]
    return replace(unit, has_weights=any(w is not None and w.dim() > 1 and w.is_floating_point() for w in weights))


def _constant_behind(value: Any, constants: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The constant that a value is a view or copy of, if it is one."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        if not is_aten(value, *SHAPES, "to", "_to_copy", "type_as"):
            return None
        value = value.args[0]
    return constants[str(value.target)] if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _classify(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Unit:
    def unit(kind: str, *inputs: Any) -> Unit:
        return Unit(kind, (node,), node, tuple(i for i in inputs if isinstance(i, fx.Node)))

    def floating(reason: str) -> Unit:
        return Unit(FLOAT, (node,), node, tuple(node.all_input_nodes), float_reason=reason)

    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and is_aten(node.args[0], *SHAPES):
        return unit(SHAPE, node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload) or is_aten(node, *_SIZES):
        return Unit(SIZE, (node,), node, ())
    if is_aten(node, *LINEARS):
        return _classify_linear(node, constants)
    if is_aten(node, *TRANSPOSED):
        return replace(unit(CORE, node.args[0]), float_reason=why_not(node))
    if (cell := cell_of(node)) is not None:
        return replace(unit(RECURRENCE), float_reason="" if cell in BOUNDED else "its state has no bound to code it by")
    if "float_reason" in node.meta:
        return floating(node.meta["float_reason"])
    if node.meta.get("dtype", torch.float32) is not torch.float32:
        return floating(f"computes in {str(node.meta['dtype']).removeprefix('torch.')}, not float32")
    if is_aten(node, *OPS["matmul"].aten):
        product = unit(MATMUL, node.args[0], node.args[1])
        if any(operand.op == "get_attr" for operand in product.inputs):
            return replace(product, float_reason=f"{op_name(node)} with a constant tensor has no int8 form")
        return product
    if is_aten(node, "add", "mul"):
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and "shape" in a.meta]
        if len(operands) < 2:
            return floating(f"{op_name(node)} with a plain number has no int8 form")
        if any(o.op == "get_attr" for o in operands):
            return floating(f"{op_name(node)} with a constant tensor has no int8 form")
        if any(o.meta.get("dtype") is not torch.float32 for o in operands):
            return floating(f"{op_name(node)} of tensors that are not float32 has no int8 form")
        if is_aten(node, "add") and arguments(node)["alpha"] != 1:
            return floating("add with alpha != 1 has no int8 form")
        return unit(ADD if is_aten(node, "add") else MUL, *operands)
    if is_aten(node, "cat"):
        tensors = node.args[0]
        if any(t.op == "get_attr" for t in tensors):  # type: ignore[union-attr]
            return floating("cat with a constant tensor has no int8 form")
        if any(t.meta.get("dtype") is not torch.float32 for t in tensors):  # type: ignore[union-attr]
            return floating("cat of tensors that are not float32 has no int8 form")
        return unit(CAT, *tensors)  # type: ignore[misc]
    if is_aten(node, *POOLS):
        return unit(MAX_POOL, node.args[0])
    if is_aten(node, *AVERAGES):
        return unit(AVG_POOL, node.args[0])
    if (alone := as_epilogue(node)) is not None and alone.bounds:
        return unit(CLAMP, node.args[0])
    if is_aten(node, *_PADS) and arguments(node).get("mode", "constant") != "constant":
        return floating("pad with a mode other than constant has no int8 form")
    if is_aten(node, *_PADS) and isinstance(arguments(node).get("value"), fx.Node):
        return floating("pad with a value computed at run time has no int8 form")
    if is_aten(node, *_PADS) and not math.isfinite(pad_fill(node)):
        return floating(f"pad with {pad_fill(node)}, which no code stands for, has no int8 form")
    if is_aten(node, *SHAPES):
        return unit(SHAPE, node.args[0])
    if is_aten(node, "batch_norm"):
        return floating("this BatchNorm does not directly follow a linear op, so it can't be folded")
    return floating(f"{op_name(node)} has no int8 form")


def _classify_linear(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Unit:
    unit = Unit(CORE, (node,), node, (node.args[0],))  # type: ignore[arg-type]
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return replace(unit, float_reason="its weight is computed at run time, not a constant")
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return replace(unit, float_reason="its bias is computed at run time, not a constant")
    if constants[str(weight.target)].dtype is not torch.float32:
        return replace(unit, float_reason=f"its weight is {constants[str(weight.target)].dtype}, not float32")
    x = node.args[0]
    expected = {"conv1d": 3, "conv2d": 4, "conv3d": 5}.get(op_name(node))
    if expected and isinstance(x, fx.Node) and len(x.meta.get("shape", ())) != expected:
        return replace(unit, float_reason="its input has no batch dimension")
    return unit
