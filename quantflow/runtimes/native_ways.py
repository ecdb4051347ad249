"""How a plan's int8 steps are cut into tasks: what the library predicts of each way, and which win when tried."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from quantflow.ir.program import Program
from quantflow.runtimes import native_library as lib
from quantflow.runtimes.native_sections import Section, SectionPlan
from quantflow.runtimes.runner import STEPS_ON_LINES


class Tries(NamedTuple):
    """Ways per shape of step that are tried: at most `most`, none predicted to take above 1 + `margin` of the best."""

    most: int
    margin: float


#: Predictions order ways better than this (bench.cost_model).
OF_FEW_THREADS = Tries(3, 0.15)
#: Which of them share a core, and who wrote what a thread reads, is not predicted; and a try takes less.
OF_MANY_THREADS = Tries(8, 0.3)
MANY_THREADS = 8
#: For all ways of a plan's steps together, and once more for the winners beside what was predicted; two rounds of each
#: are run in any case.
BUDGET_MS = 120.0
#: Variants whose int8 steps alone are predicted to take this much of what the plain way takes in all are not tried.
HOPELESS = 1.25


def try_ways(
    plan: SectionPlan, given: Sequence[torch.Tensor | int], runs: int, tries: Tries, budget_ms: float = BUDGET_MS
) -> list[dict[str, Any]]:
    """Time a plan's steps in each way worth trying, and make it, and all later plans, with the fastest.

    Returns:
        One row per shape of steps, see qf_plan_tune in native/include/quantflow/native.h.
    """
    outputs = [o if isinstance(o, int) else torch.empty_strided(o[0], o[1], dtype=o[2]) for o in plan.outputs]
    found: list[dict[str, Any]] = lib.text_of(
        "qf_plan_tune", plan.handle.pointer, lib.pointers(given), lib.pointers(outputs), ctypes.c_int32(runs),
        ctypes.c_int32(tries.most), ctypes.c_double(tries.margin), ctypes.c_double(budget_ms), room=1 << 22,
    )  # fmt: skip
    return found


def tries_of(threads: int) -> Tries:
    """What warm-up tries where steps run on so many threads."""
    return OF_MANY_THREADS if threads >= MANY_THREADS else OF_FEW_THREADS


def try_all(
    program: Program, sections: Iterable[tuple[Section, list[torch.Tensor | int], SectionPlan]], runs: int, threads: int
) -> list[dict[str, Any]]:
    """The rows of `try_ways` of every section's plan, each with the "name" of its first node."""
    rows = []
    for _, given, plan in sections:
        for row in try_ways(plan, given, runs, tries_of(threads)):
            name = program.nodes[row["node"]].name if row["node"] >= 0 else "inputs and outputs"
            rows.append({"name": name, **row})
    return rows


def why_not_alone(
    layers: Sequence[Mapping[str, Any]], alone: Iterable[SectionPlan], threads: int, plain_ms: float
) -> str:
    """Why one thread is not worth a try, by predictions as the steps' own times correct them; "": it is.

    Args:
        layers: what `try_all` found on all threads.
        alone: the same sections on one thread.
        plain_ms: what all of the program took on all threads.
    """
    # Steps that may run together have rows of their own, too.
    ways = [(row["count"], row["ways"][0]) for row in layers if row.get("kernel") != STEPS_ON_LINES]
    predicted = sum(count * way["predicted_ms"] for count, way in ways)
    if not predicted:
        return ""
    error = sum(count * way["ms"] for count, way in ways) / predicted
    alone_ms = error * sum(predicted_ms(plan) for plan in alone)
    if alone_ms < HOPELESS * plain_ms:
        return ""
    return (
        f"1 thread: its int8 steps alone are predicted to take {alone_ms:.3g} ms, {threads} threads took {plain_ms:.3g}"
    )


def least_ms(call: Callable[[], Any], runs: int = 2) -> float:
    """The least time of a call, in ms."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return min(taken)


def predicted_ms(plan: SectionPlan) -> float:
    """What the steps whose cut is chosen are predicted to take together."""
    found = ctypes.c_double()
    lib.call("qf_plan_predicted_ms", plan.handle.pointer, ctypes.byref(found))
    return found.value


def adopt(rows: Any) -> None:
    """Cut steps as `try_ways` found fastest in an earlier process: [shape, rows, panels] each, out of a file."""
    for row in rows if isinstance(rows, list) else ():
        is_way = isinstance(row, list) and [type(part) for part in row] == [str, int, int]
        if is_way and row[0].isascii() and all(0 < part < 2**40 for part in row[1:]):
            # The library takes it where a step of that shape has such a way.
            lib.call("qf_host_keep_way", row[0].encode(), *(ctypes.c_int64(part) for part in row[1:]))


def kept(layers: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """What `adopt` takes of the rows of `try_ways`: where another way than the predicted one was faster."""
    chosen = [(row["shape"], row["ways"][row["kept"]]) for row in layers if row["kept"]]
    return [[way.get("shape", shape), way["rows"], way["panels"]] for shape, way in chosen]
