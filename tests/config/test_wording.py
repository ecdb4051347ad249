"""Hydra's errors in the user's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantflow.config.compose import load_recipe
from quantflow.errors import RecipeError
from tests.config.recipes import write


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: [1", r"mine\.yaml", "is not YAML"),
        ("- a\n- b", r"mine\.yaml", "must be a mapping"),
        ("defaults: resnet18", "defaults", "must be a list"),
        ("hydra: {job: {name: x}}", "hydra", "belong on the command line"),
        ("defaults: [override hydra/launcher: joblib]", "hydra", "belong on the command line"),
        ("defaults: [resnet19]", "recipe", "'resnet19' is not known"),
        ("model: {kind: torchvison}", "model", "'torchvison' is not known; nearest: torchvision"),
        ("qconfig: sym_int9", "qconfig", "'sym_int9' is not known; nearest: sym_int8"),
        ("seed: ${nowhere}", "seed", "Interpolation key 'nowhere' not found"),
        ("mdoel: {}", "mdoel", "nearest: model"),
        ("1: 2", "1", "no such setting"),
    ],
)
def test_a_bad_file_names_place_and_cure(tmp_path: Path, text: str, place: str, message: str) -> None:
    file = write(tmp_path, "mine.yaml", text)
    with pytest.raises(RecipeError, match=rf"recipe 'mine' can't run(.|\n)*{place}: .*{re.escape(message)}"):
        load_recipe(file)
