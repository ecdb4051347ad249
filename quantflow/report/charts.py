"""Geometry of the page's small charts. Plots are stretched to the width of the page, so their texts stand in HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantflow.report.fields import is_number, number

#: The plots' own units: every x and y lies in 0..WIDTH and 0..HEIGHT.
WIDTH, HEIGHT = 1000, 180
#: A histogram with more bins is not one of ours.
MOST_BINS = 256


@dataclass(frozen=True)
class Bars:
    """A labelled bar of `percent` of the track."""

    label: str
    text: str
    percent: float
    tint: str


@dataclass(frozen=True)
class Line:
    """SVG paths: a line with gaps where there is no value, and a dot for each value."""

    path: str
    dots: str


@dataclass(frozen=True)
class Histogram:
    """Bars as one SVG path, and where the lowest and highest code lie.

    Attributes:
        clips: x of the two clip lines; narrow: x of the clip lines of the channel with the smallest scale.
        low, high: texts of the plot's ends.
        said: the same in words, for people who don't see the plot.
    """

    title: str
    path: str
    clips: tuple[float, ...]
    narrow: tuple[float, ...]
    low: str
    high: str
    said: str


def line_through(values: Sequence[Any], low: float, high: float) -> Line:
    """values over their index, held between low and high; what is not finite leaves a gap."""
    step, parts, dots, pen = WIDTH / max(1, len(values) - 1), [], [], "M"
    for index, value in enumerate(values):
        if not is_number(value) or not math.isfinite(value):
            pen = "M"
            continue
        x, y = index * step, HEIGHT - (min(max(value, low), high) - low) / (high - low) * HEIGHT
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        dots.append(f"M{x:.1f} {y:.1f}h.01")
        pen = "L"
    return Line("".join(parts), "".join(dots))


def histogram_of(data: Mapping[str, Any], title: str) -> Histogram | None:
    """The plot of a `layer_errors.histogram`: heights are log(1 + count). None where the data is not one."""
    low, high, clip, counts = (data.get(key) for key in ("low", "high", "clip", "counts"))
    pair = _pair(clip)
    if not _is_finite(low) or not _is_finite(high) or pair is None or not isinstance(counts, (list, tuple)):
        return None
    if not 0 < len(counts) <= MOST_BINS or not all(_is_finite(count) and count >= 0 for count in counts):
        return None
    narrow = _pair(data.get("clip_narrowest"))
    left, right = min(low, pair[0]), max(high, pair[1])
    margin = 0.02 * (right - left) or 1.0
    left, right = left - margin, right + margin

    def x(value: float) -> float:
        return round((value - left) / (right - left) * WIDTH, 1)

    most = max(math.log1p(max(counts)), 1e-9)
    width = (high - low) / len(counts) or 2 * margin
    start = low if high > low else low - margin
    path = "".join(
        f"M{x(start + index * width)} {HEIGHT}V{HEIGHT * (1 - 0.94 * math.log1p(count) / most):.1f}"
        f"H{x(start + (index + 1) * width)}V{HEIGHT}Z"
        for index, count in enumerate(counts)
        if count
    )
    share = data.get("clipped")
    said = f"codes span {number(pair[0], 3)} to {number(pair[1], 3)}, values {number(low, 3)} to {number(high, 3)}"
    if _is_finite(share):
        said += f"; {100 * share:.2g} % clipped"
    if narrow is not None:
        said += f"; the narrowest channel's codes span {number(narrow[0], 3)} to {number(narrow[1], 3)}"
    clips, inner = tuple(map(x, pair)), tuple(map(x, narrow)) if narrow is not None else ()
    return Histogram(title, path, clips, inner, number(left, 3), number(right, 3), said)


def _pair(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_is_finite, value)):
        return None
    return float(value[0]), float(value[1])


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and abs(value) < 1e300
