"""Recipes from names, files and overrides: what wins over what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from quantflow.config.compose import load_recipe, overlay
from quantflow.config.recipe_file import group_choices, recipe_description, recipe_files, shipped
from quantflow.errors import RecipeError
from quantflow.schema import PRESETS, Recipe
from tests.config.recipes import PLAIN, RECIPE, write

#: What a choice needs beside itself to be complete.
NEEDS = {
    "model=torchvision": ["model.name=resnet18"],
    "model=transformers": ["model.path=dir"],
    "model=scriptmodule": ["model.path=model.pt"],
    "model=exported": ["model.path=model.pt2"],
    "model=entry": ["model.entry=package.module:build"],
    "data=folder": ["data.path=dir"],
    "data=tensors": ["data.path=x.npz"],
    "data=entry": ["data.entry=package.module:batches"],
}
CHOICES = [f"{group}={name}" for group, names in group_choices().items() for name in names]
SHIPPED_RECIPES = [file.stem for file in shipped("recipes").rglob("*.yaml")]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice: str) -> None:
    recipe = load_recipe(RECIPE, [choice, *NEEDS.get(choice, [])])
    group, _, name = choice.partition("=")
    if group == "observer":
        assert recipe.qconfig.activation.observer == name
    elif group == "qconfig":
        assert recipe.qconfig == PRESETS[name]
    elif group == "algorithms":
        assert recipe.algorithms == Recipe.from_dict({"model": {"kind": "mnist_cnn"}, "algorithms": name}).algorithms
    elif group == "tune":
        limits = {name: limit for name, limit in recipe.tune.subject_to.model_dump().items() if limit is not None}
        written = yaml.safe_load((shipped("conf") / group / f"{name}.yaml").read_text()) or {}
        assert {"subject_to": limits} == ({"subject_to": {}} | written)
    elif group in ("model", "data", "mode", "runtime", "device"):
        assert getattr(recipe, group).kind == name
    else:
        written = yaml.safe_load((shipped("conf") / group / f"{name}.yaml").read_text()) or {}
        section = recipe.to_dict()[group]
        assert {key: section[key] for key in written} == written
        base = Recipe.from_dict({"model": {"kind": "mnist_cnn"}}).to_dict()[group]
        assert {key for key, value in section.items() if value != base[key]} == written.keys()


@pytest.mark.parametrize("name", SHIPPED_RECIPES)
def test_every_shipped_recipe_composes_and_describes_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description == recipe_description(recipe_files()[name]) != ""
    assert recipe.gates.min_int8_coverage is not None
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_setting_can_be_overridden_without_a_plus() -> None:
    overrides = [
        "name=other", "output=out", "seed=3", "model.weights=random", "data.calibration=5", "layers={fc:float}",
        "algorithms=fast", "qconfig.activation.percentile=99", "qconfig.weight.observer=mse",
        "qconfig.reduce_range=true", "sensitivity.samples=8", "tune.subject_to.min_cosine=0.9",
        "mode.kind=torchscript", "mode.method=script", "runtime.kind=torch", "device.kind=cpu",
        "resume=false", "sweep.objectives=[speedup]",
        "outliers.ratio=50", "policy.add=float",
        "dynamic=none", "parts=[head]",
        "calibrate.resume=false", "warmup.iterations=2", "evaluate.per_layer=false", "benchmark.batch_sizes=[1,4]",
        "benchmark.threads=2", "gates.max_latency_ms=9", "report.quiet=true",
        "report.plain=true", "report.baseline=before", "benchmark.per_layer=false",
        "compare.max_slowdown=2",
    ]  # fmt: skip
    changed, base = load_recipe(RECIPE, overrides).to_dict(), load_recipe(RECIPE).to_dict()
    same = {"description", "task", "artifact", "baseline", "candidate", "export"}
    assert {key for key in base if base[key] == changed[key]} == same
    assert changed["benchmark"]["batch_sizes"] == [1, 4]
    assert changed["qconfig"]["activation"]["percentile"] == 99.0


@pytest.mark.parametrize(
    ("override", "layers"),
    [
        ("layers.fc=float", {"fc": "float"}),
        ("layers={fc:float,layer4.*:int8}", {"fc": "float", "layer4.*": "int8"}),
        (
            "layers={fc:{activation:{observer:mse}}}",
            {"fc": {"activation": {"observer": "mse"}, "weight": {}}},
        ),
    ],
)
def test_layers_on_the_command_line(override: str, layers: dict[str, Any]) -> None:
    assert load_recipe(RECIPE, [override]).to_dict()["layers"] == layers


def test_a_file_of_ones_own_needs_no_defaults_list(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "mine.yaml", PLAIN))
    assert (recipe.name, recipe.description) == ("mine", "What mine is for")
    assert (recipe.data.kind, recipe.data.calibration) == ("folder", 8)
    assert (recipe.mode.kind, recipe.device.kind, recipe.gates.min_sqnr_db) == ("torchscript", "cpu", 20.0)
    assert recipe.qconfig.activation.observer == "mse"
    assert recipe.to_dict()["layers"] == {
        "layer4.*": "float",
        "fc": {"activation": {}, "weight": {"observer": "mse"}},
    }


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (["qconfig=sym_int8"], {"qconfig": PRESETS["sym_int8"].model_dump(mode="json")}),
        (["observer=entropy"], {"qconfig.activation.observer": "entropy", "qconfig.activation.dtype": "uint8"}),
        (["mode=imperative"], {"mode.kind": "imperative"}),
        (["device=auto"], {"device.kind": "auto"}),
        (["gates=none"], {"gates.min_sqnr_db": None}),
        (["data=mnist"], {"data": {"kind": "mnist", "calibration": 64, "evaluation": 128, "batch_size": 16}}),
        (["data=mnist", "data.batch_size=2"], {"data.batch_size": 2}),
        (["model=mnist_cnn"], {"model": {"kind": "mnist_cnn", "weights": "auto"}}),
        (["qconfig.activation.observer=mse", "observer=entropy"], {"qconfig.activation.observer": "mse"}),
    ],
)
def test_the_command_line_wins_over_the_recipe(tmp_path: Path, choice: list[str], expected: dict[str, Any]) -> None:
    file = write(tmp_path, "mine.yaml", PLAIN)
    stored = load_recipe(file)
    composed = load_recipe(file, choice).to_dict()
    overlaid = Recipe.from_dict(overlay(stored.to_dict(), choice)).to_dict()
    for settings in (composed, overlaid):
        for path, value in expected.items():
            found: Any = settings
            for part in path.split("."):
                found = found[part]
            assert found == value


def test_a_recipe_may_build_on_another(tmp_path: Path) -> None:
    file = write(tmp_path, "mine.yaml", f"defaults:\n  - {RECIPE}\n  - override /qconfig: affine_uint8\nseed: 7\n")
    recipe = load_recipe(file)
    assert recipe.model == load_recipe(RECIPE).model
    assert (recipe.name, recipe.seed, recipe.qconfig) == ("mine", 7, PRESETS["affine_uint8"])


@pytest.mark.parametrize("name", SHIPPED_RECIPES)
def test_a_written_out_recipe_is_a_recipe_file(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    for suffix, text in ((".json", json.dumps(recipe.to_dict())), (".yaml", yaml.safe_dump(recipe.to_dict()))):
        assert load_recipe(write(tmp_path, f"copy{suffix}", text)) == recipe


def test_overlay_without_overrides_changes_nothing_and_the_artifacts_task_is_set() -> None:
    stored = load_recipe("minilm_sym_int8", ["layers={a.b:float}"]).to_dict()
    assert overlay(stored, []) == stored
    assert overlay(stored, ["task=report", "artifact=DIR"]) == stored | {"task": "report", "artifact": "DIR"}


def test_overlay_refuses_another_recipe() -> None:
    with pytest.raises(RecipeError, match="an artifact holds its own recipe"):
        overlay(load_recipe(RECIPE).to_dict(), [f"recipe={RECIPE}"])


def test_hydra_is_left_as_it_was() -> None:
    load_recipe(RECIPE)
    assert not GlobalHydra.instance().is_initialized()
    with pytest.raises(RecipeError):
        load_recipe(RECIPE, ["nonsense"])
    assert not GlobalHydra.instance().is_initialized()
