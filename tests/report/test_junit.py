"""junit.xml as a CI system reads it: through junitparser, which knows nothing of us."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from junitparser import Failure, JUnitXml, Skipped, TestCase

from quantflow.report.junit import junit


def cases(results: dict[str, Any]) -> list[TestCase]:
    (suite,) = JUnitXml.fromstring(junit(results))
    return list(suite)


def test_one_case_per_gate_with_its_figure(results: dict[str, Any]) -> None:
    passed, failed = cases(results)
    assert [(case.classname, case.name) for case in (passed, failed)] == [
        ("resnet18_sym_int8", "min_sqnr_db"),
        ("resnet18_sym_int8", "min_speedup"),
    ]
    assert passed.result == []
    assert passed.system_out == "28.4 dB >= 20 dB"
    (failure,) = failed.result
    assert isinstance(failure, Failure)
    assert failure.message == "min_speedup: 5.015x is not >= 6x"


def test_the_suite_counts_and_says_what_ran(results: dict[str, Any]) -> None:
    (suite,) = JUnitXml.fromstring(junit(results))
    assert (suite.name, suite.tests, suite.failures, suite.errors, suite.skipped) == ("resnet18_sym_int8", 2, 1, 0, 0)
    assert suite.time == pytest.approx(5.3)
    told = {each.name: each.value for each in suite.properties()}
    assert told["device"] == "cpu"
    assert told["torch"] == "2.13.0+cpu"
    assert "data" not in told  # names of all samples


def test_without_gates_one_case_is_skipped(results: dict[str, Any]) -> None:
    (case,) = cases(results | {"gates": []})
    assert isinstance(case.result[0], Skipped)
    assert case.result[0].message == "the recipe sets no gate"


def test_hostile_text_stays_text(results: dict[str, Any]) -> None:
    nasty = 'a<b>&"\x00\x1b[31m\ud800\ufffe]]> \U0001f600'
    results["recipe"]["name"] = nasty
    results["gates"][1]["text"] = nasty
    (_, failed) = cases(results)
    assert failed.classname == 'a<b>&"  [31m  ]]> \U0001f600'
    assert failed.result[0].text == failed.classname
    root = ElementTree.fromstring(junit(results))
    assert [each.tag for each in root.iter("failure")] == ["failure"]


@pytest.mark.parametrize("section", ["recipe", "gates", "stages", "environment", "model"])
@pytest.mark.parametrize("damage", [None, [], "x", 7, {"x": 1}, [1]])
def test_damaged_results_give_a_file_all_the_same(results: dict[str, Any], section: str, damage: Any) -> None:
    assert cases(results | {section: damage})
