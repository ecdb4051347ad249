"""Limits from the recipe, held against the measured results. A gate without a figure has failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantflow.schema import GatesSettings

PASSED = "passed"
FAILED = "failed"
NOT_GATED = "not gated"


@dataclass(frozen=True)
class GateResult:
    """One gate: its limit, the figure it was held against (None: not measured), and a sentence for people."""

    name: str
    limit: float
    value: float | None
    passed: bool
    text: str


@dataclass(frozen=True)
class _Gate:
    """`figure` finds the value in the results or raises `_Missing` with the reason and the cure."""

    is_minimum: bool
    unit: str
    figure: Callable[[Mapping[str, Any]], Any]


class _Missing(Exception):
    """A figure that was not measured: why, and what to set."""


def evaluate_gates(gates: GatesSettings, results: Mapping[str, Any]) -> list[GateResult]:
    """Every gate that has a limit, in the order of `GATES`.

    Shares (agreement, coverage, accuracy) and their drops count from 0 to 1: a `max_accuracy_drop` of 0.003
    allows 0.3 points. `min_speedup` must hold at every batch size, `max_latency_ms` at the first one.
    NaN fails.
    """
    limits = ((name, getattr(gates, name)) for name in GATES)
    return [_evaluate(name, limit, results) for name, limit in limits if limit is not None]


def verdict(gates: Iterable[GateResult]) -> str:
    """`passed`, `failed`, or `not gated` when the recipe sets no limit."""
    outcomes = [gate.passed for gate in gates]
    if not outcomes:
        return NOT_GATED
    return PASSED if all(outcomes) else FAILED


def _evaluate(name: str, limit: float, results: Mapping[str, Any]) -> GateResult:
    gate = GATES[name]
    try:
        value = float(gate.figure(results))
    except _Missing as missing:
        return GateResult(name, limit, None, False, f"not measured: {missing}")
    return hold(name, limit, value, is_minimum=gate.is_minimum, unit=gate.unit)


def hold(name: str, limit: float, value: float, *, is_minimum: bool, unit: str, where: str = "") -> GateResult:
    """A figure against its limit. NaN fails. `where`: what the figure belongs to, for the text."""
    passed = not math.isnan(value) and (value >= limit if is_minimum else value <= limit)
    relation = ">=" if is_minimum else "<="
    if not passed:
        relation = {">=": "is not >=", "<=": "is not <="}[relation]
    text = f"{value:.4g}{unit} {relation} {limit:.4g}{unit}" + (f": {where}" if where else "")
    return GateResult(name, limit, value, passed, text)


def _accuracy(key: str, missing: str) -> Callable[[Mapping[str, Any]], Any]:
    def figure(results: Mapping[str, Any]) -> Any:
        accuracy = results.get("accuracy")
        if not accuracy:
            raise _Missing("evaluation did not run; set evaluate.enabled=true")
        if accuracy.get(key) is None:
            raise _Missing(missing)
        return accuracy[key]

    return figure


def _accuracy_drop(results: Mapping[str, Any]) -> Any:
    metric = _accuracy("metric", _NO_METRIC)(results)
    if metric.get("drop") is None:
        raise _Missing(_NO_METRIC)
    return metric["drop"]


def _configs(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    configs = (results.get("benchmark") or {}).get("configs")
    if not configs:
        raise _Missing("the benchmark did not run; set benchmark.enabled=true")
    return list(configs)


def _speedup(results: Mapping[str, Any]) -> Any:
    # min() would hide a NaN that is not first.
    speedups = [float(config["speedup"]) for config in _configs(results)]
    return math.nan if any(map(math.isnan, speedups)) else min(speedups)


def _latency(results: Mapping[str, Any]) -> Any:
    return _configs(results)[0]["int8"]["median_ms"]


def _coverage(results: Mapping[str, Any]) -> Any:
    coverage = (results.get("int8_proof") or {}).get("coverage")
    if coverage is None:
        raise _Missing("nothing ran in int8 that could be counted; use task=run")
    return coverage


def _size_ratio(results: Mapping[str, Any]) -> Any:
    ratio = ((results.get("benchmark") or {}).get("size") or {}).get("ratio")
    if ratio is None:
        raise _Missing("the model's size was not measured; set benchmark.enabled=true")
    return ratio


_NO_METRIC = "there are no labels to measure accuracy with; use data that has them, or gate min_agreement instead"
_NO_SQNR = "the model's output is classes or flags, which have no signal and noise; gate min_agreement instead"
_NO_CLASSES = "the model's output has no classes to agree on; gate min_sqnr_db instead"
_NO_ROWS = "the model's output is one number per sample, which has no direction; gate min_sqnr_db instead"

#: Gate's name, as in a recipe → how it is judged.
GATES: dict[str, _Gate] = {
    "min_sqnr_db": _Gate(True, " dB", _accuracy("sqnr_db", _NO_SQNR)),
    "max_accuracy_drop": _Gate(False, "", _accuracy_drop),
    "min_agreement": _Gate(True, "", _accuracy("agreement", _NO_CLASSES)),
    "min_cosine": _Gate(True, "", _accuracy("cosine_min", _NO_ROWS)),
    "min_speedup": _Gate(True, "x", _speedup),
    "max_latency_ms": _Gate(False, " ms", _latency),
    "min_int8_coverage": _Gate(True, "", _coverage),
    "max_size_ratio": _Gate(False, "", _size_ratio),
}
