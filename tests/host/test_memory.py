"""Freed memory is kept for the next tensor."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from quantflow.host import memory
from quantflow.host.memory import uncollected

ROOT = Path(memory.__file__).parents[2]

#: In a process of its own: after an allocation that failed, glibc serves a thread from an arena that this can't reach.
FAULTS = """
import resource
import torch
from quantflow.stages.benchmark import current_memory_bytes
from quantflow.host.memory import reused_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain, start = faults(), current_memory_bytes()
with reused_memory():
    faults()
    print(plain, faults(), current_memory_bytes() - start)
print(current_memory_bytes() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_serves_the_next_tensor_and_goes_back() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    plain, kept, held, left = map(int, found.stdout.split())
    assert kept < plain / 4
    assert held > 2**25
    assert left < 2**24


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_before_after_an_error(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), uncollected():
            1 / gc.isenabled()
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
