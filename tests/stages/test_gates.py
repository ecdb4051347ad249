from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from quantflow.stages.gates import GATES, GateResult, evaluate_gates, verdict

RESULTS: dict[str, Any] = {
    "int8_proof": {"coverage": 0.98},
    "accuracy": {"sqnr_db": 25.0, "agreement": 0.95, "cosine_min": 0.98, "metric": {"name": "top1", "drop": 0.002}},
    "benchmark": {
        "configs": [
            {"batch_size": 1, "int8": {"median_ms": 14.0}, "speedup": 4.0},
            {"batch_size": 16, "int8": {"median_ms": 170.0}, "speedup": 5.0},
        ],
        "size": {"ratio": 0.26},
    },
}


def limits(**given: float) -> Any:
    return SimpleNamespace(**{**dict.fromkeys(GATES), **given})


def one(results: dict[str, Any], **given: float) -> GateResult:
    (result,) = evaluate_gates(limits(**given), results)
    return result


@pytest.mark.parametrize(
    ("name", "passing", "failing", "value"),
    [
        ("min_sqnr_db", 25.0, 25.1, 25.0),
        ("max_accuracy_drop", 0.002, 0.0019, 0.002),
        ("min_agreement", 0.95, 0.951, 0.95),
        ("min_cosine", 0.98, 0.981, 0.98),
        ("min_speedup", 4.0, 4.01, 4.0),
        ("max_latency_ms", 14.0, 13.9, 14.0),
        ("min_int8_coverage", 0.98, 1.0, 0.98),
        ("max_size_ratio", 0.26, 0.25, 0.26),
    ],
)
def test_a_limit_itself_passes_and_a_step_further_fails(
    name: str, passing: float, failing: float, value: float
) -> None:
    passed, failed = one(RESULTS, **{name: passing}), one(RESULTS, **{name: failing})
    assert (passed.passed, passed.value, passed.name) == (True, value, name)
    assert (failed.passed, failed.value) == (False, value)
    assert "is not" in failed.text
    assert "is not" not in passed.text


def test_every_gate_is_in_the_schema_and_the_other_way_round() -> None:
    from quantflow.schema import GatesSettings

    assert list(GatesSettings.model_fields) == list(GATES)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("min_sqnr_db", "evaluate.enabled=true"),
        ("max_accuracy_drop", "evaluate.enabled=true"),
        ("min_agreement", "evaluate.enabled=true"),
        ("min_speedup", "benchmark.enabled=true"),
        ("max_latency_ms", "benchmark.enabled=true"),
        ("min_int8_coverage", "task=run"),
        ("max_size_ratio", "benchmark.enabled=true"),
    ],
)
def test_a_gate_without_its_figure_fails_and_says_why(name: str, cure: str) -> None:
    result = one({}, **{name: 0.5})
    assert (result.passed, result.value) == (False, None)
    assert "not measured" in result.text
    assert cure in result.text


def test_no_labels_and_no_classes_are_told_apart_from_no_evaluation() -> None:
    unlabelled = {"accuracy": {"sqnr_db": 20.0, "agreement": None, "metric": None}}
    assert "no labels" in one(unlabelled, max_accuracy_drop=0.1).text
    assert "no classes" in one(unlabelled, min_agreement=0.9).text


@pytest.mark.parametrize("name", ["min_sqnr_db", "min_agreement"])
def test_nan_fails(name: str) -> None:
    assert not one({"accuracy": {"sqnr_db": math.nan, "agreement": math.nan}}, **{name: 0.0}).passed


def test_a_nan_speedup_at_any_batch_size_fails() -> None:
    configs = [{"speedup": speedup} for speedup in (4.0, math.nan, 5.0)]
    assert not one({"benchmark": {"configs": configs}}, min_speedup=1.0).passed


def test_a_better_accuracy_than_float_passes() -> None:
    assert one({"accuracy": {"metric": {"drop": -0.01}}}, max_accuracy_drop=0.0).passed


def test_outputs_without_noise_pass() -> None:
    assert one({"accuracy": {"sqnr_db": math.inf}}, min_sqnr_db=300.0).passed


def test_verdict() -> None:
    good, bad = one(RESULTS, min_sqnr_db=1.0), one(RESULTS, min_sqnr_db=99.0)
    assert verdict([]) == "not gated"
    assert verdict([good]) == "passed"
    assert verdict([good, bad]) == "failed"
    assert evaluate_gates(limits(), RESULTS) == []
