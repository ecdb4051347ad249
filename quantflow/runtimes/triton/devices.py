"""Where the triton runtime can run on this machine, and what is missing. Imports Triton only where it is used."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantflow.host.environment import distribution_version
from quantflow.host.finding import Finding
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.program import Program
from quantflow.ir.units import CAT, CLAMP, CORE, FLOAT, RECURRENCE, SHAPE, SIZE

if TYPE_CHECKING:
    from quantflow.runtimes.runner import AbstractRunner

#: Devices whose kernels Triton compiles.
CARDS = ("cuda", "xpu")
_BUILDS = {
    "cuda": "install PyTorch's CUDA build, which brings Triton (pytorch.org/get-started has the command)",
    "xpu": "install PyTorch's XPU build, which brings Triton (pytorch.org/get-started has the command)",
}


def is_interpreting() -> bool:
    """Whether Triton runs kernels in Python, on the CPU: to check them, not to use them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing(device: str) -> str | None:
    """Why the runtime can't use a device, with the cure; None: it can."""
    if device not in CARDS:
        if device == "cpu" and is_interpreting() and find_spec("triton") is not None:
            return None
        return f"it runs on GPUs ({', '.join(CARDS)}); with TRITON_INTERPRET=1 its kernels can be checked on the CPU"
    if not has_card(device):
        build = getattr(torch.version, device, None)
        if build is None:
            return f"this torch ({torch.__version__}) is built without {device}; {_BUILDS[device]}"
        return f"torch finds no {device} device; install the card's driver"
    if find_spec("triton") is None:
        return f"the package triton is not installed; {_BUILDS[device]}"
    return None


def has_card(device: str) -> bool:
    """Whether PyTorch finds a card of this kind."""
    return bool(getattr(torch, device).is_available())


def build(program: Program, device: str, floats: str = "float32") -> AbstractRunner:
    """A runner on the device's current card; `floats` is how it holds what is no code, where that is tolerated."""
    from quantflow.runtimes.triton.runner import TritonRunner

    return TritonRunner(program, device, floats)


def kernel_of(planned: PlannedUnit) -> str:
    """The kernel that will run a unit, for the plan."""
    unit = planned.unit
    if unit.kind == CORE:
        parts = ["linear" if unit.op == "linear" else "conv"]
        parts += ["sum"] if unit.residual is not None else []
        parts += [unit.epilogue.kind] if unit.epilogue else []
        return f"triton.{'_'.join(parts)}"
    if unit.kind in (FLOAT, SIZE):
        return f"torch.{unit.op}"
    if unit.kind in (CAT, SHAPE, CLAMP):
        return f"torch.{unit.op} on codes"
    if unit.kind == RECURRENCE:
        return f"torch.{unit.op} (exact products in float64)"
    return f"triton.{unit.kind}"


def findings() -> list[Finding]:
    """Triton's version, every card that PyTorch finds and what runs on it, for task=doctor."""
    rows = []
    for device in CARDS:
        reason = missing(device)
        if not has_card(device):
            continue
        for index in range(getattr(torch, device).device_count()):
            about = described(device, index)
            found = f"{about.pop('name')}, {', '.join(f'{what} {value}' for what, value in about.items())}"
            rows.append(Finding(f"{device}:{index}", found, reason or ""))
        runs = "the float model, calibration, algorithms and evaluation in torch"
        if reason is None:
            runs = f"int8 on runtime triton in every mode; {runs}"
        rows.append(Finding(f"device={device}", runs))
    return rows


def described(device: str, index: int | None = None) -> dict[str, str]:
    """A card (None: the current one): its name and memory, driver and versions; nothing where PyTorch finds none."""
    if device not in CARDS or not has_card(device):
        return {}
    interface: Any = getattr(torch, device)
    properties = interface.get_device_properties(interface.current_device() if index is None else index)
    return {
        "name": str(properties.name),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "driver": getattr(properties, "driver_version", None) or _nvidia_driver() or "unknown",
        device: str(getattr(torch.version, device, None)),
        "triton": _triton() or "not installed",
    }


def _nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    try:
        found = re.search(r"(\d+\.\d+(?:\.\d+)?)", file.read_text().partition("Module")[2])
    except OSError:
        return None
    return found and found.group(1)


def _triton() -> str | None:
    return distribution_version("triton") or distribution_version("pytorch-triton-xpu")


def listed() -> list[str]:
    """Every card that PyTorch finds, for error messages."""
    return [
        f"{device}:{index} ({getattr(torch, device).get_device_name(index)})"
        for device in CARDS
        if has_card(device)
        for index in range(getattr(torch, device).device_count())
    ]
