"""What operators take on trust, looked at before each call.

torchvision's region operators index images by what boxes and offsets say; PyTorch's recurrent nets hand states and
weights to oneDNN by address. Their kernels check none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from quantflow.errors import ArtifactError
from quantflow.host.memory import memory_bytes
from quantflow.ir.op_table import MAX_ELEMENTS

#: Corners of boxes, in pixels of the image that they are taken from.
MAX_CORNER = 1 << 20
#: Places that are read for one box.
MAX_SAMPLES = 1 << 24
#: Rows of a weight per hidden unit.
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_BOXED = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


def trusts(full_name: str) -> bool:
    """Whether an operator ("lstm", "torchvision::nms") is one of those."""
    return full_name in _GATES or full_name.removeprefix("torchvision::") in (*_BOXED, "deform_conv2d")


def guarded(name: str, op: Any) -> Callable[..., Any]:
    """The operator, which raises ArtifactError where it would read what is not its own; `name` without its library."""
    names = [argument.name for argument in op._schema.arguments]

    @wraps(op, assigned=())
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        try:
            problem = _problem(name, given)
        except (AttributeError, LookupError, TypeError) as error:
            problem = f"takes something else ({error})"
        if problem:
            raise ArtifactError(f"{'aten' if name in _GATES else 'torchvision'}::{name}: {problem}")
        return op(*args, **kwargs)

    return call


def _problem(name: str, given: dict[str, Any]) -> str:
    if name in _BOXED:
        return _of_boxes(given)
    if name in _GATES:
        return _of_layers(_GATES[name], given)
    if name == "deform_conv2d":
        for role in ("offset", "mask"):
            value = given.get(role)
            if isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
                return f"its {role} holds what is no finite number"
    return ""


def _of_boxes(given: dict[str, Any]) -> str:
    image, boxes = given.get("input"), given.get("rois")
    if not isinstance(image, torch.Tensor) or not isinstance(boxes, torch.Tensor):
        return "takes an image and boxes"
    if image.dim() != 4 or boxes.dim() != 2 or boxes.shape[1] != 5:
        return f"takes images (n, c, h, w) and boxes (k, 5), gets {tuple(image.shape)} and {tuple(boxes.shape)}"
    scale, height, width = given.get("spatial_scale"), given.get("pooled_height"), given.get("pooled_width")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        return f"its spatial_scale is {scale!r}, must be a finite number"
    if not isinstance(height, int) or not isinstance(width, int) or height < 1 or width < 1:
        return f"its pooled sizes are {height!r} and {width!r}, must be at least 1"
    count = boxes.shape[0] * image.shape[1] * height * width
    if count > MAX_ELEMENTS or count * image.element_size() > memory_bytes():
        return f"gives {count} elements; {MAX_ELEMENTS} are possible, and what fits into memory"
    if not len(boxes):
        return ""
    first, last = (float(x) for x in boxes[:, 0].aminmax())
    # As the kernels cast it: towards zero.
    if not (first > -1 and last < image.shape[0]):
        return f"its boxes are of images {first:g} to {last:g}; there are {image.shape[0]}"
    corners = boxes[:, 1:].double() * scale
    if not bool((corners.abs() <= MAX_CORNER).all()):
        return f"a box has a corner that is no number within {MAX_CORNER} pixels"
    ratio = given.get("sampling_ratio", 1)
    if not isinstance(ratio, int):
        return f"its sampling_ratio is {ratio!r}, must be a whole number"
    sides = ((corners[:, 2:] - corners[:, :2]).abs().amax(0) + 1).tolist()
    each = [ratio if ratio > 0 else math.ceil(side / out) for side, out in zip(sides, (width, height), strict=True)]
    if each[0] * each[1] * width * height > MAX_SAMPLES:
        return f"reads {each[0] * each[1] * width * height} places for a box; {MAX_SAMPLES} are possible"
    return ""


def _of_layers(gates: int, given: dict[str, Any]) -> str:
    """A recurrent net: (steps, batch, features), or packed (rows, features) with the rows of each step."""
    packed, layers, params = given.get("batch_sizes"), given["num_layers"], list(given["params"])
    x = given["input"] if packed is None else given["data"]
    hx = given["hx"]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    directions = 2 if given["bidirectional"] else 1
    if len(states) != (2 if gates == 4 else 1) or x.dim() != (3 if packed is None else 2):
        return f"takes {2 if gates == 4 else 1} states and 3 dimensions, or 2 of packed rows"
    if len({tensor.dtype for tensor in (x, *states, *params)}) != 1:
        return "its input, states and weights are of different dtypes"
    if packed is None:
        batch = x.shape[0 if given["batch_first"] else 1]
    else:
        sizes = packed.tolist() if packed.dim() == 1 and packed.dtype is torch.int64 else []
        if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != x.shape[0]:
            return f"its steps' sizes {sizes[:8]} do not fall, or are not those of {x.shape[0]} rows"
        batch = sizes[0]
    hidden, out = states[-1].shape[-1:], states[0].shape[-1:]
    wanted = [(layers * directions, batch, *size) for size in ((out, hidden) if gates == 4 else (out,))]
    if [tuple(state.shape) for state in states] != wanted:
        return f"its states are {[tuple(state.shape) for state in states]}, must be {wanted}"
    shapes: list[tuple[int, ...]] = []
    rows = gates * hidden[0]
    for layer in range(layers):
        width = x.shape[-1] if layer == 0 else out[0] * directions
        each: list[tuple[int, ...]] = [(rows, width), (rows, out[0])]
        each += [(rows,)] * (2 if given["has_biases"] else 0)
        each += [(out[0], hidden[0])] * (out != hidden)
        shapes += each * directions
        if len(shapes) > len(params):
            break
    if [tuple(p.shape) for p in params] != shapes:
        return f"its weights are {[tuple(p.shape) for p in params][:8]}, must be {shapes[:8]}"
    return ""
