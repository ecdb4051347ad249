from __future__ import annotations

import gc

import pytest
import torch

from quantflow.ir.batch import Batch
from quantflow.stages.benchmark import (
    Timing,
    comparison,
    current_memory_bytes,
    interleaved,
    peak_memory_bytes,
    resized,
    threads,
    throughput,
    unsteady,
)


class Clock:
    """A clock that only the callables move."""

    def __init__(self) -> None:
        self.now = 0
        self.called: list[str] = []

    def call(self, name: str, milliseconds: float) -> None:
        self.called.append(name)
        self.now += round(milliseconds * 1e6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock.now)
    return clock


def test_times_are_milliseconds_per_call(clock: Clock) -> None:
    timings = interleaved({"a": lambda: clock.call("a", 4), "b": lambda: clock.call("b", 50)}, min_round_ms=20)
    assert timings["a"] == Timing(4, 4, 0, (4,) * 7, 5)
    assert timings["b"] == Timing(50, 50, 0, (50,) * 7, 1)


def test_median_and_spread(clock: Clock) -> None:
    durations = iter([9, 9, 1, 2, 3, 4, 100])
    timing = interleaved({"a": lambda: clock.call("a", next(durations))}, rounds=5, min_round_ms=1)["a"]
    assert timing.rounds == (1, 2, 3, 4, 100)
    assert (timing.median_ms, timing.min_ms, timing.spread_ms) == (3, 1, 2)


def test_a_single_round_has_no_spread(clock: Clock) -> None:
    assert interleaved({"a": lambda: clock.call("a", 1)}, rounds=1, min_round_ms=1)["a"].spread_ms == 0


def test_callables_take_turns_and_the_order_rotates(clock: Clock) -> None:
    names = ("a", "b", "c")
    seen: list[tuple[int, int | None]] = []
    interleaved(
        {name: lambda name=name: clock.call(name, 10) for name in names},  # type: ignore[misc]
        rounds=3,
        min_round_ms=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert "".join(clock.called) == "aabbcc" + "abc" + "bca" + "cab"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_call_too_fast_to_time_does_not_divide_by_zero(clock: Clock) -> None:
    assert interleaved({"a": lambda: clock.call("a", 0)}, rounds=1, min_round_ms=0.01)["a"].calls_per_round == 100


def test_garbage_collection_is_back_even_after_an_error() -> None:
    calls = iter(range(3))

    def fails() -> None:
        if next(calls) == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interleaved({"a": fails}, rounds=1, min_round_ms=0)
    assert gc.isenabled()


@pytest.mark.parametrize(("callables", "rounds"), [({}, 1), ({"a": int}, 0)])
def test_nothing_to_time(callables: dict[str, type[int]], rounds: int) -> None:
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved(callables, rounds=rounds)


def test_comparison_has_what_the_report_shows() -> None:
    timings = {"float": Timing(40, 39, 1, (40,), 5), "int8": Timing(10, 9, 0.5, (10,), 20)}
    config = comparison(16, timings)
    assert config["batch_size"] == 16
    assert config["speedup"] == 4
    assert config["int8"]["median_ms"] == 10
    assert config["int8"]["throughput_per_s"] == throughput(16, timings["int8"]) == 1600


def test_times_that_other_work_disturbed_are_said_to_mean_little() -> None:
    steady, disturbed = Timing(2.0, 1.9, 0.9, (2.0,), 1), Timing(4.0, 2.0, 2.1, (4.0,), 1)
    assert unsteady([comparison(1, {"float": steady, "int8": steady})]) == ()
    (notice,) = unsteady([comparison(16, {"float": disturbed, "int8": steady})])
    assert "float at batch 16 took 4 ms with a spread of 2.1 ms" in notice
    assert "task=benchmark" in notice


def test_threads_are_restored_even_after_an_error() -> None:
    before = torch.get_num_threads()

    def fails() -> None:
        with threads(before + 1) as count:
            assert count == torch.get_num_threads() == before + 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert torch.get_num_threads() == before
    with threads(None) as count:
        assert count == before


def test_memory() -> None:
    current, peak = current_memory_bytes(), peak_memory_bytes()
    assert peak > 10_000_000
    assert current is None or 10_000_000 < current <= peak * 1.01


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_resized_repeats_or_cuts(size: int) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    shared = torch.ones(5, 5)
    batch = resized(Batch((x, shared), {"mask": x + 1}, labels=torch.tensor([0, 1, 2]), ids=("a", "b", "c")), size)
    assert batch.size == size
    assert torch.equal(batch.args[0], torch.cat([x, x, x])[:size])
    assert torch.equal(batch.args[1], shared)
    assert torch.equal(batch.kwargs["mask"], batch.args[0] + 1)
    assert batch.ids == tuple("abcabcabc"[:size])
