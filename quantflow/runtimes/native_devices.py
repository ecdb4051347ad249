"""What the native runtime can run on here: the CPU, Intel GPUs, and what is missing for each."""

from __future__ import annotations

import ctypes
import json
from functools import cache
from pathlib import Path
from typing import Any

from quantflow.errors import UnavailableError
from quantflow.runtimes import native_library as lib

_INTEL = "0x8086"


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
