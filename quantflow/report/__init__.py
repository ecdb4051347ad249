"""Views of the results. The JSON is the truth; all others say the same in fewer words."""

from __future__ import annotations

from quantflow.report.html import html
from quantflow.report.junit import junit
from quantflow.report.markdown import comparison, markdown, summary
from quantflow.report.progress import Progress, stage_times
from quantflow.report.sweep import sweep_files
from quantflow.report.terminal import (
    make_console,
    print_comparison,
    print_findings,
    print_gates,
    print_notices,
    print_plan,
    print_selftest,
    print_sensitivity,
    print_summary,
    print_sweep,
)
from quantflow.report.views import views
from quantflow.store.json_values import from_json, to_json

__all__ = [
    "Progress",
    "comparison",
    "from_json",
    "html",
    "junit",
    "make_console",
    "markdown",
    "print_comparison",
    "print_findings",
    "print_gates",
    "print_notices",
    "print_plan",
    "print_selftest",
    "print_sensitivity",
    "print_summary",
    "print_sweep",
    "stage_times",
    "summary",
    "sweep_files",
    "to_json",
    "views",
]
