"""The integer program: pure data that any runtime can execute.

A program is a list of nodes over named values, plus the tensors they read. It is saved as JSON and safetensors and
holds neither code nor import paths: an op is a word from `OPS`, or the name of a functional ATen op.

What the int8 ops compute (see design: "The numbers, decided once"):

    quantize      q = quantize(x)
    dequantize    x = dequantize(q)
    conv, linear  acc = sum (q_x - zp_x) * q_w;  r = acc * (scale_x * scale_w[c]) + bias[c];
                  r += (q_r - zp_r) * scale_r, or a float32 residual;
                  r = epilogue(r);  then quantized, or left float32.
                  Codes without an activation or behind one that clamps, and no float32 residual: scales and bias are
                  divided by the output's scale beforehand, and each product is added with one rounding: kernels can be
                  equal to the bit
    matmul        acc = sum (q_a - zp_a) * (q_b - zp_b);  r = acc * (scale_a * scale_b)
    add, mul      r = a + b or a * b of the dequantized operands;  r = epilogue(r);  quantized
    avg_pool      r = exact mean of the dequantized operand;  quantized
    cat, max_pool, clamp, shape
                  move or compare codes; output and inputs share one scale and zero point
    aten, size    a float op by its ATen name; arithmetic on sizes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantflow.errors import ArtifactError
from quantflow.ir.graph import SIZE_FUNCTIONS, Input
from quantflow.ir.units import AVERAGES, POOLS, SHAPES, Epilogue
from quantflow.numerics.affine import ACTIVATION_RANGE, MAX_REDUCTION, WEIGHT_RANGE, QParams

FORMAT = 1
LINEAR_OPS = ("conv", "linear")
#: Ops that carry the name of an ATen op (or a size function) and its arguments.
NAMED_OPS = ("max_pool", "avg_pool", "shape", "cat", "aten", "size")
OPS = ("quantize", "dequantize", *LINEAR_OPS, "matmul", "add", "mul", "clamp", *NAMED_OPS)
#: How many arguments an op without a name of its own takes.
_ARITY = {"quantize": 1, "dequantize": 1, "conv": 2, "linear": 2, "matmul": 2, "add": 2, "mul": 2, "clamp": 1}
#: The ATen ops that may stand behind an op on codes.
_TARGETS = {"max_pool": POOLS, "avg_pool": AVERAGES, "cat": ("cat",), "shape": SHAPES}
#: Ops whose output shares its codes' meaning with its inputs.
_SHARING = ("max_pool", "cat", "clamp", "shape")
EPILOGUES = {
    "relu": 0, "hardtanh": 2, "hardswish": 0, "hardsigmoid": 0, "silu": 0, "sigmoid": 0, "gelu": 0, "gelu_tanh": 0,
    "leaky_relu": 1, "tanh": 0,
}  # fmt: skip
#: Functional ATen ops that still reach outside the process.
_FORBIDDEN_ATEN = ("from_file", "_print", "_debug", "record_stream", "_nested", "cuda", "_cudnn", "_copy_from")
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
              torch.int32, torch.int64, torch.bool, torch.complex64)
}  # fmt: skip

_MEMORY_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}


@dataclass(frozen=True)
class Ref:
    """A value computed earlier, or an input."""

    name: str


@dataclass(frozen=True)
class TensorRef:
    """A tensor stored with the program."""

    name: str


@dataclass(frozen=True)
class Value:
    """How a value is held. `qparams` is None for everything that is not int8 codes.

    `is_nonnegative`: a symmetric int8 value whose codes all lie in [0, 127]; its bytes are also valid uint8 codes.
    """

    qparams: QParams | None = None
    is_nonnegative: bool = False


@dataclass(frozen=True)
class Node:
    """One step. `name` is the layer's name, `output` the value it defines.

    Attributes:
        target: for NAMED_OPS, the ATen overload ("softmax.int") or size function.
        attrs: conv and linear: stride, padding, dilation, groups, weight, weight_scale, bias (tensor names);
            clamp: low, high (codes).
    """

    name: str
    op: str
    output: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    epilogue: Epilogue | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def refs(self) -> Iterator[str]:
        """The values it reads."""
        yield from _refs((self.args, tuple(self.kwargs.values())))

    @property
    def fused_name(self) -> str:
        """What is computed in one kernel: "conv_sum_relu"."""
        parts = [self.op]
        if self.op in LINEAR_OPS and self.args[1] is not None:
            parts.append("sum")
        if self.epilogue is not None:
            parts.append(self.epilogue.kind)
        return "_".join(parts)


@dataclass(frozen=True)
class Program:
    """Inputs, nodes in execution order, values, tensors and the structure of the output."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    tensors: Mapping[str, torch.Tensor]
    output: Any
    batch_is_dynamic: bool = True

    def int8_nodes(self) -> list[Node]:
        """The convolutions and linears: those that exist in a program are int8."""
        return [node for node in self.nodes if node.op in LINEAR_OPS]

    def output_names(self) -> list[str]:
        """The values the model returns, in the order of its output structure."""
        return list(_refs(self.output))

    def last_uses(self) -> dict[int, list[str]]:
        """Node index → values nothing reads after it."""
        last = {ref: index for index, node in enumerate(self.nodes) for ref in node.refs()}
        kept = set(_refs(self.output))
        frees: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in kept:
                frees.setdefault(index, []).append(name)
        return frees

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "batch_is_dynamic": self.batch_is_dynamic,
            "inputs": [
                {"name": i.name, "keyword": i.keyword, "dtype": i.dtype, "shape": list(i.shape)} for i in self.inputs
            ],
            "values": {name: _value_to_json(value) for name, value in self.values.items() if value.qparams is not None},
            "nodes": [_node_to_json(node) for node in self.nodes],
            "output": _encode(self.output),
        }

    @classmethod
    def from_json(cls, data: Any, tensors: Mapping[str, torch.Tensor]) -> Program:
        """Rebuild and check a program. Nothing is executed or imported.

        Raises:
            ArtifactError: names the node and the field that is not legal.
        """
        try:
            found = data["format"]
            if type(found) is not int or found < 1:
                raise ArtifactError(f"program.json: format {found!r} is not known")
            if found > FORMAT:
                raise ArtifactError(f"program.json: format {found} is newer than this quantflow reads ({FORMAT})")
            program = cls(
                inputs=tuple(_input_from_json(i) for i in data["inputs"]),
                nodes=tuple(_node_from_json(node) for node in data["nodes"]),
                values={name: _value_from_json(value) for name, value in data["values"].items()},
                tensors=dict(tensors),
                output=_decode(data["output"]),
                batch_is_dynamic=bool(data["batch_is_dynamic"]),
            )
            _check(program)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ArtifactError(f"program.json: {type(error).__name__} while reading it: {error}") from error
        return program


def aten_op(target: str) -> Callable[..., Any]:
    """The functional ATen overload of that name.

    Raises:
        ArtifactError: there is no such op, it writes to its arguments, or it reaches outside the process.
    """
    name, _, overload = target.partition(".")
    if not name.isidentifier() or not overload.isidentifier() or name.startswith(_FORBIDDEN_ATEN):
        raise ArtifactError(f"program.json: {target!r} is not an ATen op that a program may use")
    packet = getattr(torch.ops.aten, name, None)
    op = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(op, torch._ops.OpOverload):
        raise ArtifactError(f"program.json: this torch ({torch.__version__}) has no op aten.{target}")
    if op._schema.is_mutable:
        raise ArtifactError(f"program.json: aten.{target} writes to its arguments, which a program may not")
    if not _computes_with_tensors(op._schema):
        raise ArtifactError(f"program.json: aten.{target} is not an ATen op that a program may use")
    return op


def _computes_with_tensors(schema: torch._C.FunctionSchema) -> bool:
    """Whether the op has a result, and a tensor in or out. TorchScript's own `aten::save` and the like have not."""
    types = [str(value.type) for value in (*schema.arguments, *schema.returns)]
    return bool(schema.returns) and any("Tensor" in kind for kind in types)


def _check(program: Program) -> None:
    known = {i.name for i in program.inputs}
    if len(known) != len(program.inputs):
        raise ArtifactError("program.json: two inputs have one name")
    for index, node in enumerate(program.nodes):
        where = f"program.json: node {index} ({node.name})"
        for ref in node.refs():
            if ref not in known:
                raise ArtifactError(f"{where}: reads {ref!r}, which no earlier node defines")
        if node.output in known:
            raise ArtifactError(f"{where}: defines {node.output!r} a second time")
        known.add(node.output)
        for ref in _tensor_refs((node.args, tuple(node.kwargs.values()))):
            if ref not in program.tensors:
                raise ArtifactError(f"{where}: reads tensor {ref!r}, which weights.safetensors does not hold")
        if node.op in NAMED_OPS:
            _check_target(node, where)
        elif len(node.args) != _ARITY[node.op]:
            raise ArtifactError(f"{where}: {node.op} takes {_ARITY[node.op]} arguments, has {len(node.args)}")
        if node.op in LINEAR_OPS:
            _check_linear(program, node, where)
        _check_codes(program, node, where)
    for ref in _refs(program.output):
        if ref not in known:
            raise ArtifactError(f"program.json: the output {ref!r} is not defined")
    for ref in _tensor_refs(program.output):
        if ref not in program.tensors:
            raise ArtifactError(f"program.json: the output tensor {ref!r} is not in weights.safetensors")


def _check_target(node: Node, where: str) -> None:
    """The ATen op or size function that a node names exists and is legal for it."""
    if node.op == "size" and node.target in SIZE_FUNCTIONS:
        return
    if node.op == "shape" and node.target == "getitem":
        return
    if node.op in _TARGETS and node.target.partition(".")[0] not in _TARGETS[node.op]:
        raise ArtifactError(f"{where}: {node.op} can't be {node.target!r}; legal are {', '.join(_TARGETS[node.op])}")
    aten_op(node.target)


def _check_codes(program: Program, node: Node, where: str) -> None:
    """Operands that must be codes are, the others are not, and ops that pass codes on keep their meaning."""
    held = program.values
    if node.op == "cat":
        operands = list(node.args[0])
    elif node.op == "size":
        operands = []
    elif node.op in ("quantize", "aten"):
        operands = []
        for ref in node.refs():
            if ref in held:
                raise ArtifactError(f"{where}: {node.op} reads {ref!r}, which holds int8 codes")
    else:
        operands = list(node.args[: 1 if node.op in LINEAR_OPS else _ARITY.get(node.op, 1)])
        if not operands:
            raise ArtifactError(f"{where}: has no operand")
    for operand in operands:
        if not isinstance(operand, Ref) or operand.name not in held:
            raise ArtifactError(f"{where}: operand {operand!r} holds no int8 codes")
    if node.op in LINEAR_OPS and not isinstance(node.args[1], Ref | None):
        raise ArtifactError(f"{where}: residual {node.args[1]!r} is no value")
    if node.op in ("quantize", *_SHARING) and node.output not in held:
        raise ArtifactError(f"{where}: its output has no scale and zero_point")
    if node.op in ("dequantize", "aten", "size") and node.output in held:
        raise ArtifactError(f"{where}: its output can't hold int8 codes")
    if node.op in _SHARING and any(held[o.name].qparams != held[node.output].qparams for o in operands):
        raise ArtifactError(f"{where}: its output and its inputs must share one scale and zero_point")
    if node.op == "clamp":
        qparams, bounds = held[node.output].qparams, (node.attrs["low"], node.attrs["high"])
        legal = range(qparams.range[0], qparams.range[1] + 1) if qparams is not None else ()
        if any(not isinstance(bound, int) or bound not in legal for bound in bounds):
            raise ArtifactError(f"{where}: low and high {bounds} are not codes")


def _check_linear(program: Program, node: Node, where: str) -> None:
    a = node.attrs
    for role in ("weight", "weight_scale", "bias"):
        if a[role] is None and role == "bias":
            continue
        if a[role] not in program.tensors:
            raise ArtifactError(f"{where}: {role} {a[role]!r} is not in weights.safetensors")
    if not isinstance(node.args[0], Ref):
        raise ArtifactError(f"{where}: operand {node.args[0]!r} holds no int8 codes")
    weight, scale = program.tensors[a["weight"]], program.tensors[a["weight_scale"]]
    legal = (2,) if node.op == "linear" else (3, 4, 5)
    if weight.dtype is not torch.int8 or weight.dim() not in legal or not weight.numel():
        raise ArtifactError(f"{where}: weight is {weight.dtype} {tuple(weight.shape)}, {node.op} takes int8 codes")
    if int(weight.min()) < WEIGHT_RANGE[0]:
        raise ArtifactError(f"{where}: weight holds codes below {WEIGHT_RANGE[0]}")
    if scale.dtype is not torch.float32 or scale.numel() not in (1, weight.shape[0]):
        raise ArtifactError(f"{where}: weight_scale must be 1 or {weight.shape[0]} float32 values, has {scale.numel()}")
    if not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
        raise ArtifactError(f"{where}: weight_scale holds a value that is not positive and finite")
    if weight[0].numel() > MAX_REDUCTION:
        raise ArtifactError(f"{where}: reduction of {weight[0].numel()} exceeds {MAX_REDUCTION}, int32 could overflow")
    bias = None if a["bias"] is None else program.tensors[a["bias"]]
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype is not torch.float32):
        raise ArtifactError(f"{where}: bias must hold {weight.shape[0]} float32 values")
    if node.op == "conv":
        dims = weight.dim() - 2
        for key, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if len(a[key]) != dims or any(not isinstance(v, int) or v < least for v in a[key]):
                raise ArtifactError(f"{where}: {key} {a[key]} is not {dims} numbers of at least {least}")
        if not isinstance(a["groups"], int) or a["groups"] < 1 or weight.shape[0] % a["groups"]:
            raise ArtifactError(f"{where}: groups {a['groups']} does not divide {weight.shape[0]} channels")


def _value_to_json(value: Value) -> dict[str, Any]:
    assert value.qparams is not None
    q = value.qparams
    return {"dtype": q.dtype, "scale": q.scale, "zero_point": q.zero_point, "is_nonnegative": value.is_nonnegative}


def _input_from_json(data: Any) -> Input:
    name, keyword, dtype, shape = str(data["name"]), data["keyword"], data["dtype"], tuple(data["shape"])
    if keyword is not None and not isinstance(keyword, str):
        raise ValueError(f"input {name!r}: keyword {keyword!r} is not a name")
    if dtype not in _DTYPES:
        raise ValueError(f"input {name!r}: dtype {dtype!r} is not known")
    if any(size is not None and (not isinstance(size, int) or size < 0) for size in shape):
        raise ValueError(f"input {name!r}: shape {shape} is not made of sizes")
    return Input(name, keyword, dtype, shape)


def _value_from_json(data: Any) -> Value:
    if data["dtype"] not in ACTIVATION_RANGE:
        raise ValueError(f"dtype {data['dtype']!r} is not int8 or uint8")
    if not isinstance(data["zero_point"], int):
        raise ValueError(f"zero_point {data['zero_point']!r} is not an integer")
    qparams = QParams(data["dtype"], float(data["scale"]), data["zero_point"])
    if data["is_nonnegative"] and (qparams.dtype, qparams.zero_point) != ("int8", 0):
        raise ValueError("only a symmetric int8 value can be is_nonnegative")
    return Value(qparams, bool(data["is_nonnegative"]))


def _node_to_json(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "output": node.output,
        "args": [_encode(a) for a in node.args],
    }
    if node.kwargs:
        data["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
    if node.target:
        data["target"] = node.target
    if node.epilogue is not None:
        data["epilogue"] = {"kind": node.epilogue.kind, "values": [_encode(v) for v in node.epilogue.values]}
    if node.attrs:
        data["attrs"] = dict(node.attrs)
    return data


def _node_from_json(data: Any) -> Node:
    if data["op"] not in OPS:
        raise ValueError(f"node {data['name']!r}: op {data['op']!r} is not one of {', '.join(OPS)}")
    epilogue = None
    if (given := data.get("epilogue")) is not None:
        values = tuple(float(_decode(v)) for v in given["values"])
        if EPILOGUES.get(given["kind"]) != len(values):
            raise ValueError(
                f"node {data['name']!r}: epilogue {given['kind']!r} with {len(values)} numbers is not known"
            )
        epilogue = Epilogue(given["kind"], values)
    return Node(
        name=str(data["name"]),
        op=data["op"],
        output=str(data["output"]),
        args=tuple(_decode(a) for a in data["args"]),
        kwargs={str(k): _decode(v) for k, v in data.get("kwargs", {}).items()},
        target=str(data.get("target", "")),
        epilogue=epilogue,
        attrs=dict(data.get("attrs", {})),
    )


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"value": value.name}
    if isinstance(value, TensorRef):
        return {"tensor": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, complex):
        raise ValueError("complex numbers can't be saved in a program")
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]} if value else {"tuple": []}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "value":
        return Ref(str(content))
    if kind == "tensor":
        return TensorRef(str(content))
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "memory_format":
        return _MEMORY_FORMATS[content]
    if kind == "layout":
        return {"strided": torch.strided}[content]
    if kind == "device":
        return {"cpu": torch.device("cpu")}[content]
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
    if kind == "dict":
        return {str(k): _decode(v) for k, v in content.items()}
    if kind == "tuple":
        return tuple(_decode(v) for v in content)
    raise ValueError(f"{kind!r} is not a kind of argument")


def _refs(value: Any) -> Iterator[str]:
    yield from (ref.name for ref in _leaves(value) if isinstance(ref, Ref))


def _tensor_refs(value: Any) -> Iterator[str]:
    yield from (ref.name for ref in _leaves(value) if isinstance(ref, TensorRef))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def substitute(value: Any, of: Callable[[Ref | TensorRef], Any]) -> Any:
    """The same nesting with every reference replaced."""
    if isinstance(value, (Ref, TensorRef)):
        return of(value)
    if isinstance(value, list):
        return [substitute(v, of) for v in value]
    if isinstance(value, tuple):
        return tuple(substitute(v, of) for v in value)
    if isinstance(value, dict):
        return {k: substitute(v, of) for k, v in value.items()}
    return value
