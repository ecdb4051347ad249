"""The files beside an artifact's results.json that say the same for people and CI systems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantflow.report.html import html
from quantflow.report.junit import junit
from quantflow.report.markdown import markdown, summary
from quantflow.store.artifact import JUNIT, PAGE, REPORT, SUMMARY


def views(results: Mapping[str, Any]) -> dict[str, bytes]:
    """File name → content."""
    return {
        REPORT: markdown(results).encode(),
        PAGE: html(results).encode(),
        SUMMARY: summary(results).encode(),
        JUNIT: junit(results),
    }
