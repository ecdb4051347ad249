from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantflow.report.layout import GAP_X, layered, nearest_in_order

HEIGHT = 40.0


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    count = draw(st.integers(0, 25))
    return [draw(st.lists(st.integers(0, node - 1), unique=True, max_size=3)) if node else [] for node in range(count)]


@given(graphs())
def test_nodes_stand_below_what_they_read_and_never_overlap(reads: list[list[int]]) -> None:
    widths = [60.0 + 10 * (node % 5) for node in range(len(reads))]
    layout = layered(widths, HEIGHT, reads)
    assert len(layout.centres) == len(reads)
    for node, sources in enumerate(reads):
        for source in sources:
            assert layout.centres[source][1] + HEIGHT < layout.centres[node][1]
    for a, b in itertools.combinations(range(len(reads)), 2):
        (xa, ya), (xb, yb) = layout.centres[a], layout.centres[b]
        if ya == yb:
            assert abs(xa - xb) >= (widths[a] + widths[b]) / 2 + GAP_X - 1e-6
    for (x, y), width in zip(layout.centres, widths, strict=True):
        assert width / 2 <= x <= layout.width - width / 2
        assert HEIGHT / 2 <= y <= layout.height - HEIGHT / 2


@given(graphs())
def test_lines_run_from_edge_to_edge(reads: list[list[int]]) -> None:
    layout = layered([80.0] * len(reads), HEIGHT, reads)
    assert sorted((source, target) for source, target, _ in layout.lines) == sorted(
        (source, target) for target, sources in enumerate(reads) for source in sources
    )
    for source, target, points in layout.lines:
        assert points[0] == (layout.centres[source][0], layout.centres[source][1] + HEIGHT / 2)
        assert points[-1] == (layout.centres[target][0], layout.centres[target][1] - HEIGHT / 2)
        assert all(above[1] < below[1] for above, below in itertools.pairwise(points))


def test_a_chain_is_straight_and_a_residual_goes_around_it() -> None:
    layout = layered([80.0] * 4, HEIGHT, [[], [0], [1], [2, 0]])
    assert len({round(x) for x, _ in layout.centres[1:3]}) == 1
    around = next(points for source, target, points in layout.lines if (source, target) == (0, 3))
    assert len(around) == 4
    assert all(abs(x - layout.centres[1][0]) > 40 for x, _ in around[1:-1])


def test_two_crossed_pairs_are_uncrossed() -> None:
    layout = layered([80.0] * 4, HEIGHT, [[], [], [1], [0]])
    (x0, _), (x1, _), (x2, _), (x3, _) = layout.centres
    assert (x0 < x1) == (x3 < x2)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(0, 50))
def test_places_keep_order_and_distance(wanted: list[float], gap: float) -> None:
    found = nearest_in_order(wanted, [gap] * (len(wanted) - 1))
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(wanted), abs=1e-6)


def test_places_that_fit_stay() -> None:
    assert nearest_in_order([0.0, 100.0, 300.0], [50.0, 50.0]) == [0.0, 100.0, 300.0]
    assert nearest_in_order([0.0, 0.0], [10.0]) == [-5.0, 5.0]
