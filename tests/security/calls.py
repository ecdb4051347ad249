"""Calls of every op of the table: one that is legal as far as it is known, and what can be wrong about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantflow.ir.op_table import Argument, Row, row_of, targets

X = {"value": "x"}
INPUTS = [{"name": "x", "keyword": None, "dtype": "float32", "shape": [None, 4, 6, 6]}]


def tensor(name: str) -> dict[str, str]:
    return {"tensor": name}


#: Arguments by name, of legal calls, where the op says nothing else.
_BY_NAME: dict[str, Any] = {
    "kernel_size": [2, 2], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "output_size": [3, 3], "dim": 1,
    "start_dim": 1, "end_dim": 2, "dim0": 1, "dim1": 2, "shape": [2, 4, 36], "size": [2, 4, 6, 6], "dims": [1],
    "repeats": [1, 1, 2, 1], "shifts": [1], "split_size": 2, "split_sizes": [1, 3], "chunks": 2, "index": 1,
    "length": 2, "start": 0, "end": 3, "step": 1, "pad": [1, 1], "normalized_shape": [6], "groups": 2,
    "upscale_factor": 2, "downscale_factor": 2, "min": -1.0, "max": 1.0, "eps": 1e-5, "sizes": [2, 2], "exponent": 2.0,
    "dtype": {"dtype": "float32"}, "scale_factors": None, "k": 2, "num_classes": 3, "n": 4, "equation": "bchw->bc",
    "fill_value": 1.0, "value": 0.5, "p": 0.0, "mode": "constant", "num_groups": 2, "train": False, "training": False,
    "offset": 0, "memory_format": {"memory_format": "contiguous_format"}, "steps": 4, "approximate": "none",
}  # fmt: skip
#: Those of an op.
_BY_OP: dict[str, dict[str, Any]] = {
    "permute": {"dims": [0, 2, 3, 1]}, "linear": {"weight": tensor("w66"), "bias": None},
    "flip": {"dims": [2]}, "roll": {"shifts": [1, 2], "dims": [2, 2]},
    "conv1d": {"input": tensor("conv1"), "weight": tensor("conv1"), "bias": tensor("w4"), "stride": [1], "padding": [0],
               "dilation": [1], "groups": 1},
    "conv2d": {"weight": tensor("conv"), "bias": tensor("w4"), "groups": 1},
    "batch_norm": {"weight": tensor("w4"), "bias": tensor("w4"), "running_mean": tensor("w4"),
                   "running_var": tensor("positive"), "momentum": 0.1, "cudnn_enabled": False},
    "embedding": {"weight": tensor("table"), "indices": tensor("ids")},
    "index_select": {"index": tensor("ids"), "dim": 2}, "where": {"condition": tensor("mask"), "other": X},
    "masked_fill": {"mask": tensor("mask"), "value": 0.5}, "matmul": {"other": tensor("w66")},
    "bmm": {"self": tensor("cube"), "mat2": tensor("turned")}, "layer_norm": {"weight": None, "bias": None},
    "pixel_shuffle": {"upscale_factor": 2}, "pixel_unshuffle": {"downscale_factor": 2},
    "cat": {"tensors": [X, X]}, "stack": {"tensors": [X, X]}, "reshape": {"shape": [-1, 4, 36]},
    "view": {"size": [-1, 4, 36]}, "_unsafe_view": {"size": [-1, 4, 36]}, "expand": {"size": [-1, 4, 6, 6]},
    "pad": {"mode": "constant", "value": 0.0}, "upsample_nearest2d": {"output_size": [9, 9]},
    "upsample_bilinear2d": {"output_size": [9, 9], "align_corners": False}, "getitem": {},
    "scaled_dot_product_attention": {"query": X, "key": X, "value": X}, "unbind": {"dim": 1},
    "max_pool1d": {"self": tensor("cube"), "kernel_size": [2], "stride": [1], "padding": [0], "dilation": [1]},
    "avg_pool1d": {"self": tensor("cube"), "kernel_size": [2], "stride": [1], "padding": [0]},
    "adaptive_avg_pool1d": {"self": tensor("cube"), "output_size": [2]}, "narrow": {"start": 1},
    "linalg_vector_norm": {"ord": 2, "dim": [1]}, "_softmax": {"half_to_float": False},
    "grid_sampler_2d": {"grid": tensor("grid"), "interpolation_mode": 0, "padding_mode": 0, "align_corners": False},
    "max_unpool2d": {"indices": tensor("ids"), "output_size": [12, 12]},
    "mm": {"self": tensor("w44"), "mat2": tensor("w44")}, "mv": {"self": tensor("w44"), "vec": tensor("w4")},
    "dot": {"self": tensor("w4"), "tensor": tensor("w4")}, "outer": {"self": tensor("w4"), "vec2": tensor("w4")},
    "addmm": {"self": tensor("w4"), "mat1": tensor("w44"), "mat2": tensor("w44")},
    "addmv": {"self": tensor("w4"), "mat": tensor("w44"), "vec": tensor("w4")},
    "addbmm": {"self": tensor("one"), "batch1": tensor("cube"), "batch2": tensor("turned")},
    "baddbmm": {"self": tensor("one"), "batch1": tensor("cube"), "batch2": tensor("turned")},
    "addr": {"self": tensor("w44"), "vec1": tensor("w4"), "vec2": tensor("w4")},
    "bilinear": {"input1": tensor("w44"), "input2": tensor("w44"), "weight": tensor("block"), "bias": None},
    "linalg_multi_dot": {"tensors": [tensor("w44"), tensor("w44")]},
    "cross": {"self": tensor("cube"), "other": tensor("cube"), "dim": 1},
    "conv3d": {"input": tensor("conv3"), "weight": tensor("conv3"), "bias": tensor("w4"), "stride": [1, 1, 1],
               "padding": [0, 0, 0], "dilation": [1, 1, 1], "groups": 1},
    "conv_tbc": {"self": tensor("block"), "weight": tensor("block"), "bias": tensor("w4"), "pad": 1},
    "max_pool1d_with_indices": {"self": tensor("cube"), "kernel_size": [2], "stride": [1], "padding": [0],
                                "dilation": [1]},
    "max_pool3d": {"self": tensor("conv3"), "kernel_size": [2, 2, 2], "stride": [1, 1, 1], "padding": [0, 0, 0],
                   "dilation": [1, 1, 1]},
    "max_pool3d_with_indices": {"self": tensor("conv3"), "kernel_size": [2, 2, 2], "stride": [1, 1, 1],
                                "padding": [0, 0, 0], "dilation": [1, 1, 1]},
    "avg_pool3d": {"self": tensor("conv3"), "kernel_size": [2, 2, 2], "stride": [1, 1, 1], "padding": [0, 0, 0],
                   "divisor_override": None},
    "adaptive_max_pool1d": {"self": tensor("cube"), "output_size": [2]},
    "adaptive_max_pool3d": {"self": tensor("conv3"), "output_size": [2, 2, 2]},
    "adaptive_avg_pool3d": {"self": tensor("conv3"), "output_size": [2, 2, 2]},
    "_adaptive_avg_pool3d": {"self": tensor("conv3"), "output_size": [2, 2, 2]},
    "quantile": {"q": tensor("zero"), "dim": 1}, "nanquantile": {"q": tensor("zero"), "dim": 1},
    "gather": {"self": tensor("ids"), "dim": 0, "index": tensor("ids")}, "take": {"index": tensor("ids")},
    "take_along_dim": {"self": tensor("ids"), "dim": 0, "indices": tensor("ids")},
    "scatter": {"self": tensor("ids"), "dim": 0, "index": tensor("ids"), "src": tensor("ids"), "value": 1,
                "reduce": "add"},
    "scatter_add": {"self": tensor("ids"), "dim": 0, "index": tensor("ids"), "src": tensor("ids")},
    "index": {"self": tensor("w66"), "indices": [tensor("ids")]},
    "index_put": {"self": tensor("w66"), "indices": [tensor("ids")], "values": tensor("w66")},
    "index_add": {"self": tensor("w66"), "dim": 0, "index": tensor("ids"), "source": tensor("w66")},
    "index_copy": {"self": tensor("w66"), "dim": 0, "index": tensor("ids"), "source": tensor("w66")},
    "index_fill": {"self": tensor("w66"), "dim": 0, "index": tensor("ids"), "value": 1.0},
    "masked_select": {"self": tensor("w66"), "mask": tensor("mask")},
    "masked_scatter": {"self": tensor("w66"), "mask": tensor("mask"), "source": tensor("w66")},
    "one_hot": {"self": tensor("ids"), "num_classes": 6}, "bucketize": {"boundaries": tensor("w4")},
    "native_group_norm": {"weight": tensor("w4"), "bias": tensor("w4"), "N": 2, "C": 4, "HxW": 36, "group": 2},
    "_native_batch_norm_legit_no_training": {"weight": tensor("w4"), "bias": tensor("w4"), "running_mean": tensor("w4"),
                                             "running_var": tensor("positive"), "momentum": 0.1},
    "linalg_qr": {"mode": "reduced"}, "linalg_eigh": {"UPLO": "L"}, "linalg_eigvalsh": {"UPLO": "L"},
    "linalg_matrix_norm": {"ord": 2, "dim": [-2, -1]},
    "stft": {"self": tensor("w66"), "n_fft": 4, "hop_length": 2, "win_length": 4, "return_complex": True,
             "pad_mode": "reflect"},
    "lstm": {"input": tensor("block"), "hx": [tensor("state"), tensor("state")], "has_biases": True, "num_layers": 1,
             "params": [tensor("w16_4"), tensor("w16_4"), tensor("w16"), tensor("w16")], "bidirectional": False,
             "batch_first": False, "data": tensor("w44"), "batch_sizes": tensor("ids")},
    "gru": {"input": tensor("block"), "hx": tensor("state"), "has_biases": True, "num_layers": 1,
            "params": [tensor("w12_4"), tensor("w12_4"), tensor("w12"), tensor("w12")], "bidirectional": False,
            "batch_first": False, "data": tensor("w44"), "batch_sizes": tensor("ids")},
    "rnn_tanh": {"input": tensor("block"), "hx": tensor("state"), "has_biases": True, "num_layers": 1,
                 "params": [tensor("w44"), tensor("w44"), tensor("w4"), tensor("w4")], "bidirectional": False,
                 "batch_first": False, "data": tensor("w44"), "batch_sizes": tensor("ids")},
    "lstm_cell": {"input": tensor("w44"), "hx": [tensor("w44"), tensor("w44")], "w_ih": tensor("w16_4"),
                  "w_hh": tensor("w16_4"), "b_ih": tensor("w16"), "b_hh": tensor("w16")},
    "gru_cell": {"input": tensor("w44"), "hx": tensor("w44"), "w_ih": tensor("w12_4"), "w_hh": tensor("w12_4"),
                 "b_ih": tensor("w12"), "b_hh": tensor("w12")},
    "rnn_tanh_cell": {"input": tensor("w44"), "hx": tensor("w44"), "w_ih": tensor("w44"), "w_hh": tensor("w44"),
                      "b_ih": tensor("w4"), "b_hh": tensor("w4")},
    "cross_entropy_loss": {"self": tensor("w44"), "target": tensor("ids4"), "reduction": 0},
    "nll_loss": {"self": tensor("w44"), "target": tensor("ids4"), "reduction": 0},
    "nll_loss_nd": {"self": tensor("w44"), "target": tensor("ids4"), "reduction": 0},
    "multi_margin_loss": {"self": tensor("w44"), "target": tensor("ids4"), "p": 1, "margin": 1.0, "reduction": 0},
    "cosine_embedding_loss": {"input1": tensor("w44"), "input2": tensor("w44"), "target": tensor("w4")},
}  # fmt: skip
_BAGS = {"weight": tensor("table"), "indices": tensor("ids"), "offsets": tensor("ids"), "mode": 0}
_BY_OP |= dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _BAGS)
_BY_OP |= {"ger": _BY_OP["outer"], "vdot": {"self": tensor("w4"), "other": tensor("w4")}}
_BY_OP |= {"rnn_relu": _BY_OP["rnn_tanh"], "rnn_relu_cell": _BY_OP["rnn_tanh_cell"]}
_OTHER_TYPES = (
    None, True, -1, 7, 2.5, float(10**30), "text", [], [1], [None], [[1]], {"float": "nan"}, {"dtype": "int64"},
    X, {"tensor": "ids"}, {"tensor": "mask"}, {"tensor": "codes"}, {"dict": {}}, {"tuple": [1, 1]},
)  # fmt: skip
_NUMBERS = (-(2**63), -(2**40), -7, -1, 0, 2, 5, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 10**30)
_OTHER_RANKS = ("zero", "one", "w4", "w44", "cube", "conv", "conv3", "none")


def node(target: str, args: list[Any], kwargs: dict[str, Any] | None = None, op: str = "aten") -> dict[str, Any]:
    return {"name": "it", "op": op, "output": "y", "target": target, "args": args, "kwargs": kwargs or {}}


def program(*nodes: dict[str, Any], output: Any = None, values: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "format": 1, "batch_is_dynamic": True, "inputs": INPUTS, "values": values or {}, "nodes": list(nodes),
        "output": {"value": nodes[-1]["output"]} if output is None else output,
    }  # fmt: skip


def legal(row: Row) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call that is legal, as far as their names tell."""
    own = _BY_OP.get(row.target.partition(".")[0], {})
    args, kwargs = [], {}
    for argument in row.arguments:
        value = own.get(argument.name, _sample(argument))
        if argument.is_keyword:
            if not argument.is_optional:
                kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def _sample(argument: Argument) -> Any:
    if argument.kind == "Tensor":
        return [X, X] if argument.is_list else None if argument.takes_none else X
    if argument.kind == "none" or (argument.takes_none and argument.name not in ("dim", "dims", "end")):
        return None
    found = _BY_NAME.get(argument.name)
    if found is None:
        found = {"int": 1, "float": 0.5, "bool": False, "Scalar": 0.5, "str": "mean"}.get(argument.kind)
    if found is None:
        return {"layout": {"layout": "strided"}, "device": {"device": "cpu"}}.get(argument.kind)
    if argument.is_list:
        items = found if isinstance(found, list) else [found]
        return items[: argument.length] if argument.length else items
    return found[0] if isinstance(found, list) else found


def wrong(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls of an op with one thing changed: (what, program)."""
    args, kwargs = legal(row)
    yield "legal", program(node(row.target, args, kwargs))
    for i in range(len(args)):
        yield f"{i} missing", program(node(row.target, args[:i] + args[i + 1 :], kwargs))
        yield f"cut at {i}", program(node(row.target, args[:i], kwargs))
    yield "one too many", program(node(row.target, [*args, 1], kwargs))
    yield "unknown", program(node(row.target, args, {**kwargs, "nothing": 1}))
    for i, argument in enumerate(a for a in row.arguments if not a.is_keyword):
        if i >= len(args):
            break
        at = f"{argument.name}"
        yield f"{at} doubled", program(node(row.target, args, {**kwargs, argument.name: args[i]}))
        for value in _OTHER_TYPES:
            yield f"{at} = {value}", program(node(row.target, [*args[:i], value, *args[i + 1 :]], kwargs))
        if argument.kind in ("int", "Scalar", "float") and not argument.is_list:
            for number in _NUMBERS:
                yield f"{at} = {number}", program(node(row.target, [*args[:i], number, *args[i + 1 :]], kwargs))
        if argument.is_list and argument.kind == "int":
            old = args[i] if isinstance(args[i], list) and args[i] else [1]
            lists = [[n] * max(1, len(old)) for n in _NUMBERS] + [[n, *old[1:]] for n in _NUMBERS]
            for items in (*lists, [*old, *old], [1] * 17, old[:-1], [0, 0, 1, 1], [*old, -1]):
                yield f"{at} = {items}", program(node(row.target, [*args[:i], items, *args[i + 1 :]], kwargs))
        if argument.kind == "Tensor":
            for name in _OTHER_RANKS:
                value: Any = tensor(name)
                value = [value, X] if argument.is_list else value
                yield f"{at} = {name}", program(node(row.target, [*args[:i], value, *args[i + 1 :]], kwargs))


def every_wrong_call() -> Iterator[tuple[str, dict[str, Any]]]:
    """(op and what is wrong, program) over the whole table."""
    for target in targets():
        row = row_of(target)
        assert row is not None
        for what, data in wrong(row):
            yield f"{target}: {what}", data
