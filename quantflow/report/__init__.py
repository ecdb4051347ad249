"""Views of the results. The JSON is the truth; Markdown and terminal tables say the same in fewer words."""

from __future__ import annotations

from quantflow.report.markdown import markdown
from quantflow.report.progress import Progress
from quantflow.report.results import from_json, to_json
from quantflow.report.terminal import (
    make_console,
    print_findings,
    print_gates,
    print_notices,
    print_plan,
    print_selftest,
    print_sensitivity,
    print_summary,
)

__all__ = [
    "Progress",
    "from_json",
    "make_console",
    "markdown",
    "print_findings",
    "print_gates",
    "print_notices",
    "print_plan",
    "print_selftest",
    "print_sensitivity",
    "print_summary",
    "to_json",
]
