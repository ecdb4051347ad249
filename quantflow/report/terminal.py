"""The results in a terminal, or as plain lines in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from quantflow.errors import EXIT_PASSED
from quantflow.report import tables
from quantflow.report.sweep import sweep_headline, sweep_table
from quantflow.report.tables import Table

#: Columns of the plan that go first where a screen is narrow. In a pipe and in the report all of them stay.
DISPENSABLE = ("qparams", "group", "kernel", "op")
#: What the summary shows of layers and notices, so that it fits one screen; all of it is in the report.
NAMED_LAYERS = 3
MOST_NOTICES = 3
LONGEST_NOTICE = 300

#: Blanks between columns.
GAP = 2

_COLOURS = {"passed": "green", "FAILED": "bold red", "failed": "bold red", "int8": "green", "float": "yellow"}


def make_console(file: IO[str] | None = None, *, plain: bool = False) -> Console:
    """A console on standard output, or on `file`.

    In a pipe, in a terminal without cursor control (TERM=dumb), or when `plain`: no bars, no control codes, no wrapped
    lines. With NO_COLOR in the environment (https://no-color.org) a terminal gets bars and no colours.
    """
    moves = (file or sys.stdout).isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown") and not plain
    is_coloured = moves and not os.environ.get("NO_COLOR")
    return Console(
        file=file,
        highlight=False,
        force_terminal=moves,
        soft_wrap=not moves,
        color_system="auto" if is_coloured else None,
    )


def print_plan(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line per layer, and how many run in int8."""
    table = tables.plan(rows)
    if console.is_terminal:
        for header in DISPENSABLE:
            if sum(_widths(table)) + GAP * (len(table.headers) - 1) > console.width:
                table = table.without(header)
    _print_table(console, table)
    console.print(Text(tables.plan_summary(rows)))


def print_findings(console: Console, findings: Sequence[Any]) -> None:
    """What task=doctor found: a line per topic, and below it the cures."""
    _print_table(console, Table("This machine", ("what", "found"), tuple((f.topic, f.found) for f in findings)))
    for finding in findings:
        if finding.cure:
            console.print(Text(f"{finding.topic}: {finding.cure}", style="yellow"))


def print_selftest(console: Console, backend: str, rows: Sequence[Any]) -> None:
    """A line per kernel of a self-test, its failures, and the verdict."""
    shown = tuple(
        (row.kernel, str(row.cases), str(row.values), str(row.one_code), f"{row.seconds:.2f}",
         "passed" if row.passed else "FAILED")
        for row in rows
    )  # fmt: skip
    headers = ("kernel", "cases", "values", "one-code differences", "seconds", "verdict")
    _print_table(console, Table(f"Selftest of {backend}", headers, shown, frozenset({1, 2, 3, 4})))
    for row in rows:
        for failure in row.failures:
            console.print(Text(f"{row.kernel}: {failure}", style="red"))
    failed = sum(not row.passed for row in rows)
    verdict = f"{failed} of {len(rows)} FAILED" if failed else f"all {len(rows)} passed"
    console.print(Text(f"selftest of {backend}: {verdict}", style="bold red" if failed else "bold green"))


def print_summary(
    console: Console, results: Mapping[str, Any], *, artifact: str | None = None, quiet: bool = False
) -> None:
    """What came out, on one screen: notices, figures, worst layers, gates, verdict.

    Args:
        artifact: where everything was saved, named at the end.
        quiet: notices, gates and verdict only.
    """
    console.print(Text(tables.headline(results), style="bold"))
    notices = tables.notices(results)
    print_notices(console, [_cut(notice) for notice in notices[:MOST_NOTICES]])
    if len(notices) > MOST_NOTICES:
        console.print(Text(f"and {len(notices) - MOST_NOTICES} more notices, in the report", style="yellow"))
    if not quiet:
        _print_table(console, tables.figures(results))
        _print_layers(console, "worst", [row[:2] for row in tables.layer_errors(results).rows])
        _print_layers(console, "slowest", [(row[0], f"{row[3]} ms") for row in tables.layer_times(results).rows])
    print_gates(console, results)
    if results.get("verdict"):
        style = _COLOURS.get(str(results["verdict"]), "bold")
        console.print(Text.assemble("verdict: ", (tables.verdict(results), style)))
    if artifact:
        console.print(Text(f"saved in {artifact}"))


def print_sweep(console: Console, sweep: Mapping[str, Any], *, folder: str) -> None:
    """A line per job of a sweep, how many ended in which way, and where the report is."""
    table = sweep_table(sweep)
    if console.is_terminal:
        for header in ("coverage", "size ratio", "same class", "drop", "seconds"):
            table = table.without(header)
    _print_table(console, table)
    print_notices(console, [sweep["trouble"]] if sweep["trouble"] else [])
    console.print(Text(sweep_headline(sweep), style="bold green" if sweep["exit_code"] == EXIT_PASSED else "bold red"))
    console.print(Text(f"report in {folder}/sweep.html, sweep.md and sweep.json"))


def _print_layers(console: Console, which: str, rows: Sequence[Sequence[str]]) -> None:
    if rows:
        named = ", ".join(f"{_cut(name, 60)} {figure}" for name, figure in rows[:NAMED_LAYERS])
        console.print(Text(f"{which} layers: {named}"))


def _cut(text: str, longest: int = LONGEST_NOTICE) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def print_gates(console: Console, results: Mapping[str, Any]) -> None:
    """A line per gate; nothing where the recipe sets none."""
    _print_table(console, tables.gates(results))


def print_notices(console: Console, notices: Sequence[str]) -> None:
    """What the user must not miss, loud."""
    for notice in notices:
        console.print(Text.assemble((" NOTICE ", "bold black on yellow"), " ", (notice, "bold yellow")))


def _print_table(console: Console, table: Table) -> None:
    if not table.rows:
        return
    if console.is_terminal:
        console.print(_rich(table))
    else:
        console.print(Text("\n".join(_lines(table))))
    if table.caption:
        console.print(Text(table.caption, style="dim"))


def _rich(table: Table) -> RichTable:
    view = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold underline")
    for column, header in enumerate(table.headers):
        right = column in table.right
        view.add_column(Text(header), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in table.rows:
        view.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    return view


def _lines(table: Table) -> list[str]:
    """Columns aligned with spaces: what `grep`, `sort` and a log file want."""
    widths = _widths(table)
    return [
        (" " * GAP)
        .join(
            cell.rjust(width) if column in table.right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in (table.headers, *table.rows)
    ]


def _widths(table: Table) -> list[int]:
    return [max(cell_len(row[column]) for row in (table.headers, *table.rows)) for column in range(len(table.headers))]
