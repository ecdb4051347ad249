"""What a result was measured on: package versions, processor, instruction sets, threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

#: Instruction sets that decide which int8 kernels a CPU can run.
ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
#: Distributions whose version can change a result.
DISTRIBUTIONS = ("quantflow", "torch", "torchvision", "transformers", "safetensors", "numpy")


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

    cpu, flags = _processor()
    return {
        "quantflow": distribution_version("quantflow") or "not installed",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "isa": [name for name in ISA if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


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
