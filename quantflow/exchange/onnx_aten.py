"""Float ops and arithmetic on sizes as ONNX nodes, by their ATen names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from quantflow.exchange.onnx_writer import Writer
from quantflow.ir.aten_policy import aten_op
from quantflow.ir.graph import SIZE_FUNCTIONS
from quantflow.ir.program import Node, Ref

Given = Mapping[str, Any]
Write = Callable[[Writer, Given], Any]
#: A score that no softmax sees; not -inf, of which a row would be NaN.
_LEAST = torch.finfo(torch.float32).min
#: The largest int64, where a slice has no end.
_END = (1 << 63) - 1


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
    dim = _positive(given["dim"], w.rank(given["self"]))
    return w.add("Shape", [w.of(given["self"])], start=dim, end=dim + 1)


def _positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _scalar(w: Writer, size: Any, dtype: torch.dtype) -> str:
    """A size or number as a tensor without dimensions."""
    if isinstance(size, (int, float)):
        return w.number(size, dtype)
    return w.cast(w.add("Squeeze", [w.size(size)]), torch.int64, dtype)


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


def _layer_norm(w: Writer, given: Given) -> str:
    count = len(given["normalized_shape"])
    weight = given["weight"]
    scale = w.tensor(torch.ones(given["normalized_shape"])) if weight is None else w.of(weight)
    inputs = [w.of(given["input"]), scale] + ([] if given["bias"] is None else [w.of(given["bias"])])
    return w.add("LayerNormalization", inputs, axis=-count, epsilon=given["eps"])


def _reduced(op: str) -> Write:
    def write(w: Writer, given: Given) -> str:
        x, dims = w.of(given["self"]), given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or list(range(w.rank(given["self"])))
        keeps = int(given.get("keepdim", False))
        if op == "ReduceSum":
            x = w.cast(x, w.dtype(given["self"]), w.dtype(_out(w)))
            return w.add(op, [x, w.ints(*dims)], keepdims=keeps)
        return w.add(op, [x], axes=dims, keepdims=keeps)

    return write


def _out(w: Writer) -> Ref:
    """The node's own result."""
    return Ref(w.at.output)


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


def _float_conv(w: Writer, given: Given) -> str:
    rank = w.rank(given["input"]) - 2
    if isinstance(given["padding"], str):
        raise w.refused("padding by name")
    inputs = [w.of(given[k]) for k in ("input", "weight", "bias") if given[k] is not None]
    stride, padding, dilation = (_spread(given[k], rank) for k in ("stride", "padding", "dilation"))
    return w.add("Conv", inputs, strides=stride, pads=padding * 2, dilations=dilation, group=given["groups"])


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


# -- moving elements


def _reshape(key: str) -> Write:
    return lambda w, given: w.add("Reshape", [w.of(given["self"]), w.sizes(given[key])], allowzero=0)


def _flatten(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    first, last = _positive(given["start_dim"], rank), _positive(given["end_dim"], rank)
    if first == 1 and last == rank - 1:
        return w.add("Flatten", [w.of(given["self"])], axis=1)
    if last < rank - 1:
        raise w.refused("flattening dimensions in the middle")
    return w.add("Reshape", [w.of(given["self"]), w.ints(*[0] * first, -1)])


def _permute(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    return w.add("Transpose", [w.of(given["self"])], perm=[_positive(d, rank) for d in given["dims"]])


def _transpose(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    perm = list(range(rank))
    a, b = (_positive(given.get(k, default), rank) for k, default in (("dim0", 0), ("dim1", rank - 1)))
    perm[a], perm[b] = perm[b], perm[a]
    return w.add("Transpose", [w.of(given["self"])], perm=perm)


def _unsqueeze(w: Writer, given: Given) -> str:
    return w.add("Unsqueeze", [w.of(given["self"]), w.ints(_positive(given["dim"], w.rank(given["self"]) + 1))])


def _squeeze(w: Writer, given: Given) -> str:
    dims, shape = given.get("dim"), w.value(given["self"]).shape
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = [d for d in dims if shape[d] == 1]
    return w.add("Squeeze", [w.of(given["self"]), w.ints(*ones)]) if ones else w.of(given["self"])


def _expand(w: Writer, given: Given) -> str:
    return w.add("Expand", [w.of(given["self"]), w.sizes([1 if s == -1 else s for s in given["size"]])])


def _slice(w: Writer, given: Given) -> str:
    start, end = 0 if given["start"] is None else given["start"], given["end"]
    ends = w.ints(_END) if end is None else w.size(end)
    return w.add("Slice", [w.of(given["self"]), w.size(start), ends, w.ints(given["dim"]), w.size(given["step"])])


def _select(w: Writer, given: Given) -> str:
    index = given["index"]
    at = w.number(index, torch.int64) if isinstance(index, int) else _scalar(w, index, torch.int64)
    return w.add("Gather", [w.of(given["self"]), at], axis=given["dim"])


def _cat(w: Writer, given: Given) -> str:
    return w.add("Concat", [w.of(x) for x in given["tensors"]], axis=given["dim"])


def _stack(w: Writer, given: Given) -> str:
    dim = _positive(given["dim"], w.rank(given["tensors"][0]) + 1)
    return w.add("Concat", [w.add("Unsqueeze", [w.of(x), w.ints(dim)]) for x in given["tensors"]], axis=dim)


def _split(w: Writer, given: Given) -> list[str]:
    parts = [x.shape[given["dim"]] for x in w.value(_out(w))]
    return w.add_many("Split", [w.of(given["self"]), w.ints(*parts)], len(parts), axis=given["dim"])


def _unbind(w: Writer, given: Given) -> list[str]:
    x, count = w.of(given["self"]), len(w.value(_out(w)))
    return [w.add("Gather", [x, w.number(i, torch.int64)], axis=given["dim"]) for i in range(count)]


def _pad(w: Writer, given: Given) -> str:
    rank, pads, value = w.rank(given["self"]), list(given["pad"]), given.get("value") or 0
    if given.get("mode", "constant") != "constant":
        raise w.refused(f"padding by {given['mode']}")
    q = w.qparams(given["self"])
    real = float(value) if q is None else (value - q.zero_point) * q.scale
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return w.add("Pad", [w.of(given["self"]), w.ints(*before, *after), w.number(real, torch.float32)])


# -- tables and positions


def _embedding(w: Writer, given: Given) -> str:
    return w.add("Gather", [w.of(given["weight"]), w.of(given["indices"])], axis=0)


def _gather(w: Writer, given: Given) -> str:
    return w.add("GatherElements", [w.of(given["self"]), w.of(given["index"])], axis=given["dim"])


def _index_select(w: Writer, given: Given) -> str:
    return w.add("Gather", [w.of(given["self"]), w.of(given["index"])], axis=given["dim"])


def _index(w: Writer, given: Given) -> str:
    x, indices = given["self"], list(given["indices"])
    known = [i for i in indices if i is not None]
    if any(w.dtype(i) is torch.bool for i in known):
        raise w.refused("an index of flags")
    if len(known) == 1:
        return w.add("Gather", [w.of(x), w.of(known[0])], axis=indices.index(known[0]))
    if len(known) < len(indices):
        raise w.refused("indices around a whole dimension")
    zero = w.number(0, torch.int64)
    names = [w.as_operand(i, torch.int64) for i in known]
    together = names[0]
    for name in names[1:]:
        together = w.add("Add", [together, name])
    nothing = w.add("Mul", [together, zero])  # of the shape that all indices broadcast to
    last = [w.add("Unsqueeze", [w.add("Add", [name, nothing]), w.ints(-1)]) for name in names]
    return w.add("GatherND", [w.of(x), w.add("Concat", last, axis=-1)])


def _arange(w: Writer, given: Given) -> str:
    dtype = w.dtype(_out(w))
    start, step = given.get("start", 0), given.get("step", 1)
    return w.add("Range", [_scalar(w, each, dtype) for each in (start, given["end"], step)])


def _full(value: float | None, like: bool = False) -> Write:
    def write(w: Writer, given: Given) -> str:
        filled = w.number(given["fill_value"] if value is None else value, w.dtype(_out(w)))
        shape = w.add("Shape", [w.of(given["self"])]) if like else w.sizes(given["size"])
        return w.add("Expand", [filled, shape])

    return write


# -- windows


def _max_pool(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"]) - 2
    kernel = _spread(given["kernel_size"], rank)
    stride = _spread(given["stride"] or kernel, rank)
    padding, dilation = (_spread(given[k], rank) for k in ("padding", "dilation"))
    return w.add(
        "MaxPool", [w.of(given["self"])], kernel_shape=kernel, strides=stride, pads=padding * 2, dilations=dilation,
        ceil_mode=int(given["ceil_mode"]),
    )  # fmt: skip


def _avg_pool(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"]) - 2
    kernel = _spread(given["kernel_size"], rank)
    if given.get("divisor_override") is not None or given["ceil_mode"]:
        raise w.refused("an average with a divisor of its own, or over windows that reach out of the tensor")
    return w.add(
        "AveragePool", [w.of(given["self"])], kernel_shape=kernel, strides=_spread(given["stride"] or kernel, rank),
        pads=_spread(given["padding"], rank) * 2, count_include_pad=int(given["count_include_pad"]),
    )  # fmt: skip


def _adaptive_avg_pool(w: Writer, given: Given) -> str:
    shape = w.value(given["self"]).shape[2:]
    wanted = _spread(given["output_size"], len(shape))
    if all(size == 1 for size in wanted):
        return w.add("GlobalAveragePool", [w.of(given["self"])])
    is_fixed = not any(isinstance(size, str) for item in w.program.inputs for size in item.shape)
    if not is_fixed or any(size % count for size, count in zip(shape, wanted, strict=True)):
        raise w.refused(f"an average of {list(shape)} to {wanted}")
    kernel = [size // count for size, count in zip(shape, wanted, strict=True)]
    return w.add("AveragePool", [w.of(given["self"])], kernel_shape=kernel, strides=kernel)


def _nearest(w: Writer, given: Given) -> str:
    before, after = w.value(given["self"]).shape[2:], w.value(_out(w)).shape[2:]
    factors = [1.0, 1.0, *(b / a for a, b in zip(before, after, strict=True))]
    if any(factor != int(factor) for factor in factors):
        raise w.refused("nearest neighbours at a factor that is no whole number")
    return w.add(
        "Resize", [w.of(given["self"]), "", w.tensor(torch.tensor(factors))], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _spread(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


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
    "layer_norm": _layer_norm,
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
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _float_conv),
    "scaled_dot_product_attention": _attention,
    "reshape": _reshape("shape"),
    "view": _reshape("size"),
    "_unsafe_view": _reshape("size"),
    "flatten": _flatten,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "unbind": _unbind,
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "embedding": _embedding,
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "arange": _arange,
    "full": _full(None),
    "ones": _full(1),
    "zeros": _full(0),
    "full_like": _full(None, like=True),
    "ones_like": _full(1, like=True),
    "zeros_like": _full(0, like=True),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_avg_pool),
    "upsample_nearest2d": _nearest,
}
