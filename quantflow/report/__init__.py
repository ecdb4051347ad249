"""Views of the results. The JSON is the truth; the page, Markdown and terminal tables say the same in fewer words."""

from __future__ import annotations

from quantflow.report.html import html
from quantflow.report.markdown import markdown
from quantflow.report.progress import Progress, stage_times
from quantflow.report.results import from_json, to_json
from quantflow.report.sweep import sweep_files
from quantflow.report.terminal import (
    make_console,
    print_findings,
    print_gates,
    print_notices,
    print_plan,
    print_selftest,
    print_summary,
    print_sweep,
)

__all__ = [
    "Progress",
    "from_json",
    "html",
    "make_console",
    "markdown",
    "print_findings",
    "print_gates",
    "print_notices",
    "print_plan",
    "print_selftest",
    "print_summary",
    "print_sweep",
    "stage_times",
    "sweep_files",
    "to_json",
]
