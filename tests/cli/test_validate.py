"""quantflow-validate, and the pre-commit hook that calls it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from quantflow.cli.validate import run
from quantflow.config.recipe_file import recipe_files

ROOT = Path(__file__).parents[2]
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


def test_pre_commit_itself_stops_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that uses the hook: a commit with a good recipe is made, one with a bad recipe is not."""
    found = shutil.which("pre-commit", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        reason = "pre-commit is not installed (extra `test`)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/quantflow-validate"
    command.write_text(f"#!{sys.executable}\nfrom quantflow.cli.validate import main\n\nmain()\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{Path(found).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )  # fmt: skip

    hooks, mine = tmp_path / "quantflow", tmp_path / "mine"
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "hooks")):
        assert git(hooks, *arguments).returncode == 0
    revision = git(hooks, "rev-parse", "HEAD").stdout.strip()
    (mine / "recipes").mkdir(parents=True)
    using = {"repo": str(hooks), "rev": revision, "hooks": [{"id": "quantflow-validate"}]}
    (mine / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [using]}))
    (mine / "recipes/good.yaml").write_text(GOOD)
    git(mine, "init", "-q")
    subprocess.run([found, "install"], cwd=mine, capture_output=True, check=True)
    git(mine, "add", "-A")
    good = git(mine, "commit", "-m", "good")
    assert good.returncode == 0, good.stderr
    assert "quantflow recipes" in good.stdout + good.stderr
    (mine / "recipes/bad.yaml").write_text(BAD)
    git(mine, "add", "-A")
    bad = git(mine, "commit", "-m", "bad")
    assert bad.returncode == 1
    assert "nearest: min_sqnr_db" in bad.stdout + bad.stderr
    assert git(mine, "log", "--format=%s").stdout == "good\n"
