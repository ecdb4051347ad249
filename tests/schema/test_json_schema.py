"""The schema for editors accepts what quantflow accepts and refuses what it refuses, file by file."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings

from quantflow.cli import command as cli
from quantflow.config.recipe_file import group_choices, recipe_files, shipped
from quantflow.schema import Recipe
from quantflow.schema.json_schema import recipe_json_schema
from tests.schema.test_recipe import BAD, RECIPES

SCHEMA = recipe_json_schema(group_choices())
CHECK = jsonschema.Draft7Validator(SCHEMA)
COMMITTED = shipped("recipes") / "recipe.schema.json"

#: What shows only when a recipe is put together: fields that belong together, and required ones, given elsewhere.
TOGETHER = [
    ({}, "model"),
    ({"model": {"name": "resnet18"}}, "model.kind"),
    ({"model": {"kind": "torchvision"}}, "model.name"),
    ({"model": {"kind": "transformers"}}, "model"),
    ({"model": {"kind": "transformers", "path": "a", "package": "b"}}, "model"),
    ({"data": {"kind": "folder"}}, "data.path"),
    ({"mode": {"method": "script"}}, "mode.method"),
    ({"benchmark": {"batch_sizes": [1, 1]}}, "benchmark.batch_sizes"),
    ({"gates": {"min_sqnr_db": float("inf")}}, "gates.min_sqnr_db"),  # not in JSON, which editors read
    ({"task": "report"}, "artifact"),
    ({"artifact": "dir"}, "artifact"),
]


def test_the_schema_is_one_itself() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_the_committed_copy_and_the_task_agree_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """If not: python -m quantflow task=schema > recipes/recipe.schema.json"""
    assert cli.run(["task=schema"]) == 0
    assert COMMITTED.read_text() == capsys.readouterr().out
    assert json.loads(COMMITTED.read_text()) == SCHEMA


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_is_accepted(name: str) -> None:
    CHECK.validate(yaml.safe_load(recipe_files()[name].read_text()))


def test_the_template_names_the_schema_beside_it() -> None:
    assert f"# yaml-language-server: $schema={COMMITTED.name}\n" in recipe_files()["template"].read_text()


@settings(deadline=None, max_examples=60)
@given(RECIPES)
def test_what_a_recipe_may_say_is_accepted(written: dict[str, Any]) -> None:
    CHECK.validate(written)
    CHECK.validate(Recipe.from_dict(written).to_dict())


@pytest.mark.parametrize("written", [w for w, where, _ in BAD if (w, where) not in TOGETHER], ids=str)
def test_what_a_recipe_may_not_say_is_refused(written: dict[str, Any]) -> None:
    if written == {"model": "resnet18"}:  # a group's name is legal there, and this is none
        assert "resnet18" not in group_choices()["model"]
    assert list(CHECK.iter_errors(written))


@pytest.mark.parametrize(
    "written",
    [
        {"qconfig": "sym_int8", "observer": "mse", "mode": "torchscript", "benchmark": "quick", "model": "minilm"},
        {"defaults": ["resnet18_sym_int8", "_self_", {"override /data": "folder"}, {"override qconfig": "sym_uint8"}]},
        {"model": {"name": "resnet18"}, "data": {"path": "photos/"}},  # the defaults list chooses their kinds
        {"model": None},
    ],
)
def test_what_only_a_file_may_say_is_accepted(written: dict[str, Any]) -> None:
    CHECK.validate(written)


@pytest.mark.parametrize(
    "written",
    [
        {"qconfig": "int4"},
        {"observer": {"kind": "mse"}},
        {"defaults": "resnet18_sym_int8"},
        {"defaults": [{"override /modle": "minilm"}]},
        {"defaults": [{"override /model": "resnet18"}]},
        {"defaults": [{"override hydra/launcher": "joblib"}]},
        {"defaults": ["${oc.env:HOME}"]},
        {"hydra": {"run": {"dir": "/"}}},
        {"model": {"kind": "minilm", "name": "resnet18"}},  # a setting of another kind
        {"model": {"nmae": "resnet18"}},
        {"model": {"kind": "given", "name": "x"}},
        {"data": {"kind": "given"}},
        {"layers": ["fc"]},
    ],
    ids=str,
)
def test_what_a_file_may_not_say_is_refused(written: dict[str, Any]) -> None:
    assert list(CHECK.iter_errors(written))
