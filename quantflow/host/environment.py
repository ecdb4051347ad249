"""This machine: package versions, processor, instruction sets, threads, and whether its int8 products are exact."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

#: Instruction sets that decide which int8 kernels a CPU can run.
ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
#: Those whose u8*s8 products are summed in int32. Others add pairs of products in int16, which saturates.
_EXACT_ISA = frozenset(("avx512_vnni", "avx_vnni", "amx_int8"))
#: Distributions whose version can change a result.
DISTRIBUTIONS = ("quantflow", "torch", "torchvision", "transformers", "safetensors", "numpy")


def cache_folder() -> Path:
    """Where this user's machine keeps what it has found out once: $XDG_CACHE_HOME/quantflow."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantflow"


def versions() -> dict[str, str]:
    """Python's version and that of every distribution in `DISTRIBUTIONS` that is installed."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        version = distribution_version(name)
        if version is not None:
            found[name] = version
    return found


def distribution_version(name: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The `environment` section of the results.

    Returns:
        quantflow, torch, python: versions ("not installed" for a quantflow that runs from a bare checkout);
        cpu: the processor's name; isa: those of `ISA` it has; cores: cores this process may use;
        threads: torch's intra-op threads; platform: operating system and libc.
    """
    import torch

    cpu, _ = _processor()
    return {
        "quantflow": distribution_version("quantflow") or "not installed",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "isa": isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def isa() -> list[str]:
    """Those of `ISA` that this CPU has."""
    _, flags = _processor()
    return [name for name in ISA if name in flags]


def has_exact_int8_products() -> bool:
    """Whether this CPU sums u8*s8 products in int32 (VNNI or AMX), as PyTorch's int8 kernels need to be exact."""
    return not _EXACT_ISA.isdisjoint(isa())


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name") or platform.machine(), frozenset(fields.get("flags", "").split())
