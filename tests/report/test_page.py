from __future__ import annotations

import base64
import hashlib
import math
import re

import pytest

from quantflow.report import page
from quantflow.report.page import Cell, Column, DataTable, Row

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}"


def shown(macro: str, **context: object) -> str:
    source = '{% import "macros.html" as ui %}' + macro
    return page._environment().from_string(source).render(**context)


def test_a_table_carries_what_sorting_filtering_and_screen_readers_need() -> None:
    columns = (Column("#", is_number=True), Column("layer"), Column("ms", is_number=True, first="descending"))
    rows = (
        Row((page.number_cell(1, "1"), Cell("conv"), page.number_cell(0.5, "0.5 ms")), id="layer-1", kind="int8"),
        Row((page.number_cell(2, "2"), Cell("fc", tone="float"), page.number_cell(math.nan, "NaN")), kind="float"),
    )
    table = DataTable(
        "layers", "All layers", columns, rows, header_column=1, is_sortable=True, is_filterable=True,
        kinds=("int8", "float"), kinds_title="Runs in",
    )  # fmt: skip
    text = shown("{{ ui.table(table) }}", table=table)
    assert re.search(
        r'<th scope="col" class="num" data-first="ascending" aria-sort="ascending"><button type="button">#</button>',
        text,
    )
    assert 'data-first="descending"' in text
    assert '<tr id="layer-1" data-kind="int8"><td class="num" data-sort="1">1</td><th scope="row">conv</th>' in text
    assert '<td class="num">NaN</td>' in text
    assert '<span class="pill float">fc</span>' in text
    assert '<div class="tools" data-filter="layers"' in text
    assert "<caption" in text


def test_text_is_escaped_and_never_a_template() -> None:
    table = page.plain_table("t", HOSTILE, ("a",), [(HOSTILE,)])
    text = shown("{{ ui.table(table) }}{{ ui.notices([text]) }}", table=table, text=HOSTILE)
    assert "<script" not in text
    assert "<img" not in text
    assert "{{ 7*7 }}" in text


def test_only_the_pages_own_scripts_may_run() -> None:
    text = page.render("base.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == len(page.SCRIPTS)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]
    assert "unsafe-inline" not in policy[1].split("script-src")[1].split(";")[0]


def test_nothing_is_fetched() -> None:
    text = page.render("base.html")
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.parametrize(
    ("value", "sort"),
    [(1, 1), (math.inf, 1e300), (-math.inf, -1e300), (None, None), (True, None)],
)
def test_numbers_sort_as_numbers(value: object, sort: float | None) -> None:
    assert page.number_cell(value, "x").sort == sort


def test_long_texts_and_tables_are_cut() -> None:
    assert page.shortened("a" * 1000) == "a" * 79 + "…" + "a" * 79
    assert page.shortened("short") == "short"
    assert len(page.plain_table("t", "c", ("a",), [("x",)] * (page.MOST_ROWS + 5)).rows) == page.MOST_ROWS
