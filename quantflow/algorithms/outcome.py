"""What an algorithm did: the entry of `algorithms` in the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.float_passes import NOTHING_HELD, FloatPasses
from quantflow.ir.graph import Graph

Update = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Change:
    """One layer, before and after, in the algorithm's own measure (SQNR in dB of the layer's output where not said)."""

    layer: str
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one algorithm changed.

    Attributes:
        measure: what `before` and `after` are.
        skipped: layer → why the algorithm left it alone.
        notices: what the user must not miss.
    """

    measure: str
    changes: tuple[Change, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "layers": [asdict(change) for change in self.changes],
            "skipped": [{"layer": layer, "reason": reason} for layer, reason in self.skipped],
        }


@dataclass(frozen=True)
class Rewriting:
    """What a graph algorithm would change, in parts: with any of them alone, too, the float function stays.

    Attributes:
        changes: one per part.
        make: the numbers of parts → the graph with those changed, and what was done.
        costly: the parts that make the model slower.
    """

    changes: tuple[Change, ...]
    make: Callable[[Sequence[int]], tuple[Graph, Outcome]]
    costly: frozenset[int] = frozenset()

    def whole(self) -> tuple[Graph, Outcome]:
        """All parts."""
        return self.make(range(len(self.changes)))


@dataclass(frozen=True)
class Material:
    """What an algorithm works with besides its settings.

    Attributes:
        batches: the calibration batches.
        batch_is_dynamic: whether a batch may be cut.
        seed: of everything drawn.
        update: called with (done, total).
        fixed: constants that may not change: imperative mode can't carry all of them over to the user's module.
        may_insert: whether the graph may get new ops, which imperative mode has no place for.
        place: where float models and simulated ones are computed.
        passes: what runs the float graph, and may hold what an earlier stage has computed.
    """

    batches: Sequence[Batch]
    batch_is_dynamic: bool = True
    seed: int = 0
    update: Update = lambda done, total: None  # noqa: ARG005
    fixed: frozenset[str] = frozenset()
    may_insert: bool = True
    place: torch.device = CPU
    passes: FloatPasses = NOTHING_HELD

    def first(self, samples: int) -> list[Batch]:
        """The first `samples` samples, in whole batches where these can't be cut."""
        taken: list[Batch] = []
        for batch in self.batches:
            if samples <= 0:
                break
            taken.append(batch.head(samples) if self.batch_is_dynamic else batch)
            samples -= batch.size
        return taken


def db(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise, -inf without a signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
