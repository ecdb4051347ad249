from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml

from quantflow.cli import command as cli
from quantflow.cli import sweep
from quantflow.cli.job import run_request
from quantflow.config.compose import load_recipe, overlay
from quantflow.config.recipe_file import group_choices, recipe_description, recipe_files
from quantflow.errors import DataError, UnavailableError
from quantflow.schema import Recipe, Task

RECIPE = "recipe=resnet18_sym_int8"


class Executor:
    """Stands in for quantflow.tasks.table: remembers what it got, ends as it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Recipe, list[str]]] = []
        self.endings: list[int | BaseException] = []

    def run_task(self, recipe: Recipe, overrides: list[str]) -> int:
        self.calls.append((recipe, overrides))
        ending = self.endings.pop(0) if self.endings else 0
        if isinstance(ending, BaseException):
            raise ending
        return ending


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Executor:
    fake = Executor()
    monkeypatch.setitem(sys.modules, "quantflow.tasks.table", SimpleNamespace(run_task=fake.run_task))  # type: ignore[arg-type]
    monkeypatch.setattr(sweep, "start_process", lambda request, *_: run_request(request))
    monkeypatch.chdir(tmp_path)
    return fake


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_one_job(executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([RECIPE, "seed=3", "qconfig=affine_uint8"]) == 0
    assert executor.calls == [
        (
            load_recipe("resnet18_sym_int8", ["seed=3", "qconfig=affine_uint8"]),
            [RECIPE, "seed=3", "qconfig=affine_uint8"],
        )
    ]
    assert written(tmp_path) == []
    assert capsys.readouterr() == ("", "")


def test_an_artifacts_task_needs_no_model(executor: Executor) -> None:
    assert cli.run(["task=benchmark", "artifact=DIR", "benchmark=quick"]) == 0
    ((recipe, overrides),) = executor.calls
    assert (recipe.task, recipe.artifact, recipe.model) == ("benchmark", "DIR", None)
    assert overrides == ["task=benchmark", "artifact=DIR", "benchmark=quick"]


@pytest.mark.parametrize(
    ("ending", "exit_code", "message"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (DataError("no photos [in] here"), 2, "no photos [in] here"),
        (UnavailableError("no xpu"), 4, "no xpu"),
        (RuntimeError("bang"), 1, "RuntimeError: bang"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    executor: Executor, capsys: pytest.CaptureFixture[str], ending: int | BaseException, exit_code: int, message: str
) -> None:
    executor.endings = [ending]
    with pytest.raises(SystemExit) as caught:
        cli.main([RECIPE])
    assert caught.value.code == exit_code
    errors = capsys.readouterr().err
    assert message in errors
    assert ("Traceback" in errors) is (exit_code == 1)


BAD = [
    ("", "model: is required"),
    ("recipe=resnet18_sym_int", "recipe: 'resnet18_sym_int' is not known; nearest: resnet18_sym_int8"),
    ("recipe=mine.yaml", "recipe: no such file; known recipes are: efficientnet_lite0_affine_uint8"),
    (f"{RECIPE} qconfg=sym_int8", "qconfg: no such setting; nearest: qconfig"),
    (f"{RECIPE} qconfig=sym_int", "qconfig: 'sym_int' is not known; nearest: sym_int8"),
    (f"{RECIPE} algorithms=[equalize,gptq]", "algorithms: takes one name here (accurate, best, fast, none); a list"),
    (f"{RECIPE} qconfig=7", "qconfig: '7' is not known; legal: affine_int8"),
    (f"{RECIPE} observer=null", "observer: 'null' is not known; legal: entropy"),
    (f"{RECIPE} model.kind=minilm", "model.kind: a kind brings its own settings; choose it as model=minilm"),
    (f"{RECIPE} model.nam=resnet50", "model.nam: no such setting; nearest: name"),
    ("model.name=resnet50", "model.name: no model is chosen yet; add model=KIND (efficientnet_lite0"),
    ("model=torchvision", "model.name: is required and not given"),
    ("model=entry model.entry=os", "model.entry: found 'os'; must be written as package.module:callable"),
    (f"{RECIPE} model=torchvison", "model: 'torchvison' is not known; nearest: torchvision"),
    (f"{RECIPE} data=folder", "data.path: is required and not given"),
    (f"{RECIPE} data.pth=x", "data.pth: no such setting"),
    (f"{RECIPE} data.calibration=0", "data.calibration: found 0; must be at least 1"),
    (f"{RECIPE} seed=abc", "seed: found 'abc'; must be a whole number"),
    (f"{RECIPE} seed.x=1", "seed.x: has no settings inside"),
    (f"{RECIPE} qconfig.activation.granularity=per_channel", "'per_channel' is not possible here; use per_tensor"),
    (f"{RECIPE} qconfig.activation.obsrver=mse", "qconfig.activation.obsrver: no such setting; nearest: observer"),
    (f"{RECIPE} qconfig.activation=5", "must be a mapping with keys of: dtype"),
    (f"{RECIPE} mode.method=script", "mode.method: script is possible in mode=torchscript only"),
    (f"{RECIPE} +gates.min_sqrn_db=1", "gates.min_sqrn_db: no such setting; nearest: min_sqnr_db"),
    (f"{RECIPE} task=bench", "task: 'bench' is not possible here; nearest: benchmark"),
    (f"{RECIPE} task=report", "artifact: task=report needs the folder that a run wrote"),
    (f"{RECIPE} artifact=DIR", "artifact: task=run starts from a model"),
    (f"{RECIPE} qconfig=sym_int8,affine_uint8", "add --multirun"),
    (f"{RECIPE} qconfig", "command line: can't read 'qconfig'; write key=value"),
    (f"{RECIPE} layers=[", "command line: can't read 'layers=['"),
    (f"{RECIPE} layers.layer4.0=float", "as in layers={a.b: float}"),
    (f"{RECIPE} name=${{nowhere}}", "Interpolation key 'nowhere' not found"),
    (f"{RECIPE} ~model", "model.kind: is required"),
    (f"{RECIPE} hydra.jobb.name=x", "--hydra-help lists Hydra's own settings"),
    (f"{RECIPE} +model._target_=os.system", "model._target_: no such setting"),
    (f"{RECIPE} --config-dir nowhere", "not found"),
    (f"-m {RECIPE} qconfig=sym_int8,nonsense", "qconfig: 'nonsense' is not known"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line or "nothing" for line, _ in BAD])
def test_a_bad_line_gets_a_small_letter_and_writes_nothing(
    executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert cli.run(line.split()) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert message in errors
    assert "can't run (1 problem)" in errors
    assert not {"Traceback", "HYDRA_FULL_ERROR", "object_type"} & set(errors.split())
    assert executor.calls == []
    assert written(tmp_path) == []


def test_an_unknown_option_is_a_usage_error(executor: Executor, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run([RECIPE, "--nonsense"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
    assert executor.calls == []


def test_a_sweep_runs_every_job_and_ends_with_the_worst(executor: Executor, capsys: pytest.CaptureFixture[str]) -> None:
    executor.endings = [3, RuntimeError("bang"), 0]
    assert cli.run(["-m", RECIPE, "qconfig=sym_int8,affine_uint8", "data.calibration=8,0,16"]) == 1
    kinds = [(recipe.qconfig.activation.dtype, recipe.data.calibration) for recipe, _ in executor.calls]
    assert kinds == [("int8", 8), ("int8", 16), ("uint8", 8), ("uint8", 16)]
    assert executor.calls[0][1] == [RECIPE, "qconfig=sym_int8", "data.calibration=8"]
    outputs = [Path(recipe.output or "") for recipe, _ in executor.calls]
    assert [output.name for output in outputs] == ["0", "2", "3", "5"]
    assert {output.parent.parent for output in outputs} == {Path("outputs/multirun")}
    assert not any(output.exists() for output in outputs), "the executor's to create"
    table, errors = capsys.readouterr()
    assert "data.calibration: found 0; must be at least 1" in errors
    assert [verdict in table for verdict in ("6 jobs", "a gate failed", "crashed", "passed")] == [True] * 4
    assert os.environ.get("HYDRA_FULL_ERROR") is None


def test_a_sweep_over_recipes_and_files_keeps_to_the_output_given(executor: Executor, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: mnist_cnn\ndata: mnist\n")
    assert cli.run(["--multirun", f"recipe=mnist_cnn_sym_int8,{file}", "output=here", "hydra.sweep.dir=jobs"]) == 0
    assert [(recipe.name, recipe.output) for recipe, _ in executor.calls] == [
        ("mnist_cnn_sym_int8", "here/0"),
        ("mine", "here/1"),
    ]
    names = ("0.json", "1.json", "multirun.yaml", "sweep.html", "sweep.json", "sweep.md")
    assert set(written(tmp_path)) == {"mine.yaml", "jobs", *(f"jobs/{name}" for name in names)}


def test_an_interrupted_sweep_stops(executor: Executor) -> None:
    executor.endings = [0, KeyboardInterrupt()]
    assert cli.run(["-m", RECIPE, "seed=0,1,2"]) == 130
    assert len(executor.calls) == 2


def test_recipes_and_groups_from_a_folder_of_ones_own(
    executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "qconfig").mkdir()
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text("# Mine alone\nmodel: mnist_cnn\nqconfig: wide\n")
    (tmp_path / "own" / "qconfig" / "wide.yaml").write_text("activation: {observer: percentile, percentile: 99}\n")
    assert cli.run(["--config-dir", "own", "recipe=mine", "data=mnist"]) == 0
    ((recipe, _),) = executor.calls
    assert (recipe.qconfig.activation.percentile, recipe.data.kind) == (99.0, "mnist")
    assert cli.run(["--config-dir=own", "--help"]) == 0
    assert "mine                             Mine alone\n" in capsys.readouterr().out


@pytest.mark.usefixtures("executor")
def test_an_artifacts_recipe_is_overlaid_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_recipe("resnet18_sym_int8").to_dict()
    merged: list[Recipe] = []

    def run_task(_: Recipe, overrides: list[str]) -> int:
        merged.append(Recipe.from_dict(overlay(stored, overrides)))
        return 0

    monkeypatch.setitem(sys.modules, "quantflow.tasks.table", SimpleNamespace(run_task=run_task))  # type: ignore[arg-type]
    monkeypatch.setattr(sweep, "start_process", lambda request, *_: run_request(request))
    assert cli.run(["-m", "task=evaluate", "artifact=DIR", "data=mnist", "data.evaluation=5,6"]) == 0
    assert [(recipe.task, recipe.data.kind, recipe.data.evaluation) for recipe in merged] == [
        ("evaluate", "mnist", 5),
        ("evaluate", "mnist", 6),
    ]
    assert merged[0].model == load_recipe("resnet18_sym_int8").model


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name, file in recipe_files().items():
        assert f"  {name}  " in text.replace(name, f"{name} ")
        assert recipe_description(file) in text
    for group, names in group_choices().items():
        assert group in text
        assert ", ".join(names) in text
    for task in get_args(Task):
        assert f"\n  {task} " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("quantflow ")


@pytest.mark.parametrize(
    "line",
    [
        "--cfg job --package qconfig.activation RECIPE seed=3",
        "RECIPE --cfg job seed=3 -p qconfig.activation",
        "RECIPE -c job --config-dir recipes=mine seed=3 -p qconfig.activation",
    ],
)
def test_options_may_stand_anywhere(
    executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (tmp_path / "recipes=mine").mkdir()
    assert cli.run(line.replace("RECIPE", RECIPE).split()) == 0
    assert capsys.readouterr().out.startswith("# @package qconfig.activation\n")
    assert executor.calls == []


def test_a_sweep_may_be_asked_for_behind_what_is_swept(executor: Executor) -> None:
    assert cli.run([RECIPE, "seed=1,2", "-m", "task=plan", "hydra.sweep.dir=sw"]) == 0
    assert [(recipe.seed, recipe.task) for recipe, _ in executor.calls] == [(1, "plan"), (2, "plan")]


def test_cfg_job_shows_what_runs_and_runs_nothing(
    executor: Executor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([RECIPE, "mode=torchscript", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert Recipe.from_dict(shown) == load_recipe("resnet18_sym_int8", ["mode=torchscript"])
    assert executor.calls == []
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("recipe=resnet18", {"recipe=resnet18_sym_int8"}),
        ("mode=", {"mode=export", "mode=imperative", "mode=torchscript"}),
        ("qconfig.weight.gran", {"qconfig.weight.granularity="}),
    ],
)
def test_tab_completion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, expected: set[str]
) -> None:
    line = f"quantflow {typed}"
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert cli.run(["-sc", "query=bash"]) == 0
    assert expected <= set(capsys.readouterr().out.split())


def test_as_a_program(tmp_path: Path) -> None:
    root = Path(cli.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "quantflow", "recipe=resnet18_sym_int9"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("recipe 'resnet18_sym_int9' can't run (1 problem):\n  recipe: ")
    assert "\x1b" not in done.stderr
    assert written(tmp_path) == []
