"""A sweep's report: every job in every view, whatever became of it, and the plot of those that were measured."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from quantflow.cli.sweep import JobOutcome, summarize
from quantflow.report import from_json, make_console, print_sweep, sweep_files
from quantflow.report.sweep import _range, _ticks, plot, sweep_headline, sweep_table

HOSTILE = "<img src=x onerror=alert(1)>|`x`"


def job(number: int, ms: float | None = None, sqnr: float | None = None, code: int = 0, **more: Any) -> JobOutcome:
    measured = {"latency_ms": ms, "sqnr_db": sqnr, "batch_size": 4, "threads": 2}
    figures = {name: value for name, value in measured.items() if value is not None} if ms else {}
    overrides = ("recipe=r", f"seed={number}")
    return JobOutcome(number, "r", overrides, f"out/{number}", "k", "1", code, figures=figures, seconds=1.25, **more)


JOBS = [
    job(0, 2.0, 30.0),
    job(1, 1.0, 20.0),
    job(2, 3.0, 25.0, reused_from=0),
    job(3, code=1, reason=f"crashed with {HOSTILE}\nsecond line"),
    job(4, code=2, reason="data: no photos"),
]


def sweep(jobs: list[JobOutcome] | None = None, trouble: str = "") -> dict[str, Any]:
    return summarize(["-m", "recipe=r", "seed=0,1"], JOBS if jobs is None else jobs, trouble)


def test_every_view_holds_every_job() -> None:
    files = sweep_files(sweep())
    assert set(files) == {"sweep.json", "sweep.md", "sweep.html"}
    stored = from_json(files["sweep.json"])
    assert [each["number"] for each in stored["jobs"]] == [0, 1, 2, 3, 4]
    assert (stored["pareto"], stored["exit_code"], stored["accuracy_axis"]) == ([1, 0], 1, "sqnr_db")
    page, text = files["sweep.html"].decode(), files["sweep.md"].decode()
    for number in range(5):
        assert f'<tr id="job-{number}"' in page
        assert f"| {number} | seed={number} |" in text
    for part in ("5 jobs: 3 passed, 1 crashed, 1 can't run as written", "data: no photos", "second line"):
        assert part in text
        assert part.replace("'", "&#39;") in page
    assert "outcome of job 0, run before" in text


def test_what_others_wrote_stays_text() -> None:
    files = sweep_files(sweep(trouble=HOSTILE))
    assert "<img" not in files["sweep.html"].decode()
    assert "<img" not in files["sweep.md"].decode()
    assert "\\|\\`x\\`" in files["sweep.md"].decode()


def test_the_table_sorts_and_filters_by_how_jobs_ended() -> None:
    page = sweep_files(sweep())["sweep.html"].decode()
    assert '<table id="jobs" data-sortable>' in page
    assert 'data-sort="2.0"' in page
    assert "<option>crashed</option>" in page


def test_what_all_jobs_share_is_said_once_and_columns_without_figures_are_left_out() -> None:
    table = sweep_table(sweep())
    assert table.headers == ("job", "overrides", "ended", "SQNR", "latency", "seconds", "Pareto", "reason")
    assert table.rows[0] == ("0", "seed=0", "passed", "30.00 dB", "2 ms", "1.2", "yes", "")
    assert "every job: recipe=r" in table.caption
    assert "at batch size 4" in table.caption


def test_unlike_threads_are_said_to_be_incomparable() -> None:
    other = JobOutcome(
        5, "r", ("recipe=r",), None, "k", "1", 0, figures={"latency_ms": 1.0, "sqnr_db": 1.0, "threads": 1}
    )
    assert "measured with 1 or 2 threads: not comparable in speed" in sweep_table(sweep([*JOBS, other])).caption


def test_the_plot_holds_the_measured_jobs_and_their_front() -> None:
    drawn = plot(sweep())
    assert drawn is not None
    assert [point.is_best for point in drawn.points] == [True, True, False]
    fast, good = drawn.points[1], drawn.points[0]
    assert fast.x < good.x, "less latency is further left"
    assert fast.y > good.y, "more accuracy is further up"
    assert drawn.front == f"{fast.x},{fast.y} {good.x},{good.y}"
    for point in drawn.points:
        assert drawn.left <= point.x <= drawn.right
        assert drawn.top <= point.y <= drawn.bottom
    page = sweep_files(sweep())["sweep.html"].decode()
    assert len(re.findall(r"<title>job \d", page)) == 3
    assert page.count('class="best"') == 2


def test_no_plot_without_two_measured_jobs() -> None:
    assert plot(sweep(JOBS[3:])) is None
    assert plot(sweep([JOBS[0], job(1, 2.0, float("inf"))])) is None
    assert "<polyline" not in sweep_files(sweep(JOBS[3:]))["sweep.html"].decode()


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.07, 0.0701], [3.0, 3.0], [0.0, 0.0], [-5.0, 1e4], [1e-9, 2e-9]])
def test_axes_hold_their_values_between_round_numbers(values: list[float]) -> None:
    low, high, step = _range(values)
    assert low <= min(values)
    assert high >= max(values)
    assert 2 <= len(_ticks(low, high, step)) <= 9


@pytest.mark.parametrize("trouble", ["", "the launcher failed: gone"])
def test_on_the_terminal(trouble: str) -> None:
    out = io.StringIO()
    print_sweep(make_console(out), sweep(trouble=trouble), folder="sw")
    text = out.getvalue()
    assert "data: no photos" in text
    assert "report in sw/sweep.html" in text
    assert (trouble in text) is bool(trouble) or not trouble
    assert sweep_headline(sweep([])) == "0 jobs: none ran"
