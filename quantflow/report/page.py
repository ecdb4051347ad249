"""HTML pages in one file: autoescaped templates, their style and scripts inside, nothing fetched, nothing else run.

Names of layers, recipes and files are other people's text. Jinja escapes all of it, and the page's own policy lets
only the scripts run whose sha256 it names, so that text which got through would still be dead.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from quantflow.report.fields import is_number

if TYPE_CHECKING:
    from jinja2 import Environment

#: Scripts in templates/ that every page has: theme, sorting and filtering of tables.
SCRIPTS = ("page.js",)
#: A longer text is shortened in its middle; the JSON holds all of it.
LONGEST_TEXT = 160
#: A table shows at most this many rows, so that the page stays small; the JSON holds all of them.
MOST_ROWS = 2000


@dataclass(frozen=True)
class Column:
    """A column's title, and how it looks and sorts.

    Attributes:
        is_number: aligned to the right, sorted by `Cell.sort`.
        is_extra: hidden on a phone.
        is_whole: not broken into lines.
        first: the direction that the first click sorts in.
    """

    title: str
    is_number: bool = False
    is_extra: bool = False
    is_whole: bool = False
    first: str = "ascending"

    @property
    def classes(self) -> str:
        flags = {"num": self.is_number, "extra": self.is_extra, "whole": self.is_whole}
        return " ".join(name for name, is_set in flags.items() if is_set)


@dataclass(frozen=True)
class Cell:
    """One text of a table.

    Attributes:
        sort: what a column of numbers sorts by; None where there is no number.
        tone: "good", "bad", "int8", "float" or "other" shows the text as a coloured pill.
        link: the `#id` it leads to.
    """

    text: str
    sort: float | None = None
    tone: str = ""
    link: str = ""


@dataclass(frozen=True)
class Row:
    """Cells of a row; `id` can be linked to, `kind` can be chosen in the filter."""

    cells: tuple[Cell, ...]
    id: str = ""
    kind: str = ""


@dataclass(frozen=True)
class DataTable:
    """What the `table` macro shows. `header_column` names the row to a screen reader."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    header_column: int = 0
    is_sortable: bool = False
    is_filterable: bool = False
    kinds: tuple[str, ...] = ()
    kinds_title: str = ""
    shows_caption: bool = False
    note: str = ""


def plain_table(
    id: str,
    caption: str,
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: frozenset[int] = frozenset(),
    note: str = "",
) -> DataTable:
    """A table of texts that neither sorts nor filters."""
    columns = tuple(Column(title, is_number=index in numbers) for index, title in enumerate(headers))
    body = tuple(Row(tuple(Cell(shortened(text)) for text in row)) for row in rows)
    return DataTable(id, caption, columns, body[:MOST_ROWS], note=note)


def number_cell(value: Any, text: str) -> Cell:
    """A cell that sorts by `value` where that is a number; infinities sort beyond all others, NaN as missing."""
    if not is_number(value) or math.isnan(value):
        return Cell(text)
    return Cell(text, sort=max(-1e300, min(1e300, value)))


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, with its middle left out where it is too long."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def breakable(text: str) -> Markup:
    """The text, escaped, with a place for a line break after every dot, underscore and slash before a letter."""
    return Markup(re.sub(r"([._/])(?=[A-Za-z])", r"\1<wbr>", str(escape(text))))


def render(template: str, *, scripts: Sequence[str] = (), **context: Any) -> str:
    """A page from a template that extends base.html.

    Args:
        template: a file in templates/.
        scripts: further script files in templates/, run after `SCRIPTS`.
        context: the template's variables; every text in them is escaped.
    """
    sources = [_source(name) for name in (*SCRIPTS, *scripts)]
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in sources)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    page = _environment().get_template(template)
    return page.render(scripts=[Markup(source) for source in sources], policy=Markup(policy), **context)


@cache
def _environment() -> Environment:
    # Only here: importing it takes a tenth of the time that quantflow takes, and not every process writes a page.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quantflow.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = breakable
    return environment


@cache
def _source(name: str) -> str:
    return resources.files("quantflow.report").joinpath("templates", name).read_text(encoding="utf-8")


def _sha256(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
