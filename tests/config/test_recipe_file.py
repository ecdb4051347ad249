"""Which files there are, and which are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantflow.config import recipe_file
from quantflow.config.recipe_file import (
    config_dirs,
    group_choices,
    read_recipe,
    recipe_description,
    recipe_files,
    shipped,
)
from quantflow.errors import RecipeError
from tests.config.recipes import PLAIN, write


def test_the_yaml_files_are_all_found() -> None:
    found = {str(file.relative_to(shipped("conf")).with_suffix("")) for file in shipped("conf").rglob("*.yaml")}
    assert found == {f"{group}/{name}" for group, names in group_choices().items() for name in names} | {"config"}
    assert {file.stem for file in shipped("recipes").rglob("*.yaml")} == recipe_files().keys()


def test_the_users_recipes_are_those_of_every_config_dir(tmp_path: Path) -> None:
    mine = write(tmp_path, "recipe/mine.yaml", PLAIN)
    for arguments in (["-cd", str(tmp_path)], ["seed=1", f"--config-dir={tmp_path}"]):
        assert config_dirs(arguments) == [tmp_path]
        assert recipe_files(config_dirs(arguments)) == recipe_files() | {"mine": mine}


def test_a_file_is_described_by_its_first_comment(tmp_path: Path) -> None:
    assert recipe_description(write(tmp_path, "mine.yaml", PLAIN)) == "What mine is for"
    assert recipe_description(write(tmp_path, "mine.yaml", PLAIN + "description: other\n")) == "other"
    assert recipe_description(write(tmp_path, "mine.yaml", "a: [1")) == "(not readable)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: *a", "the alias *a stands inside what it repeats, or before it"),
        ("a: " + "9" * 1001, "a value without quotes has 1001 characters, 1000 at most"),
        ("[" * 51 + "]" * 51, "it is nested deeper than 50 levels"),
        (" " * 2**20 + "a", "it is longer than 1048576 bytes"),
        (
            "\n".join(["a0: &a0 [1, 1]"] + [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(17)]),
            "it holds more than 100000 values, aliases counted as often as they are used",
        ),
    ],
    ids=["alias", "number", "depth", "length", "aliases"],
)
def test_what_grows_out_of_a_small_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"is no recipe: {message}")):
        read_recipe(write(tmp_path, "mine.yaml", text))


def test_a_runtime_of_the_schema_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(recipe_file.unwritten_kinds().values()), "what ships has a comment that says what it is"
    written = {group: [name for name in names if name != "torch"] for group, names in recipe_file._written().items()}
    monkeypatch.setattr(recipe_file, "_written", lambda: written)
    assert recipe_file.unwritten_kinds() == {"runtime": ["torch"], "device": []}
    monkeypatch.setattr(recipe_file, "group_choices", recipe_file.group_choices.__wrapped__)
    assert recipe_file.group_choices()["runtime"] == ["auto", "native", "reference", "torch", "triton"]
    assert recipe_file.group_choices()["mode"] == ["export", "imperative", "torchscript"]
