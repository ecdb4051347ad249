"""What harms the whole model is rolled back, said so, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow import algorithms
from quantflow.algorithms import Change, Material, Outcome
from quantflow.algorithms.guard import SAMPLES, Guard
from quantflow.algorithms.outcome import Rewriting
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.plan import Plan
from quantflow.schema import ClipWeightsAlgorithm, EqualizeAlgorithm, QConfig
from quantflow.stages.calibrate import calibrate
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import Prepared, prepare
from quantflow.stages.refined import Refined, unrefined

Prepare = Callable[..., Any]
CLIP = ClipWeightsAlgorithm()


def zeroed(refined: Refined, layer: str) -> Refined:
    numbers = refined.layers[layer]
    return refined.with_layer(layer, replace(numbers, codes=torch.zeros_like(numbers.codes)))


def rescaled(graph: Graph, factor: float, *pairs: tuple[str, str]) -> Graph:
    """The same float function: channel 0 of each pair's first layer divided by the factor, the second's multiplied."""
    constants = {name: value.clone() for name, value in graph.constants.items()}
    for writer, reader in pairs:
        for role in ("weight", "bias"):
            constants[f"{writer}.{role}"][0] /= factor
        constants[f"{reader}.weight"][:, 0] *= factor
    return replace(graph, constants=constants)


class Chain(nn.Module):
    """Linears with ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())  # type: ignore[no-any-return]


@pytest.fixture
def chain() -> tuple[Graph, list[Batch]]:
    torch.manual_seed(0)
    batches = [Batch((torch.randn(8, 8),)) for _ in range(8)]
    return fold_batch_norms(capture_export(Chain().eval(), batches[0])), batches


def plan_of(graph: Graph) -> Plan:
    return make_plan(graph, QConfig())


PAIRS = (("a", "b"), ("b", "c"), ("c", "d"))


def rewriting_of(graph: Graph, factors: Sequence[float]) -> Rewriting:
    """A part per pair; a factor of 1 changes nothing."""
    changes = tuple(Change(f"{a} → {b}", 1, 2) for a, b in PAIRS)

    def make(chosen: Sequence[int]) -> tuple[Graph, Outcome]:
        result = graph
        for part in chosen:
            result = rescaled(result, factors[part], PAIRS[part])
        return result, Outcome("m", tuple(changes[part] for part in chosen))

    return Rewriting(changes, make)


@pytest.mark.parametrize(
    ("factors", "kept"),
    [((1.0, 1.0, 1.0), (0, 1, 2)), ((1.0, 1e3, 1.0), (0, 2)), ((1.0, 1.0, 1e3), (0, 1)), ((1e3,) * 3, ())],
)
def test_the_parts_of_a_rewriting_that_do_harm_are_left_out(
    chain: tuple[Graph, list[Batch]], factors: tuple[float, ...], kept: tuple[int, ...]
) -> None:
    graph, batches = chain
    rewriting = rewriting_of(graph, factors)
    guard = Guard([EqualizeAlgorithm()], graph, Material(batches))
    result, outcome, effect = guard.rewritten(EqualizeAlgorithm(), graph, rewriting, plan_of)
    assert outcome.changes == tuple(rewriting.changes[part] for part in kept)
    expected = rewriting.make(kept)[0]
    assert all(torch.equal(value, expected.constants[name]) for name, value in result.constants.items())
    assert effect is not None
    assert effect.after_db >= effect.before_db - 0.1
    undone = [rewriting.changes[part].layer for part in range(3) if part not in kept]
    assert [layer for layer, reason in outcome.skipped if "makes the whole model worse" in reason] == undone
    if not undone:
        assert effect.all_db is None
        assert not outcome.notices
        return
    assert effect.all_db is not None
    assert effect.all_db < effect.before_db - 3
    (notice,) = outcome.notices
    how_many = "all of its 3" if len(undone) == 3 else f"{len(undone)} of its 3"
    assert f"equalize: {how_many} changes were rolled back" in notice
    assert f"to {effect.all_db:.1f} dB on 16 held-out calibration samples" in notice


@pytest.mark.parametrize(
    ("factor", "costly", "kept"), [(1.0, {0, 2}, (1,)), (1.0, {0, 1, 2}, ()), (1.0, set(), (0, 1, 2))]
)
def test_parts_that_cost_time_must_gain_something(
    chain: tuple[Graph, list[Batch]], factor: float, costly: set[int], kept: tuple[int, ...]
) -> None:
    graph, batches = chain
    rewriting = replace(rewriting_of(graph, (factor,) * 3), costly=frozenset(costly))
    guard = Guard([EqualizeAlgorithm()], graph, Material(batches))
    _, outcome, effect = guard.rewritten(EqualizeAlgorithm(), graph, rewriting, plan_of)
    assert outcome.changes == tuple(rewriting.changes[part] for part in kept)
    assert effect is not None
    assert (effect.all_db is None) is not bool(costly)
    assert all("costs time" in reason for _, reason in outcome.skipped)
    assert all("cost time at run time and gain the whole model only 0.00 dB" in notice for notice in outcome.notices)
    assert len(outcome.notices) == bool(costly)
    bad = rescaled(graph, 1e3, PAIRS[0])
    mending = replace(rewriting_of(bad, (1e-3, 1.0, 1.0)), costly=frozenset({0}))
    _, outcome, effect = Guard([EqualizeAlgorithm()], bad, Material(batches)).rewritten(
        EqualizeAlgorithm(), bad, mending, plan_of
    )
    assert len(outcome.changes) == 3, "the first part mends the model"
    assert effect is not None
    assert effect.after_db > effect.before_db + 3


def test_a_large_rewriting_is_searched_in_bounded_time(chain: tuple[Graph, list[Batch]]) -> None:
    graph, batches = chain
    made: list[Sequence[int]] = []
    changes = tuple(Change(str(part), 1, 2) for part in range(64))

    def make(chosen: Sequence[int]) -> tuple[Graph, Outcome]:
        made.append(chosen)
        return rescaled(graph, 1e3 if len(chosen) else 1, PAIRS[0]), Outcome("m", tuple(changes[i] for i in chosen))

    guard = Guard([EqualizeAlgorithm()], graph, Material(batches))
    result, outcome, _ = guard.rewritten(EqualizeAlgorithm(), graph, Rewriting(changes, make), plan_of)
    assert len(made) < 20
    assert not outcome.changes
    assert result is graph


def test_numbers_that_do_harm_are_those_from_before(ready: Prepare, depthwise: nn.Module, images: list[Batch]) -> None:
    start = ready(depthwise, images)
    guard = Guard([CLIP], start.graph, start.material)
    outcome = Outcome("m", (Change("project", 1, 2),), notices=("its own",))
    worse = zeroed(start.refined, "project")
    found, said, effect = guard.refined(CLIP, start.prepared, start.refined, worse, outcome)
    assert found is start.refined
    assert said.changes == ()
    assert said.skipped == (("project", "rolled back, because it makes the whole model worse"),)
    assert said.notices[0] == "its own"
    assert "clip_weights: all of its 1 changes were rolled back" in said.notices[1]
    assert effect is not None
    assert effect.all_db is not None
    assert effect.after_db == effect.before_db > effect.all_db + 20
    held_out = replace(start, material=Material(images[-2:]))
    assert effect.before_db == pytest.approx(held_out.db(start.refined), abs=0.5), "the integer program's own SQNR"
    found, said, effect = guard.refined(CLIP, start.prepared, worse, start.refined, outcome)
    assert found is start.refined
    assert said is outcome
    assert effect is not None
    assert effect.after_db > effect.before_db
    assert effect.all_db is None


def harmful(_settings: Any, _prepared: Prepared, refined: Refined, _material: Material) -> tuple[Refined, Outcome]:
    return zeroed(refined, next(iter(refined.layers))), Outcome("m", (Change(next(iter(refined.layers)), 1, 2),))


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_a_planted_algorithm_changes_no_model_unless_its_guard_is_off(
    depthwise: nn.Module, images: list[Batch], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(algorithms.NUMBER_ALGORITHMS, "clip_weights", harmful)

    def quantized(chosen: Any) -> Any:
        runtime = "torch" if mode == "torchscript" else "reference"
        return qf.quantize(depthwise, images, mode=mode, runtime=runtime, algorithms=chosen)

    plain, guarded, free = (
        quantized(c) for c in ("none", ["clip_weights"], [{"name": "clip_weights", "guard": False}])
    )
    x = images[0].args[0]
    torch.testing.assert_close(guarded(x), plain(x), rtol=0, atol=0)
    assert not torch.equal(free(x), plain(x))
    (entry,) = guarded.results["algorithms"]
    assert entry["model"]["all_db"] < entry["model"]["before_db"] == entry["model"]["after_db"]
    assert entry["model"]["samples"] == 8
    assert any("clip_weights" in notice and "rolled back" in notice for notice in guarded.results["notices"])
    assert free.results["algorithms"][0]["model"] is None


def test_imperative_modules_keep_what_a_graph_algorithm_was_denied(
    depthwise: nn.Module, images: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rolled-back graph is the one that is carried over."""

    def planted(_settings: Any, graph: Graph, _plan: Plan, _material: Material) -> Rewriting:
        worse = replace(graph, constants={**graph.constants, "head.weight": graph.constants["head.weight"] * 2})
        change = Change("head", 1, 2)
        return Rewriting(
            (change,), lambda chosen: (worse if chosen else graph, Outcome("m", (change,) if chosen else ()))
        )

    monkeypatch.setitem(algorithms.GRAPH_ALGORITHMS, "equalize", planted)
    plain, guarded, free = (
        qf.quantize(depthwise, images, mode="imperative", runtime="reference", algorithms=chosen)
        for chosen in ("none", ["equalize"], [{"name": "equalize", "guard": False}])
    )
    x = images[0].args[0]
    torch.testing.assert_close(guarded(x), plain(x), rtol=0, atol=0)
    assert not torch.equal(free(x), plain(x))


class Several(nn.Module):
    """A dict of two outputs, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.a(x).relu()
        logits = self.b(y)
        return {"class": logits.argmax(-1), "hidden": y, "logits": logits}


def test_every_real_output_counts(ready: Prepare) -> None:
    torch.manual_seed(0)
    start = ready(Several().eval(), [Batch((torch.randn(8, 8),)) for _ in range(4)])
    guard = Guard([CLIP], start.graph, start.material)
    outcome = Outcome("m", (Change("b", 1, 2),))
    found, _, effect = guard.refined(CLIP, start.prepared, start.refined, zeroed(start.refined, "b"), outcome)
    assert found is start.refined
    assert effect is not None
    assert effect.all_db is not None
    assert effect.all_db < effect.before_db - 20


def batches_of(*sizes: int) -> list[Batch]:
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    return [Batch((torch.arange(start, start + size).float(),)) for start, size in zip(first, sizes, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "can_cut", "seen", "judged"),
    [
        ((4,) * 8, True, 24, 8),  # a quarter at most
        ((16,) * 8, True, 112, SAMPLES),
        ((64,) * 8, True, 448, SAMPLES),
        ((64,) * 8, False, 448, 64),
        ((1,) * 100, True, 84, SAMPLES),
        ((8,), True, 6, 2),
        ((8,), False, 8, 8),  # one batch that can't be cut serves both
        ((2,), True, 2, 2),
    ],
)
def test_algorithms_do_not_see_what_they_are_judged_on(
    sizes: tuple[int, ...], can_cut: bool, seen: int, judged: int
) -> None:
    material = Material(batches_of(*sizes), can_cut)
    graph = capture_export(nn.Identity(), material.batches[0])
    guard = Guard([CLIP], graph, material)
    shown = torch.cat([batch.args[0] for batch in guard.material.batches])
    assert guard.samples == judged
    assert torch.equal(shown, torch.arange(seen).float())
    assert len(guard.material.batches[:]) == len(guard.material.batches)
    assert Guard([ClipWeightsAlgorithm(guard=False)], graph, material).material is material


class Classes(Chain):
    """Gives classes, and a mask of -inf on the way to them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = super().forward(x)
        return scores.masked_fill(torch.arange(8) == 3, float("-inf")).argmax(-1)


def test_a_model_that_returns_classes_only_is_judged_by_what_they_are_computed_from() -> None:
    torch.manual_seed(0)
    batches = [Batch((torch.randn(16, 8),)) for _ in range(8)]
    effects = []
    for kind in (Chain, Classes):
        torch.manual_seed(0)
        graph = fold_batch_norms(capture_export(kind().eval(), batches[0]))
        prepared = prepare(graph, plan_of(graph))
        guard = Guard([CLIP], graph, Material(batches))
        before = unrefined(prepared, calibrate(prepared, batches))
        after, _, effect = guard.refined(
            CLIP, prepared, before, zeroed(before, "b"), Outcome("", (Change("b", 1.0, 2.0),))
        )
        assert after is before
        assert effect is not None
        effects.append(effect)
    scores, classes = effects
    assert classes.before_db == pytest.approx(scores.before_db, abs=3)
    assert classes.all_db < classes.before_db - 10
