from __future__ import annotations

import math
import re
from html import unescape
from typing import Any

import pytest

from quantflow.report.charts import HEIGHT, WIDTH, histogram_of, line_through
from quantflow.report.html import html
from quantflow.report.picture import picture_of

TWO_MB = 2 * 10**6


def words(page: str) -> str:
    """The page's text without tags, in one line."""
    body = page.split("<body>")[1].split("<script>")[0]
    return " ".join(re.sub(r"<wbr>", "", body).replace("<", " <").split(" "))


def said(page: str) -> str:
    return unescape(" ".join(re.sub(r"<[^>]*>", "", words(page)).split()))


def test_the_page_answers_with_the_figures(results: dict[str, Any]) -> None:
    text = said(html(results))
    for part in (
        "Failed 1 of 2 gates failed: min_speedup.",
        "Notice weights are seeded random",
        "drop +0.27 +- 0.40 points",
        "5.01x 6.4 ms, float 32.1 ms, batch 1 baseline 8 ms",
        "baseline, int8 8 +- 0.1 ms",
        "Not alike threads: 4 there, 2 here.",
        "21 layers were counted running in int8",
        "1 no int8 form 1 softmax",
        "codes span -5.1 to 5, values 0 to 6; 1 % clipped",
        "the narrowest channel's codes span -0.1 to 0.1",
        "layer1.1.conv1 0.750 ms, 71.4%",
        "overrides device=cpu",
        "data: sha256 77aa",
        "cpu AMD EPYC",
        "layers: fc: float",
    ):
        assert part in text, part


def test_what_speaks_against_int8_has_no_tick(results: dict[str, Any]) -> None:
    assert '<li class="not">' not in html(results)
    results["int8_proof"]["int8_layers_run"] = 20
    results["int8_proof"]["output_differs"] = False
    page = html(results)
    assert page.count('<li class="not">') == 2
    assert "IS IDENTICAL to float's" in said(page)


def test_the_baselines_figures_stand_beside_this_runs(results: dict[str, Any]) -> None:
    text = said(html(results))
    assert "SQNR of the output 29.00 dB 28.41 dB -0.5877 dB" in text
    assert "latency, batch 1 8 ms 6.4 ms -20.0 %" in text
    assert "same top-1 class 95.31 % 95.31 % same" in text
    del results["baseline"]
    assert "baseline" not in said(html(results)).lower()


@pytest.mark.parametrize("name", ["n", "deep." * 50, '"' * 200])
def test_the_page_stays_small(results: dict[str, Any], name: str) -> None:
    count = 4000
    results["plan"] = [
        {"name": f"{name}{i}", "op": "conv2d" * 20, "precision": "float", "reason": f"reason {i} " * 30, "kernel": name}
        for i in range(count)
    ]
    results["accuracy"]["per_layer"] = [{"name": f"{name}{i}", "sqnr_db": 1.0 * i} for i in range(count)]
    results["graph"] = {
        "inputs": [name],
        "nodes": [{"name": f"{name}{i}", "op": name, "precision": "int8", "reads": [i, 0]} for i in range(count)],
    }
    results["notices"] = [name * 10] * 5
    page = html(results)
    assert len(page.encode()) < TWO_MB
    assert re.search(r"\d{4} more layers are in results.json\.", said(page))
    assert "nodes are left out here" in said(page)


def test_a_histogram_is_drawn_from_end_to_end() -> None:
    data = {"low": -1.0, "high": 1.0, "counts": [1, 0, 100, 1], "clip": [-2.0, 2.0], "clipped": 0.0}
    plot = histogram_of(data, "Weight")
    assert plot is not None
    assert plot.path.count("Z") == 3
    assert [round(x) for x in plot.clips] == [19, 981]
    numbers = [float(n) for n in re.findall(r"[MH]([\d.]+)", plot.path)]
    assert min(numbers) == pytest.approx(WIDTH * (0.08 + 1) / 4.16, abs=0.1)
    assert min(float(n) for n in re.findall(r"V([\d.]+)H", plot.path)) == pytest.approx(0.06 * HEIGHT, abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": []},
        {"counts": [-1]},
        {"counts": [math.nan]},
        {"clip": [1.0]},
        {"low": math.inf},
        {"counts": [1] * 999},
    ],
)
def test_what_is_no_histogram_is_not_drawn(change: dict[str, Any]) -> None:
    data = {"low": -1.0, "high": 1.0, "counts": [1], "clip": [-2.0, 2.0]}
    assert histogram_of(data, "x") is not None
    assert histogram_of(data | change, "x") is None


def test_a_line_has_gaps_and_stays_inside() -> None:
    line = line_through([0.0, 5.0, None, 10.0, math.nan, 99.0], 0.0, 10.0)
    assert line.path == "M0.0 180.0L200.0 90.0M600.0 0.0M1000.0 0.0"
    assert line.dots.count("h.01") == 4


def test_boxes_are_coloured_by_what_they_cost(results: dict[str, Any]) -> None:
    picture = picture_of(results["graph"], {"layer1.0.conv1": 50.0, "layer1.1.conv1": 12.0}, {"layer1.1.conv1": 2.0}, 9)
    assert picture is not None
    classes = [box.classes for box in picture.boxes]
    assert classes == [
        "p-input e-none t-none",
        "p-between e-none t-none",
        "p-int8 e-0 t-none",
        "p-int8 e-4 t-4",
        "p-float e-none t-none",
    ]
    assert len(picture.lines) == 5
    assert picture.left_out == 0


def test_a_graph_that_reads_what_is_not_there_is_drawn_without_it() -> None:
    nodes = [{"name": "a", "reads": [0, 1, 7, -1, True, "x", None]}, {"name": "b", "reads": {"c": 1}}]
    picture = picture_of({"inputs": ["x"], "nodes": nodes, "outputs": "odd"}, {}, {}, 9)
    assert picture is not None
    assert len(picture.lines) == 1


def test_a_large_graph_is_cut() -> None:
    nodes = [{"name": str(i), "reads": [i]} for i in range(100)]
    picture = picture_of({"inputs": ["x"], "nodes": nodes}, {}, {}, 80)
    assert picture is not None
    assert (len(picture.boxes), picture.left_out) == (80, 21)
