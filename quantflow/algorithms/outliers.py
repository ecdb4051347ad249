"""Massive outliers: channels or tokens of a linear's input that are hundreds of times larger than the others.

One scale serves the whole tensor, so a value that is 3000 times the median leaves the others next to no codes (Sun et
al. 2024, arXiv:2402.17762, find such values in every large language model). An input is massive when

    max_j m_j >= ratio * median_j m_j,   m_j = max|x| of channel j, or of token j

What int8 would leave of a typical token then decides: with y = x W^T, y' from the rounded x and W, and c the median of
y over the tokens (massive values are mostly constant, so that they must not count as signal),

    kept = 10 log10 median_t(|y_t - c|^2 / |y_t - y'_t|^2)

A layer that keeps less than `min_sqnr_db` stays float.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from quantflow.algorithms.outcome import Material
from quantflow.algorithms.simulate import on_grid, with_second_term
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan, PlannedUnit
from quantflow.ir.units import CORE
from quantflow.numerics.affine import activation_qparams
from quantflow.numerics.observers import AbstractObserver, make_observer
from quantflow.schema import OutlierSettings
from quantflow.stages.refined import float_numbers, nearest_codes

#: Rows of an input that the error is measured on hold at most this many numbers, and are at least so many.
ROW_NUMBERS, FEWEST_ROWS = 2**18, 64
#: How many channels, tokens or layers are named.
LISTED = 5


@dataclass(frozen=True)
class Outlier:
    """One int8 linear with a massive input.

    Attributes:
        channel_ratio, token_ratio: the largest over the median.
        channels: the massive ones, the largest first; `positions`: where in the sequence massive tokens stand.
        kept_db: what int8 leaves of a typical token.
        is_float: whether the layer stays float because of it.
    """

    layer: str
    channel_ratio: float
    token_ratio: float
    channels: tuple[int, ...]
    positions: tuple[int, ...]
    kept_db: float
    is_float: bool

    def __str__(self) -> str:
        found = []
        if self.channels:
            found.append(f"{_named('channel', self.channels)} {self.channel_ratio:.0f} times the median channel")
        if self.positions:
            found.append(f"{_named('token', self.positions)} {self.token_ratio:.0f} times the median token")
        return f"its input has {' and '.join(found)}, and int8 keeps {self.kept_db:.1f} dB of a typical token"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "channels": list(self.channels), "positions": list(self.positions)}


@dataclass(frozen=True)
class Outliers:
    """Every layer with a massive input."""

    found: tuple[Outlier, ...] = ()

    @property
    def left_float(self) -> dict[str, str]:
        """Layer → why it stays float."""
        return {each.layer: str(each) for each in self.found if each.is_float}

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user must hear, one line per decision."""
        lines = []
        for is_float, what in ((True, "stay float"), (False, "run in int8 all the same")):
            chosen = [each for each in self.found if each.is_float is is_float]
            if chosen:
                named = "; ".join(f"{each.layer}: {each}" for each in chosen[:LISTED])
                more = f"; and {len(chosen) - LISTED} more" if len(chosen) > LISTED else ""
                lines.append(f"massive outliers: {len(chosen)} linears {what} ({named}{more})")
        return tuple(lines)


NO_OUTLIERS = Outliers()


@dataclass
class _Input:
    """What was seen of one value."""

    readers: list[PlannedUnit]
    observer: AbstractObserver
    channels: torch.Tensor | None = None
    tokens: list[torch.Tensor] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)

    def observe(self, x: torch.Tensor, batches: int, generator: torch.Generator) -> None:
        """A value, which is left out if it holds NaN or infinities: they show in the largest of their channel."""
        rows = x.detach().reshape(-1, x.shape[-1])
        magnitude = rows.abs()
        channels = magnitude.amax(0)
        if not bool(channels.isfinite().all()):
            return
        self.channels = channels if self.channels is None else torch.maximum(self.channels, channels)
        self.tokens.append(magnitude.amax(1))
        self.places.append(torch.arange(len(rows)) % x.shape[-2])
        self.observer.observe(x)
        wanted = -(-max(ROW_NUMBERS // x.shape[-1], FEWEST_ROWS) // batches)
        self.rows.append(rows[torch.randperm(len(rows), generator=generator)[:wanted]].clone())


def find_outliers(settings: OutlierSettings, graph: Graph, plan: Plan, material: Material) -> Outliers:
    """Look for massive inputs of the int8 linears on the first `samples` calibration samples.

    Values of fewer than three dimensions have no tokens and are left out.
    """
    inputs: dict[fx.Node, _Input] = {}
    for planned in plan.units:
        x = planned.unit.inputs[0] if planned.unit.inputs else None
        is_linear = planned.unit.kind == CORE and planned.unit.op == "linear" and planned.is_int8
        if x is not None and is_linear and len(x.meta.get("shape", ())) > 2:
            observer = make_observer(plan.specs[plan.codes[x.name]])
            inputs.setdefault(x, _Input([], observer)).readers.append(planned)
    if not inputs or not settings.samples:
        return NO_OUTLIERS
    batches, placed = material.first(settings.samples), graph.at(material.place)
    generator = torch.Generator().manual_seed(material.seed)

    def on_value(node: fx.Node, value: Any) -> None:
        if node in inputs and value.numel():
            inputs[node].observe(value, len(batches), generator)

    with torch.inference_mode():
        for done, batch in enumerate(batches, start=1):
            material.passes.run(placed, batch, on_value)
            material.update(done, len(batches))
        found = [each for seen in inputs.values() if seen.rows for each in _judged(settings, graph, plan, seen)]
    return Outliers(tuple(found))


def _judged(settings: OutlierSettings, graph: Graph, plan: Plan, seen: _Input) -> list[Outlier]:
    assert seen.channels is not None
    tokens, places = torch.cat(seen.tokens), torch.cat(seen.places)
    channel_ratio, massive_channels = _massive(seen.channels, settings.ratio)
    token_ratio, massive_tokens = _massive(tokens, settings.ratio)
    if not massive_channels and not massive_tokens:
        return []
    spec, (low, high) = seen.observer.spec, seen.observer.range()
    qparams = activation_qparams(low, high, dtype=spec.dtype, qscheme=spec.qscheme, reduce_range=plan.reduce_range)
    x = torch.cat(seen.rows)
    rounded = on_grid(x, qparams)
    found = []
    for planned in seen.readers:
        weight = float_numbers(graph, planned)[0].to(x.device)
        coded = nearest_codes(graph, planned).weight().to(x.device)
        read = rounded if planned.qconfig.input_terms == 1 else with_second_term(x, rounded, qparams)
        y, error = x @ weight.t(), read @ coded.t()
        signal = (y - y.median(0).values).square().sum(1)
        noise = (y - error).square().sum(1).clamp_min(1e-30)
        kept = float(10 * (signal / noise).median().clamp_min(1e-30).log10())
        found.append(
            Outlier(
                planned.unit.name,
                channel_ratio,
                token_ratio,
                tuple(massive_channels[:LISTED]),
                tuple(dict.fromkeys(places[massive_tokens[: 64 * LISTED]].tolist()))[:LISTED],
                kept,
                settings.fall_back and kept < settings.min_sqnr_db,
            )
        )
    return found


def _massive(largest: torch.Tensor, ratio: float) -> tuple[float, list[int]]:
    """(largest / median, positions of those of `ratio` times the median, the largest first); zeros don't count."""
    occupied = largest[largest > 0]
    if not occupied.numel():
        return 1.0, []
    relative = largest / occupied.median()
    order = relative.argsort(descending=True)
    return float(relative.max()), order[relative[order] >= ratio].tolist()


def _named(what: str, numbers: tuple[int, ...]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
