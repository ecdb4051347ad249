"""A float pass is computed once for all who look at the same batch, and never for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantflow
from quantflow.capture import capture
from quantflow.executor import measure
from quantflow.ir import float_passes
from quantflow.ir.batch import Batch
from quantflow.ir.float_passes import FloatPasses
from quantflow.ir.graph import Graph, interpret
from quantflow.schema import ModeSettings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        return self.head((x + self.down(x)).mean((2, 3)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """One entry per float pass of `FloatPasses`."""
    seen: list[Graph] = []

    def counting(graph: Graph, *args: Any) -> Any:
        seen.append(graph)
        return interpret(graph, *args)

    monkeypatch.setattr(float_passes, "interpret", counting)
    return seen


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Net().eval(), Batch((torch.randn(2, 3, 8, 8),)), ModeSettings())


def test_a_batch_is_computed_once_and_told_in_order(graph: Graph, counted: list[Graph]) -> None:
    passes, batch = FloatPasses(), Batch((torch.randn(4, 3, 8, 8),))
    told: list[list[tuple[str, Any]]] = [[], []]
    outputs = [
        passes.run(graph, same, lambda node, value, into=into: into.append((node.name, value)))
        for same, into in zip((batch, batch.mapped(torch.clone)), told, strict=True)
    ]
    assert len(counted) == 1
    assert torch.equal(outputs[0], outputs[1])
    assert [name for name, _ in told[0]] == [name for name, _ in told[1]]
    held = passes.held(graph, batch)
    assert held is not None
    assert all(held[name] is value for name, value in told[1])


def test_another_batch_graph_or_a_forgotten_one_is_computed_anew(graph: Graph, counted: list[Graph]) -> None:
    passes, batch = FloatPasses(), Batch((torch.randn(4, 3, 8, 8),))
    other = Batch((batch.tensors[0] + 1,))
    for each in (batch, other, batch.head(3), Batch((torch.full((4, 3, 8, 8), torch.nan),))):
        passes.run(graph, each)
        assert passes.held(graph, batch) is None or each is batch
    passes.run(graph.with_notes("another"), batch)
    passes.run(graph, batch)
    passes.forget()
    assert passes.held(graph, batch) is None
    passes.run(graph, batch)
    assert len(counted) == 7


def test_a_loader_may_use_its_memory_again(graph: Graph, counted: list[Graph]) -> None:
    passes, memory = FloatPasses(), torch.randn(4, 3, 8, 8)
    first, kept = passes.run(graph, Batch((memory,))).clone(), memory.clone()
    memory.normal_()
    second = passes.run(graph, Batch((memory,)))
    assert len(counted) == 2
    assert not torch.equal(first, second)
    memory.copy_(kept)
    assert torch.equal(passes.run(graph, Batch((memory,))), first)


@pytest.mark.parametrize(("most_bytes", "samples"), [(1000, 4), (None, 17)])
def test_what_is_too_large_is_not_held(graph: Graph, most_bytes: int | None, samples: int) -> None:
    passes, batch = FloatPasses(most_bytes), Batch((torch.randn(samples, 3, 8, 8),))
    passes.run(graph, batch)
    assert passes.held(graph, batch) is None


def test_calibration_joins_and_layers_share_one_pass_with_the_same_report(
    counted: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, batches = Net().eval(), [torch.randn(8, 3, 8, 8)]
    shared = quantflow.quantize(module, batches)
    assert len(counted) == 1
    monkeypatch.setattr(float_passes, "memory_bytes", lambda: 0)
    alone = quantflow.quantize(module, batches)
    assert len(counted) > 2
    assert shared.record.program.to_json() == alone.record.program.to_json()
    for section in ("joins", "outliers"):
        assert shared.results[section] == alone.results[section]
    for a, b in zip(shared.results["accuracy"]["per_layer"], alone.results["accuracy"]["per_layer"], strict=True):
        assert a.keys() == b.keys()
        assert a["name"] == b["name"]
        for figure in a.keys() - {"name"}:
            assert a[figure] == pytest.approx(b[figure], rel=1e-5)
    found, wanted = (each.results["accuracy"]["histograms"] for each in (shared, alone))
    assert [each["name"] for each in found] == [each["name"] for each in wanted]
    assert all(
        sum(each["output"]["counts"]) == sum(other["output"]["counts"])
        for each, other in zip(found, wanted, strict=True)
        if "output" in each
    )


def test_own_errors_are_of_the_first_samples_where_the_batch_is_not_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose values hold the batch elsewhere is computed in parts, as one that is not held."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    told = []
    true = measure._of_first_samples
    monkeypatch.setattr(measure, "_of_first_samples", lambda *args: told.append(true(*args)) or told[-1])
    torch.manual_seed(0)
    model = quantflow.quantize(Turned(), [torch.randn(8, 5, 6)])
    assert told == [None]
    assert any("own_sqnr_db" in row for row in model.results["accuracy"]["per_layer"])


class Counting(nn.Module):
    """Notes how many samples each of its own calls gets; not those of its graph."""

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.net, self.drift, self.seen = Net(), drift, list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            self.seen.append(len(x))
        return self.net(x) + self.drift * len(self.seen)


@pytest.mark.parametrize(("drift", "seen"), [(0.0, [1]), (0.1, [1, 8])])
def test_the_graph_stands_for_the_float_model_where_that_agrees(
    drift: float, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, accuracies, called = Counting(drift).eval(), [], list[list[int]]()
    true = measure.tally

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = len(module.seen)
        found = true(*args, **kwargs)
        called.append(module.seen[before:])
        return found

    monkeypatch.setattr(measure, "tally", watched)
    batches = [torch.randn(8, 3, 8, 8)]
    accuracies.append(quantflow.quantize(module, batches).results["accuracy"])
    monkeypatch.setattr(float_passes, "memory_bytes", lambda: 0)
    accuracies.append(quantflow.quantize(module, batches).results["accuracy"])
    assert called == [seen, [8]]
    if not drift:
        assert accuracies[0]["sqnr_db"] == pytest.approx(accuracies[1]["sqnr_db"], rel=1e-4)
