"""The fused graph as a drawing: a box per kernel, coloured by precision, own error or time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantflow.report import tables
from quantflow.report.fields import is_number, items, text
from quantflow.report.layout import layered
from quantflow.report.page import shortened

#: Steps of the scales that boxes are coloured by: 0 is harmless, the last one is worst.
STEPS = 5
#: Own SQNR in dB from which a layer counts as harmless, and width of a step.
HARMLESS_DB, STEP_DB = 45.0, 5.0
BOX_HEIGHT = 42.0
#: Width of a character of the labels, and the least and most a box is wide.
CHARACTER, NARROWEST, WIDEST = 7.0, 84.0, 250.0
LABEL = 32


@dataclass(frozen=True)
class Box:
    """One node: its corner, size, texts, and classes that colour it."""

    number: int
    x: float
    y: float
    width: float
    label: str
    op: str
    title: str
    classes: str


@dataclass(frozen=True)
class Picture:
    """Boxes and lines (SVG paths), the size of the drawing, and how many nodes were left out."""

    boxes: tuple[Box, ...]
    lines: tuple[str, ...]
    width: float
    height: float
    left_out: int
    has_errors: bool
    has_times: bool


def picture_of(graph: Mapping[str, Any], own_db: Mapping[str, Any], ms: Mapping[str, Any], most: int) -> Picture | None:
    """The drawing of the results' `graph` section; None where there is nothing to draw.

    Args:
        own_db: layer → the SQNR of its own error.
        ms: layer → its time.
        most: a larger graph is drawn up to this node.
    """
    nodes = items(graph, "nodes")
    names = graph.get("inputs")
    inputs = [text(name) for name in names] if isinstance(names, (list, tuple)) else []
    if not nodes:
        return None
    labels = [*inputs, *(text(node.get("name")) for node in nodes)][:most]
    ops = ["input"] * len(inputs) + [text(node.get("op")) for node in nodes]
    reads = [[] for _ in inputs] + [_reads(node.get("reads"), len(inputs) + i) for i, node in enumerate(nodes)]
    outputs = graph.get("outputs")
    ends = {n for n in outputs if isinstance(n, int)} if isinstance(outputs, (list, tuple)) else set()
    widths = [_width(shortened(label, LABEL), shortened(op, LABEL)) for label, op in zip(labels, ops, strict=False)]
    placed = layered(widths, BOX_HEIGHT, reads[: len(labels)])
    slowest = max((value for value in ms.values() if _is_finite(value)), default=0.0)
    boxes = []
    for number, (label, op, width) in enumerate(zip(labels, ops, widths, strict=False)):
        precision = "input" if number < len(inputs) else text(nodes[number - len(inputs)].get("precision"))
        error, taken = own_db.get(label), ms.get(label)
        kind = precision if precision in ("int8", "float", "between", "input") else "between"
        classes = [f"p-{kind}", f"e-{_error_step(error)}", f"t-{_time_step(taken, slowest)}"]
        said = [shortened(label), shortened(op), kind, "returned" if number in ends else ""]
        said += [
            f"SQNR alone {tables.db(error)}" if is_number(error) else "",
            tables.ms(taken) if is_number(taken) else "",
        ]
        x, y = placed.centres[number]
        boxes.append(
            Box(
                number, round(x - width / 2, 1), round(y - BOX_HEIGHT / 2, 1), width, shortened(label, LABEL),
                shortened(op, LABEL), ", ".join(part for part in said if part), " ".join(classes),
            )
        )  # fmt: skip
    lines = tuple(_path(points) for _, _, points in placed.lines)
    left_out = len(inputs) + len(nodes) - len(labels)
    return Picture(
        tuple(boxes), lines, round(placed.width), round(placed.height), left_out,
        any(is_number(error) for error in own_db.values()), slowest > 0,
    )  # fmt: skip


def _reads(value: Any, before: int) -> list[int]:
    """Numbers of earlier nodes; anything else in the JSON is not an edge."""
    found = value if isinstance(value, (list, tuple)) else []
    return [n for n in dict.fromkeys(x for x in found if type(x) is int) if 0 <= n < before]


def _width(label: str, op: str) -> float:
    return min(WIDEST, max(NARROWEST, 24 + CHARACTER * max(len(label), len(op))))


def _error_step(db: Any) -> str:
    if not is_number(db) or math.isnan(db):
        return "none"
    return str(max(0, min(STEPS - 1, math.ceil((HARMLESS_DB - max(-999.0, min(999.0, db))) / STEP_DB))))


def _time_step(ms: Any, slowest: float) -> str:
    if not _is_finite(ms) or slowest <= 0:
        return "none"
    return str(max(0, min(STEPS - 1, int(STEPS * ms / slowest))))


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Through the points, leaving and entering each one vertically."""
    x0, y0 = points[0]
    parts = [f"M{x0:.0f} {y0:.0f}"]
    for x, y in points[1:]:
        middle = (y0 + y) / 2
        parts.append(
            f"V{y:.0f}" if abs(x - x0) < 0.5 else f"C{x0:.0f} {middle:.0f} {x:.0f} {middle:.0f} {x:.0f} {y:.0f}"
        )
        x0, y0 = x, y
    return "".join(parts)


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
