"""The results in a terminal, or as plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from quantflow.report import tables
from quantflow.report.tables import Table

#: Columns of the plan that go first where a screen is narrow. In a pipe and in the report all of them stay.
DISPENSABLE = ("qparams", "group", "kernel", "op")
#: As many of the worst layers as the summary shows; all of them are in the report.
WORST_LAYERS = 3

#: Blanks between columns.
GAP = 2

_COLOURS = {"passed": "green", "FAILED": "bold red", "failed": "bold red", "int8": "green", "float": "yellow"}


def make_console(file: IO[str] | None = None) -> Console:
    """A console on standard output, or on `file`. In a pipe: no colours, no wrapped lines."""
    is_terminal = (file or sys.stdout).isatty()
    return Console(file=file, highlight=False, soft_wrap=not is_terminal, no_color=not is_terminal or None)


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


def print_sensitivity(console: Console, found: Mapping[str, Any]) -> None:
    """A line per layer, the most harmful first."""
    _print_table(console, tables.sensitivity(found))


def print_summary(
    console: Console, results: Mapping[str, Any], *, artifact: str | None = None, quiet: bool = False
) -> None:
    """What came out, on one screen: notices, figures, worst layers, gates, verdict.

    Args:
        artifact: where everything was saved, named at the end.
        quiet: notices, gates and verdict only.
    """
    console.print(Text(tables.headline(results), style="bold"))
    print_notices(console, tables.notices(results))
    if not quiet:
        _print_table(console, tables.layer_times(results))
        _print_table(console, tables.figures(results))
        worst = tables.layer_errors(results).rows[:WORST_LAYERS]
        if worst:
            console.print(Text("worst layers: " + ", ".join(f"{name} {sqnr}" for name, sqnr, _ in worst)))
    print_gates(console, results)
    if results.get("tune"):
        console.print(Text(tables.tune(results)))
    if results.get("verdict"):
        style = _COLOURS.get(str(results["verdict"]), "bold")
        console.print(Text.assemble("verdict: ", (tables.verdict(results), style)))
    if artifact:
        console.print(Text(f"saved in {artifact}"))


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
