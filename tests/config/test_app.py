"""One job or a sweep, as Hydra runs them."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from quantflow.config.app import Job, _sweeper_arguments, run_app, sweep_folder
from quantflow.config.compose import prepare
from quantflow.errors import RecipeError
from quantflow.schema import Recipe
from tests.config.recipes import PLAIN, RECIPE, write


def test_a_recipe_of_ones_own_may_build_on_another_and_take_a_shipped_name(tmp_path: Path) -> None:
    write(tmp_path, "recipe/base.yaml", "model: mnist_cnn\nseed: 5\n")
    write(tmp_path, f"recipe/{RECIPE}.yaml", "defaults: [base]\ndata: mnist\n")
    jobs: list[Job] = []
    run_app(["--config-dir", str(tmp_path), f"recipe={RECIPE}"], jobs.append)
    recipe = Recipe.from_dict(jobs[0].settings)
    assert (jobs[0].name, recipe.name, recipe.seed) == (RECIPE, RECIPE, 5)
    assert recipe.model is not None
    assert (recipe.model.kind, recipe.data.kind) == ("mnist_cnn", "mnist")


def test_a_broken_neighbour_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path, "recipe/broken.yaml", "a: [1")
    write(tmp_path, "recipe/fine.yaml", PLAIN)
    jobs: list[Job] = []
    run_app(["--config-dir", str(tmp_path), "recipe=fine"], jobs.append)
    assert [(len(job.settings["layers"]), job.overrides) for job in jobs] == [(2, ("recipe=fine",))]
    with pytest.raises(RecipeError, match="is not YAML"):
        run_app(["--config-dir", str(tmp_path), "recipe=broken"], lambda _: 0)


def test_hydras_arguments_pass_an_argparse_that_looks_into_each_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.14's does, which finds an object there that is no text yet."""
    added, checked = ArgumentParser.add_argument, list[Action]()

    def check(_: ArgumentParser, action: Action) -> None:
        checked.append(action)
        assert action.help is None or "%" not in action.help

    def add_argument(parser: ArgumentParser, *names: Any, **rest: Any) -> Action:
        action = added(parser, *names, **rest)
        parser._check_help(action)  # type: ignore[attr-defined]
        return action

    monkeypatch.setattr(ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(ArgumentParser, "add_argument", add_argument)
    write(tmp_path, "recipe/fine.yaml", PLAIN)
    jobs: list[Job] = []
    run_app(["--config-dir", str(tmp_path), "recipe=fine"], jobs.append)
    assert len(jobs) == 1
    ArgumentParser().add_argument("--other", help="of somebody else")
    assert checked, "others' parsers are checked as before"


def test_the_same_sweep_has_the_same_folder_whatever_launches_it() -> None:
    folder = sweep_folder(["-m", "recipe=a", "seed=1,2"])
    assert folder.parent == Path("outputs", "multirun")
    assert folder.name.startswith("a-")
    same = (["recipe=a", "seed=1,2", "--multirun", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
            ["-m", "recipe=a", "resume=false", "seed=1,2"])  # fmt: skip
    assert {sweep_folder(arguments) for arguments in same} == {folder}
    assert sweep_folder(["-m", "recipe=a", "seed=1,3"]) != folder
    assert sweep_folder(["-m", "recipe=a", "hydra.sweep.dir=here"]) == Path("here")
    assert re.fullmatch(r"glob_resnet-\w{10}", sweep_folder(["-m", "recipe=glob(resnet*)"]).name)


RAY = ["hydra/launcher=ray", "hydra.launcher.ray.init.address=a:1"]
OPTUNA = ["hydra/sweeper=optuna", f"recipe={RECIPE}"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["seed=1,2"], []),
        (["hydra.sweep.dir=there"], None),
        (["hydra/launcher=ray"], []),
        (RAY, ["++hydra.launcher.ray.init.object_store_memory=null"]),
        ([*RAY, "hydra.launcher.ray.init.object_store_memory=1"], []),
        (OPTUNA, ["hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1.0"]),
        (
            [*OPTUNA, "sweep.objectives=[speedup,size_ratio]", "seed=choice(1,2)"],
            ["hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.max_failure_rate=1.0"],
        ),
        (
            [*OPTUNA, "hydra.sweeper.direction=minimize", "hydra.sweeper.max_failure_rate=0"],
            [],
        ),
    ],
)
def test_what_hydra_is_told_beside_the_users_words(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: list[str] | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    prepare(arguments)
    expected = [] if told is None else ["hydra.sweep.dir=sw", *told]
    assert _sweeper_arguments(arguments, Path("sw")) == expected
