"""Float convolutions, norms, pools and resizing."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.exchange.onnx_arguments import Given, Write, channels, spread
from quantflow.exchange.onnx_writer import Writer


def _float_conv(w: Writer, given: Given) -> str:
    rank = w.rank(given["input"]) - 2
    if isinstance(given["padding"], str):
        raise w.refused("padding by name")
    inputs = [w.of(given[k]) for k in ("input", "weight", "bias") if given[k] is not None]
    stride, padding, dilation = (spread(given[k], rank) for k in ("stride", "padding", "dilation"))
    return w.add("Conv", inputs, strides=stride, pads=padding * 2, dilations=dilation, group=given["groups"])


def _layer_norm(w: Writer, given: Given) -> str:
    count = len(given["normalized_shape"])
    weight = given["weight"]
    scale = w.tensor(torch.ones(given["normalized_shape"])) if weight is None else w.of(weight)
    inputs = [w.of(given["input"]), scale] + ([] if given["bias"] is None else [w.of(given["bias"])])
    return w.add("LayerNormalization", inputs, axis=-count, epsilon=given["eps"])


def _conv_transpose(w: Writer, given: Given) -> str:
    rank = w.rank(given["input"]) - 2
    inputs = [w.of(given[k]) for k in ("input", "weight", "bias") if given[k] is not None]
    stride, padding, dilation, more = (
        spread(given[k], rank) for k in ("stride", "padding", "dilation", "output_padding")
    )
    return w.add(
        "ConvTranspose", inputs, strides=stride, pads=padding * 2, dilations=dilation, output_padding=more,
        group=given["groups"],
    )  # fmt: skip


def _batch_norm(w: Writer, given: Given) -> str:
    if given["training"]:
        raise w.refused("a BatchNorm that takes its statistics from the batch")
    count = len(w.value(given["running_mean"]))
    weight, bias = (
        w.tensor(torch.full((count,), value)) if given[k] is None else w.of(given[k])
        for k, value in (("weight", 1.0), ("bias", 0.0))
    )
    statistics = [w.of(given[k]) for k in ("running_mean", "running_var")]
    return w.add("BatchNormalization", [w.of(given["input"]), weight, bias, *statistics], epsilon=given["eps"])


def _instance_norm(w: Writer, given: Given) -> str:
    if not given["use_input_stats"]:
        raise w.refused("an InstanceNorm with statistics of its own")
    return _normalized(w, given["input"], w.value(given["input"]).shape[1], given)


def _group_norm(w: Writer, given: Given) -> str:
    return _normalized(w, given["input"], given["num_groups"], given)


def _normalized(w: Writer, x: Any, groups: int, given: Given) -> str:
    """Each group of channels by its own mean and variance, then a factor and a term per channel."""
    rank, shape = w.rank(x), w.add("Shape", [w.of(x)])
    ones, zeros = w.tensor(torch.ones(groups)), w.tensor(torch.zeros(groups))
    grouped = w.add("Reshape", [w.of(x), w.ints(0, groups, -1)], allowzero=0)
    r = w.add("InstanceNormalization", [grouped, ones, zeros], epsilon=given["eps"])
    r = w.add("Reshape", [r, shape])
    for op, each in (("Mul", given["weight"]), ("Add", given["bias"])):
        if each is not None:
            r = w.add(op, [r, w.tensor(channels(w.value(each), rank))])
    return r


def _max_pool(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"]) - 2
    kernel = spread(given["kernel_size"], rank)
    stride = spread(given["stride"] or kernel, rank)
    padding, dilation = (spread(given[k], rank) for k in ("padding", "dilation"))
    return w.add(
        "MaxPool", [w.of(given["self"])], kernel_shape=kernel, strides=stride, pads=padding * 2, dilations=dilation,
        ceil_mode=int(given["ceil_mode"]),
    )  # fmt: skip


def _avg_pool(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"]) - 2
    kernel = spread(given["kernel_size"], rank)
    if given.get("divisor_override") is not None or given["ceil_mode"]:
        raise w.refused("an average with a divisor of its own, or over windows that reach out of the tensor")
    return w.add(
        "AveragePool", [w.of(given["self"])], kernel_shape=kernel, strides=spread(given["stride"] or kernel, rank),
        pads=spread(given["padding"], rank) * 2, count_include_pad=int(given["count_include_pad"]),
    )  # fmt: skip


def _adaptive_avg_pool(w: Writer, given: Given) -> str:
    shape = w.value(given["self"]).shape[2:]
    wanted = spread(given["output_size"], len(shape))
    if all(size == 1 for size in wanted):
        return w.add("GlobalAveragePool", [w.of(given["self"])])
    is_fixed = not any(isinstance(size, str) for item in w.program.inputs for size in item.shape)
    if not is_fixed or any(size % count for size, count in zip(shape, wanted, strict=True)):
        raise w.refused(f"an average of {list(shape)} to {wanted}")
    kernel = [size // count for size, count in zip(shape, wanted, strict=True)]
    return w.add("AveragePool", [w.of(given["self"])], kernel_shape=kernel, strides=kernel)


def _upsampled(mode: str, **attributes: Any) -> Write:
    def write(w: Writer, given: Given) -> str:
        x = given["self"] if "self" in given else given["input"]
        at = {"coordinate_transformation_mode": "half_pixel", **attributes}
        if given.get("align_corners"):
            at["coordinate_transformation_mode"] = "align_corners"
        factors = given.get("scale_factors") or [v for k, v in given.items() if k.startswith("scales") and v]
        if factors and not given.get("output_size"):
            scales = w.tensor(torch.tensor([1.0, 1.0, *factors]))
            return w.add("Resize", [w.of(x), "", scales], mode=mode, **at)
        kept = w.add("Shape", [w.of(x)], start=0, end=2)
        size = w.add("Concat", [kept, w.sizes(given["output_size"])], axis=0)
        return w.add("Resize", [w.of(x), "", "", size], mode=mode, **at)

    return write


_NEAREST = _upsampled("nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")


OPS: dict[str, Write] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _float_conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_avg_pool),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), _NEAREST),
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), _upsampled("linear")),
    "upsample_bicubic2d": _upsampled("cubic", cubic_coeff_a=-0.75),
}
