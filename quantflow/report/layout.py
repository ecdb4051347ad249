"""Where the nodes of a graph stand in its picture: layers from top to bottom, few crossings, short lines.

Layered drawing after Sugiyama, Tagawa, Toda, "Methods for Visual Understanding of Hierarchical System Structures"
(IEEE Trans. SMC 11, 1981): ranks by longest path, long lines cut at every rank they pass, order within a rank by the
mean of the neighbours' places, then coordinates: each rank in turn moves as near to its neighbours as the widths allow
(least squares under an order, solved by pooling adjacent violators).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 6
#: Blank space between two neighbours of a rank, and between two ranks.
GAP_X, GAP_Y = 26.0, 30.0
#: Where long lines pass more ranks than this in all, they are drawn straight.
MOST_BENDS = 20_000


@dataclass(frozen=True)
class Layout:
    """Centres of the nodes, points of the lines, and the size of the whole; all in pixels from the top left.

    Attributes:
        lines: (from, to, points) for every edge, points from top to bottom.
    """

    centres: tuple[tuple[float, float], ...]
    lines: tuple[tuple[int, int, tuple[tuple[float, float], ...]], ...]
    width: float
    height: float


def layered(widths: Sequence[float], height: float, reads: Sequence[Sequence[int]]) -> Layout:
    """Place nodes below what they read.

    Args:
        widths: of each node; all are `height` high.
        reads: for each node the nodes it reads, all of them before it.
    """
    ranks = _ranks(reads)
    edges = [(source, target) for target, sources in enumerate(reads) for source in sources]
    bends = sum(ranks[target] - ranks[source] - 1 for source, target in edges)
    places, chains = list(ranks), []
    spans = list(widths)
    for source, target in edges:
        chain = [source]
        if bends <= MOST_BENDS:
            for rank in range(ranks[source] + 1, ranks[target]):
                chain.append(len(places))
                places.append(rank)
                spans.append(1.0)
        chains.append([*chain, target])
    rows: list[list[int]] = [[] for _ in range(max(places, default=-1) + 1)]
    for node, rank in enumerate(places):
        rows[rank].append(node)
    above: list[list[int]] = [[] for _ in places]
    below: list[list[int]] = [[] for _ in places]
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    _order(rows, above, below)
    x = _coordinates(rows, spans, above, below)
    left = min((x[i] - spans[i] / 2 for i in range(len(spans))), default=0.0)
    right = max((x[i] + spans[i] / 2 for i in range(len(spans))), default=0.0)
    step = height + GAP_Y
    points = [(x[i] - left + GAP_X, GAP_Y + height / 2 + places[i] * step) for i in range(len(places))]
    lines = tuple((chain[0], chain[-1], _line([points[i] for i in chain], height)) for chain in chains)
    return Layout(tuple(points[: len(widths)]), lines, right - left + 2 * GAP_X, max(1, len(rows)) * step + GAP_Y)


def _ranks(reads: Sequence[Sequence[int]]) -> list[int]:
    """Longest path from the top; what reads nothing moves down to just above its first reader."""
    ranks: list[int] = []
    for sources in reads:
        ranks.append(1 + max((ranks[source] for source in sources), default=-1))
    first: dict[int, int] = {}
    for target, sources in enumerate(reads):
        for source in sources:
            first[source] = min(first.get(source, ranks[target]), ranks[target])
    return [
        max(0, first[node] - 1) if not sources and node in first else rank
        for node, (rank, sources) in enumerate(zip(ranks, reads, strict=True))
    ]


def _order(rows: list[list[int]], above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> None:
    """Sort each rank by the mean place of its neighbours, down and up in turn."""
    place = _places(rows)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else reversed(rows):
            mean = {n: sum(place[m] for m in neighbours[n]) / len(neighbours[n]) for n in row if neighbours[n]}
            row.sort(key=lambda node, mean=mean: mean.get(node, place[node]))  # type: ignore[misc]
            place |= _places([row])


def _places(rows: Sequence[Sequence[int]]) -> dict[int, float]:
    """Where each node stands in its rank, 0 to 1."""
    return {node: (index + 0.5) / len(row) for row in rows for index, node in enumerate(row)}


def _coordinates(
    rows: Sequence[Sequence[int]],
    spans: Sequence[float],
    above: Sequence[Sequence[int]],
    below: Sequence[Sequence[int]],
) -> list[float]:
    x = [0.0] * len(spans)
    for row in rows:
        at = 0.0
        for node in row:
            x[node] = at + spans[node] / 2
            at += spans[node] + GAP_X
        for node in row:
            x[node] -= at / 2
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else reversed(rows):
            wanted = [sum(x[n] for n in neighbours[i]) / len(neighbours[i]) if neighbours[i] else x[i] for i in row]
            apart = [(spans[a] + spans[b]) / 2 + GAP_X for a, b in itertools.pairwise(row)]
            for node, place in zip(row, nearest_in_order(wanted, apart), strict=True):
                x[node] = place
    return x


def nearest_in_order(wanted: Sequence[float], apart: Sequence[float]) -> list[float]:
    """argmin sum (x_i - wanted_i)^2 with x_(i+1) - x_i >= apart_i: isotonic regression of what the gaps leave."""
    offsets = [0.0]
    for gap in apart:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, int]] = []
    for value, offset in zip(wanted, offsets, strict=False):
        mean, count = value - offset, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _line(points: Sequence[tuple[float, float]], height: float) -> tuple[tuple[float, float], ...]:
    """From the lower edge of the first node to the upper edge of the last."""
    (x0, y0), *between, (x1, y1) = points
    return ((x0, y0 + height / 2), *between, (x1, y1 - height / 2))
