"""The Hydra app: one job, or every point of a multirun, from a command line."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from quantflow.config.compose import JOB_NAME, VERSION_BASE, compose, kinds_of, plain, prepare
from quantflow.config.foreign import require_named, strangers
from quantflow.config.overrides import OWN, key_of, requested_recipe
from quantflow.config.recipe_file import shipped
from quantflow.config.wording import explained
from quantflow.schema import OBJECTIVES, SweepSettings

#: What asks for a sweep.
_MULTIRUN = frozenset(("-m", "--multirun", "hydra.mode=MULTIRUN"))
#: Hydra's options that are followed by a value.
_WITH_VALUE = frozenset(
    ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
     "--experimental-rerun")
)  # fmt: skip
#: What Python 3.14's argparse calls for each argument.
_HELP_CHECK = "_check_help"
#: Settings that say how a sweep is run, and not what is swept.
_LAUNCHING = re.compile(r"hydra/launcher|hydra\.launcher\..*|resume")


@dataclass(frozen=True)
class Job:
    """One composition of the command line, not validated yet.

    Attributes:
        name: what errors call the recipe.
        settings: plain data, for Recipe.from_dict.
        overrides: the command line's overrides, as `overlay` takes them.
        number: counts from 0 within a multirun.
        is_alone: no other job of the multirun runs at the same time.
    """

    name: str
    settings: dict[str, Any]
    overrides: tuple[str, ...]
    number: int = 0
    is_alone: bool = True


def run_app(arguments: Sequence[str], job: Callable[[Job], Any], sweep: Path | None = None) -> None:
    """Runs the command line under Hydra: one job, or with -m every point of the sweep.

    Args:
        arguments: the command line without the program's name.
        job: gets each composition; must not raise, so that one job can't stop the others. What it returns is what an
            optimizing sweeper sees. A launcher may pickle it and call it in another process.
        sweep: where a multirun writes: `sweep_folder(arguments)`.

    Raises:
        RecipeError: the command line can't be composed.
    """
    prepared, places = prepare(_ordered(arguments)), strangers(_ordered(arguments))
    name = requested_recipe(prepared)

    def run_one(cfg: DictConfig) -> Any:
        return job(_job(cfg, sweep, places))

    if sweep is not None:
        prepared[:0] = _sweeper_arguments(prepared, sweep)
    with explained(name, prepared, kinds_of), _program(prepared), _late_help():
        hydra.main(str(shipped("conf")), "config", VERSION_BASE)(run_one)()


def _ordered(arguments: Sequence[str]) -> list[str]:
    """Overrides first, then options with their values: argparse takes no overrides on both sides of an option."""
    overrides, options = list[str](), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_value = before in _WITH_VALUE or (before in ("--info", "-i") and not key_of(argument))
        (options if is_value or argument.startswith("-") else overrides).append(argument)
    return [*overrides, *options]


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for a sweep."""
    return not _MULTIRUN.isdisjoint(arguments)


def sweep_folder(arguments: Sequence[str]) -> Path:
    """Where a multirun writes: `hydra.sweep.dir`, else a folder named after what is swept.

    The same command line leads to the same folder, whatever launcher runs it, so that it can go on there.
    """
    given = next((argument.partition("=")[2] for argument in arguments if key_of(argument) == "hydra.sweep.dir"), None)
    if given is not None:
        return Path(given)
    told = [each for each in arguments if each not in _MULTIRUN and not _LAUNCHING.fullmatch(key_of(each))]
    digest = hashlib.sha256("\0".join(told).encode()).hexdigest()[:10]
    name = re.sub(r"[^\w.-]+", "_", requested_recipe([Path(word).stem for word in told])).strip("_")
    return Path("outputs", "multirun", f"{name[:60]}-{digest}")


def _job(cfg: DictConfig, sweep: Path | None, places: Sequence[str]) -> Job:
    """The job that Hydra runs; inside a sweep its output goes to a folder of its own."""
    running = HydraConfig.get()
    overrides = tuple(override.removesuffix(OWN) for override in running.overrides.task)
    name = requested_recipe(overrides)
    number = int(running.job.num) if sweep is not None else 0
    with explained(name, running.overrides.task, kinds_of):
        settings = plain(cfg)
    require_named(settings, overrides, places, name)
    if sweep is not None:
        settings["output"] = str(Path(settings.get("output") or sweep) / str(number))
    return Job(name, settings, overrides, number, running.runtime.choices["hydra/launcher"] == "basic")


def _sweeper_arguments(prepared: Sequence[str], sweep: Path) -> list[str]:
    """What Hydra is told beside the user's own words: where to write and, for Optuna, what is better.

    A failed trial must not end the others, whatever their share. The Ray launcher always sets the size of the object
    store, which Ray refuses for a cluster that is there already, unless it is told none.
    """
    given = {key_of(argument): argument.partition("=")[2] for argument in prepared}
    told = {"hydra.sweep.dir": str(sweep)}
    if given.get("hydra/launcher") == "ray" and (
        "hydra.launcher.ray.init.address" in given or "RAY_ADDRESS" in os.environ
    ):
        told["++hydra.launcher.ray.init.object_store_memory"] = "null"
    if given.get("hydra/sweeper") == "optuna":
        fixed = [argument for argument in prepared if not _is_swept(argument)]
        settings = compose([argument for argument in fixed if not argument.startswith("-")], "sweep")
        better = [OBJECTIVES[name] for name in SweepSettings(**settings["sweep"]).objectives]
        told["hydra.sweeper.direction"] = better[0] if len(better) == 1 else f"[{','.join(better)}]"
        told["hydra.sweeper.max_failure_rate"] = "1.0"
    return [f"{key}={value}" for key, value in told.items() if key.lstrip("+") not in given]


def _is_swept(argument: str) -> bool:
    """Whether the argument stands for several values; what can't be read is Hydra's to complain about."""
    if not key_of(argument):
        return False
    try:
        return bool(OverridesParser.create().parse_override(argument).is_sweep_override())
    except HydraException:
        return True


@contextmanager
def _program(arguments: Sequence[str]) -> Iterator[None]:
    """hydra.main reads sys.argv, and raises its errors only when asked to by this variable."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [JOB_NAME, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
        GlobalHydra.instance().clear()


@contextmanager
def _late_help() -> Iterator[None]:
    """Hydra 1.3 hands argparse a help text that is made when it is shown; Python 3.14's looks for % in it at once."""
    check = getattr(ArgumentParser, _HELP_CHECK, None)
    if check is None:
        yield
        return
    setattr(ArgumentParser, _HELP_CHECK, lambda *_: None)
    try:
        yield
    finally:
        setattr(ArgumentParser, _HELP_CHECK, check)
