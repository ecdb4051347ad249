"""quantflow-validate, and the pre-commit hook that calls it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from quantflow.config import recipe_files
from quantflow.validate import run

ROOT = Path(__file__).parent.parent
GOOD = "model: {kind: torchvision, name: resnet18}\n"
BAD = "model: {kind: torchvision, name: resnet18, nmae: x}\ngates: {min_sqrn_db: 1}\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(BAD)
    (tmp_path / "worse.yaml").write_text("model: [")
    return tmp_path


def test_every_shipped_recipe_is_legal() -> None:
    assert run([str(file) for file in recipe_files().values()]) == 0


def test_every_problem_of_every_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["good.yaml", "bad.yaml", "worse.yaml", "nowhere.yaml"]) == 2
    message = capsys.readouterr().err
    assert "bad.yaml: recipe 'bad' can't run (2 problems)" in message
    assert "nearest: name" in message
    assert "nearest: min_sqnr_db" in message
    assert "worse.yaml: is not YAML" in message
    assert "nowhere.yaml: recipe './nowhere.yaml' can't run" in message
    assert "good.yaml" not in message
    assert sorted(path.name for path in files.iterdir()) == ["bad.yaml", "good.yaml", "worse.yaml"]


def test_a_file_of_a_shipped_recipes_name_is_the_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "template").write_text(BAD)
    assert run(["template"]) == 2
    assert "template" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-x"], 2)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == code
    assert "usage: quantflow-validate FILE" in capsys.readouterr().err


def test_the_hook_as_pre_commit_runs_it(files: Path) -> None:
    """pre-commit takes the entry, appends the files that match, and calls it from the repository's root."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook.keys() >= {"id", "name", "entry", "language"}
    assert hook["id"] == "quantflow-validate"
    matching = [name for name in ("recipes/mine.yaml", "a/recipe/x.yml", "recipes/a/b.yaml", "conf/x.yaml", "good.yaml")
                if re.search(hook["files"], name)]  # fmt: skip
    assert matching == ["recipes/mine.yaml", "a/recipe/x.yml"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[hook["entry"]].partition(":")
    for name, code in (("good.yaml", 0), ("bad.yaml", 2)):
        done = subprocess.run(
            [sys.executable, "-c", f"from {module} import {function}; {function}()", name],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=files, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
