"""The guard: an algorithm that makes the whole model worse is rolled back.

Algorithms judge what they do layer by layer, and gains of layers do not always add up to a gain of the model. After
each one, on a few samples that it did not see,

    db(model) = -10 log10 mean_o (sum |y_o - y'_o|^2 / sum |y_o|^2)         over the model's outputs o

is measured, y float and y' simulated int8, and what it did is kept if db does not fall by more than MARGIN_DB. Where a
model returns classes or flags only, y are the floating values that these are computed from. Of an algorithm on the
graph, whose parts are independent, halves that do harm are looked for and the rest is kept; parts that cost time at run
time must raise db by more than MARGIN_DB. Graphs are judged with nearest codes in the ranges of those samples:
calibration comes later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from quantflow.algorithms.outcome import Change, Material, Outcome, Rewriting
from quantflow.algorithms.simulate import simulate
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, floating_outputs, interpret
from quantflow.ir.plan import Plan
from quantflow.schema import ActivationSpec, Algorithm
from quantflow.stages.calibrate import calibrate
from quantflow.stages.prepare import Prepared, prepare
from quantflow.stages.refined import Refined, unrefined

#: Samples held out, and the largest share of all that they may be.
SAMPLES, SHARE = 16, 4
#: What the model may lose: less than what another choice of samples changes.
MARGIN_DB = 0.1
_HARM = "rolled back, because it makes the whole model worse"
_NO_WORTH = "rolled back, because it costs time and gains the whole model next to nothing"
#: How many combinations of parts are measured at most; what is undecided by then is rolled back.
MOST_TRIALS = 12


@dataclass(frozen=True)
class Effect:
    """What an algorithm did to the whole model.

    Attributes:
        samples: how many the model was judged on.
        before_db, after_db: `db` without it, and with what was kept of it.
        all_db: with all of it, where it was rolled back in part or as a whole; else None.
    """

    samples: int
    before_db: float
    after_db: float
    all_db: float | None = None

    def notices(self, name: str, parts: int, kept: int) -> tuple[str, ...]:
        """What the user must hear of a rollback."""
        if self.all_db is None:
            return ()
        what = f"{'all' if not kept else parts - kept} of its {parts} changes were rolled back"
        where = f"on {self.samples} held-out calibration samples"
        cure = f"(algorithms: {name} with guard: false keeps them)"
        if not _is_harm(self.before_db, self.all_db):
            gain = f"they cost time at run time and gain the whole model only {self.all_db - self.after_db:.2f} dB"
            return (f"{name}: {what}, because {gain} {where} {cure}",)
        fall = f"with them the whole model falls from {self.before_db:.1f} to {self.all_db:.1f} dB"
        others = f"; with the others it has {self.after_db:.1f} dB" if kept else ""
        return (f"{name}: {what}, because {fall} {where}{others} {cure}",)


class Guard:
    """Judges what algorithms make of one float model."""

    def __init__(self, algorithms: Sequence[Algorithm], graph: Graph, material: Material) -> None:
        """
        Args:
            algorithms: those that will run.
            graph: computes the float model.
            material: all of the calibration data; the guard's own `material` is what algorithms may see of it.
        """
        self._graph = graph.at(material.place)
        self._place = material.place
        is_needed = any(settings.guard for settings in algorithms)
        self._batches, self.material = _held_out(material) if is_needed else ([], material)
        self.samples = sum(batch.size for batch in self._batches)
        self._float: list[list[torch.Tensor]] = []
        self._current: tuple[object, float] | None = None

    def rewritten(
        self, settings: Algorithm, graph: Graph, rewriting: Rewriting, plan_of: Callable[[Graph], Plan]
    ) -> tuple[Graph, Outcome, Effect | None]:
        """The graph with those parts that do no harm to the model; no effect where there are none."""
        whole, outcome = rewriting.whole()
        parts = len(rewriting.changes)
        if not parts or not self._batches or not settings.guard:
            return whole, outcome, None

        def judged(candidate: Graph) -> float:
            prepared = prepare(candidate, plan_of(candidate))
            recorded = _Recorded(prepared.at(self._place), [])
            table = calibrate(recorded, self._batches)
            # All candidates are the same float model up to rounding.
            self._float = self._float or recorded.outputs
            return self._db(prepared, unrefined(prepared, table))

        before, all_db = self._known(graph, lambda: judged(graph)), judged(whole)
        kept, found = list(range(parts)), all_db
        if _is_harm(before, all_db):
            kept, found = _harmless(parts, before, lambda some: judged(rewriting.make(some)[0]))
        cheap = [part for part in kept if part not in rewriting.costly]
        if len(cheap) < len(kept):
            without = judged(rewriting.make(cheap)[0]) if cheap else before
            if not found > without + MARGIN_DB:
                kept, found = cheap, without
        undone = [part for part in range(parts) if part not in kept]
        if undone:
            whole, outcome = rewriting.make(kept)
        self._current = (whole if kept else graph, found)
        reason = _HARM if _is_harm(before, all_db) else _NO_WORTH
        effect = Effect(self.samples, before, found, all_db if undone else None)
        return (
            whole if kept else graph,
            _told(
                outcome,
                [rewriting.changes[part] for part in undone],
                reason,
                effect.notices(settings.name, parts, len(kept)),
            ),
            effect,
        )

    def refined(
        self, settings: Algorithm, prepared: Prepared, before: Refined, after: Refined, outcome: Outcome
    ) -> tuple[Refined, Outcome, Effect | None]:
        """The numbers after the algorithm, or those before it where it does harm to the model."""
        if after is before or not self._batches or not settings.guard:
            return after, outcome, None
        was, now = self._known(before, lambda: self._db(prepared, before)), self._db(prepared, after)
        if not _is_harm(was, now):
            self._current = (after, now)
            return after, outcome, Effect(self.samples, was, now)
        effect, undone = Effect(self.samples, was, was, now), outcome.changes
        notices = effect.notices(settings.name, len(undone), 0)
        return before, _told(replace(outcome, changes=()), undone, _HARM, notices), effect

    def _known(self, product: object, measure: Callable[[], float]) -> float:
        if self._current is None or self._current[0] is not product:
            self._current = (product, measure())
        return self._current[1]

    def _db(self, prepared: Prepared, refined: Refined) -> float:
        if not self._float:
            graph = self._graph
            with torch.inference_mode():
                self._float = [_outputs(graph, batch) for batch in self._batches]
        placed = prepared.at(self._place)
        signal, noise = ([0.0] * len(self._float[0]) for _ in range(2))
        for batch, wanted in zip(self._batches, self._float, strict=True):
            simulated = floating_outputs(
                placed.graph, lambda on_value, batch=batch: simulate(placed, refined, batch, on_value)
            )
            for o, (y, found) in enumerate(zip(wanted, simulated, strict=True)):
                masked = y.isinf() & (y == found)
                signal[o] += float(y.masked_fill(masked, 0).square().sum(dtype=torch.float64))
                noise[o] += float((y - found).masked_fill(masked, 0).square().sum(dtype=torch.float64))
        shares = [n / s if s > 0 else math.inf if n > 0 else 0.0 for s, n in zip(signal, noise, strict=True)]
        share = sum(shares) / max(len(shares), 1)
        return -10 * math.log10(share) if share > 0 else math.inf


@dataclass(frozen=True)
class _Recorded:
    """What calibration runs, and the outputs of each batch."""

    prepared: Prepared
    outputs: list[list[torch.Tensor]]

    @property
    def observed(self) -> Mapping[str, ActivationSpec]:
        return self.prepared.observed

    @property
    def layers(self) -> Mapping[str, str]:
        return self.prepared.layers

    def run(self, batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> None:
        def observed(node: fx.Node, value: Any) -> None:
            if node.name in self.observed:
                on_value(node.name, value)

        self.outputs.append(_outputs(self.prepared.graph, batch, observed))


def _outputs(
    graph: Graph, batch: Batch, on_value: Callable[[fx.Node, Any], None] = lambda *_: None
) -> list[torch.Tensor]:
    """What is judged of a float run."""

    def run(keep: Callable[[fx.Node, Any], None]) -> Any:
        def both(node: fx.Node, value: Any) -> None:
            on_value(node, value)
            keep(node, value)

        return interpret(graph, bind(graph, batch.args, batch.kwargs), both)

    return floating_outputs(graph, run)


def _harmless(parts: int, before_db: float, judged: Callable[[Sequence[int]], float]) -> tuple[list[int], float]:
    """Those of the parts that together do no harm, found by halving, and what the model has with them."""
    kept, found = list[int](), before_db
    pending = [list(range(parts // 2, parts)), list(range(parts // 2))] if parts > 1 else []
    for _ in range(MOST_TRIALS):
        if not pending:
            break
        tried = pending.pop()
        value = judged(sorted([*kept, *tried]))
        if not _is_harm(found, value):
            kept, found = sorted([*kept, *tried]), value
        elif len(tried) > 1:
            pending += [tried[len(tried) // 2 :], tried[: len(tried) // 2]]
    return kept, found


def _told(outcome: Outcome, undone: Sequence[Change], reason: str, notices: Sequence[str]) -> Outcome:
    """The outcome with what was rolled back."""
    skipped = (*outcome.skipped, *((change.layer, reason) for change in undone))
    return replace(outcome, skipped=skipped, notices=(*outcome.notices, *notices))


def _is_harm(before_db: float, after_db: float) -> bool:
    """Whether a model lost more than it may; NaN is the worst there is."""
    return not math.isnan(before_db) and not after_db >= before_db - MARGIN_DB


def _held_out(material: Material) -> tuple[list[Batch], Material]:
    """The last samples, and the material without them; a single batch that can't be cut serves both."""
    batches, can_cut = material.batches, material.batch_is_dynamic
    kept, judging = len(batches), list[Batch]()
    while len(judging) < len(batches) // SHARE and sum(batch.size for batch in judging) < SAMPLES:
        kept -= 1
        judging.insert(0, batches[kept])
    if judging or not batches:
        some = replace(material, batches=judging).first(SAMPLES)
        return some, replace(material, batches=_First(batches, kept))
    last = batches[-1]
    share = min(SAMPLES, last.size // SHARE)
    if not can_cut or not share:
        return [last], material
    return [last.tail(share)], replace(material, batches=_First(batches, kept - 1, last.head(last.size - share)))


class _First(Sequence[Batch]):
    """The first batches, and one more; each is loaded when it is asked for."""

    def __init__(self, batches: Sequence[Batch], count: int, *more: Batch) -> None:
        self._batches, self._count, self._more = batches, count, more

    def __len__(self) -> int:
        return self._count + len(self._more)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return self._batches[position] if position < self._count else self._more[position - self._count]
