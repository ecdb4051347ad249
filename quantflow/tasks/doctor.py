"""task=doctor: what this machine can run, what is missing, and the command that installs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantflow import report
from quantflow.errors import EXIT_PASSED, UnavailableError
from quantflow.host.environment import DISTRIBUTIONS, distribution_version, environment, has_exact_int8_products
from quantflow.runtimes import RUNTIMES, native_devices
from quantflow.runtimes import native_library as lib
from quantflow.schema import Recipe

#: Distributions that the SYCL backend of the native runtime consists of.
SYCL_DISTRIBUTIONS = ("onednn", "intel-sycl-rt", "intel-opencl-rt", "intel-cmplr-lib-ur", "tbb", "umf")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it (empty: nothing)."""

    topic: str
    found: str
    cure: str = ""


def task(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Printed, a line per finding."""
    report.print_findings(report.make_console(plain=recipe.report.plain), diagnose())
    return EXIT_PASSED


def diagnose() -> list[Finding]:
    """Look at processor, packages, runtimes and devices. Never raises for something that is missing."""
    return [*_machine(), *_packages(), *_runtimes(), *_sycl()]


def _machine() -> list[Finding]:
    found = environment()
    exact = "int8 products are exact in hardware" if has_exact_int8_products() else "no VNNI"
    return [
        Finding("processor", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads in use"),
        Finding("instruction sets", f"{', '.join(found['isa']) or 'none of those that matter'} ({exact})"),
        Finding("system", str(found["platform"])),
    ]


def _packages() -> list[Finding]:
    rows = [Finding("python", str(environment()["python"]))]
    for name in (*DISTRIBUTIONS, *SYCL_DISTRIBUTIONS):
        version = distribution_version(name)
        needed = name in SYCL_DISTRIBUTIONS and version is None
        rows.append(Finding(name, version or "not installed", lib.INSTALL_SYCL if needed else ""))
    return rows


def _runtimes() -> list[Finding]:
    rows = []
    for name, runtime in RUNTIMES.items():
        reason = runtime.missing("cpu")
        if reason is not None:
            rows.append(Finding(f"runtime {name}", "can't run on the CPU", reason))
        elif name == "native":
            rows.append(Finding("runtime native", f"runs on the CPU, kernels for {lib.host_isa()}"))
        else:
            notes = runtime.notes()
            rows.append(Finding(f"runtime {name}", "runs on the CPU" + (", not accelerated" if notes else "")))
    if torch.xpu.is_available():
        rows.append(Finding("torch xpu", f"{torch.xpu.device_count()} devices"))
    return rows


def _sycl() -> list[Finding]:
    try:
        devices = native_devices.sycl_devices(strict=True)
    except UnavailableError as error:
        return [Finding("SYCL", "can't be used", str(error))]
    rows = [
        Finding(
            f"SYCL {d['type']}",
            f"{d['name']} ({d['backend']}, driver {d['driver']}, {d['compute_units']} compute units, "
            f"{d['memory_bytes'] / 2**30:.1f} GiB)" + ("" if d["onednn"] else ", not usable by oneDNN"),
        )
        for d in devices
    ]
    if not any(d["type"] == "gpu" for d in devices):
        if native_devices.has_intel_gpu():
            cure = "install Intel's driver: apt install intel-level-zero-gpu libze1 (or your system's package)"
            if not os.access("/dev/dri", os.R_OK):
                cure = "join the group that may use it: sudo usermod -aG render $USER, then log in again"
            rows.append(Finding("Intel GPU", "the system shows one, SYCL does not", cure))
        else:
            rows.append(Finding("Intel GPU", "none found"))
    if shutil.which("g++") is None:
        rows.append(Finding("compiler", "no g++", "only needed to build quantflow from source: apt install g++"))
    return rows
