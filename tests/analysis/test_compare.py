"""task=compare: a planted regression is named and ends with 3; two honest runs of one recipe pass."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantflow.analysis.compare import GATES, compare
from quantflow.cli import command as cli
from quantflow.errors import RecipeError, UsageError
from quantflow.schema import CompareSettings, Recipe
from quantflow.stages.gates import FAILED, PASSED
from quantflow.stages.record import Record
from quantflow.store import artifact

MODEL = ["model=entry", "model.entry=mine:net"]
RUN = [
    *(*MODEL, "data=random", "data.shape=[[3,8,8]]", "data.calibration=4", "data.evaluation=4", "mode=torchscript"),
    *("benchmark.rounds=3", "benchmark.min_round_ms=5", "benchmark.per_layer=true", "report.quiet=true"),
]
#: Times of a model that takes 50 microseconds say nothing on a machine that runs other tests.
COMPARE = ["task=compare", "baseline=base", "compare=untimed"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mine.py and two honest runs of one recipe, base and same."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copy(Path(__file__).parents[1] / "own_models.py", folder / "mine.py")
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        assert cli.run([*RUN, "output=base"]) == 0
        assert cli.run([*RUN, "output=same"]) == 0
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("mine", None)
    return folder


@pytest.fixture
def place(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "same"):
        shutil.copytree(runs / name, tmp_path / name)
    shutil.copy(runs / "mine.py", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sign(art: Path) -> None:
    """The manifest made to agree, as a run that went wrong would have written it."""
    files = {path.name: path.read_bytes() for path in art.iterdir() if path.name != artifact.MANIFEST}
    artifact.write_artifact(art, files)


def doubled_weight_scale(art: Path) -> None:
    tensors = load_file(art / "weights.safetensors")
    tensors["block.weight_scale"] *= 2
    save_file(tensors, art / "weights.safetensors")


def doubled_activation_scale(art: Path) -> None:
    program = json.loads((art / "program.json").read_text())
    (node,) = (node for node in program["nodes"] if node["name"] == "block")
    program["values"][node["output"]]["scale"] *= 2
    # The pooling behind it shares no scale, so that one value is all that changes.
    (art / "program.json").write_text(json.dumps(program))


def moved_bias(art: Path) -> None:
    tensors = load_file(art / "weights.safetensors")
    tensors["block.bias_float"] += 1.0
    save_file(tensors, art / "weights.safetensors")


@pytest.mark.parametrize(
    ("plant", "gate"),
    [
        (doubled_weight_scale, "min_weight_sqnr_db"),
        (doubled_activation_scale, "max_range_change"),
        (moved_bias, "min_weight_sqnr_db"),
    ],
)
def test_a_planted_change_is_named(
    plant: Callable[[Path], None], gate: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(place / "same")
    sign(place / "same")
    assert cli.run([*COMPARE, "candidate=same"]) == 3
    shown = capsys.readouterr().out
    results = json.loads((place / "outputs/compare/compare.json").read_text())
    failed = {each["name"]: each["text"] for each in results["gates"] if not each["passed"]}
    assert failed.keys() == {gate}
    assert "first block, worst block, 1 in all" in failed[gate]
    assert [row["name"] for row in results["layers"] if row["exceeds"]] == ["block"]
    for text in (shown, *((place / "outputs/compare" / name).read_text() for name in ("compare.md", "summary.md"))):
        assert "first block, worst block" in text
        assert "failed" in text
    (failure,) = ElementTree.fromstring((place / "outputs/compare/junit.xml").read_bytes()).iter("failure")
    assert "first block" in failure.attrib["message"]


def test_a_planted_change_shows_in_the_figures_when_they_are_measured_again(place: Path) -> None:
    doubled_weight_scale(place / "same")
    sign(place / "same")
    assert cli.run(["task=evaluate", "artifact=same", *MODEL]) == 0
    assert cli.run([*COMPARE, "candidate=same", "compare.min_weight_sqnr_db=null"]) == 3
    results = json.loads((place / "outputs/compare/compare.json").read_text())
    failed = {each["name"]: each["text"] for each in results["gates"] if not each["passed"]}
    assert "first block" in failed["max_layer_sqnr_drop_db"]
    assert "max_sqnr_drop_db" in failed


def test_a_layer_left_float_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*RUN, "output=left", "layers={block: float}"]) == 0
    assert cli.run([*COMPARE, "candidate=left"]) == 3
    shown = capsys.readouterr().out
    assert "1 is not <= 0: block (the recipe says so: layers.block)" in shown
    results = json.loads((place / "outputs/compare/compare.json").read_text())
    failed = {each["name"] for each in results["gates"] if not each["passed"]}
    assert {"max_lost_layers", "max_coverage_drop", "max_size_growth"} <= failed
    assert [row["name"] for row in results["layers"] if row["is_lost"]] == ["block"]
    assert any("ask for different numbers (layers)" in notice for notice in results["notices"])
    limits = ["compare.max_lost_layers=1", "compare.max_coverage_drop=0.5", "compare.max_size_growth=3"]
    assert cli.run([*COMPARE, "candidate=left", *limits]) == 0


def test_two_honest_runs_pass(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*COMPARE, "candidate=same", "output=cmp"]) == 0
    assert "verdict: passed" in capsys.readouterr().out
    assert sorted(artifact.read_artifact(place / "cmp")) == [
        *("compare.json", "compare.md", "junit.xml", "manifest.json", "summary.md")
    ]
    results = json.loads((place / "cmp/compare.json").read_text())
    assert {row["name"] for row in results["layers"]} >= {"stem.0", "block", "head"}
    assert not any(row["exceeds"] for row in results["layers"])
    assert not (place / "outputs").exists()


def test_other_models_and_data_are_refused_unless_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*RUN, "output=other", "data.evaluation=3"]) == 0
    assert cli.run([*COMPARE, "candidate=other"]) == 2
    message = capsys.readouterr().err
    assert "data: they were evaluated on different samples" in message
    assert "compare.allow_different=true" in message
    assert not (place / "outputs").exists()
    assert cli.run([*COMPARE, "candidate=other", "compare.allow_different=true"]) in (0, 3)
    results = json.loads((place / "outputs/compare/compare.json").read_text())
    assert any("max_lost_layers was not judged" in notice for notice in results["notices"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=compare", "candidate=same"], "baseline: task=compare needs the folder that a run wrote: baseline=DIR"),
        (["task=compare", "baseline=base"], "candidate: task=compare needs the folder"),
        (["task=inspect", "artifact=base", "baseline=base"], "baseline: task=inspect does not read it"),
        ([*COMPARE, "candidate=nowhere"], "no artifact at"),
        ([*COMPARE, "candidate=same", "output=same"], "output: 'same' is one of the artifacts compared"),
        ([*COMPARE, "candidate=same", "output=."], "hold"),
        ([*COMPARE, "candidate=same", "compare.max_slowdown=0"], "compare.max_slowdown: found 0; must be more than 0"),
        ([*COMPARE, "candidate=same", "compare.max_slow=2"], "nearest: max_slowdown"),
    ],
)
def test_what_cant_be_compared(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    assert message in capsys.readouterr().err
    assert Record.load("base")
    assert Record.load("same")
    assert not (place / "outputs").exists()


# --- gate by gate, on records


@pytest.fixture
def base(runs: Path) -> Record:
    return Record.load(runs / "base")


def changed(record: Record, *path: str, to: Any) -> Record:
    """The record with one figure of its results replaced; None takes the figure away."""
    results = copy.deepcopy(dict(record.results))
    section = results
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = to
    return replace(record, results=results)


def gate(name: str, baseline: Record, candidate: Record, limit: float) -> dict[str, Any]:
    limits: dict[str, Any] = {**dict.fromkeys(GATES), name: limit}
    (result,) = compare(baseline, candidate, CompareSettings(**limits))["gates"]
    return dict(result)


METRIC = {"name": "top1", "float": 0.9, "int8": 0.9, "drop": 0.0, "samples": 4}


@pytest.mark.parametrize(
    ("name", "path", "before", "after", "passing", "failing"),
    [
        ("max_sqnr_drop_db", ("accuracy", "sqnr_db"), 30.0, 28.5, 1.5, 1.4),
        ("max_accuracy_drop", ("accuracy", "metric"), METRIC, METRIC | {"int8": 0.775}, 0.126, 0.1),
        ("max_agreement_drop", ("accuracy", "agreement"), 1.0, 0.75, 0.25, 0.2),
        ("max_coverage_drop", ("int8_proof", "coverage"), 1.0, 0.75, 0.25, 0.2),
    ],
)
def test_a_limit_itself_passes_and_a_step_further_fails(
    base: Record, name: str, path: tuple[str, ...], before: Any, after: Any, passing: float, failing: float
) -> None:
    baseline, candidate = changed(base, *path, to=before), changed(base, *path, to=after)
    assert gate(name, baseline, candidate, passing)["passed"]
    assert not gate(name, baseline, candidate, failing)["passed"]
    assert gate(name, candidate, baseline, 0.0)["passed"]  # better is never a failure
    missing = gate(name, baseline, changed(base, *path, to=None), passing)
    assert (missing["passed"], missing["value"]) == (False, None)
    assert "the baseline has the figure, the candidate has not" in missing["text"]
    results = compare(changed(base, *path, to=None), candidate, CompareSettings())
    assert any(notice.startswith(f"{name} was not judged") for notice in results["notices"])


def timed(record: Record, int8_ms: list[float]) -> Record:
    config = {"batch_size": 1, "float": {"rounds": [8.0] * len(int8_ms)}, "int8": {"rounds": int8_ms}}
    return changed(record, "benchmark", "configs", to=[config])


def test_a_slowdown_within_the_spread_is_not_one(base: Record) -> None:
    steady, slower = timed(base, [1.0] * 7), timed(base, [1.5] * 7)
    assert gate("max_slowdown", steady, slower, 1.25)["value"] == pytest.approx(1.5)
    assert not gate("max_slowdown", steady, slower, 1.25)["passed"]
    assert gate("max_slowdown", slower, steady, 1.0)["passed"]
    noisy = timed(base, [1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert gate("max_slowdown", steady, noisy, 1.25)["passed"]
    assert "set benchmark.enabled=true" in gate("max_slowdown", steady, changed(base, "benchmark", to=None), 9)["text"]


def test_the_slowest_batch_size_counts(base: Record) -> None:
    both = [
        {"batch_size": size, "float": {"rounds": [8.0]}, "int8": {"rounds": [1.0 + slow]}}
        for size, slow in ((1, 0.0), (16, 1.0))
    ]
    one = [both[0], both[1] | {"int8": {"rounds": [1.0]}}]
    result = gate("max_slowdown", changed(base, "benchmark", "configs", to=one),
                  changed(base, "benchmark", "configs", to=both), 1.25)  # fmt: skip
    assert result["value"] == pytest.approx(2.0)
    assert "batch 16" in result["text"]


@pytest.mark.parametrize(
    ("name", "section", "key", "before", "after", "limit"),
    [
        ("max_layer_sqnr_drop_db", "accuracy", "sqnr_db", 30.0, 20.0, 10.0),
        ("max_layer_sqnr_drop_db", "accuracy", "sqnr_db", math.inf, 90.0, 10.0),
        ("max_layer_slowdown", "benchmark", "ms", 0.1, 0.3, 3.1),
    ],
)
def test_figures_of_a_layer(
    base: Record, name: str, section: str, key: str, before: float, after: float, limit: float
) -> None:
    baseline, candidate = (
        changed(base, section, "per_layer", to=[{"name": "block", key: value}, {"name": "head", key: 1.0}])
        for value in (before, after)
    )
    assert gate(name, baseline, candidate, limit)["passed"]
    failed = gate(name, baseline, candidate, limit / 2)
    assert not failed["passed"]
    assert "first block, worst block, 1 in all" in failed["text"]


def test_a_layer_that_became_nan_fails(base: Record) -> None:
    candidate = changed(base, "accuracy", "per_layer", to=[{"name": "block", "sqnr_db": math.nan}])
    assert gate("max_layer_sqnr_drop_db", base, candidate, 1e9)["value"] == math.inf


def test_growth(base: Record) -> None:
    program = replace(base.program, tensors={**base.program.tensors, "more": torch.zeros(10_000)})
    bigger = replace(base, program=program)
    assert not gate("max_size_growth", base, bigger, 1.05)["passed"]
    assert gate("max_size_growth", bigger, base, 1.0)["passed"]


def test_ranges_and_weights_may_move_when_the_recipe_says_so(base: Record) -> None:
    tensors = dict(base.program.tensors)
    tensors["block.weight_scale"] = tensors["block.weight_scale"] * 2
    settings = Recipe.from_dict(base.recipe).to_dict()
    settings["qconfig"]["weight"]["observer"] = "mse"
    moved = replace(base, program=replace(base.program, tensors=tensors))
    assert compare(base, moved, CompareSettings(max_slowdown=None))["verdict"] == FAILED
    asked = compare(base, replace(moved, recipe=settings), CompareSettings(max_slowdown=None))
    assert asked["verdict"] == PASSED
    assert any("ask for different numbers (qconfig)" in notice for notice in asked["notices"])
    (row,) = (row for row in asked["layers"] if row["name"] == "block")
    assert row["weight_scale_ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("model", "name"), "resnet50", "model.name: 'resnet50' against 'net'"),
        (("model", "weights_used"), "random", "model.weights_used"),
        (("data", "evaluation_ids"), ["x"], "evaluated on different samples"),
        (("data", "content_sha256"), "0" * 64, "the samples have the same names and different content"),
    ],
)
def test_what_makes_a_comparison_unfair(base: Record, path: tuple[str, ...], to: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(base, changed(base, *path, to=to), CompareSettings())
    allowed = compare(base, changed(base, *path, to=to), CompareSettings(allow_different=True))
    assert any(message in notice for notice in allowed["notices"])


def test_other_calibration_samples_are_compared(base: Record) -> None:
    results = compare(base, changed(base, "data", "calibration_ids", to=["x"]), CompareSettings(max_slowdown=None))
    assert results["verdict"] == PASSED
    assert any("different numbers (data)" in notice for notice in results["notices"])


def test_what_a_reader_should_know(base: Record) -> None:
    candidate = changed(changed(base, "environment", "cpu", to="another"), "verdict", to="failed")
    notices = compare(base, candidate, CompareSettings(), ("old", "new"))["notices"]
    assert any("different machines or versions (cpu)" in notice for notice in notices)
    assert "'new' failed its own gates" in notices


def test_every_gate_is_in_the_schema_and_the_other_way_round() -> None:
    assert ["allow_different", *GATES] == list(CompareSettings.model_fields)


@pytest.mark.parametrize("section", ["accuracy", "benchmark", "int8_proof", "model", "data", "environment", "gates"])
@pytest.mark.parametrize("damage", [None, [], "x", -1, {"configs": [1], "per_layer": [1, {}], "metric": []}])
def test_damaged_results_never_crash(base: Record, section: str, damage: Any) -> None:
    candidate = replace(base, results={**base.results, section: damage})
    results = compare(base, candidate, CompareSettings(allow_different=True))
    assert results["verdict"] in (PASSED, FAILED)
    compare(candidate, base, CompareSettings(allow_different=True))


def test_a_recipe_of_another_schema(base: Record) -> None:
    with pytest.raises(RecipeError, match="kalibrate: no such setting"):
        compare(base, replace(base, recipe={**base.recipe, "kalibrate": 1}), CompareSettings())
