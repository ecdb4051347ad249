"""The rates of this machine by which the native kernels are chosen: measured once, kept in the user's cache.

A rate is what a part of an int8 step costs, in cycles of one core; native/host/rates.hpp says what each counts. They
decide how steps are cut into tasks, groups are merged and kernels chosen: how long a step takes, never what it gives. A
process that finds none in the cache computes by those that are built in, until it is asked to measure (warm-up and
task=doctor do).
"""

from __future__ import annotations

import ctypes
import json
import math
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantflow.host.environment import cache_folder, distribution_version
from quantflow.host.finding import Finding
from quantflow.host.forks import lock
from quantflow.runtimes import native_library as lib
from quantflow.store.whole_file import read_regular, replace_file

BUILT_IN, CACHED, MEASURED = "built in", "cached", "measured"


@dataclass(frozen=True)
class InUse:
    """Where the rates in use come from.

    Attributes:
        source: BUILT_IN, CACHED or MEASURED (by this process).
        measured_at: when, in UTC; empty where they are built in.
        note: what went wrong with the cache; empty: nothing.
    """

    source: str = BUILT_IN
    measured_at: str = ""
    note: str = ""

    @property
    def said(self) -> str:
        """In words."""
        return ", ".join(filter(None, (f"{self.source} {self.measured_at}".strip(), self.note)))


_in_use: InUse | None = None
_lock = lock()


def take_up(threads: int) -> InUse:
    """Use what the cache holds, once per process: one small file is read, nothing is measured."""
    global _in_use
    with _lock:
        if _in_use is None:
            _in_use = _from_cache(_file(threads), threads)
        return _in_use


def measure(threads: int) -> bool:
    """Measure what the cache does not hold, in about a third of a second, and keep it; whether the rates changed."""
    global _in_use
    before = take_up(threads)
    if before.source != BUILT_IN or lib.host_isa() == "generic":
        return False
    with _lock:
        if _in_use is not before:  # another thread was faster
            return False
        lib.call("qf_host_measure_rates", ctypes.c_int32(threads))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found = lib.host_rates()
        content = {"key": _key(threads), "measured_at": now, "rates": {**found["rates"], "ghz": found["ghz"]}}
        note = before.note
        try:
            replace_file(_file(threads), json.dumps(content, indent=1).encode())
        except OSError as error:
            note = f"{note}; " * bool(note) + f"not kept: '{error.filename}' can't be written ({error.strerror})"
        _in_use = InUse(MEASURED, now, note)
        return True


def described(threads: int) -> dict[str, Any]:
    """For the results: the rates in use, where they come from, and what is built in."""
    found, source = lib.host_rates(), take_up(threads)
    return {
        **vars(source),
        **{k: found[k] for k in ("isa", "l1_bytes", "l2_bytes", "caches", "ghz", "rates", "built_in")},
    }


def findings(threads: int) -> list[Finding]:
    """For task=doctor, which measures where the cache holds nothing."""
    measure(threads)
    found = described(threads)
    source = replace(take_up(threads), note="")
    rates = ", ".join(f"{name} {value:.3g}" for name, value in found["rates"].items())
    caches = f"{found['l1_bytes'] >> 10} KiB and {found['l2_bytes'] >> 10} KiB a core ({found['caches']})"
    return [
        Finding("int8 rates", f"{rates} cycles at {found['ghz']:.2f} GHz ({source.said})", found["note"]),
        Finding("caches", caches),
    ]


def _key(threads: int) -> dict[str, Any]:
    """What the rates depend on."""
    path = lib.library_path("libquantflow_native.so")
    size = path.stat().st_size if path is not None else 0
    version = distribution_version("quantflow") or "not installed"
    found = lib.host_rates()
    return {
        "cpu": found["cpu"], "isa": found["isa"], "threads": threads,
        "library": f"{version}, interface {lib.ABI_VERSION}, {size} bytes",
    }  # fmt: skip


def _file(threads: int) -> Path:
    key = _key(threads)
    name = "-".join(str(key[part]) for part in ("cpu", "isa", "threads"))
    return cache_folder() / f"rates-{re.sub(r'[^A-Za-z0-9_.]+', '-', name)}.json"


def _from_cache(file: Path, threads: int) -> InUse:
    lib.call("qf_host_set_rates", None, ctypes.c_size_t(0))
    try:
        text = read_regular(file)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return InUse(note="" if missing else f"'{file}' can't be read ({error.strerror or error})")
    try:
        content = json.loads(text)
        if content["key"] != _key(threads):
            return InUse()  # an earlier version's
        names = (*sorted(lib.host_rates()["rates"]), "ghz")
        values = [float(content["rates"][name]) for name in names]
        if not all(0 < value < math.inf for value in values):
            raise ValueError("a rate must be a positive number")
        measured_at = datetime.fromisoformat(content["measured_at"]).isoformat(timespec="seconds")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return InUse(note=f"'{file}' held something else ({type(error).__name__}: {error})"[:300])
    lib.call("qf_host_set_rates", (ctypes.c_double * len(values))(*values), ctypes.c_size_t(len(values)))
    return InUse(CACHED, measured_at)
