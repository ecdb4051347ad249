"""Views of the results. The JSON is the truth; Markdown, JUnit and terminal tables say the same in fewer words."""

from __future__ import annotations

from quantflow.report.junit import junit
from quantflow.report.markdown import comparison, markdown, summary
from quantflow.report.progress import Progress
from quantflow.report.results import from_json, to_json
from quantflow.report.terminal import (
    make_console,
    print_comparison,
    print_findings,
    print_gates,
    print_notices,
    print_plan,
    print_selftest,
    print_summary,
)

__all__ = [
    "Progress",
    "comparison",
    "from_json",
    "junit",
    "make_console",
    "markdown",
    "print_comparison",
    "print_findings",
    "print_gates",
    "print_notices",
    "print_plan",
    "print_selftest",
    "print_summary",
    "summary",
    "to_json",
]
