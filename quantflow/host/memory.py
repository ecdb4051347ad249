"""This machine's memory, which a run that computes keeps."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

#: mallopt's parameters, and what glibc's own thresholds grow to in a process that frees large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_GROWN = ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**26), (_M_MMAP_MAX, 2**16))


@cache
def memory_bytes() -> int:
    """Of this machine, or of the container that the process runs in."""
    found = 1 << 46
    with suppress(ValueError, OSError, AttributeError):
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number
            found = min(found, int(Path("/sys/fs/cgroup", name).read_text()))
    return found


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage, which goes through the objects of all imported libraries over and over, and frees few."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def reused_memory() -> Iterator[None]:
    """Has glibc keep what tensors free for the next ones.

    It returns large blocks to the system, and a batch's activations then cost the page faults of fresh memory in every
    op: half the time of a small net's float pass. What was kept goes back at the end. It reaches the main thread; in
    others, glibc maps blocks of 32 MiB and more whatever it is told.
    """
    try:
        glibc = ctypes.CDLL(None)
        tell, trim = glibc.mallopt, glibc.malloc_trim
    except (OSError, AttributeError):  # another C library
        yield
        return
    tell(_M_MMAP_MAX, 0)
    tell(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        for parameter, value in _GROWN:
            tell(parameter, value)
        trim(0)
