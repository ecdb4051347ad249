"""Latencies that can be compared: everything in one process, taking turns, with the spread shown."""

from __future__ import annotations

import dataclasses
import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantflow.host.memory import uncollected
from quantflow.host.place import CPU, interface_of
from quantflow.ir.batch import Batch

#: A spread beyond this share of the median comes from other work on the machine, not from the model.
UNSTEADY = 0.5
#: What its notices begin with.
UNSTEADY_NOTICE = "benchmark: "


#: (call, how often) → milliseconds of all of them.
Clock = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one callable.

    Attributes:
        median_ms: median over the rounds.
        min_ms: the fastest round.
        spread_ms: interquartile range over the rounds; 0 for a single round.
        rounds: mean milliseconds per call in each round, in order.
        calls_per_round: calls that each round's mean is taken over.
    """

    median_ms: float
    min_ms: float
    spread_ms: float
    rounds: tuple[float, ...]
    calls_per_round: int


def interleaved(
    callables: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    min_round_ms: float = 200.0,
    clock: Clock | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Timing]:
    """Times callables against each other.

    In each round every callable runs for at least about `min_round_ms`; the order is rotated from round to
    round, so that a machine that slows down or heats up does so for all of them. Two calls of each before
    the first round are not counted. On the processor's clock a callable must return only when its work is done.

    Args:
        callables: name → a call without arguments.
        rounds: how often each takes its turn, >= 1.
        clock: (call, calls) → what that many calls take together in ms; None: the processor's.
        progress: called with (rounds done, rounds) after each round.
    """
    if not callables or rounds < 1:
        raise ValueError(f"nothing to time: {len(callables)} callables, {rounds} rounds")
    names = list(callables)
    clock = clock or _time_ms
    calls = {name: _calls_for(callables[name], min_round_ms, clock) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    with uncollected():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(clock(callables[name], calls[name]) / calls[name])
            if progress is not None:
                progress(turn + 1, rounds)
    return {name: _timing(taken[name], calls[name]) for name in names}


def comparison(batch_size: int, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """One entry of the results' `benchmark.configs`, from timings named `float` and `int8` (and any others).

    speedup = float's median / int8's median; throughput counts samples per second.
    """
    measured = {
        name: {**dataclasses.asdict(timing), "throughput_per_s": throughput(batch_size, timing)}
        for name, timing in timings.items()
    }
    others = {
        f"speedup_{name}": timing.median_ms / timings["int8"].median_ms
        for name, timing in timings.items()
        if name not in ("float", "int8")
    }
    speedup = timings["float"].median_ms / timings["int8"].median_ms
    return {"batch_size": batch_size, **measured, "speedup": speedup, **others}


def not_worth_it(configs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A notice for each of `comparison`'s entries in which compiled bfloat16 is at least as fast as int8."""
    return tuple(
        f"benchmark: int8 takes {1 / config['speedup_bfloat16']:.2f} times as long as bfloat16 under torch.compile at "
        f"batch {config['batch_size']}: on this card an int8 model of it is not worth having for its speed"
        for config in configs
        if config.get("speedup_bfloat16") is not None and config["speedup_bfloat16"] <= 1
    )


def unsteady(configs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A notice for each of `comparison`'s entries whose times vary too much to be compared."""
    return tuple(
        f"{UNSTEADY_NOTICE}{name} at batch {config['batch_size']} took {config[name]['median_ms']:.3g} ms with a "
        f"spread of {config[name]['spread_ms']:.3g} ms: other work had the cores meanwhile, so its times and the "
        "speed-up mean little; repeat it on a quiet machine (task=benchmark artifact=DIR)"
        for config in configs
        for name in ("float", "int8")
        if config[name]["spread_ms"] > UNSTEADY * config[name]["median_ms"]
    )


def clock_of(place: torch.device) -> Clock:
    """The clock of a device: a card's own, by events around calls that follow each other; else the processor's."""
    if place == CPU:
        return _time_ms
    interface = interface_of(place)

    def by_events(call: Callable[[], Any], calls: int) -> float:
        begin, end = (interface.Event(enable_timing=True) for _ in range(2))
        interface.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        interface.synchronize()
        return float(begin.elapsed_time(end))

    return by_events


def card_memory_bytes(place: torch.device) -> int:
    """The most memory that torch has ever held on a card."""
    return int(interface_of(place).max_memory_allocated(place))


def throughput(batch_size: int, timing: Timing) -> float:
    """Samples per second at the median latency: 1000 * batch_size / median_ms."""
    return 1000.0 * batch_size / timing.median_ms


def resized(batch: Batch, size: int) -> Batch:
    """A batch of `size` samples: the given ones, repeated in turn or cut off.

    A tensor whose first dimension is not the batch's (a mask shared by all samples, say) stays as it is.
    """
    rows = torch.arange(size) % batch.size

    def resize(x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, rows.to(x.device)) if x.dim() and x.shape[0] == batch.size else x

    return dataclasses.replace(
        batch.mapped(resize),
        labels=None if batch.labels is None else resize(batch.labels),
        ids=tuple(batch.ids[row] for row in rows.tolist()) if batch.ids else (),
    )


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Sets torch's intra-op threads (None: leaves them), gives the number in force, and restores it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def peak_memory_bytes() -> int:
    """The most memory this process has ever had resident; float and int8 model, data and calibration included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory_bytes() -> int | None:
    """Memory resident now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def _calls_for(call: Callable[[], Any], min_round_ms: float, clock: Clock) -> int:
    """How many calls fill a round; the first call may build kernels, so the second one is timed."""
    call()
    return max(1, math.ceil(min_round_ms / max(clock(call, 1), 1e-4)))


def _time_ms(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / 1e6


def _timing(taken: list[float], calls: int) -> Timing:
    spread = 0.0
    if len(taken) > 1:
        quartiles = statistics.quantiles(taken, n=4, method="inclusive")
        spread = quartiles[2] - quartiles[0]
    return Timing(statistics.median(taken), min(taken), spread, tuple(taken), calls)
