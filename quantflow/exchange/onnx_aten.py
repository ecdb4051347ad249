"""Float ops and arithmetic on sizes as ONNX nodes, by their ATen names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantflow.exchange import onnx_moves as moves
from quantflow.exchange import onnx_windows as windows
from quantflow.exchange.onnx_arguments import Given, Write, channels, out, positive
from quantflow.exchange.onnx_writer import Writer
from quantflow.ir.aten_policy import aten_op
from quantflow.ir.graph import SIZE_FUNCTIONS
from quantflow.ir.program import Node

#: A score that no softmax sees; not -inf, of which a row would be NaN.
_LEAST = torch.finfo(torch.float32).min


def write(w: Writer, node: Node) -> Any:
    """The node's result: a name, or a list of names.

    Raises:
        UsageError: the op has no form here; names layer and op.
    """
    name = node.target.partition(".")[0]
    if node.target in SIZE_FUNCTIONS:
        return _size_function(w, node.target, node.args)
    if name not in _OPS:
        raise w.refused(f"the op {node.target}")
    return _OPS[name](w, _named(node))


def _named(node: Node) -> dict[str, Any]:
    """Every argument by its name, defaults included."""
    given: dict[str, Any] = {}
    for index, argument in enumerate(aten_op(node.target)._schema.arguments):  # type: ignore[attr-defined]
        if index < len(node.args):
            given[argument.name] = node.args[index]
        else:
            given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


# -- sizes


_SIZES = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min",
    "sym_max": "Max", "sym_min": "Min",
}  # fmt: skip


def _size_function(w: Writer, name: str, args: Sequence[Any]) -> Any:
    if name == "getitem":
        return w.names[args[0].name][args[1]]
    if name == "neg":
        return w.add("Neg", [w.size(args[0])])
    if name == "int":
        return w.size(args[0])
    if name not in _SIZES:
        raise w.refused(f"{name} of sizes")
    return w.add(_SIZES[name], [w.size(each) for each in args])


def _shape_of(w: Writer, given: Given) -> str:
    dim = positive(given["dim"], w.rank(given["self"]))
    return w.add("Shape", [w.of(given["self"])], start=dim, end=dim + 1)


# -- one tensor


def clipped(w: Writer, x: str, low: float, high: float) -> str:
    """A clamp; infinite bounds are none."""
    if low == 0 and math.isinf(high):
        return w.add("Relu", [x])
    bounds = ["" if math.isinf(each) else w.number(each, torch.float32) for each in (low, high)]
    return w.add("Clip", [x, *bounds] if bounds[1] else [x, bounds[0]])


def _gelu(w: Writer, x: str) -> str:
    inner = w.add("Erf", [w.add("Div", [x, w.number(math.sqrt(2), torch.float32)])])
    outer = w.add("Mul", [x, w.add("Add", [inner, w.number(1.0, torch.float32)])])
    return w.add("Mul", [outer, w.number(0.5, torch.float32)])


def _gelu_tanh(w: Writer, x: str) -> str:
    cubed = w.add("Mul", [w.add("Mul", [x, x]), x])
    inner = w.add("Add", [x, w.add("Mul", [cubed, w.number(0.044715, torch.float32)])])
    inner = w.add("Tanh", [w.add("Mul", [inner, w.number(math.sqrt(2 / math.pi), torch.float32)])])
    outer = w.add("Mul", [x, w.add("Add", [inner, w.number(1.0, torch.float32)])])
    return w.add("Mul", [outer, w.number(0.5, torch.float32)])


#: Activations that are no clamp, by the names that programs use.
ACTIVATIONS: dict[str, Callable[..., str]] = {
    "hardswish": lambda w, x: w.add("HardSwish", [x]),
    "hardsigmoid": lambda w, x: w.add("HardSigmoid", [x], alpha=1 / 6, beta=0.5),
    "silu": lambda w, x: w.add("Mul", [x, w.add("Sigmoid", [x])]),
    "sigmoid": lambda w, x: w.add("Sigmoid", [x]),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "leaky_relu": lambda w, x, slope: w.add("LeakyRelu", [x], alpha=slope),
    "tanh": lambda w, x: w.add("Tanh", [x]),
}


def _unary(op: str) -> Write:
    return lambda w, given: w.add(op, [w.of(given["self"])])


def _activation(kind: str, *numbers: str) -> Write:
    return lambda w, given: ACTIVATIONS[kind](w, w.of(given["self"]), *(float(given[name]) for name in numbers))


def _gelu_of(w: Writer, given: Given) -> str:
    return (_gelu if given["approximate"] == "none" else _gelu_tanh)(w, w.of(given["self"]))


def _clamp(low: str | None, high: str | None) -> Write:
    def write(w: Writer, given: Given) -> str:
        bounds = [given.get(low) if low else None, given.get(high) if high else None]
        if any(not isinstance(each, (int, float, type(None))) for each in bounds):
            raise w.refused("a clamp to tensors")
        x, dtype = w.of(given["self"]), w.dtype(given["self"])
        inputs = ["" if each is None else w.number(each, dtype) for each in bounds]
        return w.add("Clip", [x, *inputs] if inputs[1] else [x, inputs[0]])

    return write


def _same(w: Writer, given: Given) -> str:
    return w.of(given.get("self", given.get("input")))


def _cast(w: Writer, given: Given) -> str:
    found, wanted = w.dtype(given["self"]), given.get("dtype")
    return w.cast(w.of(given["self"]), found, wanted or found)


def _softmax(op: str) -> Write:
    def write(w: Writer, given: Given) -> str:
        x = w.cast(w.of(given["self"]), w.dtype(given["self"]), given.get("dtype") or w.dtype(given["self"]))
        return w.add(op, [x], axis=given["dim"])

    return write


def _reduced(op: str) -> Write:
    def write(w: Writer, given: Given) -> str:
        x, dims = w.of(given["self"]), given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or list(range(w.rank(given["self"])))
        keeps = int(given.get("keepdim", False))
        if op == "ReduceSum":
            x = w.cast(x, w.dtype(given["self"]), w.dtype(out(w)))
            return w.add(op, [x, w.ints(*dims)], keepdims=keeps)
        return w.add(op, [x], axes=dims, keepdims=keeps)

    return write


def _norm(w: Writer, given: Given) -> str:
    if given["ord"] != 2:
        raise w.refused(f"a norm of order {given['ord']}")
    return _reduced("ReduceL2")(w, given)


# -- two tensors


def _binary(op: str) -> Write:
    def write(w: Writer, given: Given) -> str:
        a, b = given["self"], given["other"]
        dtype = _promoted(w, a, b)
        if op == "Div" and not dtype.is_floating_point:
            dtype = torch.float32
        right = w.as_operand(b, dtype)
        if given.get("alpha", 1) != 1:
            right = w.add("Mul", [right, w.as_operand(given["alpha"], dtype)])
        return w.add(op, [w.as_operand(a, dtype), right])

    return write


def _promoted(w: Writer, a: Any, b: Any) -> torch.dtype:
    return torch.result_type(w.value(a), w.value(b))


def _compared(op: str, negated: bool = False) -> Write:
    def write(w: Writer, given: Given) -> str:
        a, b = given["self"], given["other"]
        dtype = _promoted(w, a, b)
        found = w.add(op, [w.as_operand(a, dtype), w.as_operand(b, dtype)])
        return w.add("Not", [found]) if negated else found

    return write


def _logical(op: str) -> Write:
    def write(w: Writer, given: Given) -> str:
        both = (given["self"], given["other"])
        if any(w.dtype(x) is not torch.bool for x in both):
            raise w.refused("bits of whole numbers")
        return w.add(op, [w.of(x) for x in both])

    return write


def _power(w: Writer, given: Given) -> str:
    return w.add("Pow", [w.of(given["self"]), w.as_operand(given["exponent"], w.dtype(given["self"]))])


def _rsub(w: Writer, given: Given) -> str:
    return _binary("Sub")(w, {**given, "self": given["other"], "other": given["self"]})


def _where(w: Writer, given: Given) -> str:
    dtype = _promoted(w, given["self"], given["other"])
    return w.add("Where", [w.of(given["condition"]), *(w.as_operand(given[k], dtype) for k in ("self", "other"))])


def _masked_fill(w: Writer, given: Given) -> str:
    x = given["self"]
    return w.add("Where", [w.of(given["mask"]), w.as_operand(given["value"], w.dtype(x)), w.of(x)])


def _matmul(second: str) -> Write:
    return lambda w, given: w.add("MatMul", [w.of(given["self"]), w.of(given[second])])


def _float_linear(w: Writer, given: Given) -> str:
    turned = w.add("Transpose", [w.of(given["weight"])], perm=[1, 0])
    r = w.add("MatMul", [w.of(given["input"]), turned])
    return r if given["bias"] is None else w.add("Add", [r, w.of(given["bias"])])


def _addmm(w: Writer, given: Given) -> str:
    return w.add(
        "Gemm",
        [w.of(given[k]) for k in ("mat1", "mat2", "self")],
        alpha=float(given["alpha"]),
        beta=float(given["beta"]),
    )


def _attention(w: Writer, given: Given) -> str:
    if given["dropout_p"] or given.get("enable_gqa"):
        raise w.refused("attention with dropout or grouped heads")
    q, k, v = (given[name] for name in ("query", "key", "value"))
    rank, width = w.rank(k), w.value(q).shape[-1]
    scale = 1 / math.sqrt(width) if given["scale"] is None else given["scale"]
    turned = w.add("Transpose", [w.of(k)], perm=[*range(rank - 2), rank - 1, rank - 2])
    scaled = w.add("Mul", [w.of(q), w.number(scale, torch.float32)])
    scores, mask = w.add("MatMul", [scaled, turned]), given["attn_mask"]
    if given["is_causal"]:
        shape = w.add("Concat", [w.add("Shape", [w.of(x)], start=rank - 2, end=rank - 1) for x in (q, k)], axis=0)
        ones = w.add("Expand", [w.number(1.0, torch.float32), shape])
        lower = w.add("Cast", [w.add("Trilu", [ones], upper=0)], to=w.onnx_type(torch.bool))
        scores = w.add("Where", [lower, scores, w.number(_LEAST, torch.float32)])
    elif mask is not None and w.dtype(mask) is torch.bool:
        scores = w.add("Where", [w.of(mask), scores, w.number(_LEAST, torch.float32)])
    elif mask is not None:
        scores = w.add("Add", [scores, w.of(mask)])
    return w.add("MatMul", [w.add("Softmax", [scores], axis=-1), w.of(v)])


def _prelu(w: Writer, given: Given) -> str:
    slope = w.value(given["weight"])
    rank = w.rank(given["self"])
    return w.add("PRelu", [w.of(given["self"]), w.tensor(channels(slope, rank) if rank > 1 else slope)])


def _elu(w: Writer, given: Given) -> str:
    if given["scale"] != 1 or given["input_scale"] != 1:
        raise w.refused("an ELU with scales")
    return w.add("Elu", [w.of(given["self"])], alpha=float(given["alpha"]))


def _mish(w: Writer, given: Given) -> str:
    x = w.of(given["self"])
    return w.add("Mul", [x, w.add("Tanh", [w.add("Softplus", [x])])])


def _einsum(w: Writer, given: Given) -> str:
    return w.add("Einsum", [w.of(x) for x in given["tensors"]], equation=given["equation"])


def _cumsum(w: Writer, given: Given) -> str:
    x = w.cast(w.of(given["self"]), w.dtype(given["self"]), w.dtype(out(w)))
    return w.add("CumSum", [x, w.number(given["dim"], torch.int64)])


def _arg(op: str) -> Write:
    def write(w: Writer, given: Given) -> str:
        x, dim = w.of(given["self"]), given["dim"]
        if dim is None:
            x, dim = w.add("Reshape", [x, w.ints(-1)]), 0
        return w.add(op, [x], axis=dim, keepdims=int(given["keepdim"]))

    return write


def _topk(w: Writer, given: Given) -> list[str]:
    return w.add_many(
        "TopK", [w.of(given["self"]), w.size(given["k"])], 2, axis=given["dim"], largest=int(given["largest"]),
        sorted=int(given["sorted"]),
    )  # fmt: skip


_OPS: dict[str, Write] = {
    "sym_size": _shape_of,
    **{
        name: _unary(op)
        for name, op in {
            "relu": "Relu",
            "sigmoid": "Sigmoid",
            "tanh": "Tanh",
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "abs": "Abs",
            "neg": "Neg",
            "erf": "Erf",
            "sin": "Sin",
            "cos": "Cos",
            "floor": "Floor",
            "ceil": "Ceil",
            "softplus": "Softplus",
            "reciprocal": "Reciprocal",
            "logical_not": "Not",
            "hardswish": "HardSwish",
        }.items()
    },
    "rsqrt": lambda w, given: w.add("Reciprocal", [w.add("Sqrt", [w.of(given["self"])])]),
    "silu": _activation("silu"),
    "hardsigmoid": _activation("hardsigmoid"),
    "leaky_relu": _activation("leaky_relu", "negative_slope"),
    "gelu": _gelu_of,
    "hardtanh": _clamp("min_val", "max_val"),
    "clamp": _clamp("min", "max"),
    "clamp_min": _clamp("min", None),
    "clamp_max": _clamp(None, "max"),
    "relu6": lambda w, given: clipped(w, w.of(given["self"]), 0.0, 6.0),
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "dropout", "lift_fresh_copy"), _same),
    **dict.fromkeys(("_to_copy", "to"), _cast),
    "softmax": _softmax("Softmax"),
    "_softmax": _softmax("Softmax"),
    "log_softmax": _softmax("LogSoftmax"),
    "mean": _reduced("ReduceMean"),
    "sum": _reduced("ReduceSum"),
    "amax": _reduced("ReduceMax"),
    "amin": _reduced("ReduceMin"),
    "linalg_vector_norm": _norm,
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "rsub": _rsub,
    "pow": _power,
    "maximum": _binary("Max"),
    "minimum": _binary("Min"),
    "eq": _compared("Equal"),
    "ne": _compared("Equal", negated=True),
    "lt": _compared("Less"),
    "le": _compared("LessOrEqual"),
    "gt": _compared("Greater"),
    "ge": _compared("GreaterOrEqual"),
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _logical("And")),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), _logical("Or")),
    "where": _where,
    "masked_fill": _masked_fill,
    "matmul": _matmul("other"),
    "bmm": _matmul("mat2"),
    "mm": _matmul("mat2"),
    "addmm": _addmm,
    "linear": _float_linear,
    "scaled_dot_product_attention": _attention,
    "prelu": _prelu,
    "elu": _elu,
    "mish": _mish,
    "einsum": _einsum,
    "cumsum": _cumsum,
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "topk": _topk,
    **moves.OPS,
    **windows.OPS,
}
