"""The results as a Markdown page: verdict and notices first, then figures, then everything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantflow.report import tables
from quantflow.report.fields import items
from quantflow.report.tables import Table


def markdown(results: Mapping[str, Any]) -> str:
    """A page for people and pull requests. Sections that did not run are left out.

    Args:
        results: the results, as read by `from_json` or as measured.
    """
    return "\n\n".join(_blocks(results)) + "\n"


def summary(results: Mapping[str, Any]) -> str:
    """The first screen of `markdown`: verdict, notices, gates and figures. Fits a CI job's summary page."""
    return "\n\n".join(_first_blocks(results)) + "\n"


def comparison(results: Mapping[str, Any], *, every_layer: bool = True) -> str:
    """What `compare` found, as a page: verdict, notices, gates, figures, layers.

    Args:
        every_layer: also those that exceed no limit.
    """
    return "\n\n".join(_comparison_blocks(results, every_layer)) + "\n"


def _comparison_blocks(results: Mapping[str, Any], every_layer: bool) -> Iterator[str]:
    yield "# quantflow: comparison"
    yield _escape(tables.comparison_headline(results))
    yield from _verdict(results)
    parts = [tables.comparison_layers(results, only_exceeding=True), tables.comparison_figures(results)]
    for table in (tables.gates(results), *parts, *([tables.comparison_layers(results)] if every_layer else [])):
        yield from _section(table)


def _verdict(results: Mapping[str, Any]) -> Iterator[str]:
    if results.get("verdict"):
        yield f"**Verdict: {_escape(tables.verdict(results))}**"
    for notice in tables.notices(results):
        yield f"> **Notice:** {_escape(notice)}"


def _first_blocks(results: Mapping[str, Any]) -> Iterator[str]:
    recipe = results.get("recipe")
    yield f"# quantflow: {_escape(str(recipe.get('name')) if isinstance(recipe, Mapping) else 'results')}"
    yield _escape(tables.headline(results)) or "No settings recorded."
    yield from _verdict(results)
    if results.get("tune"):
        yield _escape(tables.tune(results))
    for table in (tables.gates(results), tables.figures(results), tables.baseline(results)):
        yield from _section(table)


def _blocks(results: Mapping[str, Any]) -> Iterator[str]:
    yield from _first_blocks(results)
    if plan := items(results, "plan"):
        yield "## Plan"
        yield _escape(tables.plan_summary(plan)) + "."
        yield markdown_table(tables.plan(plan))
    for table in (
        tables.algorithms(results),
        tables.layer_errors(results),
        tables.layer_times(results),
        tables.stages(results),
        tables.settings(results),
    ):
        yield from _section(table)


def _section(table: Table) -> Iterator[str]:
    if table.rows:
        yield f"## {table.title}"
        yield markdown_table(table)
        if table.caption:
            yield _escape(table.caption)


def markdown_table(table: Table) -> str:
    """Header, rule and rows, every cell escaped."""
    rules = ("--:" if column in table.right else "---" for column in range(len(table.headers)))
    rows = [table.headers, *table.rows]
    lines = [_line(_escape(cell) for cell in row) for row in rows]
    return "\n".join([lines[0], _line(rules), *lines[1:]])


def _line(cells: Iterator[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """Text that Markdown and HTML leave as it is. An underscore inside a word is one already."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|\[\]~#]|(?<![^\W_])_|_(?![^\W_])", lambda match: "\\" + match[0], text)
