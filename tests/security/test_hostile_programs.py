"""Programs made to do harm: each is refused by name, or computed as the reference does; none ends the process."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from tests.security.calls import X, node, program, tensor
from tests.security.running import outcomes

CODES = {"dtype": "int8", "scale": 0.05, "zero_point": 0, "is_nonnegative": False}
BIG = 2**40
HUGE = 2**63 - 1


def aten(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return program(node(target, list(args), kwargs))


def two(first: dict[str, Any], target: str, *args: Any) -> dict[str, Any]:
    """An op on the first one's result, which is `y`."""
    return program(first, {**node(target, list(args)), "output": "z"})


def coded(*nodes: dict[str, Any], values: dict[str, Any] | None = None, last: str = "y") -> dict[str, Any]:
    """x as codes `q`, and nodes on them."""
    quantize = {"name": "quantize", "op": "quantize", "output": "q", "args": [X]}
    held = {"q": CODES, "y": CODES} if values is None else values
    return program(quantize, *nodes, values=held, output={"value": last})


def on_codes(op: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return coded(node(target, [{"value": "q"}, *args], kwargs, op))


def conv(**attrs: Any) -> dict[str, Any]:
    held = {
        "weight": "conv_codes", "weight_scale": "scale", "bias": None, "stride": [1, 1], "padding": [0, 0],
        "dilation": [1, 1], "groups": 1, **attrs,
    }  # fmt: skip
    return coded({"name": "it", "op": "conv", "output": "y", "args": [{"value": "q"}, None], "attrs": held})


def linear(*args: Any, **attrs: Any) -> dict[str, Any]:
    held = {"weight": "codes", "weight_scale": "scale", "bias": None, **attrs}
    return coded({"name": "it", "op": "linear", "output": "y", "args": [*args], "attrs": held})


def size(target: str, *args: Any) -> dict[str, Any]:
    return program(node(target, list(args), op="size"))


def chained(target: str, count: int) -> dict[str, Any]:
    """A size that grows with every node."""
    nodes = [{**node("sym_size.int", [X, 1], op="size"), "output": "s0"}]
    nodes += [{**node(target, [{"value": f"s{i}"}] * 2, op="size"), "output": f"s{i + 1}"} for i in range(count)]
    made = {**node("zeros.default", [[{"value": f"s{count}"}]]), "output": "made"}
    return program(*nodes, made)


PROGRAMS: dict[str, dict[str, Any]] = {
    # ops that are none of a program's
    "an index that writes anywhere": aten("max_pool2d_with_indices_backward.default", X, X, [2, 2], [2, 2], [0, 0],
                                          [1, 1], False, tensor("ids")),
    "strides of one's own": aten("as_strided.default", X, [2**20], [2**20]),
    "memory that nobody wrote": aten("empty.memory_format", [4]),
    "a storage exchanged": aten("set.source_Tensor", X, X),
    "an in-place op": aten("relu_.default", X),
    "a gradient": aten("embedding_dense_backward.default", X, tensor("ids"), 10, -1, False),
    "a jit op": aten("save.default", X, "pwned"),
    "a file": aten("from_file.default", "/etc/passwd"),
    "a segment reduction": aten("segment_reduce.default", X, "sum", lengths=tensor("ids")),
    "an internal transform": aten("_fft_r2c.default", X, [HUGE], 0, True),
    "BatchNorm without statistics": aten("native_batch_norm.default", X, None, None, None, None, False, 0.1, 1e-5),
    "BatchNorm that trains": aten("batch_norm.default", X, None, None, tensor("w4"), tensor("w4"), True, 0.1, 1e-5,
                                  False),
    "an unknown overload": aten("add.everything", X, X),
    # dimensions
    "permute with a dimension twice": aten("permute.default", X, [0, 1, 1, 3]),
    "permute with too few": aten("permute.default", X, [0, 1]),
    "permute far outside": aten("permute.default", X, [0, 1, 2, BIG]),
    "mean over one dimension four times": aten("mean.dim", X, [1, 1, 1, 1]),
    "sum over a dimension and itself from the end": aten("sum.dim_IntList", X, [1, -3]),
    "amax over a dimension twice": aten("amax.default", X, [2, 2]),
    "flip twice": aten("flip.default", X, [1, 1]),
    "softmax of dimension -9": aten("softmax.int", X, -9),
    "transpose far outside": aten("transpose.int", X, 1, 100),
    "t of four dimensions": aten("t.default", X),
    "squeeze of dimension 2^40": aten("squeeze.dim", X, BIG),
    "unsqueeze of dimension 9": aten("unsqueeze.default", X, 9),
    "flatten backwards": aten("flatten.using_ints", X, 3, 1),
    "a norm over a dimension twice": aten("linalg_vector_norm.default", X, 2, [1, 1]),
    # shapes
    "layer_norm of what is not there": aten("layer_norm.default", X, [1048576, 16]),
    "layer_norm of negative sizes": aten("layer_norm.default", X, [-6, -6]),
    "layer_norm of a product that wraps": aten("layer_norm.default", X, [2**32, 2**32]),
    "layer_norm with a short weight": aten("layer_norm.default", X, [6], tensor("w4")),
    "layer_norm with an expanded weight": two(node("expand.default", [tensor("one"), [6]]), "layer_norm.default", X,
                                              [6], {"value": "y"}),
    "rms_norm with another weight": aten("rms_norm.default", X, [6], tensor("w66")),
    "a norm of no channels": two(node("slice.Tensor", [X, 1, 0, 0]), "batch_norm.default", {"value": "y"},
                                 tensor("empty"), None, tensor("empty"), tensor("empty"), False, 0.1, 1e-5, False),
    "batch_norm of other channels": aten("batch_norm.default", X, None, None, tensor("w66"), tensor("w66"), False, 0.1,
                                         1e-5, False),
    "linear with a short bias": aten("linear.default", X, tensor("w66"), tensor("w4")),
    "linear with a bias of integers": aten("linear.default", X, tensor("w66"), tensor("ids")),
    "linear with a bias of one value": aten("linear.default", X, tensor("w66"), tensor("one")),
    "linear by a transposed weight": two(node("t.default", [tensor("table")]), "linear.default", tensor("table"),
                                         {"value": "y"}),
    "linear of other features": aten("linear.default", X, tensor("w44")),
    "conv with a short bias": aten("conv2d.default", X, tensor("conv"), tensor("one")),
    "conv with a 1-d weight": aten("conv2d.default", X, tensor("w4")),
    "conv with another rank": aten("conv2d.default", X, tensor("conv3")),
    "conv of no stride": aten("conv2d.default", X, tensor("conv"), None, [0, 0]),
    "conv of negative padding": aten("conv2d.default", X, tensor("conv"), None, [1, 1], [-9, -9]),
    "conv of padding 2^40": aten("conv2d.default", X, tensor("conv"), None, [1, 1], [BIG, BIG]),
    "conv of terabytes": aten("conv2d.default", X, tensor("conv"), None, [1, 1], [2**20, 2**20]),
    "conv of dilation 2^62": aten("conv2d.default", X, tensor("conv"), None, [1, 1], [0, 0], [2**62, 1]),
    "conv of no groups": aten("conv2d.default", X, tensor("conv"), None, [1, 1], [0, 0], [1, 1], 0),
    "conv of -1 groups": aten("conv2d.default", X, tensor("conv"), None, [1, 1], [0, 0], [1, 1], -1),
    "a transposed conv of terabytes": aten("conv_transpose2d.input", X, tensor("conv"), None, [2**20, 2**20]),
    "matmul of other sizes": aten("matmul.default", X, tensor("w44")),
    "matmul of codes as floats": aten("matmul.default", X, tensor("codes")),
    "matmul of integers": aten("matmul.default", tensor("ids"), tensor("ids")),
    "bmm of matrices": aten("bmm.default", tensor("w44"), tensor("w44")),
    "attention to other widths": aten("scaled_dot_product_attention.default", X, tensor("w44"), X),
    "attention under a mask of integers": aten("scaled_dot_product_attention.default", X, X, X, tensor("ids")),
    "attention masked twice": aten("scaled_dot_product_attention.default", X, X, X, tensor("w66"), 0.0, True),
    "view of another count": aten("view.default", X, [7, 7]),
    "view with two open sizes": aten("view.default", X, [-1, -1]),
    "view of a negative size": aten("view.default", X, [2, -4, 36]),
    "view whose product wraps": aten("view.default", X, [2**32, 2**32]),
    "expand of a size to another": aten("expand.default", X, [2, 5, 6, 6]),
    "expand with an open new size": aten("expand.default", X, [-1, 2, 4, 6, 6]),
    "repeat below zero": aten("repeat.default", X, [-1, 1, 1, 1]),
    "repeat whose product wraps": aten("repeat.default", X, [2**31, 2**31, 2**31, 2**31]),
    "repeat of too few": aten("repeat.default", X, [2, 2]),
    "cat of other shapes": aten("cat.default", [X, tensor("w44")], 1),
    "cat of nothing": aten("cat.default", []),
    "cat of several integers": aten("cat.default", [tensor("ids"), tensor("small")]),
    "stack of other shapes": aten("stack.default", [X, tensor("cube")]),
    "stack of other ranks at the end": aten("stack.default", [X, tensor("w4")], 4),
    "stack at dimension 7": aten("stack.default", [X, X], 7),
    "split into no size": aten("split.Tensor", X, 0, 1),
    "split that does not sum up": aten("split_with_sizes.default", X, [1, 1], 1),
    "split below zero": aten("split_with_sizes.default", X, [-1, 5], 1),
    "chunk into nothing": aten("chunk.default", X, 0, 1),
    "narrow outside": aten("narrow.default", X, 1, 3, 9),
    "narrow from below": aten("narrow.default", X, 1, -(2**63), 1),
    "select outside": aten("select.int", X, 1, 4),
    "select from below": aten("select.int", X, 1, -5),
    "slice backwards": aten("slice.Tensor", X, 1, 0, 3, -1),
    "slice by 2^62": aten("slice.Tensor", X, 1, 0, HUGE, 2**62),
    "slice of no step": aten("slice.Tensor", X, 1, 0, 3, 0),
    "unflatten that does not fit": aten("unflatten.int", X, 1, [3, 3]),
    "roll by 2^63": aten("roll.default", X, [-(2**63)], [1]),
    "roll of a dimension twice": aten("roll.default", X, [1, 2], [2, 2]),
    "roll of more dimensions than shifts": aten("roll.default", X, [1], [1, 2]),
    "pixel_shuffle by 2^32": aten("pixel_shuffle.default", X, 2**32),
    "pixel_shuffle by nothing": aten("pixel_shuffle.default", X, 0),
    "channel_shuffle by nothing": aten("channel_shuffle.default", X, 0),
    # missing, doubled and mistaken arguments
    "where with one argument": aten("where.self", tensor("mask")),
    "where of numbers on a tensor's place": aten("where.self", tensor("mask"), 1, 2),
    "where without a condition": aten("where.self", None, X, X),
    "masked_fill without a value": aten("masked_fill.Scalar", X, tensor("mask")),
    "masked_fill without anything": aten("masked_fill.Scalar"),
    "masked_fill with a tensor of many": aten("masked_fill.Tensor", X, tensor("mask"), X),
    "add of one": aten("add.Tensor", X),
    "add of nothing": aten("add.Tensor"),
    "add of five": aten("add.Tensor", X, X, 1, 1, 1),
    "an argument twice": aten("softmax.int", X, 1, dim=1),
    "an argument of no name": aten("relu.default", X, eps=1),
    "a list for a tensor": aten("relu.default", [X]),
    "text for a tensor": aten("relu.default", "x"),
    "a tensor for a number": aten("softmax.int", X, X),
    "None for a tensor": aten("relu.default", None),
    "a dict for a number": aten("softmax.int", X, {"dict": {}}),
    "layer_norm of no shape": aten("layer_norm.default", X),
    "embedding of no index": aten("embedding.default", tensor("table")),
    # indices
    "embedding outside its table": two(node("full_like.default", [tensor("ids"), BIG]), "embedding.default",
                                       tensor("table"), {"value": "y"}),
    "embedding from below": two(node("full_like.default", [tensor("ids"), -(2**62)]), "embedding.default",
                                tensor("table"), {"value": "y"}),
    "embedding by floats": aten("embedding.default", tensor("table"), X),
    "index_select outside": two(node("full_like.default", [tensor("ids"), 10**9]), "index_select.default", X, 1,
                                {"value": "y"}),
    "gather outside": two(node("full_like.default", [tensor("ids"), 10**9]), "gather.default", tensor("w4"), 0,
                          {"value": "y"}),
    "scatter outside": two(node("full_like.default", [tensor("ids"), 10**9]), "scatter.value", tensor("w4"), 0,
                           {"value": "y"}, 1.0),
    "take outside": two(node("full_like.default", [tensor("ids"), 10**12]), "take.default", X, {"value": "y"}),
    "bags outside": two(node("full_like.default", [tensor("ids"), 10**12]), "embedding_bag.default", tensor("table"),
                        tensor("ids"), {"value": "y"}),
    # memory
    "2^50 ones": aten("ones.default", [2**50]),
    "2^33 ones twice": aten("ones.default", [2**33, 2]),
    "sizes that wrap to 16": aten("zeros.default", [2**32, 2**32, 16]),
    "sizes that wrap to 0": aten("zeros.default", [2**32, 2**32]),
    "negative ones": aten("ones.default", [-4]),
    "a range without end": aten("arange.default", 1e300),
    "a range that never begins": aten("arange.start_step", 0, 10, -1),
    "a range of NaN": aten("arange.default", {"float": "nan"}),
    "an outer product": two(node("ones.default", [[2**20]]), "outer.default", {"value": "y"}, {"value": "y"}),
    "a broadcast": program(node("ones.default", [[2**20, 1]]), {**node("ones.default", [[1, 2**20]]), "output": "z"},
                           {**node("add.Tensor", [{"value": "y"}, {"value": "z"}]), "output": "sum"}),
    "an einsum": two(node("ones.default", [[2**20]]), "einsum.default", "i,j->ij", [{"value": "y"}, {"value": "y"}]),
    "one_hot of 2^40": aten("one_hot.default", tensor("ids"), BIG),
    "one_hot of what is asked": aten("one_hot.default", tensor("ids"), -1),
    "padding of 2^40": aten("constant_pad_nd.default", X, [BIG, BIG]),
    "padding below nothing": aten("constant_pad_nd.default", X, [-9, -9]),
    "padding by -2^63": aten("constant_pad_nd.default", X, [-(2**63), 0]),
    "padding by an odd count": aten("constant_pad_nd.default", X, [1, 1, 1]),
    "padding of more dimensions": aten("constant_pad_nd.default", X, [1] * 10),
    "images of 2^20": aten("upsample_nearest2d.default", X, [2**20, 2**20]),
    "images by a scale of 1e30": aten("upsample_nearest2d.vec", X, None, [1e30, 1e30]),
    "images by a scale of NaN": aten("upsample_nearest2d.vec", X, None, [{"float": "nan"}] * 2),
    "images of no size and no scale": aten("upsample_nearest2d.vec", X, None, None),
    "images of size 0": aten("upsample_bilinear2d.default", X, [0, 0], False),
    "images of a size and a scale": aten("upsample_nearest2d.vec", X, [9, 9], [2.0, 2.0]),
    "parts without end": two(node("ones.default", [[2**20]]), "unbind.int", {"value": "y"}),
    "splits without end": two(node("ones.default", [[2**20]]), "split.Tensor", {"value": "y"}, 1),
    "17 dimensions": aten("ones.default", [1] * 17),
    "a grid for an image of 2^20": aten("affine_grid_generator.default", tensor("cube"), [1, 1, 2**20, 2**20], False),
    "terabytes expanded and summed": two(node("expand.default", [tensor("one"), [2**40]]), "sum.default",
                                         {"value": "y"}),
    # windows
    "a window of no size": aten("max_pool2d.default", X, [0, 0]),
    "a window of 2^40": aten("avg_pool2d.default", X, [BIG, BIG]),
    "a stride of 0": aten("max_pool2d.default", X, [2, 2], [0, 0]),
    "padding over half of a window": aten("avg_pool2d.default", X, [2, 2], [2, 2], [2, 2]),
    "a divisor of 0": aten("avg_pool2d.default", X, [2, 2], [2, 2], [0, 0], False, True, 0),
    "three numbers for two": aten("max_pool2d.default", X, [2, 2, 2]),
    "an adaptive pool of -1": aten("adaptive_avg_pool2d.default", X, [-1, -1]),
    "an adaptive pool of 2^20": aten("adaptive_avg_pool2d.default", X, [2**20, 2**20]),
    "an adaptive pool of three": aten("adaptive_avg_pool2d.default", X, [2, 2, 2]),
    "a pool of a matrix": aten("max_pool2d.default", tensor("w44"), [2, 2]),
    "an unpooling outside": two(node("full_like.default", [tensor("cube"), 10**9]), "max_unpool2d.default",
                                tensor("cube"), {"value": "y"}, [9, 9]),
    # sizes
    "a power of powers": size("pow", 10, 10**9),
    "a division by 0": size("floordiv", 1, 0),
    "a remainder by 0": size("mod", 1, 0),
    "text as a size": size("mul", "x", 10**9),
    "a list as a size": size("mul", [1], 10**9),
    "a size of many arguments": size("add", 1, 2, 3),
    "a size of dimension 9": size("sym_size.int", X, 9),
    "sizes that square without end": chained("mul", 40),
    "sizes that double without end": chained("add", 60),
    "an item of what is no list": program(node("getitem", [X, 0], op="shape")),
    "an item outside": program(node("split.Tensor", [X, 2, 1]),
                               {**node("getitem", [{"value": "y"}, 7], op="size"), "output": "z"}),
    # codes
    "codes padded by no code": on_codes("shape", "constant_pad_nd.default", [1, 1], 300),
    "codes padded by half a code": on_codes("shape", "constant_pad_nd.default", [1, 1], 0.5),
    "codes padded by NaN": on_codes("shape", "constant_pad_nd.default", [1, 1], {"float": "nan"}),
    "codes permuted twice": on_codes("shape", "permute.default", [0, 1, 1, 3]),
    "codes by a window of no size": on_codes("max_pool", "max_pool2d.default", [0, 0]),
    "codes by an op that computes": on_codes("shape", "exp.default"),
    "codes by an op of no table": on_codes("shape", "as_strided.default", [4], [1]),
    "codes with another scale": coded(node("flatten.using_ints", [{"value": "q"}, 1], op="shape"),
                                      values={"q": CODES, "y": {**CODES, "scale": 0.1}}),
    "a clamp upside down": coded({"name": "it", "op": "clamp", "output": "y", "args": [{"value": "q"}],
                                  "attrs": {"low": 100, "high": -100}}),
    "a clamp beyond codes": coded({"name": "it", "op": "clamp", "output": "y", "args": [{"value": "q"}],
                                   "attrs": {"low": -1000, "high": 1000}}),
    "an activation on a quantization": program({"name": "q", "op": "quantize", "output": "q", "args": [X],
                                                "epilogue": {"kind": "relu", "values": []}}, values={"q": CODES}),
    "codes of integers": program({"name": "q", "op": "quantize", "output": "q", "args": [tensor("ids")]},
                                 values={"q": CODES}),
    "an int8 product of other features": linear({"value": "q"}, None),
    "an int8 product of no operand": linear(None, None),
    "an int8 product whose residual is a list": linear({"value": "q"}, [1]),
    "a convolution by a weight that is none": conv(weight="w44"),
    "a convolution of huge padding": conv(weight="codes4", padding=[2**20, 2**20]),
    "a convolution of lines longer than a task": conv(weight="codes4", stride=[2, 2], padding=[7, 65536]),
    "a recurrence of other gates": program({"name": "it", "op": "recurrence", "output": "y", "args": [X, None, None],
                                            "attrs": {"cell": "lstm", "reverse": False, "weight": "w44",
                                                      "weight_scale": None, "bias": None}}),
    "an LSTM of other states": aten("lstm.input", tensor("block"), [tensor("cube"), X],
                                    [tensor(name) for name in ("w16_4", "w16_4", "w16", "w16")],
                                    True, 1, 0.0, False, False, False),
    "an LSTM of other weights": aten("lstm.input", tensor("block"), [tensor("state")] * 2,
                                     [tensor(name) for name in ("w44", "w16_4", "w4", "w16")],
                                     True, 1, 0.0, False, False, False),
    "packed rows of other steps": aten("gru.data", tensor("w44"), tensor("ids"), tensor("state"),
                                       [tensor(name) for name in ("w12_4", "w12_4", "w12", "w12")],
                                       True, 1, 0.0, False, False),
    # sizes that vary, aliases, outputs
    "an input of a negative size": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None,
                                    "dtype": "float32", "shape": [2, -4, 6, 6]}]},
    "an input of half a size": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None,
                                "dtype": "float32", "shape": [2, 4.5, 6, 6]}]},
    "an input of true sizes": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None,
                               "dtype": "float32", "shape": [True, 4, 6, 6]}]},
    "an input of 17 dimensions": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None,
                                  "dtype": "float32", "shape": [1] * 17}]},
    "an input whose size is a NUL": {**aten("relu.default", X), "format": 2, "inputs": [
        {"name": "x", "keyword": None, "dtype": "float32", "shape": ["\0", 4, 6, 6]}]},
    "an input called twice": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None, "dtype": "float32",
                              "shape": [None, 4, 6, 6]}] * 2},
    "an input of no dtype": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None, "dtype": "object",
                             "shape": [None, 4, 6, 6]}]},
    "a limit that computes": {**aten("relu.default", X), "format": 2, "limits": [
        {"expression": "__import__('os').system('true')", "place": "here"}]},
    "a limit that never ends": {**aten("relu.default", X), "format": 2, "limits": [
        {"expression": "9**9**9**9 > batch", "place": "here"}]},
    "an output that is its input": aten("relu.default", X) | {"output": {"value": "x"}},
    "an output a thousand times": aten("relu.default", X) | {"output": {"tuple": [{"value": "y"}] * 1000}},
    "an output of its input and its view": {
        **program(node("view.default", [X, [-1, 144]])),
        "output": {"tuple": [{"value": "x"}, {"value": "y"}, {"value": "x"}]}},
    "an output that is a weight": aten("relu.default", X) | {"output": {"tensor": "w4"}},
    "an output that nobody made": aten("relu.default", X) | {"output": {"value": "nobody"}},
    "an output of a number": aten("relu.default", X) | {"output": 7},
    "an output nested without end": aten("relu.default", X) | {"output": reduce(
        lambda inner, _: {"tuple": [inner]}, range(200), {"value": "y"})},
    "an output of a class": aten("relu.default", X) | {"output": {"typed": "os.system", "fields": []}},
    "a value called NUL": program({**node("relu.default", [X]), "output": "\0"}),
    "a value of another script": program({**node("relu.default", [X]), "output": "\u202eabc"}),
    "a value called ../..": program({**node("relu.default", [X]), "output": "../../etc/passwd"}),
    "a value called __dict__": program({**node("relu.default", [X]), "output": "__dict__"}),
    "a value of a megabyte's name": program({**node("relu.default", [X]), "output": "y" * (1 << 20)}),
    "a value that is no text": program({**node("relu.default", [X]), "output": 7}, output={"value": "7"}),
    "a tensor called NUL": aten("add.Tensor", X, {"tensor": "\0"}),
    "a tensor that is not there": aten("add.Tensor", X, {"tensor": "../w4"}),
    "an empty expanded and added": two(node("expand.default", [tensor("none"), [7, 0, 4]]), "add.Tensor", X,
                                       {"value": "y"}),
    "an input written over its expansion": two(node("expand.default", [tensor("one"), [2, 4, 6, 6]]), "add.Tensor",
                                               {"value": "y"}, X),
    "a cat of one value with its own view": two(node("transpose.int", [X, 2, 3]), "cat.default",
                                                [X, {"value": "y"}, X], 1),
    "a permutation of a size that varies": two(node("permute.default", [X, [1, 0, 2, 3]]), "reshape.default",
                                               {"value": "y"}, [4, -1]),
    "a permutation of computed dimensions": program(
        {**node("sym_size.int", [X, 1], op="size"), "output": "s"},
        node("permute.default", [X, [0, {"value": "s"}, 2, 3]])),
    "a slice from a computed size to below it": program(
        {**node("sym_size.int", [X, 1], op="size"), "output": "s"},
        node("slice.Tensor", [X, 1, {"value": "s"}, 0, 1])),
    "a repeat of computed size": program(
        {**node("sym_size.int", [X, 1], op="size"), "output": "s"},
        {**node("pow", [{"value": "s"}, 30], op="size"), "output": "t"},
        node("repeat.default", [X, [{"value": "t"}, 1, 1, 1]])),
    "an expansion of computed size": program(
        {**node("sym_size.int", [X, 1], op="size"), "output": "s"},
        {**node("pow", [{"value": "s"}, 30], op="size"), "output": "t"},
        node("expand.default", [tensor("one"), [{"value": "t"}]])),
    "a view of a negative computed size": program(
        {**node("sym_size.int", [X, 1], op="size"), "output": "s"},
        {**node("neg", [{"value": "s"}], op="size"), "output": "t"},
        node("view.default", [X, [{"value": "t"}, 72]])),
    "an item of computed place": program(
        node("split.Tensor", [X, 2, 1]), {**node("sym_size.int", [X, 1], op="size"), "output": "s"},
        {**node("getitem", [{"value": "y"}, {"value": "s"}], op="size"), "output": "z"}),
    "a size of a list": program(node("split.Tensor", [X, 2, 1]),
                                {**node("sym_size.int", [{"value": "y"}, 0], op="size"), "output": "z"}),
    # what PyTorch takes otherwise than one might think
    "a view of a permutation": two(node("permute.default", [X, [0, 2, 3, 1]]), "view.default", {"value": "y"}, [2, -1]),
    "a range up to true": aten("arange.default", True),
    "a step of 2^31 over one place": aten("conv2d.default", X, tensor("conv"), None, [2**31, 2**31], [0, 0], [1, 1]),
    "a window's step of 2^40": aten("max_pool1d.default", tensor("cube"), [6], [BIG]),
    "a number for the list of steps": aten("conv2d.default", X, tensor("conv"), None, 2),
    "one size for an image": aten("adaptive_avg_pool2d.default", X, [3]),
    "a pool of nothing": aten("avg_pool1d.default", tensor("none"), [2]),
    "a slice that steps over all memory": aten("slice.Tensor", X, 1, 0, 4, 2**63 - 1),
    "a clamp to NaN": aten("clamp.default", X, {"float": "nan"}, 1.0),
    "an activation up to NaN": two(node("add.Tensor", [X, X]), "hardtanh.default", {"value": "y"}, 0.0,
                                   {"float": "nan"}),
    "positions at both ends of 64 bits": aten("lt.Tensor", tensor("ends"), tensor("ends")),
    "a bool taken away": aten("rsub.Tensor", tensor("mask"), X),
    "a product in another dtype": aten("bmm.dtype", tensor("cube"), tensor("turned"), {"dtype": "int64"}),
    "a fused clamp to NaN": coded({"name": "it", "op": "add", "output": "y", "args": [{"value": "q"}, {"value": "q"}],
                                   "epilogue": {"kind": "hardtanh", "values": [0.0, {"float": "nan"}]}}),
    # codes
    "codes of scale NaN": coded(values={"q": {**CODES, "scale": {"float": "nan"}}}, last="q"),
    "codes of scale 0": coded(values={"q": {**CODES, "scale": 0.0}}, last="q"),
    "codes of a negative scale": coded(values={"q": {**CODES, "scale": -1.0}}, last="q"),
    "codes of scale 1e300": coded(values={"q": {**CODES, "scale": 1e300}}, last="q"),
    "codes of scale 1e-300": coded(values={"q": {**CODES, "scale": 1e-300}}, last="q"),
    "codes of the least scale": coded(values={"q": {**CODES, "scale": 1e-45}}, last="q"),
    "codes of zero point 128": coded(values={"q": {**CODES, "zero_point": 128}}, last="q"),
    "codes of zero point 2^40": coded(values={"q": {**CODES, "zero_point": BIG}}, last="q"),
    "codes of zero point 0.5": coded(values={"q": {**CODES, "zero_point": 0.5}}, last="q"),
    "codes of zero point true": coded(values={"q": {**CODES, "zero_point": True}}, last="q"),
    "codes of another dtype": coded(values={"q": {**CODES, "dtype": "int32"}}, last="q"),
    "codes that are not negative around 3": coded(values={"q": {**CODES, "zero_point": 3, "is_nonnegative": True}},
                                                  last="q"),
    "codes of a value that is not there": aten("relu.default", X) | {"values": {"nobody": CODES}},
    "a convolution of groups 0": conv(weight="codes4", groups=0),
    "a convolution of groups -1": conv(weight="codes4", groups=-1),
    "a convolution of groups 3": conv(weight="codes4", groups=3),
    "a convolution of groups 2^40": conv(weight="codes4", groups=BIG),
    "a convolution of stride 0": conv(weight="codes4", stride=[0, 1]),
    "a convolution of dilation 2^20": conv(weight="codes4", dilation=[2**20, 2**20]),
    "a convolution of three paddings": conv(weight="codes4", padding=[0, 0, 0]),
    "a convolution that pads by true": conv(weight="codes4", padding=[True, True]),
    "a convolution that pads by half": conv(weight="codes4", padding=[0.5, 0.5]),
    "a convolution of no weight": conv(weight=None),
    "a convolution of another scale": conv(weight="codes4", weight_scale="w44"),
    "a convolution of float weights": conv(weight="conv"),
    "a convolution of a long bias": conv(weight="codes4", bias="table"),
    "a convolution that adds itself": coded({"name": "it", "op": "conv", "output": "y", "args": [{"value": "q"},
                                             {"value": "y"}], "attrs": {"weight": "codes4", "weight_scale": "scale",
                                             "bias": None, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
                                             "groups": 1}}),
    "a convolution that adds its input": coded({"name": "it", "op": "conv", "output": "y", "args": [{"value": "q"},
                                                {"value": "q"}], "attrs": {"weight": "codes4", "weight_scale": "scale",
                                                "bias": None, "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1],
                                                "groups": 1}}),
    # the program itself
    "a list of a million": aten("cat.default", [X] * 70_000),
    "40,000 nodes": program(*[{**node("relu.default", [X]), "output": f"y{i}"} for i in range(40_000)]),
    "an input of 10^30": {**aten("relu.default", X), "inputs": [{"name": "x", "keyword": None, "dtype": "float32",
                                                                 "shape": [None, 10**30]}]},
    "an input that holds codes of another kind": {**aten("relu.default", X), "values": {"x": CODES}},
    "a node of itself": aten("relu.default", {"value": "y"}),
    "an op called os.system": aten("os.system", "true"),
    "an op called __class__": aten("__class__.default", X),
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What becomes of every program, in as few processes as that takes."""
    return dict(zip(PROGRAMS, outcomes(list(PROGRAMS.values())), strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_is_refused_or_computed_as_the_reference_does(found: dict[str, str], name: str) -> None:
    assert found[name].startswith(("refused", "failed", "computed")), found[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("permute with a dimension twice", "names dimension 1 twice"),
        ("mean over one dimension four times", "names dimension 1 twice"),
        ("layer_norm with a short weight", ""),
        ("where with one argument", "'self' of where.self is missing"),
        ("an argument twice", "'dim' of softmax.int is given twice"),
        ("an argument of no name", "has no argument 'eps'"),
        ("an index that writes anywhere", "not among the ops"),
        ("sizes that wrap to 16", "more than 2^40 elements"),
        ("a window of no size", "must be a list of: a whole number in [1,"),
        ("40,000 nodes", "40000 nodes"),
        ("codes of integers", ""),
        ("a view of a permutation", "computed"),
        ("a range up to true", "computed"),
        ("a clamp to NaN", "computed"),
        ("a step of 2^31 over one place", "computed"),
        ("a number for the list of steps", "must be a list of: a whole number in [1,"),
        ("a fused clamp to NaN", "a number of its epilogue 'hardtanh' is NaN"),
    ],
)
def test_says_what_is_wrong(found: dict[str, str], name: str, words: str) -> None:
    assert words in found[name]


def test_are_many() -> None:
    assert len(PROGRAMS) >= 150
