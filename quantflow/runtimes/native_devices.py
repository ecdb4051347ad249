"""What the native runtime can run on here: the CPU, Intel GPUs, and what is missing for each."""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quantflow.errors import UnavailableError
from quantflow.host.finding import Finding
from quantflow.runtimes import native_library as lib
from quantflow.runtimes import native_rates

_INTEL = "0x8086"
#: What the SYCL backend consists of.
SYCL_DISTRIBUTIONS = ("onednn", "intel-sycl-rt", "intel-opencl-rt", "intel-cmplr-lib-ur", "tbb", "umf")


def backend_of(device: str) -> str:
    """The library's backend for a device: our own kernels on the CPU, SYCL and oneDNN on a GPU."""
    return "sycl.gpu" if device == "xpu" else "host"


def backends_of(device: str) -> list[str]:
    """Every backend that can serve a device here: on a CPU also SYCL's, where its int8 products are exact."""
    if device == "xpu":
        return ["sycl.gpu"]
    has_sycl = any(d["type"] == "cpu" and d["onednn"] and d["exact_int8"] for d in sycl_devices())
    return ["host", "sycl.cpu"] if has_sycl else ["host"]


@cache
def missing(device: str) -> str | None:
    """Why the native runtime can't use a device, with the cure; None: it can."""
    if device not in ("cpu", "xpu"):
        return "it runs on the CPU and on Intel GPUs"
    try:
        lib.library()
        if device == "xpu" and not any(d["type"] == "gpu" and d["onednn"] for d in sycl_devices(strict=True)):
            return "SYCL lists no Intel GPU that oneDNN can use"
    except UnavailableError as error:
        return str(error)
    return None


def has_intel_gpu() -> bool:
    """Whether the system shows an Intel GPU: a look at its device files, before anything heavy is loaded."""
    vendors = Path("/sys/class/drm").glob("renderD*/device/vendor")
    return any(path.read_text().strip() == _INTEL for path in vendors)


def sycl_devices(*, strict: bool = False) -> list[dict[str, Any]]:
    """The devices that SYCL lists.

    Each has name, vendor, type, backend, driver, compute_units, memory_bytes, onednn (whether it can use the device)
    and exact_int8.

    Args:
        strict: raise where the SYCL library can't be used, instead of listing none.

    Raises:
        UnavailableError: `strict`, and SYCL or oneDNN are missing or broken.
    """
    try:
        return _sycl_devices()
    except UnavailableError:
        if strict:
            raise
        return []


@cache
def _sycl_devices() -> list[dict[str, Any]]:
    loaded = ctypes.CDLL(str(lib.sycl_library()))
    room = 1 << 16
    text = ctypes.create_string_buffer(room)
    loaded.qf_sycl_devices(text, ctypes.c_size_t(room))
    found: list[dict[str, Any]] = json.loads(text.value)
    if broken := [device["error"] for device in found if "error" in device]:
        raise UnavailableError(f"device: SYCL can't list devices ({'; '.join(broken)}); {lib.INSTALL_SYCL}")
    return found


def findings() -> list[Finding]:
    """The CPU's rates, PyTorch's and SYCL's devices, Intel's driver, and what is missing."""
    rows = [] if missing("cpu") else native_rates.findings(torch.get_num_threads())
    if torch.xpu.is_available():
        rows.append(Finding("torch xpu", f"{torch.xpu.device_count()} devices"))
    try:
        devices = sycl_devices(strict=True)
    except UnavailableError as error:
        return [*rows, Finding("SYCL", "can't be used", str(error))]
    rows += [
        Finding(
            f"SYCL {d['type']}",
            f"{d['name']} ({d['backend']}, driver {d['driver']}, {d['compute_units']} compute units, "
            f"{d['memory_bytes'] / 2**30:.1f} GiB)" + ("" if d["onednn"] else ", not usable by oneDNN"),
        )
        for d in devices
    ]
    if not any(d["type"] == "gpu" for d in devices):
        if has_intel_gpu():
            cure = "install Intel's driver: apt install intel-level-zero-gpu libze1 (or your system's package)"
            if not os.access("/dev/dri", os.R_OK):
                cure = "join the group that may use it: sudo usermod -aG render $USER, then log in again"
            rows.append(Finding("Intel GPU", "the system shows one, SYCL does not", cure))
        else:
            rows.append(Finding("Intel GPU", "none found"))
    return rows
