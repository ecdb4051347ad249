"""A sweep's results as JSON, Markdown and one HTML page: all jobs in one table, accuracy against speed in one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantflow.errors import EXIT_GATE, EXIT_PASSED, VERDICTS
from quantflow.report import tables
from quantflow.report.markdown import _escape as escape
from quantflow.report.markdown import markdown_table
from quantflow.report.page import Cell, Column, DataTable, Row, number_cell, plain_table, render, shortened
from quantflow.report.tables import Table
from quantflow.store.json_values import to_json

#: Figure of a job → the column's title, and how its values are written.
FIGURES = {
    "metric": ("metric", tables.number),
    "metric_drop": ("drop", lambda value: tables.number(value, 3)),
    "sqnr_db": ("SQNR", tables.db),
    "agreement": ("same class", tables.percent),
    "latency_ms": ("latency", tables.ms),
    "speedup": ("speedup", lambda value: tables.number(value, 3)),
    "size_ratio": ("size ratio", lambda value: tables.number(value, 3)),
    "int8_coverage": ("coverage", tables.percent),
}
#: Figures whose columns are hidden on a phone.
EXTRA = ("metric_drop", "agreement", "size_ratio", "int8_coverage")
#: The plot's extent and margins, in its own units.
WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 720, 360, 64, 48, 20
#: Labels per axis, about.
TICKS = 5


def sweep_files(sweep: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name."""
    return {
        "sweep.json": to_json(sweep),
        "sweep.md": sweep_markdown(sweep).encode(),
        "sweep.html": sweep_html(sweep).encode(),
    }


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """A row per job: what it was asked, how it ended, its figures, and why it did not pass."""
    used = _used_figures(sweep)
    headers = ("job", "overrides", "ended", *(FIGURES[name][0] for name in used), "seconds", "Pareto", "reason")
    rows = tuple(
        (
            str(job["number"]),
            _asked(job, sweep),
            _verdict(job),
            *(FIGURES[name][1](job["figures"].get(name)) for name in used),
            _seconds(job),
            "yes" if job["number"] in sweep["pareto"] else "",
            _reason(job),
        )
        for job in sweep["jobs"]
    )
    return Table("Jobs", headers, rows, frozenset({0, *range(3, 4 + len(used))}), _caption(sweep))


def sweep_headline(sweep: Mapping[str, Any]) -> str:
    """How many jobs ended in which way."""
    counts: dict[str, int] = {}
    for job in sweep["jobs"]:
        counts[_verdict(job)] = counts.get(_verdict(job), 0) + 1
    return f"{len(sweep['jobs'])} jobs: " + (", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "none ran")


def sweep_markdown(sweep: Mapping[str, Any]) -> str:
    """The jobs as a Markdown page."""
    blocks = ["# quantflow: sweep", sweep_headline(sweep)]
    if sweep["trouble"]:
        blocks.append(f"> **Notice:** {escape(sweep['trouble'])}")
    table = sweep_table(sweep)
    blocks += [markdown_table(table), escape(table.caption)] if table.rows else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def sweep_html(sweep: Mapping[str, Any]) -> str:
    """The jobs as a page: one sortable table, and the Pareto plot."""
    fixed = " ".join(_fixed(sweep))
    passed = sweep["exit_code"] == EXIT_PASSED
    return render(
        "sweep.html",
        headline=sweep_headline(sweep),
        verdict="passed" if passed else "failed",
        verdict_text=VERDICTS.get(sweep["exit_code"], f"exit code {sweep['exit_code']}"),
        fixed=fixed,
        command=" ".join(sweep["arguments"]),
        notices=[sweep["trouble"]] if sweep["trouble"] else [],
        failures=_failures(sweep),
        table=_data_table(sweep),
        plot=plot(sweep),
    )


@dataclass(frozen=True)
class Point:
    """A job in the plot; `path` to the next point of the front."""

    x: float
    y: float
    label: str
    is_best: bool


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    """What the page draws: points, the front's corners, the labels of both axes."""

    points: tuple[Point, ...]
    front: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM
    right: int = WIDTH - EDGE
    top: int = EDGE


def plot(sweep: Mapping[str, Any]) -> Plot | None:
    """Accuracy (up is better) against latency (left is better); None where fewer than two jobs have both."""
    axis = sweep["accuracy_axis"]
    found = [
        (job, job["figures"]["latency_ms"], job["figures"][axis])
        for job in sweep["jobs"]
        if _is_finite(job["figures"].get("latency_ms")) and _is_finite(job["figures"].get(axis))
    ]
    if len(found) < 2:
        return None
    low_x, high_x, step_x = _range([x for _, x, _ in found])
    low_y, high_y, step_y = _range([y for _, _, y in found])

    def across(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - EDGE), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - BOTTOM - EDGE), 1)

    best = set(sweep["pareto"])
    points = tuple(
        Point(
            across(x), up(y),
            f"job {job['number']}: {FIGURES['latency_ms'][1](x)}, {FIGURES[axis][1](y)}; {_asked(job, sweep)}",
            job["number"] in best,
        )
        for job, x, y in found
    )  # fmt: skip
    corners = sorted((point for point in points if point.is_best), key=lambda point: point.x)
    title = FIGURES[axis][0]
    names = {job["figures"].get("metric_name") for job, _, _ in found}
    y_title = str(tables.METRIC_NAMES.get(names.pop(), title)) if axis == "metric" and len(names) == 1 else title
    return Plot(
        points,
        " ".join(f"{point.x},{point.y}" for point in corners) if len(corners) > 1 else "",
        tuple(Tick(across(x), f"{x:g}") for x in _ticks(low_x, high_x, step_x)),
        tuple(Tick(up(y), f"{y:g}") for y in _ticks(low_y, high_y, step_y)),
        "int8 latency, ms (less is better)",
        f"{y_title}{' of the int8 model' if axis == 'metric' else ' against float, dB'} (more is better)",
    )


def _data_table(sweep: Mapping[str, Any]) -> DataTable:
    used = _used_figures(sweep)
    columns = (
        Column("job", is_number=True),
        Column("overrides"),
        Column("ended"),
        *(
            Column(FIGURES[name][0], is_number=True, is_whole=True, is_extra=name in EXTRA, first="descending")
            for name in used
        ),
        Column("seconds", is_number=True, is_extra=True),
        Column("Pareto"),
    )
    rows = []
    for job in sweep["jobs"]:
        tone = "good" if job["exit_code"] == EXIT_PASSED else "bad"
        cells = (
            number_cell(job["number"], str(job["number"])),
            Cell(shortened(_asked(job, sweep))),
            Cell(_verdict(job), tone=tone),
            *(number_cell(job["figures"].get(name), FIGURES[name][1](job["figures"].get(name))) for name in used),
            number_cell(job["seconds"], _seconds(job)),
            Cell("yes", tone="int8") if job["number"] in sweep["pareto"] else Cell(""),
        )
        rows.append(Row(cells, id=f"job-{job['number']}", kind=_verdict(job)))
    kinds = tuple(dict.fromkeys(row.kind for row in rows))
    return DataTable(
        "jobs", "Every job of the sweep", columns, tuple(rows), header_column=1, is_sortable=True, is_filterable=True,
        kinds=kinds, kinds_title="Ended", note=_caption(sweep),
    )  # fmt: skip


def _failures(sweep: Mapping[str, Any]) -> DataTable:
    rows = [
        (str(job["number"]), _asked(job, sweep), _verdict(job), job["reason"])
        for job in sweep["jobs"]
        if job["exit_code"] != EXIT_PASSED
    ]
    return plain_table("failures", "Jobs that did not pass", ("job", "overrides", "ended", "reason"), rows)


def _used_figures(sweep: Mapping[str, Any]) -> list[str]:
    return [name for name in FIGURES if any(job["figures"].get(name) is not None for job in sweep["jobs"])]


def _fixed(sweep: Mapping[str, Any]) -> list[str]:
    """The overrides that every job has."""
    jobs = [job["overrides"] for job in sweep["jobs"]]
    return [each for each in jobs[0] if all(each in other for other in jobs)] if len(jobs) > 1 else []


def _asked(job: Mapping[str, Any], sweep: Mapping[str, Any]) -> str:
    """What sets this job apart."""
    fixed = set(_fixed(sweep))
    return " ".join(each for each in job["overrides"] if each not in fixed)


def _verdict(job: Mapping[str, Any]) -> str:
    return VERDICTS.get(job["exit_code"], f"exit code {job['exit_code']}")


def _reason(job: Mapping[str, Any]) -> str:
    """One line."""
    reused = f"outcome of job {job['reused_from']}, run before" if job["reused_from"] is not None else ""
    reason = "" if job["exit_code"] in (EXIT_PASSED, EXIT_GATE) else job["reason"]
    return "; ".join(filter(None, (" ".join(reason.split()), reused)))


def _seconds(job: Mapping[str, Any]) -> str:
    return f"{job['seconds']:.1f}"


def _caption(sweep: Mapping[str, Any]) -> str:
    parts = [f"every job: {' '.join(_fixed(sweep))}"] if _fixed(sweep) else []
    sizes = {job["figures"]["batch_size"] for job in sweep["jobs"] if "batch_size" in job["figures"]}
    threads = {job["figures"]["threads"] for job in sweep["jobs"] if "threads" in job["figures"]}
    if sizes:
        parts.append(f"latency and speedup at batch size {' or '.join(map(str, sorted(sizes)))}")
    if len(threads) > 1:
        parts.append(f"measured with {' or '.join(map(str, sorted(threads)))} threads: not comparable in speed")
    if sweep["pareto"]:
        parts.append("Pareto: no other job is both faster and at least as accurate, or as fast and more accurate")
    return "; ".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, step): round numbers around the values."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - max(abs(low) * 0.1, 0.1), high + max(abs(high) * 0.1, 0.1)
    rough = (high - low) / TICKS
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [low + index * step for index in range(round((high - low) / step) + 1)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
