"""A search keeps its limits, knows when to stop, and goes on where it was killed."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sensitivity import PER_TENSOR, batches, fragile

import quantflow as qf
from quantflow.cli import command as cli
from quantflow.errors import RecipeError
from quantflow.schema import ConstraintSettings, LayerOverride, QConfig, TuneSettings
from quantflow.search.steps import (
    MET,
    NOT_MET,
    Search,
    SearchOutcome,
    Step,
    Trial,
    by_noise,
    by_ratio,
    drawn,
    possible_steps,
    taken,
)
from quantflow.search.workbench import FLOAT, INPUT_TERMS, WEIGHT_TERMS, Setting, Workbench
from quantflow.stages.record import Record
from quantflow.store.journal import Journal

ROOT = Path(cli.__file__).parents[2]

# --- decisions, on layers whose noises simply add up


class Additive:
    """Layer → (noise, milliseconds that float adds, milliseconds that each second term adds).

    Of a layer's noise 60 % comes of its weight and 38 % of its input. Keeps what it was asked for.
    """

    def __init__(self, layers: Mapping[str, tuple[float, float, float]]) -> None:
        self.layers = layers
        self.asked: list[str] = []

    def sensitivity(self, _: Setting, before_each: Callable[[], None]) -> dict[str, Any]:
        before_each()
        whole = sum(noise for noise, _, _ in self.layers.values())
        rows = [
            {
                "layer": name,
                "int8_alone": {"noise": noise / whole},
                "float_alone": {"noise_back": noise / whole, "added_ms": float_ms},
                "weight_terms": {"noise": 0.4 * noise / whole, "added_ms": terms_ms},
                "input_terms": {"noise": 0.62 * noise / whole, "added_ms": terms_ms},
            }
            for name, (noise, float_ms, terms_ms) in self.layers.items()
        ]
        return {"layers": sorted(rows, key=lambda row: -row["float_alone"]["noise_back"])}  # type: ignore[index]

    def ranking_errors(self, setting: Setting) -> dict[str, Any]:
        back = {FLOAT: 1.0, WEIGHT_TERMS: 0.6, INPUT_TERMS: 0.38}
        noise = sum(noise for noise, _, _ in self.layers.values())
        noise -= sum(self.layers[name][0] * back[change] for name, change in setting.changes)
        noise *= 0.5 if setting.qconfig.activation.observer == "mse" else 1.0
        noise *= 0.25 if setting.algorithms else 1.0
        noise *= 0.5 if setting.qconfig.activation.dtype == "uint8" else 1.0
        return {"sqnr_db": -10 * torch.tensor(noise, dtype=torch.float64).log10().item()}

    def accuracy(self, setting: Setting) -> dict[str, Any]:
        self.asked.append(setting.digest)
        return self.ranking_errors(setting)

    def latency(self, setting: Setting, _: int = 0) -> dict[str, Any]:
        added = sum(self.layers[name][1 if change == FLOAT else 2] for name, change in setting.changes)
        return {"ms": 10 + added, "start_ms": 10.0, "relative": (10 + added) / 10}


LAYERS = {
    "a": (0.04, 4.0, 1.0),
    "b": (0.03, 0.5, 0.4),
    "c": (0.02, 5.0, 0.1),
    "d": (0.009, 3.0, 2.0),
    "e": (1e-4, 0.0, 0.0),
}
START = Setting((), QConfig())


def search(
    bench: Additive, journal: Journal | None = None, budget_s: float = 1e6, **options: Any
) -> tuple[SearchOutcome, Search]:
    limits = options.pop("limits", None) or ConstraintSettings(min_sqnr_db=options.pop("db", 14.0))
    chosen = {"algorithms": (), "qconfigs": (), "observers": (), **options.pop("tried", {})}
    settings = TuneSettings(subject_to=limits, time_budget_s=budget_s, **chosen)
    found = Search(bench, bench.sensitivity, settings, journal or Journal(None, ""), **options)
    return found.run(START), found


def test_what_holds_already_is_left_alone() -> None:
    bench = Additive(LAYERS)
    outcome, _ = search(bench, db=10.0)
    assert (outcome.verdict, outcome.best.setting, outcome.trials) == (MET, START, 1)


def test_the_cheapest_steps_that_suffice() -> None:
    """0.0991 has to fall below 10^-1.4 = 0.0398: c and b in two terms are not enough, with a they are."""
    outcome, _ = search(Additive(LAYERS))
    assert outcome.verdict == MET
    assert {name for name, _ in outcome.best.setting.changes} <= {"a", "b", "c"}
    best_ms = outcome.best.latency["ms"]  # type: ignore[index]
    every = [
        Additive(LAYERS).latency(START.with_changes(changes))["ms"]
        for changes in combinations(list(LAYERS))
        if Additive(LAYERS).accuracy(START.with_changes(changes))["sqnr_db"] >= 14.0
    ]
    assert best_ms <= 1.1 * min(every)


class Counting(Additive):
    """Agreement that noise lowers and that chance moves by a sample in a hundred, as samples near a tie do."""

    def accuracy(self, setting: Setting) -> dict[str, Any]:
        errors = super().accuracy(setting)
        chance = int(setting.digest[:6], 16) / 0xFFFFFF - 0.5
        noise = 10 ** (-errors["sqnr_db"] / 10)
        return errors | {"agreement": 1 - noise / 2 + chance / 100, "samples": 400}


@pytest.mark.parametrize("least", [0.97, 0.98, 0.99])
def test_a_limit_that_counts_samples_is_kept_by_a_cheap_draw(least: float) -> None:
    layers = {f"{name}{i}": layer for i in range(4) for name, layer in LAYERS.items() if name != "e"}
    layers = {name: (noise / 4, float_ms / 4, terms_ms / 4) for name, (noise, float_ms, terms_ms) in layers.items()}
    journal = Journal(None, "")
    limits = ConstraintSettings(min_agreement=least)
    outcome, _ = search(Counting(layers | {"e": LAYERS["e"]}), journal, limits=limits)
    assert outcome.verdict == MET
    first = next(
        record["latency"]["relative"]
        for name, record in journal.records.items()
        if name.startswith("trial") and record["accuracy"]["agreement"] >= least
    )
    assert outcome.best.latency is not None
    assert outcome.best.latency["relative"] <= first
    assert f"best of {outcome.trials} programs judged on the same 400 samples" in outcome.text
    again, _ = search(Counting(layers | {"e": LAYERS["e"]}), journal, limits=limits)
    assert (again.best.setting, again.trials) == (outcome.best.setting, outcome.trials), "a function of the journal"


def test_drawn_steps_stay_within_their_cost() -> None:
    steps = [Step(name, FLOAT, 1.0, ms) for name, ms in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.5))]
    dice = random.Random(1)
    found = [drawn(steps, 3.5, dice) for _ in range(50)]
    assert all(sum(step.ms for step in some) <= 3.5 for some in found)
    assert all(len({step.layer for step in some}) == len(some) for some in found)
    assert len({tuple(step.layer for step in some) for some in found}) > 3


def combinations(names: list[str]) -> list[set[tuple[str, str]]]:
    if not names:
        return [set()]
    rest = combinations(names[1:])
    ways = ((), (FLOAT,), (WEIGHT_TERMS,), (INPUT_TERMS,), (WEIGHT_TERMS, INPUT_TERMS))
    return [c | {(names[0], change) for change in way} for c in rest for way in ways]


def test_a_target_that_can_not_be_had() -> None:
    outcome, _ = search(Additive(LAYERS), db=200.0)
    assert outcome.verdict == NOT_MET
    assert not outcome.stopped_early
    assert "not reached (all but one layer in float do not reach it either)" in outcome.text
    assert len(outcome.best.setting.changes) >= 4  # the closest: nearly everything made exact


def test_the_budget_ends_a_search() -> None:
    clock = iter(range(1000))
    bench = Additive(LAYERS)
    outcome, _ = search(bench, db=200.0, budget_s=20, spent_s=lambda: float(next(clock)))
    assert outcome.stopped_early
    assert "the 20 s of tune.time_budget_s were over" in outcome.text
    assert 0 < len(bench.asked) < 20
    # The artifact's own time is kept back; the recipe as it is is tried in any case.
    clock, bench = iter(range(1000)), Additive(LAYERS)
    outcome, _ = search(bench, db=200.0, budget_s=20, reserve_s=30, spent_s=lambda: float(next(clock)))
    assert len(bench.asked) == 1


def test_a_search_goes_on_from_any_record_to_the_same_end(tmp_path: Path) -> None:
    with Journal(tmp_path / "whole", "k") as journal:
        expected, _ = search(Additive(LAYERS), journal)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    assert len(lines) > 8
    for kept in range(1, len(lines), 2):
        (tmp_path / "half").write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        bench = Additive(LAYERS)
        with Journal(tmp_path / "half", "k") as journal:
            outcome, _ = search(bench, journal)
        assert outcome == expected
        recorded = sum(b'"trial ' in line for line in lines[:kept])
        assert len(bench.asked) == sum(b'"trial ' in line for line in lines) - recorded


def test_recorded_times_decide_and_not_those_of_now(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "k") as journal:
        expected, _ = search(Additive(LAYERS), journal)
    slower = Additive(LAYERS)
    slower.latency = lambda *_: pytest.fail("was timed again")  # type: ignore[method-assign]
    with Journal(tmp_path / "j", "k") as journal:
        assert search(slower, journal)[0] == expected


def test_each_better_model_is_handed_over_at_once() -> None:
    seen: list[Trial] = []
    outcome, _ = search(Additive(LAYERS), on_best=seen.append)
    assert seen[0].setting == START
    assert [trial.rank for trial in seen] == sorted((trial.rank for trial in seen), reverse=True)
    assert seen[-1].setting == outcome.best.setting


@pytest.mark.parametrize(
    ("tried", "changed"),
    [
        ({"observers": ("mse",)}, lambda s: s.qconfig.activation.observer == "mse"),
        ({"algorithms": ("fast",)}, lambda s: len(s.algorithms) > 0),
        ({"qconfigs": ("affine_uint8",)}, lambda s: s.qconfig.activation.dtype == "uint8"),
    ],
)
def test_what_costs_no_speed_comes_first(tried: dict[str, Any], changed: Callable[[Setting], bool]) -> None:
    outcome, _ = search(Additive(LAYERS), tried=tried, db=13.0)
    assert outcome.verdict == MET
    assert changed(outcome.best.setting)
    assert not outcome.best.setting.changes
    without, _ = search(Additive(LAYERS), db=13.0)
    assert without.best.setting.changes


def test_steps_and_their_order() -> None:
    def row(name: str, *measured: tuple[float, float] | None) -> dict[str, Any]:
        """What float takes away of all noise, the weight's and the input's share of it, and what each costs."""
        whole, *shares = measured
        assert whole is not None
        terms = [None if pair is None else {"noise": whole[0] - pair[0], "added_ms": pair[1]} for pair in shares]
        return {
            "layer": name,
            "int8_alone": None if name == "m" else {"noise": whole[0]},
            "float_alone": {"noise_back": whole[0] if name == "m" else -1.0, "added_ms": whole[1]},
            **dict(zip(("weight_terms", "input_terms"), terms, strict=True)),
        }

    rows = [
        row("a", (0.55, 10), (0.4, 1), (0.1, 1)),
        row("b", (0.3, 1), (0.1, 1), None),
        row("m", (0.09, 1), None, None),
        row("z", (0.05, 1), (0.04, 2), (0.04, 2)),
    ]
    steps = possible_steps(rows, 0.01)
    assert [(s.layer, s.change) for s in steps] == [
        ("a", WEIGHT_TERMS), ("a", INPUT_TERMS), ("a", FLOAT), ("b", FLOAT), ("m", FLOAT),
    ]  # fmt: skip
    assert steps[2].noise == pytest.approx(0.05)
    assert steps[2].ms == 8
    assert [(s.layer, s.change) for s in by_ratio(steps)] == [
        ("a", WEIGHT_TERMS), ("b", FLOAT), ("a", INPUT_TERMS), ("m", FLOAT), ("a", FLOAT),
    ]  # fmt: skip
    assert [s.layer for s in by_noise(steps)] == ["a", "b", "a", "m", "a"]
    assert taken(steps) == {("a", FLOAT), ("b", FLOAT), ("m", FLOAT)}
    assert taken(steps[:2]) == {("a", WEIGHT_TERMS), ("a", INPUT_TERMS)}
    assert taken([Step("a", FLOAT, 1, 1), Step("a", WEIGHT_TERMS, 1, 1)]) == {("a", FLOAT)}


def test_a_setting_is_what_its_recipe_says() -> None:
    own = LayerOverride.model_validate({"weight": {"observer": "mse"}})
    changes = [("b", FLOAT), ("a", WEIGHT_TERMS), ("a", INPUT_TERMS)]
    setting = Setting((), QConfig(), {"a": own, "*": "int8"}).with_changes(changes)
    assert list(setting.all_layers) == ["a", "*", "b"]
    assert setting.all_layers["b"] == "float"
    assert setting.all_layers["a"].input_terms == 2  # type: ignore[union-attr]
    assert setting.all_layers["a"].weight.model_dump() == {"observer": "mse", "terms": 2}  # type: ignore[union-attr]
    assert setting.digest != Setting((), QConfig(), setting.layers).digest
    assert setting.with_changes([]) == Setting((), QConfig(), setting.layers)


# --- the whole task, on a model with one fragile layer

MINE = "import torch\nfrom torch import nn\n\n" + inspect.getsource(fragile)
ARGUMENTS = [
    "model=entry", "model.entry=mine:fragile", "data=random", "data.shape=[[3,8,8]]", "data.calibration=16",
    "data.evaluation=24", "data.batch_size=8", "qconfig.weight.granularity=per_tensor", "tune.algorithms=[]",
    "benchmark.rounds=1", "benchmark.min_round_ms=1", "output=art",
]  # fmt: skip
LIMIT = "tune.subject_to.min_sqnr_db=43"
JOURNAL = ".art.tune.jsonl"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def artifact_files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / "art" / name).read_bytes() for name in ("recipe.json", "program.json", "weights.safetensors")
    }


#: What a change costs is the same in every process: two searches that measure alike must decide alike.
FIXED_CLOCK = """
from quantflow.search.workbench import FLOAT, Workbench

def cost_ms(setting):
    return sum((2.0 if change == FLOAT else 0.5) + 0.01 * len(name) for name, change in setting.changes)

def latency(self, setting, rounds=1):
    return {"ms": 10 + cost_ms(setting), "start_ms": 10.0, "relative": 1 + cost_ms(setting) / 10}

def added_ms(self, setting, changed):
    return cost_ms(changed) - cost_ms(setting)
"""


def test_killed_and_resumed(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle leaves the best so far, and the next run ends where an uninterrupted one does."""
    clock: dict[str, Any] = {}
    exec(FIXED_CLOCK, clock)
    for name in ("latency", "added_ms"):
        monkeypatch.setattr(Workbench, name, clock[name])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    patched = "Workbench.latency, Workbench.added_ms = latency, added_ms"
    run = f"{FIXED_CLOCK}\n{patched}\nfrom quantflow.cli.command import main\nmain()\n"
    command = [sys.executable, "-c", run, *ARGUMENTS, LIMIT]
    with subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if (place / JOURNAL).exists() and len((place / JOURNAL).read_bytes().splitlines()) >= 5:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL
    so_far = Record.load(place / "art")
    assert so_far.results["notices"][-1] == "the search was not over when this was saved: the best so far"
    assert so_far.results["accuracy"]["sqnr_db"] > 0
    recorded = len((place / JOURNAL).read_bytes().splitlines()) - 1

    assert cli.run([*ARGUMENTS, LIMIT]) == 0, capsys.readouterr().err
    resumed = artifact_files(place)
    tune = Record.load(place / "art").results["tune"]
    assert (tune["verdict"], tune["resumed_measurements"] >= recorded - 1) == (MET, True)
    assert sorted(path.name for path in place.glob(".*")) == []

    assert cli.run([*ARGUMENTS, LIMIT]) == 0
    assert artifact_files(place) == resumed
    assert Record.load(place / "art").results["tune"]["resumed_measurements"] == 0

    # The recipe that was found makes the same model without a search.
    record = Record.load(place / "art")
    assert record.results["gates"][0]["name"] == "min_sqnr_db"
    assert "1" in record.recipe["layers"]
    assert cli.run([f"recipe={place / 'art/recipe.json'}", "output=again"]) == 0, capsys.readouterr().err
    again = Record.load(place / "again")
    assert "tune" not in again.results
    for name in ("program.json", "weights.safetensors"):
        assert (place / "again" / name).read_bytes() == (place / "art" / name).read_bytes()
    journal = [json.loads(line) for line in record.attached["tune.jsonl"].splitlines()]
    assert journal[0]["format"] == 1
    assert len(journal) - 1 == record.results["tune"]["measurements"]


def test_a_target_beyond_int8_ends_with_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*ARGUMENTS, "task=tune", "tune.subject_to.min_sqnr_db=200"]) == 3
    out = capsys.readouterr().out
    assert "search: not met: the target was not reached" in out
    results = Record.load(place / "art").results
    assert results["verdict"] == "failed"
    assert re.search(r"what comes closest has .* layers in float", results["tune"]["text"])
    baseline = qf.load(place / "art")
    assert baseline.int8_layers() >= 1


def test_a_budget_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No time for a search: the recipe as it is, judged, and said so."""
    assert cli.run([*ARGUMENTS, LIMIT, "tune.time_budget_s=0.001"]) == 3, capsys.readouterr().err
    tune = Record.load(place / "art").results["tune"]
    assert (tune["verdict"], tune["trials"], tune["stopped_by_budget"]) == (NOT_MET, 1, True)


def test_in_python(place: Path) -> None:
    options: dict[str, Any] = {"qconfig": PER_TENSOR, "evaluation": batches(seed=2)}
    plain = qf.quantize(fragile(), batches(), **options)
    assert plain.results["accuracy"]["sqnr_db"] < 42
    model = qf.quantize(
        fragile(), batches(), **options, tune={"subject_to": {"min_sqnr_db": 42}, "algorithms": ["fast"]}
    )
    assert model.results["tune"]["verdict"] == MET
    assert model.results["accuracy"]["sqnr_db"] >= 42
    assert model.results["verdict"] == "passed"
    assert not list(place.glob(".*"))


def test_a_search_without_a_limit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"tune\.subject_to: task=tune needs a limit"):
        qf.load_recipe("mnist_cnn_sym_int8", ["task=tune"])
    recipe = qf.load_recipe("mnist_cnn_sym_int8", ["task=tune", "tune=cosine"])
    assert recipe.tune.subject_to.is_set
    assert not qf.load_recipe("mnist_cnn_sym_int8").tune.subject_to.is_set
