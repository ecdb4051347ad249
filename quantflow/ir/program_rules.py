"""What a legal program is: every value defined before it is read, codes where an op takes codes, numbers in range."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantflow.errors import ArtifactError
from quantflow.ir.aten_policy import aten_op, require_allowed
from quantflow.ir.calls import BATCH
from quantflow.ir.graph import SIZE_FUNCTIONS
from quantflow.ir.op_table import MAX_ITEMS, MAX_NODES
from quantflow.ir.ops import LINEAR_OPS, MOVING_OPS, NAMED_OPS, OPS
from quantflow.ir.program import Node, Program, Ref, TensorRef, referenced_tensors, referenced_values
from quantflow.ir.program_shapes import check_shapes
from quantflow.ir.recurrence import BOUNDED, CELLS
from quantflow.ir.structure import Leaf, leaves_of
from quantflow.numerics.affine import MAX_REDUCTION, WEIGHT_RANGE

#: Strides, paddings and dilations of a convolution, so that sums of their products stay far inside 64 bits.
MAX_GEOMETRY = 1 << 20
#: Ops that an activation may be fused to.
_FUSED = (*LINEAR_OPS, "add", "mul")
#: Functions on sizes → how many they take.
_SIZE_ARITY = {"neg": 1, "abs": 1, "int": 1, "sym_float": 1, "round": 1, "ceil": 1, "floor": 1, "trunc": 1}


def check(program: Program, operators: Sequence[str] | None = ()) -> None:
    """Every node, value and tensor of the program.

    Args:
        operators: patterns of the operators that it may call besides ATen's ("my::*"); None: it is read, never run.

    Raises:
        ArtifactError: names the node and what is not legal about it.
    """
    known = {i.name for i in program.inputs}
    if len(known) != len(program.inputs):
        raise ArtifactError("program.json: two inputs have one name")
    if len(program.nodes) > MAX_NODES or len(program.inputs) > MAX_ITEMS:
        raise ArtifactError(
            f"program.json: has {len(program.nodes)} nodes and {len(program.inputs)} inputs; {MAX_NODES} and "
            f"{MAX_ITEMS} are possible"
        )
    for item in program.inputs:
        coded = program.values.get(item.name)
        if coded is not None and coded.qparams is not None and coded.qparams.dtype != item.dtype:
            raise ArtifactError(
                f"program.json: input {item.name!r} is {item.dtype} and holds {coded.qparams.dtype} codes"
            )
    for index, node in enumerate(program.nodes):
        where = f"program.json: node {index} ({node.name})"
        for ref in node.refs():
            if ref not in known:
                raise ArtifactError(f"{where}: reads {ref!r}, which no earlier node defines")
        if node.output in known:
            raise ArtifactError(f"{where}: defines {node.output!r} a second time")
        known.add(node.output)
        for ref in referenced_tensors((node.args, tuple(node.kwargs.values()))):
            if ref not in program.tensors:
                raise ArtifactError(f"{where}: reads tensor {ref!r}, which weights.safetensors does not hold")
        if node.op in NAMED_OPS:
            _check_target(node, where, operators)
        elif len(node.args) != OPS[node.op].arity:
            raise ArtifactError(f"{where}: {node.op} takes {OPS[node.op].arity} arguments, has {len(node.args)}")
        if node.op in LINEAR_OPS:
            _check_linear(program, node, where)
        if node.op == "recurrence":
            _check_recurrence(program, node, where)
        _check_codes(program, node, where)
        if node.epilogue is not None and node.op not in _FUSED:
            raise ArtifactError(f"{where}: {node.op} has no fused activation; {', '.join(_FUSED)} may")
    _check_call(program)
    for ref in referenced_values(program.output):
        if ref not in known:
            raise ArtifactError(f"program.json: the output {ref!r} is not defined")
    for ref in referenced_tensors(program.output):
        if ref not in program.tensors:
            raise ArtifactError(f"program.json: the output tensor {ref!r} is not in weights.safetensors")
    check_shapes(program)


def _check_call(program: Program) -> None:
    """Every input has its place among the arguments, and limits speak of sizes that inputs have."""
    if program.arguments is not None:
        leaves = leaves_of(list(program.arguments.parameters.values()))
        placed = sorted(leaf.index for leaf in leaves if isinstance(leaf, Leaf))
        if placed != list(range(len(program.inputs))):
            raise ArtifactError(f"program.json: arguments place inputs {placed}, there are {len(program.inputs)}")
    known = {size for item in program.inputs for size in item.shape if isinstance(size, str)} | {BATCH}
    for limit in program.limits:
        try:
            limit.holds(dict.fromkeys(limit.names, 1))
        except (ValueError, SyntaxError, LookupError, TypeError) as error:
            raise ArtifactError(f"program.json: limit {limit.expression!r} can't be read: {error}") from error
        if unknown := sorted(set(limit.names) - known):
            raise ArtifactError(f"program.json: limit {limit.expression!r} speaks of {unknown[0]!r}, which is no size")


def _check_target(node: Node, where: str, operators: Sequence[str] | None) -> None:
    """The ATen op or size function that a node names exists and is legal for it."""
    if (node.op == "size" and node.target in SIZE_FUNCTIONS) or (node.op == "shape" and node.target == "getitem"):
        _check_size_function(node, where)
        return
    legal = OPS[node.op].aten
    if legal and node.target.partition(".")[0] not in legal:
        raise ArtifactError(f"{where}: {node.op} can't be {node.target!r}; legal are {', '.join(legal)}")
    if "::" not in node.target:
        aten_op(node.target)  # it says more about a name that is none
    elif operators is None:
        return
    require_allowed(node.target, operators or ())
    if "::" in node.target:
        aten_op(node.target)  # it may import its library, so only now


def _check_size_function(node: Node, where: str) -> None:
    count = _SIZE_ARITY.get(node.target, 2)
    is_open = node.target in ("max", "min", "sym_max", "sym_min", "round")
    if node.kwargs or not (len(node.args) == count or (is_open and 1 <= len(node.args) <= MAX_ITEMS)):
        raise ArtifactError(f"{where}: {node.target} takes {count} arguments, has {len(node.args)}")
    listed = node.args[0] if node.target == "getitem" else None
    for arg in node.args[1:] if isinstance(listed, (list, tuple)) else node.args:
        is_number = isinstance(arg, float) or (isinstance(arg, int) and abs(arg) < 1 << 63)
        if not isinstance(arg, Ref) and not is_number:
            raise ArtifactError(f"{where}: {node.target} is given {arg!r}, which is no number")


def _check_codes(program: Program, node: Node, where: str) -> None:
    """Operands that must be codes are, the others are not, and ops that pass codes on keep their meaning."""
    held = program.values
    if node.op == "cat":
        operands = list(node.args[0])
    elif node.op == "size":
        operands = []
    elif node.op in ("quantize", "aten", "recurrence"):
        operands = []
        if node.op == "quantize" and not isinstance(node.args[0], Ref):
            raise ArtifactError(f"{where}: quantizes {node.args[0]!r}, which is no value")
        for ref in node.refs():
            if ref in held:
                raise ArtifactError(f"{where}: {node.op} reads {ref!r}, which holds int8 codes")
    else:
        operands = list(node.args[: 1 if node.op in LINEAR_OPS else OPS[node.op].arity or 1])
        if not operands:
            raise ArtifactError(f"{where}: has no operand")
    for operand in operands:
        if not isinstance(operand, Ref) or operand.name not in held:
            raise ArtifactError(f"{where}: operand {operand!r} holds no int8 codes")
    if node.op in LINEAR_OPS and not isinstance(node.args[1], Ref | None):
        raise ArtifactError(f"{where}: residual {node.args[1]!r} is no value")
    if node.op in ("quantize", *MOVING_OPS) and node.output not in held:
        raise ArtifactError(f"{where}: its output has no scale and zero_point")
    if node.op in ("dequantize", "aten", "size", "recurrence") and node.output in held:
        raise ArtifactError(f"{where}: its output can't hold int8 codes")
    if node.op in MOVING_OPS and any(held[o.name].qparams != held[node.output].qparams for o in operands):
        raise ArtifactError(f"{where}: its output and its inputs must share one scale and zero_point")
    if node.op == "shape" and node.target.startswith(("constant_pad_nd", "pad")):
        _check_fill(program, node, where)
    if node.op == "clamp":
        qparams, bounds = held[node.output].qparams, (node.attrs["low"], node.attrs["high"])
        legal = range(qparams.range[0], qparams.range[1] + 1) if qparams is not None else ()
        if any(type(bound) is not int or bound not in legal for bound in bounds) or bounds[0] > bounds[1]:
            raise ArtifactError(f"{where}: low and high {bounds} are not codes in order")


def _check_fill(program: Program, node: Node, where: str) -> None:
    """What codes are padded with is a code."""
    qparams = program.values[node.output].qparams
    fill = node.args[-1] if len(node.args) > 2 else node.kwargs.get("value", 0)
    low, high = (0, 0) if qparams is None else qparams.range
    if not isinstance(fill, (int, float)) or not low <= fill <= high or fill != int(fill):
        raise ArtifactError(f"{where}: pads codes with {fill!r}, which is none in [{low}, {high}]")


def _check_linear(program: Program, node: Node, where: str) -> None:
    a = node.attrs
    _check_stored(program, node, where, optional=("bias",))
    if not isinstance(node.args[0], Ref):
        raise ArtifactError(f"{where}: operand {node.args[0]!r} holds no int8 codes")
    weight, scale = program.tensors[a["weight"]], program.tensors[a["weight_scale"]]
    legal = (2,) if node.op == "linear" else (3, 4, 5)
    if weight.dtype is not torch.int8 or weight.dim() not in legal or not weight.numel():
        raise ArtifactError(f"{where}: weight is {weight.dtype} {tuple(weight.shape)}, {node.op} takes int8 codes")
    _check_codes_of_weight(weight, scale, where)
    bias = None if a["bias"] is None else program.tensors[a["bias"]]
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype is not torch.float32):
        raise ArtifactError(f"{where}: bias must hold {weight.shape[0]} float32 values")
    if node.op == "conv":
        dims = weight.dim() - 2
        for key, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if len(a[key]) != dims or any(type(v) is not int or not least <= v <= MAX_GEOMETRY for v in a[key]):
                raise ArtifactError(f"{where}: {key} {a[key]} is not {dims} numbers in [{least}, {MAX_GEOMETRY}]")
        if type(a["groups"]) is not int or a["groups"] < 1 or weight.shape[0] % a["groups"]:
            raise ArtifactError(f"{where}: groups {a['groups']} does not divide {weight.shape[0]} channels")


def _check_stored(program: Program, node: Node, where: str, optional: tuple[str, ...]) -> None:
    for role in ("weight", "weight_scale", "bias"):
        name = node.attrs[role]
        if not (name is None and role in optional) and name not in program.tensors:
            raise ArtifactError(f"{where}: {role} {name!r} is not in weights.safetensors")


def _check_codes_of_weight(weight: torch.Tensor, scale: torch.Tensor, where: str) -> None:
    if int(weight.min()) < WEIGHT_RANGE[0]:
        raise ArtifactError(f"{where}: weight holds codes below {WEIGHT_RANGE[0]}")
    if scale.dtype is not torch.float32 or scale.numel() not in (1, weight.shape[0]):
        raise ArtifactError(f"{where}: weight_scale must be 1 or {weight.shape[0]} float32 values, has {scale.numel()}")
    if not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
        raise ArtifactError(f"{where}: weight_scale holds a value that is not positive and finite")
    if weight[0].numel() > MAX_REDUCTION:
        raise ArtifactError(f"{where}: reduction of {weight[0].numel()} exceeds {MAX_REDUCTION}, int32 could overflow")


def _check_recurrence(program: Program, node: Node, where: str) -> None:
    a = node.attrs
    if a["cell"] not in CELLS or not isinstance(a["reverse"], bool):
        raise ArtifactError(f"{where}: cell {a['cell']!r}, reverse {a['reverse']!r}; cells are {', '.join(CELLS)}")
    if not isinstance(node.args[0], Ref) or any(not isinstance(x, Ref | TensorRef | None) for x in node.args[1:]):
        raise ArtifactError(f"{where}: takes gates, and first states or none")
    _check_stored(program, node, where, optional=("weight_scale", "bias"))
    weight = program.tensors[a["weight"]]
    rows = CELLS[a["cell"]]
    if weight.dim() != 2 or not weight.numel() or weight.shape[0] != rows * weight.shape[1]:
        raise ArtifactError(f"{where}: weight is {tuple(weight.shape)}, must be ({rows} * hidden, hidden)")
    if weight.dtype is not (torch.float32 if a["weight_scale"] is None else torch.int8):
        raise ArtifactError(f"{where}: weight is {weight.dtype}; int8 codes have a weight_scale, float32 has none")
    if a["weight_scale"] is not None:
        if a["cell"] not in BOUNDED:
            raise ArtifactError(f"{where}: {a['cell']} has no int8 form; those that have are {', '.join(BOUNDED)}")
        _check_codes_of_weight(weight, program.tensors[a["weight_scale"]], where)
    bias = None if a["bias"] is None else program.tensors[a["bias"]]
    if bias is not None and (a["cell"] != "gru" or bias.shape != weight.shape[1:] or bias.dtype is not torch.float32):
        raise ArtifactError(f"{where}: bias must hold {weight.shape[1]} float32 values, of a gru")
