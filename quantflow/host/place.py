"""Where torch computes what is not int8: the float model, calibration, accuracy algorithms and evaluation."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

#: Where tensors lie when nothing else is said.
CPU = torch.empty(0).cpu().device


def place_of(device: str) -> torch.device:
    """Where torch computes for a run on a device: the current card, or under torchrun this worker's own.

    The CPU where this torch is built without the device: the SYCL runtime needs no torch for it.
    """
    interface = None if device == CPU.type else getattr(torch, device, None)
    if interface is None or not interface.is_available():
        return CPU
    worker = os.environ.get("LOCAL_RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    index = int(worker) % interface.device_count() if worker.isdigit() else interface.current_device()
    return torch.device(device, index)


def interface_of(place: torch.device) -> Any:
    """torch.cuda, torch.xpu."""
    return getattr(torch, place.type)


def current(place: torch.device) -> AbstractContextManager[Any]:
    """Inside, this card is the current one of its kind."""
    return nullcontext() if place.type == CPU.type else interface_of(place).device(place)  # type: ignore[no-any-return]


@contextmanager
def _by_older_names() -> Iterator[None]:
    """Inside, TF32's older names are used without a warning: torch 2.9 gives one, 2.13 does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 is float32 on every device: convolutions on a card would else keep 10 bits of each operand."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        with _by_older_names():
            before: Any = cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:  # set by its newer name, beside which the older one can't be read
        before = None
    if before is None:
        names = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, matmul)  # type: ignore[attr-defined]
        kept = [setting.fp32_precision for setting in names]
        for setting in names:
            setting.fp32_precision = "ieee"
    else:
        with _by_older_names():
            cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        if before is None:
            for setting, value in zip(names, kept, strict=True):
                setting.fp32_precision = value
        else:
            with _by_older_names():
                cudnn.allow_tf32, matmul.allow_tf32 = before


def adds_exactly_in_float32() -> bool:
    """Whether float32 products on this CPU add up what they are given: in no shorter format, and by no transformation.

    On x86-64 oneDNN's direct convolution does where it is asked for float32; NNPACK, which torch takes without it,
    transforms.
    """
    mkldnn = torch.backends.mkldnn
    if platform.machine() not in ("x86_64", "AMD64") or not mkldnn.is_available() or not mkldnn.enabled:
        return False
    try:
        asked = torch.get_float32_matmul_precision()
        kept = [getattr(getattr(mkldnn, name, None), "fp32_precision", "none") for name in ("matmul", "conv")]
    except RuntimeError:  # set by newer names, beside which the older one can't be read
        return False
    return asked == "highest" and all(each in ("none", "ieee") for each in kept)
