"""What every benchmark here shares: its command line, the line about the machine, its tables and its JSON file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quantflow.host.environment import environment, versions

#: Wide in a pipe, so that no table is folded in a log.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `description` is the module's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny settings: shows that it runs, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    return parser


def machine() -> dict[str, Any]:
    """Processor, instruction sets, cores, threads and package versions; nothing that names the machine."""
    found = environment()
    return {key: found[key] for key in ("cpu", "isa", "cores", "threads")} | {"versions": versions()}


def show_machine() -> dict[str, Any]:
    """Print and return `machine()`."""
    found = machine()
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {' '.join(found['isa'])}")
    console.print(packages)
    return found


def show(title: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print the rows' named columns as a table."""
    console.print(f"\n{title}", markup=False)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)


def write(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write the JSON file, if one was asked for. Infinities and NaN become strings."""
    if path is not None:
        path.write_text(json.dumps(_plain(content), indent=1) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
