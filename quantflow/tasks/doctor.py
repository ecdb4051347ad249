"""task=doctor: what this machine can run, what is missing, and the command that installs it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from quantflow import report
from quantflow.errors import EXIT_PASSED
from quantflow.host.environment import DISTRIBUTIONS, distribution_version, environment, has_exact_int8_products
from quantflow.host.finding import Finding
from quantflow.runtimes import HOST, RUNTIMES
from quantflow.schema import Recipe


def task(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Printed, a line per finding."""
    report.print_findings(report.make_console(plain=recipe.report.plain), diagnose())
    return EXIT_PASSED


def diagnose() -> list[Finding]:
    """Look at processor, packages, runtimes and devices. Never raises for something that is missing."""
    return [*_machine(), *_packages(), *_runtimes(), *_compiler()]


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
    cures = {name: cure for runtime in RUNTIMES.values() for name, cure in runtime.packages.items()}
    for name in (*DISTRIBUTIONS, *cures):
        version = distribution_version(name)
        rows.append(Finding(name, version or "not installed", cures.get(name, "") if version is None else ""))
    return rows


def _runtimes() -> list[Finding]:
    rows = []
    for name, runtime in RUNTIMES.items():
        reason = runtime.missing(HOST)
        if reason is not None:
            rows.append(Finding(f"runtime {name}", "can't run on the CPU", reason))
        else:
            about = runtime.about()
            rows.append(Finding(f"runtime {name}", "runs on the CPU" + (f", {about}" if about else "")))
    return [*rows, *(finding for runtime in RUNTIMES.values() for finding in runtime.findings())]


def _compiler() -> list[Finding]:
    if shutil.which("g++") is not None:
        return []
    return [Finding("compiler", "no g++", "only needed to build quantflow from source: apt install g++")]
