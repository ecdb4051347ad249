"""The int8 ops of a program as ONNX nodes between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantflow.exchange import onnx_aten
from quantflow.exchange.expressible import clamp_changes_codes
from quantflow.exchange.onnx_arguments import spread
from quantflow.exchange.onnx_writer import Writer
from quantflow.ir.activations import Epilogue
from quantflow.ir.program import Node

#: Why onnxruntime computes a layer in float: it takes codes behind a convolution, and nothing between.
ACTIVATION_BETWEEN = "an activation that is no clamp lies between its sum and its codes"
NO_CODES = "its result is float32"
LARGE_BIAS = "its bias does not fit int32"
_INT32 = 2.0**31 - 1


def write_node(w: Writer, node: Node) -> None:
    """One node of the program."""
    w.at = node
    if node.op in _INT8:
        _INT8[node.op](w, node)
    elif node.op in ("aten", "size"):
        w.names[node.output] = onnx_aten.write(w, node)
    else:
        raise w.refused(node.op)


def activated(w: Writer, r: str, epilogue: Epilogue | None) -> str:
    """The activation on float32."""
    if epilogue is None:
        return r
    if epilogue.bounds is not None:
        return onnx_aten.clipped(w, r, *epilogue.bounds)
    return onnx_aten.ACTIVATIONS[epilogue.kind](w, r, *epilogue.values)


def _finished(w: Writer, node: Node, r: str) -> None:
    """Activation and codes, or float32."""
    q = w.qparams(node.output)
    if q is None:
        w.names[node.output] = activated(w, r, node.epilogue)
        return
    w.coded(activated(w, r, node.epilogue) if clamp_changes_codes(node, q) else r, q, node.output)


def _quantize(w: Writer, node: Node) -> None:
    _finished(w, node, w.of(node.args[0]))


def _dequantize(w: Writer, node: Node) -> None:
    w.names[node.output] = w.of(node.args[0])


def _weight(w: Writer, node: Node, axis: int, transposed: bool = False) -> str:
    weight = w.program.tensors[node.attrs["weight"]]
    scale = w.program.tensors[node.attrs["weight_scale"]].reshape(-1).to(torch.float32)
    scale = scale if scale.numel() > 1 else scale.reshape(())
    mark = ".T" if transposed else ""
    codes = w.tensor(weight.t() if transposed else weight, node.attrs["weight"] + mark)
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    attributes = {"axis": axis} if scale.dim() else {}
    return w.add("DequantizeLinear", [codes, w.tensor(scale), w.tensor(zero)], **attributes)


def _bias(w: Writer, node: Node) -> str | None:
    """In steps of scale_x * scale_w, as int32; as float32 where that is too narrow."""
    bias = w.program.tensors[node.attrs["bias"]].to(torch.float64).reshape(-1)
    q = w.qparams(node.args[0])
    assert q is not None
    weight = w.program.tensors[node.attrs["weight"]]
    scale = (w.program.tensors[node.attrs["weight_scale"]].reshape(-1).to(torch.float32) * q.scale).to(torch.float64)
    scale = scale.expand(bias.shape) if scale.numel() == 1 else scale
    steps = torch.round(bias / scale)
    if bool((steps.abs() > _INT32).any()) or len(bias) != len(weight):
        w.float_layers[node.name] = LARGE_BIAS
        return w.tensor(bias.to(torch.float32))
    codes = w.tensor(steps.to(torch.int32), f"{node.attrs['bias']}.codes.{node.output}")
    return w.add("DequantizeLinear", [codes, w.tensor(scale.to(torch.float32))], axis=0)


def _conv(w: Writer, node: Node) -> None:
    a, rank = node.attrs, w.rank(node.args[0]) - 2
    stride, dilation = spread(a["stride"], rank), spread(a["dilation"], rank)
    inputs = [w.of(node.args[0]), _weight(w, node, 0)]
    if a["bias"] is not None:
        inputs.append(_bias(w, node))
    if isinstance(a["padding"], str):
        pads = {"auto_pad": {"same": "SAME_UPPER", "valid": "VALID"}[a["padding"]]}
    else:
        pads = {"pads": spread(a["padding"], rank) * 2}
    r = w.add("Conv", inputs, strides=stride, dilations=dilation, group=a["groups"], **pads)
    q = w.qparams(node.output)
    if q is None or node.args[1] is not None:
        w.float_layers[node.name] = NO_CODES
    elif clamp_changes_codes(node, q):
        w.float_layers[node.name] = ACTIVATION_BETWEEN
    _finished(w, node, _with_residual(w, node, r))


def _linear(w: Writer, node: Node) -> None:
    x, has_bias = w.of(node.args[0]), node.attrs["bias"] is not None
    if w.rank(node.args[0]) == 2:
        bias = [_bias(w, node)] if has_bias else []
        r = w.add("Gemm", [x, _weight(w, node, 0), *bias], transB=1)
    else:
        r = w.add("MatMul", [x, _weight(w, node, 1, transposed=True)])
        if has_bias:
            bias = w.program.tensors[node.attrs["bias"]].reshape(-1)
            r = w.add("Add", [r, w.tensor(bias, node.attrs["bias"])])
    _finished(w, node, _with_residual(w, node, r))


def _with_residual(w: Writer, node: Node, r: str) -> str:
    return r if node.args[1] is None else w.add("Add", [r, w.of(node.args[1])])


def _pair(op: str) -> Callable[[Writer, Node], None]:
    def write(w: Writer, node: Node) -> None:
        _finished(w, node, w.add(op, [w.of(a) for a in node.args]))

    return write


def _clamp(w: Writer, node: Node) -> None:
    q = w.qparams(node.args[0])
    assert q is not None
    low, high = ((node.attrs[key] - q.zero_point) * q.scale for key in ("low", "high"))
    w.coded(onnx_aten.clipped(w, w.of(node.args[0]), low, high), q, node.output)


def _moved(w: Writer, node: Node) -> None:
    """On the numbers that the codes stand for, then codes again: runtimes move the codes themselves."""
    q = w.qparams(node.output)
    moved = onnx_aten.write(w, node)
    if isinstance(moved, list):
        names = []
        for index, each in enumerate(moved):
            assert q is not None
            names.append(w.coded(each, q, f"{node.output}.{index}"))
        w.names[node.output] = names
    elif q is None:
        w.names[node.output] = moved
    else:
        w.coded(moved, q, node.output)


def _average(w: Writer, node: Node) -> None:
    _finished(w, node, onnx_aten.write(w, node))


_INT8: dict[str, Callable[[Writer, Node], None]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "conv": _conv,
    "linear": _linear,
    "matmul": _pair("MatMul"),
    "add": _pair("Add"),
    "mul": _pair("Mul"),
    "clamp": _clamp,
    "max_pool": _moved,
    "shape": _moved,
    "cat": _moved,
    "avg_pool": _average,
}
