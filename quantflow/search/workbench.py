"""Measures settings of one model: how far each is from float, and how long it takes.

sensitivity and tune both work at it; neither captures, calibrates or runs the float model a second time.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantflow.executor.built import Converted
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.program import Node, Program
from quantflow.ir.units import CORE, MATMUL
from quantflow.runtimes import Choice
from quantflow.schema import Algorithm, LayerOverride, QConfig
from quantflow.search.variants import Layers, Variants
from quantflow.stages import benchmark as timing
from quantflow.stages.compile import Compiled, compile_program
from quantflow.stages.evaluate import evaluate

#: How a layer is made more exact.
FLOAT, WEIGHT_TERMS, INPUT_TERMS = "float", "weight in two terms", "input in two terms"
#: Two programs take turns this often and this long, and the median of the rounds' ratios counts.
ROUNDS, ROUND_MS = 7, 40.0
#: Runs that a kernel's least time is taken from, each time that it is.
PROFILE_RUNS = 10


@dataclass(frozen=True)
class Setting:
    """What of a recipe a search may change.

    `changes` are pairs of a layer's exact name and how it is made more exact; one in float has no other.
    """

    algorithms: tuple[Algorithm, ...]
    qconfig: QConfig
    layers: Layers = field(default_factory=dict)
    changes: tuple[tuple[str, str], ...] = ()

    def with_layers(self, changed: Layers) -> Setting:
        """These layers changed, by exact name; the other patterns stay in their order."""
        return replace(self, layers={**self.layers, **changed})

    def with_changes(self, changes: Iterable[tuple[str, str]]) -> Setting:
        """Those changes and no others."""
        return replace(self, changes=tuple(sorted(set(changes))))

    @property
    def changed_layers(self) -> Layers:
        """The changes as entries of `layers`."""
        changed: dict[str, str | LayerOverride] = {}
        for name, change in self.changes:
            before = changed.get(name, self.layers.get(name))
            changed[name] = FLOAT if change == FLOAT else _in_two_terms(change, before)
        return changed

    @property
    def all_layers(self) -> Layers:
        """`layers` of the recipe that makes this setting."""
        return {**self.layers, **self.changed_layers}

    def to_json(self) -> dict[str, Any]:
        layers = {
            name: value.model_dump(mode="json") if isinstance(value, LayerOverride) else value
            for name, value in self.all_layers.items()
        }
        algorithms = [settings.model_dump(mode="json") for settings in self.algorithms]
        return {"algorithms": algorithms, "qconfig": self.qconfig.model_dump(mode="json"), "layers": layers}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the setting."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Candidate:
    """A layer that runs in int8, and how it can be made more exact."""

    name: str
    op: str
    changes: tuple[str, ...]


class Yardstick:
    """Compares models with the float model on fixed samples; the float model runs once."""

    def __init__(
        self,
        float_model: Callable[..., Any],
        batches: Sequence[Batch],
        *,
        metric: str | None = None,
        outputs: str = "other",
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.batches = list(batches)
        self._metric, self._kind = metric, outputs
        self._outputs = []
        with torch.inference_mode():
            for done, batch in enumerate(self.batches, start=1):
                self._outputs.append(float_model(*batch.args, **batch.kwargs))
                if progress is not None:
                    progress(done, len(self.batches))

    def errors(self, call: Callable[..., Any]) -> dict[str, Any]:
        """The `accuracy` section of the results for a model, without what is listed per sample or output."""
        outputs = iter(self._outputs)
        found = evaluate(lambda *_, **__: next(outputs), call, self.batches, metric=self._metric, outputs=self._kind)
        return {key: value for key, value in found.items() if key not in ("cosine_per_sample", "others")}


class Workbench:
    """Settings in, figures out."""

    def __init__(
        self,
        variants_of: Callable[[tuple[Algorithm, ...]], Variants],
        choice: Choice,
        start: Setting,
        batch: Batch,
        ranking: Yardstick,
        evaluation: Yardstick | None = None,
    ) -> None:
        """
        Args:
            variants_of: the model as a list of algorithms leaves it.
            start: the recipe's own setting; the others are timed beside it.
            batch: what is timed.
            ranking: the samples that layers are ranked on; not those that a search is judged by.
            evaluation: those.
        """
        self.start = start
        self._variants_of = variants_of
        self._variants: dict[tuple[Algorithm, ...], Variants] = {}
        self.choice = choice
        self._batch = batch
        self._ranking = ranking
        self._evaluation = evaluation
        self._built: tuple[Setting, Converted, Compiled] | None = None
        self._first: Compiled | None = None
        self._profiled: tuple[Setting, Compiled] | None = None
        self._pieces: list[dict[str, Any]] | None = None

    def variants(self, setting: Setting) -> Variants:
        """The model as the setting's algorithms leave it."""
        if setting.algorithms not in self._variants:
            self._variants[setting.algorithms] = self._variants_of(setting.algorithms)
        return self._variants[setting.algorithms]

    def variant(self, setting: Setting) -> Converted:
        return self._build(setting)[0]

    def candidates(self, setting: Setting) -> list[Candidate]:
        """The convolutions, linears and matmuls that run in int8."""
        planned = [p for p in self.variant(setting).plan.units if p.is_int8 and p.unit.kind in (CORE, MATMUL)]
        swaps = self.variants(setting).imperative is not None

        def changes(p: PlannedUnit) -> tuple[str, ...]:
            if p.unit.kind != CORE or swaps:
                return (FLOAT,)
            terms = {WEIGHT_TERMS: p.qconfig.weight.terms, INPUT_TERMS: p.qconfig.input_terms}
            return (FLOAT, *(change for change, given in terms.items() if given == 1))

        return [Candidate(p.unit.name, p.unit.layer_type, changes(p)) for p in planned]

    def ranking_errors(self, setting: Setting) -> dict[str, Any]:
        """Against float, on the ranking samples."""
        return self._ranking.errors(self._build(setting)[1])

    def accuracy(self, setting: Setting) -> dict[str, Any]:
        """Against float, on the evaluation samples."""
        return self.judge(self._build(setting)[1])

    def judge(self, call: Callable[..., Any]) -> dict[str, Any]:
        """The same for any callable."""
        assert self._evaluation is not None
        return self._evaluation.errors(call)

    def added_ms(self, setting: Setting, changed: Setting) -> float:
        """What a change adds to the latency: the time of the kernels that differ, all others left out as noise.

        Both take turns, and the median of the rounds' differences counts: a machine's pace changes within seconds.
        """
        if self._profiled is None or self._profiled[0] != setting:
            self._profiled = setting, self._build(setting)[1]
        before, after = self._profiled[1], self._build(changed)[1]
        touched = differing(before.program, after.program)
        inputs = bind(before.program, self._batch.args, self._batch.kwargs)

        def ms(compiled: Compiled) -> float:
            rows = compiled.runner.profile(inputs, PROFILE_RUNS)
            return sum(row["ms"] for row in rows if row["name"] in touched)

        return statistics.median(ms(after) - ms(before) for _ in range(ROUNDS))

    def latency(self, setting: Setting, rounds: int = ROUNDS) -> dict[str, Any]:
        """Latency of the setting and of `start`, taking turns; `relative` is the median of the rounds' ratios."""
        compiled = self._build(setting)[1]
        self._first = self._first or self._build(self.start)[1]
        first, batch = self._first, self._batch
        timings = timing.interleaved(
            {
                "start": lambda: first(*batch.args, **batch.kwargs),
                "ms": lambda: compiled(*batch.args, **batch.kwargs),
            },
            rounds=rounds,
            min_round_ms=ROUND_MS,
        )
        ratios = [b / a for a, b in zip(timings["start"].rounds, timings["ms"].rounds, strict=True)]
        return {
            "ms": timings["ms"].median_ms,
            "start_ms": timings["start"].median_ms,
            "relative": statistics.median(ratios),
        }

    def _build(self, setting: Setting) -> tuple[Converted, Compiled]:
        """The last one built is kept: most questions about a setting follow each other."""
        if self._built is None or self._built[0] != setting:
            self._built = None
            variant = self.variants(setting).build(setting.qconfig, setting.layers, setting.changed_layers)
            compiled = compile_program(variant.program, self.choice)
            self._cut_batches(compiled)
            self._built = (setting, variant, compiled)
        return self._built[1:]

    def _cut_batches(self, compiled: Compiled) -> None:
        """Have the program run judged batches in pieces where that is faster, as the first one to be built told."""
        judged = (self._evaluation or self._ranking).batches[0]
        if judged.size == self._batch.size:
            return  # nor what is timed
        if self._pieces is None:
            self._pieces = compiled.runner.tune(bind(compiled.program, judged.args, judged.kwargs))
        compiled.runner.adopt(self._pieces)


def _in_two_terms(change: str, layer: str | LayerOverride | None) -> LayerOverride:
    layer = layer if isinstance(layer, LayerOverride) else LayerOverride()
    if change == INPUT_TERMS:
        return layer.model_copy(update={"input_terms": 2})
    return layer.model_copy(update={"weight": layer.weight.model_copy(update={"terms": 2})})


def differing(a: Program, b: Program) -> set[str]:
    """Names of the nodes that are not the same work in both programs."""
    first, second = ({_signature(node, program) for node in program.nodes} for program in (a, b))
    return {signature[0] for signature in first ^ second}


def _signature(node: Node, program: Program) -> tuple[str, str, str, tuple[str, ...], bool]:
    return node.name, node.fused_name, node.target, tuple(node.refs()), node.output in program.values
