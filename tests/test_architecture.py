"""The layout that docs/architecture.md describes is the layout that there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantflow"
#: `ls quantflow` stays readable, and so does each module.
MOST_ENTRIES, MOST_LINES, MOST_LINES_OF_THE_ORDER = 25, 600, 120
#: Made by builds and runs, not part of the source.
MADE = {"__pycache__", "_native"}


def entries() -> set[str]:
    return {path.name for path in PACKAGE.iterdir()} - MADE


def rooms_of_the_page() -> dict[str, str]:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", table, flags=re.M))


def test_every_room_has_a_line_in_the_architecture_page() -> None:
    assert rooms_of_the_page().keys() == entries(), "a new top-level module needs its line in docs/architecture.md"
    assert len(entries()) <= MOST_ENTRIES


def test_every_folder_says_what_it_is() -> None:
    for file in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file.parent} does not say what it is"


def test_no_module_is_too_long_to_read() -> None:
    too_long = {
        str(file.relative_to(ROOT)): lines
        for file in (*PACKAGE.rglob("*.py"), *(ROOT / "native/src").rglob("*.[ch]pp"))
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not too_long
    assert len((PACKAGE / "executor/order.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_THE_ORDER
    assert len((ROOT / "native/src/lower.cpp").read_text(encoding="utf-8").splitlines()) <= 500
