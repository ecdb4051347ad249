from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from quantflow.report import (
    html,
    make_console,
    markdown,
    print_gates,
    print_notices,
    print_plan,
    print_summary,
    summary,
    tables,
)
from quantflow.report.tables import Table

SECTIONS = [
    *("format", "recipe", "verdict", "notices", "environment", "model", "data", "mode", "device", "runtime", "plan"),
    *("int8_proof", "calibration", "warmup", "accuracy", "benchmark", "gates", "stages", "graph", "baseline"),
    "algorithms",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def piped() -> Console:
    return make_console(io.StringIO())


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screen(monkeypatch: pytest.MonkeyPatch, width: int = 80) -> Console:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    return make_console(Terminal())


def test_what_algorithms_did_to_the_model_is_a_table(results: dict[str, Any]) -> None:
    table = tables.algorithms(results)
    assert table.rows == (
        ("equalize", "2.5 s", "1", "0", "17.07 dB", "17.50 dB", "17.50 dB"),
        ("gptq", "14.0 s", "0", "1", "17.50 dB", "11.25 dB", "17.50 dB"),
    )
    assert "with what was kept" in markdown(results)
    results["algorithms"][1]["model"] = None
    assert tables.algorithms(results).rows[1][4:] == ("-", "-", "-")
    assert not tables.algorithms({}).rows


def test_a_pipe_gets_plain_whole_lines(results: dict[str, Any]) -> None:
    console = piped()
    results["plan"][0]["name"] = "a" * 300
    print_plan(console, results["plan"])
    print_summary(console, results, artifact="outputs/x")
    lines = text(console).splitlines()
    assert "\x1b" not in text(console)
    assert any("a" * 300 in line for line in lines)
    assert not any(line != line.rstrip() for line in lines)
    assert text(console).isascii()


def test_the_summary_says_what_matters(results: dict[str, Any]) -> None:
    console = piped()
    print_summary(console, results, artifact="outputs/x")
    shown = text(console)
    for part in (
        "resnet18_sym_int8, resnet18 (weights: random), mode export, runtime torch, device cpu",
        "NOTICE  weights are seeded random",
        "drop +0.27 +- 0.40 points",
        "28.41 dB",
        "32.1 +- 0.8 ms",
        "5.01x as fast",
        "0.253 of float",
        "median of 7 interleaved rounds",
        "128 samples",
        "worst layers: layer1.0.conv1 NaN, layer4.1.conv2 24.00 dB",
        "min_speedup  FAILED",
        "verdict: failed (1 of 2 gates passed)",
        "saved in outputs/x",
    ):
        assert part in shown


def summary_lines(console: Console, results: dict[str, Any]) -> list[str]:
    print_summary(console, results, artifact="outputs/x")
    return re.sub(r"\x1b\[[0-9;]*m", "", text(console)).splitlines()


def test_the_summary_fits_a_screen(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    console = screen(monkeypatch)
    lines = summary_lines(console, results)
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    assert "\x1b[" in text(console)


def test_the_largest_summary_fits_a_screen(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = {"op": "conv2d", "kernel": "k" * 40, "ms": 1.0}
    results["benchmark"]["per_layer"] = [{"name": f"block{i}." + "deep." * 40, **kernel} for i in range(500)]
    results["notices"] = ["what must not be missed, " * 40] * 9
    results["gates"] *= 4
    lines = summary_lines(screen(monkeypatch, 100), results)
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert "and 6 more notices, in the report" in lines
    assert any(line.startswith("slowest layers: block0.") for line in lines)


@pytest.mark.parametrize(
    ("environment", "plain"), [({"TERM": "dumb"}, False), ({"TERM": "xterm", "FORCE_COLOR": "1"}, True)]
)
def test_no_control_codes_in_a_plain_terminal(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], plain: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = make_console(Terminal(), plain=plain)
    print_summary(console, results)
    print_plan(console, results["plan"])
    assert "\x1b" not in text(console)
    assert text(console).isascii()


def test_no_color_takes_every_style_away(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    screen(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    console = make_console(Terminal())
    print_summary(console, results)
    assert "\x1b" not in text(console)
    assert console.is_terminal


def test_a_pipe_stays_plain_whatever_the_environment_asks(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = piped()
    print_summary(console, results)
    assert "\x1b" not in text(console)


def test_quiet_keeps_notices_gates_and_verdict(results: dict[str, Any]) -> None:
    console = piped()
    print_summary(console, results, quiet=True)
    assert "NOTICE" in text(console)
    assert "FAILED" in text(console)
    assert "28.41" not in text(console)


def test_a_narrow_screen_drops_columns_and_a_pipe_none(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, pipe = screen(monkeypatch), piped()
    print_plan(narrow, results["plan"])
    print_plan(pipe, results["plan"])
    assert "qparams" not in text(narrow)
    assert "has an int8 kernel" in text(narrow)
    assert "scale=0.02149" in text(pipe)
    assert "8 of 9 layers in int8; 1 float: no int8 form" in text(narrow)


@pytest.mark.parametrize("missing", [*[{name} for name in SECTIONS], set(SECTIONS), set(SECTIONS) - {"plan"}])
@pytest.mark.parametrize("present", [False, True])
def test_any_section_may_be_missing_or_empty(results: dict[str, Any], missing: set[str], present: bool) -> None:
    results = {name: section for name, section in results.items() if name not in missing}
    if present:
        results |= dict.fromkeys(missing)
    console = piped()
    print_plan(console, results.get("plan") or [])
    print_summary(console, results)
    print_gates(console, results)
    markdown(results)
    html(results)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [path]
    return [leaf for key, item in items for leaf in leaves(item, (*path, key))]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "text"])
def test_any_figure_may_be_missing_or_odd(results: dict[str, Any], value: Any) -> None:
    for *path, last in leaves(results):
        changed = copy.deepcopy(results)
        section: Any = changed
        for key in path:
            section = section[key]
        section[last] = value
        print_summary(piped(), changed)
        markdown(changed)


ODD = [None, math.nan, math.inf, "text", 10**400, []]


@pytest.mark.parametrize("turn", range(3))
def test_any_figure_of_the_page_may_be_missing_or_odd(results: dict[str, Any], turn: int) -> None:
    for index, (*path, last) in enumerate(leaves(results)):
        changed = copy.deepcopy(results)
        section: Any = changed
        for key in path:
            section = section[key]
        section[last] = ODD[(index + 2 * turn) % len(ODD)]
        assert html(changed).endswith("</html>\n")


HOSTILE = "a|b\n<script>*x*</script>[red]`y`\x1b[31m_z_"


def test_names_from_a_model_cannot_break_a_page_or_a_terminal(results: dict[str, Any]) -> None:
    results["plan"][0]["name"] = results["accuracy"]["per_layer"][1]["name"] = HOSTILE
    results["notices"] = [HOSTILE]
    page, console = markdown(results), piped()
    assert "<script>" not in page
    assert "\x1b" not in page
    plan = page.split("## Plan")[1].split("##")[0].strip().splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in plan if line.startswith("|")} == {8}
    print_plan(console, results["plan"])
    print_summary(console, results)
    print_notices(console, tables.notices(results))
    assert "\x1b" not in text(console)
    assert "[red]" in text(console)


def test_the_sample_has_every_section(results: dict[str, Any]) -> None:
    assert set(results) == set(SECTIONS)


def test_markdown_has_every_section(results: dict[str, Any]) -> None:
    page = markdown(results)
    titles = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    assert titles == [
        "Gates",
        "Figures",
        "Against the baseline",
        "Plan",
        "Accuracy algorithms",
        "Layers, worst first",
        "Time per layer",
        "Stages",
        "Settings",
    ]
    assert "> **Notice:** weights are seeded random" in page
    assert "| min_speedup | FAILED | 5.015x is not >= 6x |" in page
    assert "| runtime | torch (asked for: auto): native is not built |" in page
    assert "| overrides | device=cpu |" in page


def test_columns_that_are_empty_throughout_are_left_out() -> None:
    rows = [{"name": "a", "op": "conv2d", "precision": "int8", "reason": "r"}]
    assert tables.plan(rows).headers == ("layer", "op", "runs in", "reason")


def test_without_moves_the_alignment_along() -> None:
    table = Table("t", ("a", "b", "c"), (("1", "2", "3"),), frozenset({2}))
    assert table.without("b") == Table("t", ("a", "c"), (("1", "3"),), frozenset({1}))
    assert table.without("a").without("c") == Table("t", ("b",), (("2",),))
    assert table.without("x") is table


def test_identical_outputs_are_shouted(results: dict[str, Any]) -> None:
    results["int8_proof"]["output_differs"] = False
    assert "IDENTICAL" in markdown(results)


def test_the_summary_page_is_the_reports_first_screen(results: dict[str, Any]) -> None:
    page = summary(results)
    assert markdown(results).startswith(page.rstrip())
    assert page.startswith("# quantflow: resnet18_sym_int8\n")
    assert "**Verdict: failed (1 of 2 gates passed)**" in page
    assert "| min_speedup | FAILED | 5.015x is not >= 6x |" in page
    assert "## Figures" in page
    assert "## Plan" not in page
