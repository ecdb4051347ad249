"""The fastest int8 model that keeps its distance to float: which layers are made more exact, and how.

1. Try the recipe as it is. If it keeps the limits, nothing is left to search.
2. What costs little or no speed: other activation codes, presets of accuracy algorithms where the recipe asks for none,
   and without algorithms other observers, for the whole model and for its worst layers. Keep what lowers the error.
3. Three steps can be taken per layer: its weight in two int8 terms, its input in two, and float. Rank all of them by
   the noise that each takes away per millisecond that it costs (`quantflow.search.sensitivity`).
4. Take more and more of that order's first steps, from the cheapest program on, until one keeps the limits: errors of
   layers do not add up, so each try is the whole program, measured, and none follows from another. Then take steps
   back, the poorest first, many at once and then one by one, while the limits are kept. Again in the order of noise
   alone, and both again with float as the only step, as far as these could be faster than what was found. First the
   programs that take at most CHEAP of the start's time; dearer ones only if none of these keeps the limits.
5. From what was found, the fastest first: exchange steps for others that should cost less, the dearest first, as long
   as that makes it faster.
6. Where a limit counts samples, a few samples near a tie decide, and of programs that cost the same one keeps it and
   the next does not. There, before anything dearer than CHEAP and again at the end, steps are drawn, the better ones
   more often, for programs that should be faster than what was found.
7. Time the best few of what keeps the limits against each other, at length; the fastest is the result.

Layers are ranked on calibration samples and the limits judged on the evaluation samples, so that no ranking is made by
the noise of the samples it is judged by. That the best of many programs is one that these samples favour can't be
helped; the verdict says how many there were. Every measurement is in a journal, and every decision is a function of it.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import TypeAdapter

from quantflow.errors import NothingQuantizedError
from quantflow.schema import (
    PRESETS,
    ActivationOverride,
    Algorithm,
    ConstraintSettings,
    GatesSettings,
    LayerOverride,
    TuneSettings,
    WeightOverride,
)
from quantflow.schema.algorithms import Algorithms
from quantflow.search.sensitivity import FLOAT_ALONE, INT8_ALONE, TERMS, noise_db
from quantflow.search.workbench import FLOAT, INPUT_TERMS, ROUNDS, WEIGHT_TERMS, Setting
from quantflow.stages.gates import GateResult, evaluate_gates
from quantflow.store.journal import Journal

_ALGORITHMS: TypeAdapter[tuple[Algorithm, ...]] = TypeAdapter(Algorithms)
MET, NOT_MET = "met", "not met"
#: Layers whose observers are tried one by one.
WORST_LAYERS = 6
#: Of the budget, for an algorithm that can be stopped.
ALGORITHM_SHARE = 0.25
#: SQNR that another observer must win.
WORTHWHILE_DB = 0.05
#: SQNR that other activation codes must win.
CODES_WORTHWHILE_DB = 0.5
#: Settings that are timed against each other at the end.
FINALISTS = 3
#: Share of the start's latency below which an added time is noise.
LEAST_COST = 0.002
#: Share of the start's latency that is tried in full before anything slower.
CHEAP = 1.25
#: What each program of a row adds at least to the one before: of the start's latency, and of what was added so far.
LEAST_ADDED, ADDED_SHARE = 0.015, 0.1
#: Shares of a step's milliseconds that those in its place may cost.
EXCHANGE = (0.75, 0.5, 0.25)
#: Programs whose steps are exchanged.
EXCHANGED = 4
#: Programs drawn each time, the least share of the milliseconds to spend, and the deviation of a ratio's logarithm.
DRAWS, LEAST_DRAWN, CHANCE = 300, 0.5, 1.0
#: A finalist must be this much faster to go before the one found first.
FASTER = 0.98


class Bench(Protocol):
    """Measures what the search asks for."""

    def ranking_errors(self, setting: Setting) -> dict[str, Any]:
        """Error against float on the ranking samples."""

    def accuracy(self, setting: Setting) -> dict[str, Any]:
        """Error against float on the evaluation samples: the `accuracy` section of the results."""

    def latency(self, setting: Setting, rounds: int = ROUNDS) -> dict[str, Any]:
        """{"ms", "start_ms", "relative"}: beside the start."""


@dataclass(frozen=True)
class Trial:
    """A setting with what was measured of it. `latency` is None where the limits are not kept."""

    setting: Setting
    accuracy: Mapping[str, Any]
    latency: Mapping[str, Any] | None
    gates: tuple[GateResult, ...]

    @property
    def holds(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def shortfall(self) -> float:
        """How far the limits are missed, in units of each limit; infinite for a figure that could not be measured."""
        missed = [gate for gate in self.gates if not gate.passed]
        return sum(
            float("inf") if gate.value is None else abs(gate.value - gate.limit) / max(abs(gate.limit), 1e-9)
            for gate in missed
        )

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts the best first: what keeps the limits by latency, the rest by what is missing."""
        return (not self.holds, self.latency["relative"] if self.latency is not None else self.shortfall)


@dataclass(frozen=True)
class SearchOutcome:
    """What the search came to. `best` keeps the limits where `verdict` is met, else it comes closest."""

    verdict: str
    text: str
    best: Trial
    trials: int
    stopped_early: bool


class BudgetSpent(Exception):
    """The next measurement would not end in time."""


@dataclass
class Search:
    """One search.

    Attributes:
        sensitivity: `measure_sensitivity` of a setting; calls its second argument before each layer it measures.
        reserve_s: what must be left of the budget for the artifact.
        spent_s: seconds spent so far, in this process and in those it goes on from.
        on_best: called with each trial that is better than all before it.
        progress: called with the seconds spent and the budget.
    """

    bench: Bench
    sensitivity: Callable[[Setting, Callable[[], None]], Mapping[str, Any]]
    settings: TuneSettings
    journal: Journal
    reserve_s: float = 0.0
    spent_s: Callable[[], float] = time.perf_counter
    on_best: Callable[[Trial], None] = lambda _: None
    progress: Callable[[int, int | None], None] = lambda *_: None
    _trials: dict[str, Trial] = field(default_factory=dict)
    _best: Trial | None = None
    _longest_s: dict[str, float] = field(default_factory=dict)

    def run(self, start: Setting) -> SearchOutcome:
        """The search; deterministic given the journal."""
        stopped = False
        self._trial(start, asked=True)
        try:
            if not self._trials[start.digest].holds:
                self._search(start)
        except BudgetSpent:
            stopped = True
        best = self._final(stopped)
        return SearchOutcome(
            MET if best.holds else NOT_MET, self._text(best, stopped), best, len(self._trials), stopped
        )

    # -- the steps

    def _search(self, start: Setting) -> None:
        setting = self._algorithms(self._codes(start))
        if not setting.algorithms:
            setting = self._whole_model(setting)
        if self._trial(setting).holds:
            return
        rows = self.sensitivity(setting, lambda: self._require_time("layer"))["layers"]
        if not setting.algorithms:
            setting = self._worst_layers(setting, [row["layer"] for row in rows[:WORST_LAYERS]])
            if self._trial(setting).holds:
                return
        start_ms = self._start_ms(start)
        least_ms = start_ms * LEAST_COST
        steps = possible_steps(rows, least_ms)
        in_float = possible_steps(rows, least_ms, terms={})
        orders = [order for some in (steps, in_float) for order in (by_ratio(some), by_noise(some))]
        others = [*by_ratio(steps), *in_float]
        drawing = random.Random(0)
        found: list[list[Step]] = []
        for most in (CHEAP, math.inf):
            for order in orders:
                found += self._fewest_steps(setting, order, start_ms, most)
            if self._counts_samples and math.isfinite(most):
                found += self._drawn(setting, others, start_ms, drawing)
            if found:
                break
        for kept in sorted(found, key=lambda kept: self._trial(setting.with_changes(taken(kept))).rank)[:EXCHANGED]:
            self._exchange(setting, kept, others)
        if self._counts_samples and found:
            for kept in self._drawn(setting, others, start_ms, drawing):
                self._exchange(setting, kept, others)

    def _codes(self, start: Setting) -> Setting:
        """The activation codes of the preset that gives the least error; they may cost speed, so it has to pay."""
        best, least = start, self._ranking_db(start)
        for preset in self.settings.qconfigs:
            spec = PRESETS[preset].activation
            codes = {"dtype": spec.dtype, "qscheme": spec.qscheme}
            activation = start.qconfig.activation.model_copy(update=codes)
            if activation == start.qconfig.activation:
                continue
            tried = replace(start, qconfig=start.qconfig.model_copy(update={"activation": activation}))
            sqnr_db = self._ranking_db(tried)
            if sqnr_db > least + CODES_WORTHWHILE_DB:
                best, least = tried, sqnr_db
        return best

    def _algorithms(self, start: Setting) -> Setting:
        """The preset of algorithms that gives the least error, where the recipe asks for none."""
        best, least = start, self._ranking_db(start)
        for preset in self.settings.algorithms if not start.algorithms else ():
            tried = replace(start, algorithms=tuple(map(self._bounded, _ALGORITHMS.validate_python(preset))))
            sqnr_db = self._ranking_db(tried)
            if sqnr_db > least + WORTHWHILE_DB:
                best, least = tried, sqnr_db
        return best

    def _bounded(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm, which may take no more than its share of the budget where it can be told so."""
        if "max_seconds" not in type(algorithm).model_fields:
            return algorithm
        most = min(algorithm.max_seconds, self.settings.time_budget_s * ALGORITHM_SHARE)
        return algorithm.model_copy(update={"max_seconds": most})

    def _whole_model(self, start: Setting) -> Setting:
        """The observers for all activations and all weights that give the least error."""
        best, least = start, self._ranking_db(start)
        for part in ("activation", "weight"):
            for observer in self.settings.observers:
                spec = getattr(best.qconfig, part)
                if spec.observer == observer:
                    continue
                qconfig = best.qconfig.model_copy(update={part: spec.model_copy(update={"observer": observer})})
                tried = replace(best, qconfig=qconfig)
                sqnr_db = self._ranking_db(tried)
                if sqnr_db > least + WORTHWHILE_DB:
                    best, least = tried, sqnr_db
        return best

    def _worst_layers(self, setting: Setting, names: Sequence[str]) -> Setting:
        """The same layer by layer, for those that cost most with the setting so far."""
        best, least = setting, self._ranking_db(setting)
        for name in names:
            for observer in self.settings.observers:
                for part, spec in (("activation", setting.qconfig.activation), ("weight", setting.qconfig.weight)):
                    override = with_observer(best.layers.get(name), part, observer)
                    if spec.observer == observer or override is None:
                        continue
                    tried = best.with_layers({name: override})
                    sqnr_db = self._ranking_db(tried)
                    if sqnr_db > least + WORTHWHILE_DB:
                        best, least = tried, sqnr_db
        return best

    def _fewest_steps(
        self, setting: Setting, order: Sequence[Step], start_ms: float, most: float
    ) -> Iterator[list[Step]]:
        """The cheapest prefix of the order that keeps the limits, then without every step that can be spared.

        Args:
            most: times the start's latency that it may take.

        Yields:
            Those steps; nothing where no prefix keeps the limits that could be faster than what does already.
        """

        def holds(steps: Sequence[Step]) -> bool:
            return self._trial(setting.with_changes(taken(steps))).holds

        kept: list[Step] = []
        for count, relative in prefixes(order, start_ms):
            if relative > min(most, self._to_beat()):
                return
            if holds(order[:count]):
                kept = list(order[:count])
                break
        if not kept:
            return
        size = max(1, len(kept) // 3)
        while size:
            for end in range(len(kept), 0, -size):
                fewer = kept[: max(end - size, 0)] + kept[end:]
                if taken(fewer) != taken(kept) and holds(fewer):
                    kept = fewer
            size //= 3
        yield kept

    def _drawn(
        self, setting: Setting, steps: Sequence[Step], start_ms: float, drawing: random.Random
    ) -> Iterator[list[Step]]:
        """What keeps the limits of DRAWS programs that should be faster than the best one, and than CHEAP."""
        for _ in range(DRAWS):
            ms = (min(CHEAP, self._to_beat()) - 1) * start_ms * drawing.uniform(LEAST_DRAWN, 1)
            tried = drawn(steps, ms, drawing)
            if tried and self._trial(setting.with_changes(taken(tried))).holds:
                yield tried

    @property
    def _counts_samples(self) -> bool:
        limits = self.settings.subject_to
        return limits.min_agreement is not None or limits.max_accuracy_drop is not None

    def _to_beat(self) -> float:
        """Share of the start's latency that the best program takes; infinite where none keeps the limits."""
        if self._best is None or not self._best.holds or self._best.latency is None:
            return math.inf
        return float(self._best.latency["relative"])

    def _exchange(self, setting: Setting, kept: Sequence[Step], steps: Sequence[Step]) -> None:
        """Each step in turn for the first others that together should cost less, while the program gets faster."""
        trial = self._trial(setting.with_changes(taken(kept)))
        improved = True
        while improved:
            improved = False
            for step, share in itertools.product(sorted(kept, key=lambda step: -step.ms), EXCHANGE):
                others = exchanged(step, kept, steps, share * step.ms)
                found = self._trial(setting.with_changes(taken(others)))
                if found.rank < trial.rank:
                    kept, trial, improved = others, found, True
                    break

    def _final(self, stopped: bool) -> Trial:
        """The fastest of the best few, timed once more and longer than before."""
        assert self._best is not None
        finalists = sorted((t for t in self._trials.values() if t.holds), key=lambda t: t.rank)[:FINALISTS]
        if len(finalists) < 2 or (stopped and not self._knows("final", finalists)):
            return self._best
        best, least = finalists[0], float("inf")
        for trial in finalists:
            try:
                latency = self._measure(
                    f"final {trial.setting.digest}",
                    "final",
                    lambda t=trial: self.bench.latency(t.setting, 3 * ROUNDS),  # type: ignore[misc]
                )
            except BudgetSpent:
                break
            if latency["relative"] < least * FASTER:
                timed = {key: value for key, value in latency.items() if key != "seconds"}
                best, least = replace(trial, latency=timed), latency["relative"]
        return best

    # -- measurements

    def _trial(self, setting: Setting, *, asked: bool = False) -> Trial:
        """The whole program on the evaluation samples; timed where it keeps the limits."""
        if setting.digest in self._trials:
            return self._trials[setting.digest]

        def work() -> dict[str, Any]:
            try:
                accuracy = self.bench.accuracy(setting)
            except NothingQuantizedError as error:
                return {"setting": setting.to_json(), "impossible": str(error)}
            holds = all(gate.passed for gate in judged(self.settings.subject_to, accuracy))
            latency = self.bench.latency(setting) if holds or asked else None
            return {"setting": setting.to_json(), "accuracy": accuracy, "latency": latency}

        record = self._measure(f"trial {setting.digest}", "trial", work, always=asked)
        accuracy = record.get("accuracy", {})
        trial = Trial(setting, accuracy, record.get("latency"), tuple(judged(self.settings.subject_to, accuracy)))
        self._trials[setting.digest] = trial
        if self._best is None or trial.rank < self._best.rank:
            self._best = trial
            self.on_best(trial)
        return trial

    def _ranking_db(self, setting: Setting) -> float:
        name = f"ranking {setting.digest}"
        return float(self._measure(name, "ranking", lambda: _only_db(self.bench.ranking_errors(setting)))["sqnr_db"])

    def _start_ms(self, start: Setting) -> float:
        latency = self._trials[start.digest].latency
        assert latency is not None
        return float(latency["ms"])

    def _measure(
        self, name: str, kind: str, work: Callable[[], Mapping[str, Any]], *, always: bool = False
    ) -> dict[str, Any]:
        if name not in self.journal.records and not always:
            self._require_time(kind)
        record = self.journal.measure(name, work)
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), record["seconds"])
        return record

    def _require_time(self, kind: str) -> None:
        """
        Raises:
            BudgetSpent: a measurement as long as the longest of its kind would end too late.
        """
        self.progress(int(self.spent_s()), int(self.settings.time_budget_s))
        needed = self._longest_s.get(kind, 0.0) + self.reserve_s
        if self.spent_s() + needed > self.settings.time_budget_s:
            raise BudgetSpent

    def _knows(self, kind: str, trials: Sequence[Trial]) -> bool:
        return all(f"{kind} {trial.setting.digest}" in self.journal.records for trial in trials)

    def _text(self, best: Trial, stopped: bool) -> str:
        """The verdict in a sentence."""
        figures = "; ".join(f"{gate.name} {gate.text}" for gate in best.gates)
        changes = [change for _, change in best.setting.changes]
        made = (
            f"{changes.count(FLOAT)} layers in float, {changes.count(WEIGHT_TERMS)} weights and "
            f"{changes.count(INPUT_TERMS)} inputs in two terms"
        )
        budget = f"the {self.settings.time_budget_s:g} s of tune.time_budget_s were over"
        if not best.holds:
            why = budget if stopped else "all but one layer in float do not reach it either"
            return f"the target was not reached ({why}); what comes closest has {made}: {figures}"
        assert best.latency is not None
        speed = f"{100 / best.latency['relative']:.0f} % of the speed of the recipe as it was"
        chance = (
            f"; it is the best of {len(self._trials)} programs judged on the same {best.accuracy['samples']} samples, "
            "so expect a little less on others"
            if self._counts_samples and len(self._trials) > 1
            else ""
        )
        return f"{figures}, with {made}, at {speed}{chance}{f'; the search stopped when {budget}' if stopped else ''}"


def judged(limits: ConstraintSettings, accuracy: Mapping[str, Any]) -> list[GateResult]:
    """The limits held against measured accuracy, as gates."""
    return evaluate_gates(GatesSettings(**limits.model_dump()), {"accuracy": accuracy})


@dataclass(frozen=True)
class Step:
    """A layer made more exact: the share of all noise that this takes away, and the milliseconds that it adds.

    Float after terms is a step of its own: what it takes away and adds beyond them.
    """

    layer: str
    change: str
    noise: float
    ms: float


def possible_steps(rows: Sequence[Mapping[str, Any]], least_ms: float, terms: Mapping[str, str] = TERMS) -> list[Step]:
    """All steps worth taking, from a sensitivity's rows; the least harmful linear layer is never made float.

    Args:
        least_ms: an added time below this is noise, and counts as this.
        terms: the changes short of float that may be steps, by their kind in the rows.
    """
    linear = [row["layer"] for row in rows if any(row[kind] is not None for kind in TERMS)]
    linear = linear or [row["layer"] for row in rows]
    steps = []
    for row in rows:

        def step(change: str, kind: str, noise: float, row: Mapping[str, Any] = row) -> Step:
            return Step(row["layer"], change, noise, max(row[kind]["added_ms"], least_ms))

        alone = row[INT8_ALONE]
        exact = step(FLOAT, FLOAT_ALONE, row[FLOAT_ALONE]["noise_back"] if alone is None else alone["noise"])
        given = [(change, kind) for kind, change in terms.items() if row[kind] is not None]
        for term in by_ratio([step(change, kind, exact.noise - row[kind]["noise"]) for change, kind in given]):
            beyond = replace(exact, noise=exact.noise - term.noise, ms=max(exact.ms - term.ms, least_ms))
            if term.noise > 0 and term.noise / term.ms > beyond.noise / beyond.ms:
                steps.append(term)
                exact = beyond
        if row["layer"] != linear[-1]:
            steps.append(exact)
    return steps


def by_ratio(steps: Sequence[Step]) -> list[Step]:
    """Best first by noise taken away per millisecond added."""
    return sorted(steps, key=lambda step: -step.noise / step.ms)


def prefixes(order: Sequence[Step], start_ms: float) -> Iterator[tuple[int, float]]:
    """Prefixes of an order that are worth a try: how many steps, and the share of the start's time they should take."""
    added = tried = 0.0
    for count, step in enumerate(order, start=1):
        added += step.ms
        if count in (1, len(order)) or added - tried >= max(LEAST_ADDED * start_ms, ADDED_SHARE * tried):
            yield count, 1 + added / start_ms
            tried = added


def by_noise(steps: Sequence[Step]) -> list[Step]:
    """Best first by noise taken away."""
    return sorted(steps, key=lambda step: -step.noise)


def taken(steps: Sequence[Step]) -> set[tuple[str, str]]:
    """The changes that some steps come to, whatever their order: a layer in float needs no terms."""
    in_float = {step.layer for step in steps if step.change == FLOAT}
    return {(step.layer, step.change) for step in steps if step.change == FLOAT or step.layer not in in_float}


def drawn(steps: Sequence[Step], ms: float, drawing: random.Random) -> list[Step]:
    """Steps that together cost these milliseconds at most: the best by ratio, had chance not changed each."""
    chosen: list[Step] = []
    for step in sorted(steps, key=lambda step: -step.noise / step.ms * drawing.lognormvariate(0, CHANCE)):
        in_float = {other.layer for other in chosen if other.change == FLOAT}
        if step.ms <= ms and step.noise > 0 and step.layer not in in_float:
            chosen.append(step)
            ms -= step.ms
    return chosen


def exchanged(step: Step, kept: Sequence[Step], steps: Sequence[Step], ms: float) -> list[Step]:
    """Without a step, and with as many of the others as together cost these milliseconds, in the order they come."""
    left = [other for other in kept if other is not step]
    in_float = {other.layer for other in left if other.change == FLOAT}
    for other in steps:
        change = (other.layer, other.change)
        new = other.layer not in in_float and change != (step.layer, step.change) and change not in taken(left)
        if new and other.noise > 0 and other.ms <= ms:
            left.append(other)
            ms -= other.ms
    return left


def with_observer(layer: str | LayerOverride | None, part: str, observer: str) -> LayerOverride | None:
    """A layer's settings with another observer; None where the recipe already chose one, or float."""
    layer = LayerOverride() if layer in (None, "int8") else layer
    if not isinstance(layer, LayerOverride) or getattr(layer, part).observer is not None:
        return None
    if part == "activation":
        changed: ActivationOverride | WeightOverride = layer.activation.model_copy(update={"observer": observer})
    else:
        changed = layer.weight.model_copy(update={"observer": observer})
    return layer.model_copy(update={part: changed})


def _only_db(errors: Mapping[str, Any]) -> dict[str, Any]:
    return {"sqnr_db": noise_db(errors)}
