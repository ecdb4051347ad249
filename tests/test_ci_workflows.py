"""The CI files in docs/ci: their shell steps run here as the CI system would run them.

The steps that install are left out, because everything is installed where tests run; `uses:` steps are the CI system's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from junitparser import JUnitXml

from bench.torch_versions import VERSIONS
from quantflow.stages.record import Record

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / "docs/ci"
GITHUB = yaml.safe_load((WORKFLOWS / "github.yml").read_text())
GITLAB = yaml.safe_load((WORKFLOWS / "gitlab.yml").read_text())
STEPS: list[dict[str, Any]] = GITHUB["jobs"]["quantize"]["steps"]

RECIPE = """
# A network of milliseconds
model: {kind: entry, entry: "mine:net"}
data: {kind: random, shape: [[3, 8, 8]], calibration: 4, evaluation: 4}
mode: torchscript
benchmark: disabled
"""
GOOD = RECIPE + "gates: {min_sqnr_db: 10, min_int8_coverage: 1.0}\n"
FAILING = RECIPE + "gates: {min_sqnr_db: 200, min_int8_coverage: 1.0}\n"
#: Passes its own gates and is worse than GOOD.
WORSE = RECIPE + "gates: {min_sqnr_db: 10}\nlayers: {block: float}\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A user's checkout."""
    shutil.copy(ROOT / "tests/own_models.py", tmp_path / "mine.py")
    return tmp_path


def environment(*variables: dict[str, str]) -> dict[str, str]:
    merged = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for each in variables:
        merged |= each
    return os.environ | merged


def github(repository: Path, recipe: str, ref: str) -> tuple[int, dict[str, int]]:
    """The job's exit code, and step name → exit code: after a failure only the steps that say always() run."""
    (repository / "mine.yaml").write_text(recipe)
    summary = repository / "step-summary"
    variables = environment(GITHUB["env"], {"RECIPE": "mine.yaml", "GITHUB_STEP_SUMMARY": str(summary)})
    job, codes = 0, {}
    for step in STEPS:
        condition = step.get("if", "success()")
        assert condition in ("success()", "always()", "github.ref == 'refs/heads/main'"), condition
        wanted = condition == "always()" or (job == 0 and (condition == "success()" or ref == "refs/heads/main"))
        if "run" not in step or step["run"].startswith("pip install") or not wanted:
            continue
        assert "${{" not in step["run"], "values reach the shell through the environment only"
        done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=repository, env=variables, check=False)
        codes[step["name"]] = done.returncode
        job = job or done.returncode
    return job, codes


def test_github_passes_keeps_a_baseline_and_fails_on_what_became_worse(repository: Path) -> None:
    job, codes = github(repository, GOOD, "refs/heads/main")
    assert job == 0
    assert list(codes) == ["Quantize, verify, judge", "Compare with main", "Summary page", "Keep as baseline"]
    assert Record.load(repository / "baseline").results["verdict"] == "passed"
    assert "**Verdict: passed" in (repository / "step-summary").read_text()
    job, codes = github(repository, WORSE, "refs/pull/1/merge")
    assert job == 3
    assert codes == {"Quantize, verify, judge": 0, "Compare with main": 3, "Summary page": 0}
    page = (repository / "step-summary").read_text()
    assert "| max_lost_layers | FAILED |" in page
    (suite,) = JUnitXml.fromfile(str(repository / "outputs/ci-compared/junit.xml"))
    assert suite.failures > 0


def test_github_fails_on_a_gate_and_publishes_all_the_same(repository: Path) -> None:
    job, codes = github(repository, FAILING, "refs/heads/main")
    assert job == 3
    assert codes == {"Quantize, verify, judge": 3, "Summary page": 0}
    assert "| min_sqnr_db | FAILED |" in (repository / "step-summary").read_text()
    published = next(step for step in STEPS if "upload-artifact" in step.get("uses", ""))
    assert published["if"] == "always()"
    (folder,) = repository.glob(published["with"]["path"].replace("${{ env.OUTPUT }}", GITHUB["env"]["OUTPUT"]))
    assert {"report.md", "junit.xml", "results.json"} <= {path.name for path in folder.iterdir()}
    assert not (repository / "baseline").exists()


@pytest.mark.parametrize(("recipe", "code"), [(GOOD, 0), (FAILING, 3)], ids=["good", "failing"])
def test_gitlab(repository: Path, recipe: str, code: int) -> None:
    (repository / "mine.yaml").write_text(recipe)
    job = GITLAB["quantize"]
    assert all(line.startswith("pip install") for line in job["before_script"])
    variables = environment({"OUTPUT": job["variables"]["OUTPUT"], "RECIPE": "mine.yaml"})
    done = subprocess.run(["bash", "-e", "-c", "\n".join(job["script"])], cwd=repository, env=variables, check=False)
    assert done.returncode == code
    junit = repository / job["artifacts"]["reports"]["junit"].replace("$OUTPUT", job["variables"]["OUTPUT"])
    (suite,) = JUnitXml.fromfile(str(junit))
    assert (suite.tests, suite.failures) == (2, int(code == 3))
    assert job["artifacts"]["when"] == "always"


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml"])
def test_the_default_recipe_is_a_shipped_one_and_the_caches_are_ours(name: str) -> None:
    text = (WORKFLOWS / name).read_text()
    assert (ROOT / "recipes/mnist_cnn_sym_int8.yaml").is_file()
    assert "RECIPE: mnist_cnn_sym_int8" in text
    assert "cache" in text
    assert 'pip install ".[zoo]"' in text


def test_a_release_is_tried_on_the_versions_that_are_declared() -> None:
    jobs = yaml.safe_load((WORKFLOWS / "wheels.yml").read_text())["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]
    assert matrix["versions"] == list(VERSIONS)
    assert {row["versions"] for row in matrix["include"]} <= VERSIONS.keys()
    pythons = jobs["smoke"]["strategy"]["matrix"]["python"]
    assert {*matrix["python"], *(row["python"] for row in matrix["include"])} == {pythons[0], pythons[-1]}
    assert set(jobs["publish"]["needs"]) == {"smoke", "versions"}
