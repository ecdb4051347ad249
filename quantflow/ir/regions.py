"""What torchvision's region operators take on trust: which image a box is of, how large it is, that it is a number.

Their kernels index images by what boxes and offsets say, and check none of it.
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
_BOXED = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


def guarded(name: str, op: Any) -> Callable[..., Any]:
    """The operator torchvision::NAME, which raises ArtifactError where it would read what is not its own."""
    names = [argument.name for argument in op._schema.arguments]

    @wraps(op, assigned=())
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if problem := _problem(name, given):
            raise ArtifactError(f"torchvision::{name}: {problem}")
        return op(*args, **kwargs)

    return call


def _problem(name: str, given: dict[str, Any]) -> str:
    if name in _BOXED:
        return _of_boxes(given)
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
