"""Hydra → dict → Recipe. The only file that imports Hydra or OmegaConf.

Defaults come from the schema and are put into Hydra's ConfigStore; `conf/` and `recipes/` say what differs.
A recipe's values win over its groups; a group chosen on the command line replaces what the recipe says about it;
single values on the command line win over everything.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import hydra
import yaml  # type: ignore[import-untyped]
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel

from quantflow.errors import Problem, RecipeError
from quantflow.schema import OBJECTIVES, DataSpec, ModelSpec, Recipe, SweepSettings
from quantflow.schema.problems import choices, legal_keys

VERSION_BASE = "1.3"
JOB_NAME = "quantflow"

#: Sections whose keys depend on their kind: choosing a kind replaces the whole section.
_UNIONS = {"model": ModelSpec, "data": DataSpec}
#: What a group says, where it is not the section of its own name.
_SECTION = {"observer": ("qconfig", "activation", "observer")}
#: The name under which an artifact's recipe is composed.
_STORED = "_stored"
#: Ends the names under which the user's own recipes are composed: Hydra would take a file of the same name in a
#: --config-dir for the recipe, as it is, and the stored one for its schema.
_OWN = ".own"
#: What asks for a sweep.
_MULTIRUN = frozenset(("-m", "--multirun", "hydra.mode=MULTIRUN"))
#: Hydra's options that are followed by a value.
_WITH_VALUE = frozenset(
    ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
     "--experimental-rerun")
)  # fmt: skip
#: Settings that say how a sweep is run, and not what is swept.
_LAUNCHING = re.compile(r"hydra/launcher|hydra\.launcher\..*|resume")

#: Bounds of a recipe file: far above what a person writes, far below what could hurt.
_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 50
_MAX_PLAIN = 1000


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


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that file, with overrides in the command line's syntax.

    Raises:
        RecipeError: unknown name, unreadable file, or anything in it that is not legal; lists every problem.
    """
    arguments = _prepare([f"recipe={os.fspath(name_or_path)}", *overrides])
    name = _requested_recipe(arguments)
    return Recipe.from_dict(_compose(arguments, name), name)


def overlay(base: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """An artifact's recipe with the command line's overrides on top, group choices included.

    Args:
        base: what Recipe.to_dict returned.
        overrides: as in ["task=evaluate", "artifact=DIR", "data=folder", "data.path=DIR"].

    Raises:
        RecipeError: an override can't be applied, or names another recipe.
    """
    name = str(base.get("name", "custom"))
    if any(_key(override) == "recipe" for override in overrides):
        raise RecipeError(name, [Problem("recipe", "an artifact holds its own recipe; leave recipe=… out")])
    _store_schema()
    _store_recipe(_STORED, _as_node(base, name, _chosen_groups(overrides)))
    return _compose([f"recipe={_STORED}", *overrides], name)


def recipe_files(config_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """Name → file of every recipe that ships with the package or lies in the `recipe` folder of a `--config-dir`."""
    folders = [shipped("recipes"), *(folder / "recipe" for folder in config_dirs)]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def recipe_description(file: Path) -> str:
    """The recipe's `description`, else its first comment line."""
    with suppress(RecipeError):
        return str(_read_recipe(file)["description"])
    return "(not readable)"


@cache
def group_choices() -> dict[str, list[str]]:
    """Group → the names it accepts, as files in conf/."""
    folders = sorted(path for path in shipped("conf").iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that `--config-dir DIR` names."""
    folders = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value or following))
    return folders


def shipped(name: str) -> Path:
    """conf or recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


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
    prepared = _prepare(_ordered(arguments))
    name = _requested_recipe(prepared)

    def run_one(cfg: DictConfig) -> Any:
        return job(_job(cfg, sweep))

    if sweep is not None:
        prepared[:0] = _sweeper_arguments(prepared, sweep)
    with _explained(name, prepared), _program(prepared):
        hydra.main(str(shipped("conf")), "config", VERSION_BASE)(run_one)()


def _ordered(arguments: Sequence[str]) -> list[str]:
    """Overrides first, then options with their values: argparse takes no overrides on both sides of an option."""
    overrides, options = list[str](), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_value = before in _WITH_VALUE or (before in ("--info", "-i") and not _key(argument))
        (options if is_value or argument.startswith("-") else overrides).append(argument)
    return [*overrides, *options]


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for a sweep."""
    return not _MULTIRUN.isdisjoint(arguments)


def sweep_folder(arguments: Sequence[str]) -> Path:
    """Where a multirun writes: `hydra.sweep.dir`, else a folder named after what is swept.

    The same command line leads to the same folder, whatever launcher runs it, so that it can go on there.
    """
    given = next((argument.partition("=")[2] for argument in arguments if _key(argument) == "hydra.sweep.dir"), None)
    if given is not None:
        return Path(given)
    told = [each for each in arguments if each not in _MULTIRUN and not _LAUNCHING.fullmatch(_key(each))]
    digest = hashlib.sha256("\0".join(told).encode()).hexdigest()[:10]
    name = re.sub(r"[^\w.-]+", "_", _requested_recipe([Path(word).stem for word in told])).strip("_")
    return Path("outputs", "multirun", f"{name[:60]}-{digest}")


def _job(cfg: DictConfig, sweep: Path | None) -> Job:
    """The job that Hydra runs; inside a sweep its output goes to a folder of its own."""
    running = HydraConfig.get()
    overrides = tuple(override.removesuffix(_OWN) for override in running.overrides.task)
    name = _requested_recipe(overrides)
    number = int(running.job.num) if sweep is not None else 0
    with _explained(name, running.overrides.task):
        settings = _plain(cfg)
    if sweep is not None:
        settings["output"] = str(Path(settings.get("output") or sweep) / str(number))
    return Job(name, settings, overrides, number, running.runtime.choices["hydra/launcher"] == "basic")


def _sweeper_arguments(prepared: Sequence[str], sweep: Path) -> list[str]:
    """What Hydra is told beside the user's own words: where to write and, for Optuna, what is better.

    A failed trial must not end the others, whatever their share. The Ray launcher always sets the size of the object
    store, which Ray refuses for a cluster that is there already, unless it is told none.
    """
    given = {_key(argument): argument.partition("=")[2] for argument in prepared}
    told = {"hydra.sweep.dir": str(sweep)}
    if given.get("hydra/launcher") == "ray" and (
        "hydra.launcher.ray.init.address" in given or "RAY_ADDRESS" in os.environ
    ):
        told["++hydra.launcher.ray.init.object_store_memory"] = "null"
    if given.get("hydra/sweeper") == "optuna":
        fixed = [argument for argument in prepared if not _is_swept(argument)]
        settings = _compose([argument for argument in fixed if not argument.startswith("-")], "sweep")
        better = [OBJECTIVES[name] for name in SweepSettings(**settings["sweep"]).objectives]
        told["hydra.sweeper.direction"] = better[0] if len(better) == 1 else f"[{','.join(better)}]"
        told["hydra.sweeper.max_failure_rate"] = "1.0"
    return [f"{key}={value}" for key, value in told.items() if key.lstrip("+") not in given]


def _is_swept(argument: str) -> bool:
    """Whether the argument stands for several values; what can't be read is Hydra's to complain about."""
    if not _key(argument):
        return False
    try:
        return bool(OverridesParser.create().parse_override(argument).is_sweep_override())
    except HydraException:
        return True


def _compose(arguments: Sequence[str], name: str) -> dict[str, Any]:
    with _explained(name, arguments), _loader():
        return _plain(hydra.compose("config", list(arguments)))


@contextmanager
def _loader() -> Iterator[None]:
    """Hydra's loader: our own running app's, which knows its --config-dir, else one that is set aside afterwards."""
    state = GlobalHydra.instance()
    if state.is_initialized() and HydraConfig.initialized() and HydraConfig.get().job.name == JOB_NAME:
        yield
        return
    outer = state.hydra
    state.clear()
    try:
        with hydra.initialize_config_dir(str(shipped("conf")), job_name=JOB_NAME, version_base=VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


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


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Plain data without the ??? that stand for required values nobody gave."""
    with _environment_unread():
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return _without_missing(settings)  # type: ignore[no-any-return]


@contextmanager
def _environment_unread() -> Iterator[None]:
    """Recipes get passed on, and what they resolve to is kept in artifacts: secrets of the environment must not be."""

    def refuse(*_: Any) -> None:
        raise ValueError(
            "recipes can't read environment variables; give the value itself, or set it on the command line"
        )

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _without_missing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_missing(item) for key, item in value.items() if item != "???"}
    return value


# What Hydra composes from: the schema's defaults and the recipes.


def _prepare(arguments: Sequence[str]) -> list[str]:
    """Stores schema and recipes where Hydra finds them; recipes given as files are replaced by their names."""
    _store_schema()
    ConfigStore.instance().repo.pop("recipe", None)
    known = recipe_files()
    own = {name: file for name, file in recipe_files(config_dirs(arguments)).items() if file != known.get(name)}
    prepared = []
    for argument in arguments:
        if _key(argument) == "recipe":
            value = argument.partition("=")[2]
            words = [value] if Path(value).is_file() else value.split(",")
            names = [_recipe_name(word, own, known) for word in words]
            argument = f"recipe={','.join(name + _OWN if name in own else name for name in names)}"
        prepared.append(argument)
    problems = [problem for argument in arguments if (problem := _misused_group(argument))]
    if problems:
        raise RecipeError(_requested_recipe(prepared), problems)
    _store_recipes(_requested_recipe(prepared).split(","), known, own, _chosen_groups(arguments))
    return prepared


def _store_recipes(
    requested: Sequence[str], known: Mapping[str, Path], own: Mapping[str, Path], chosen: set[str]
) -> None:
    """Stores the recipes asked for and those they build on; all that are readable when none is, for tab completion."""
    files = {**known, **own}
    wanted = [name for name in requested if name in files]
    waiting, stored = list(wanted or files), set[str]()
    while waiting:
        name = waiting.pop()
        stored.add(name)
        try:
            node = _as_node(_read_recipe(files[name]), name, chosen)
        except RecipeError:
            if wanted:
                raise
            continue
        inherited = [entry for entry in node["defaults"] if isinstance(entry, str) and entry in files and entry != name]
        waiting += [entry for entry in inherited if entry not in stored]
        node["defaults"] = [
            entry + _OWN if entry in inherited and entry in own else entry for entry in node["defaults"]
        ]
        _store_recipe(name + _OWN if name in own else name, node)


def _requested_recipe(arguments: Sequence[str]) -> str:
    """What errors call the recipe: its name, in a sweep their names, and custom when none was asked for."""
    value = next((argument.partition("=")[2] for argument in arguments if _key(argument) == "recipe"), "custom")
    return ",".join(word.removesuffix(_OWN) for word in value.split(","))


def _misused_group(argument: str) -> Problem | None:
    """What Hydra would take for a plain value, or refuse without naming the group."""
    key, word = _key(argument), argument.partition("=")[2]
    section = key.removesuffix(".kind")
    if key in group_choices() and word.startswith("["):
        legal = ", ".join(group_choices()[key])
        return Problem(key, f"takes one name here ({legal}); a list belongs in the recipe's file")
    if section != key and section in _UNIONS:
        return Problem(key, f"a kind brings its own settings; choose it as {section}={word}")
    if key in group_choices() and re.fullmatch(r"|null|true|false|[\d.]+", word):
        return Problem(key, f"'{word}' is not known; {choices(word, group_choices()[key])}")
    return None


def _recipe_name(word: str, own: dict[str, Path], known: Mapping[str, Path]) -> str:
    """The recipe's name; a file is added to `own` under its stem."""
    path = Path(word).expanduser()
    if word in own or word in known or not (path.suffix in (".yaml", ".yml", ".json") or os.sep in word):
        return word
    if not path.is_file():
        names = ", ".join(sorted(known.keys() | own.keys()))
        raise RecipeError(word, [Problem("recipe", f"no such file; known recipes are: {names}")])
    name = re.sub(r"[^\w.-]", "_", path.stem)
    while own.get(name, path) != path:
        name += "_"
    own[name] = path
    return name


def _check_size(text: str) -> None:
    """Refuses, before anything is built, what grows out of a small file: nesting, aliases of aliases, long numbers.

    Raises:
        ValueError: says which of them.
        yaml.YAMLError: it is not YAML.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and how many values came before
    values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands inside what it repeats, or before it")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.implicit[0] and len(event.value) > _MAX_PLAIN:
                raise ValueError(f"a value without quotes has {len(event.value)} characters, {_MAX_PLAIN} at most")
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        if values > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES} values, aliases counted as often as they are used")
        if len(open_nodes) > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")


def _read_recipe(file: Path) -> dict[str, Any]:
    """A recipe file as plain data, with name and description filled in from the file's name and first comment."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it is longer than {_MAX_BYTES} bytes")
        text = content.decode("utf-8")
        _check_size(text)
        settings = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(file.stem, [Problem(str(file), f"can't be read: {error}")]) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(file.stem, [Problem(str(file), f"is not YAML: {' '.join(str(error).split())}")]) from None
    except ValueError as error:
        raise RecipeError(file.stem, [Problem(str(file), f"is no recipe: {error}")]) from None
    if not isinstance(settings, dict):
        raise RecipeError(file.stem, [Problem(str(file), "must be a mapping, as in 'model: {kind: torchvision, …}'")])
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    first = next((comment for comment in comments if comment and not comment.startswith("@package")), "")
    return {"name": file.stem, "description": first, **{str(key): value for key, value in settings.items()}}


def _as_node(settings: Mapping[str, Any], name: str, chosen: set[str]) -> dict[str, Any]:
    """A recipe as Hydra composes it.

    `model: {kind: x}`, and any group given as a word, become `override /group: x` in the defaults list, so that the
    chosen kind's own settings are there. What a group in `chosen` replaces is left out.
    """
    body = copy.deepcopy(dict(settings))
    defaults = body.pop("defaults", None) or []
    if not isinstance(defaults, list):
        raise RecipeError(name, [Problem("defaults", "must be a list, as in '- override /model: torchvision'")])
    if any("${" in str(entry) for entry in defaults):
        raise RecipeError(name, [Problem("defaults", "names are written out here; '${…}' is not replaced")])
    if "hydra" in body or any("hydra/" in str(entry) for entry in defaults):
        raise RecipeError(name, [Problem("hydra", "Hydra's own settings belong on the command line")])
    for group in group_choices():
        if group in chosen:
            _drop(body, _SECTION.get(group, (group,)))
        section = body.get(group)
        word = section.get("kind") if group in _UNIONS and isinstance(section, dict) else section
        if isinstance(word, str):
            if isinstance(section, dict):
                del section["kind"]
            else:
                del body[group]
            defaults = [entry for entry in defaults if not _overrides(entry, group)] + [{f"override /{group}": word}]
    if "_self_" not in defaults:
        inherited = sum(not any(_overrides(entry, group) for group in group_choices()) for entry in defaults)
        defaults.insert(inherited, "_self_")
    return {"defaults": defaults, **body}


def _overrides(entry: object, group: str) -> bool:
    return isinstance(entry, dict) and any(f"override {slash}{group}" in entry for slash in ("", "/"))


def _drop(settings: dict[str, Any], path: tuple[str, ...]) -> None:
    *parents, last = path
    for part in parents:
        settings = settings.get(part, {})
        if not isinstance(settings, dict):
            return
    settings.pop(last, None)


def _store_recipe(name: str, node: dict[str, Any]) -> None:
    ConfigStore.instance().store(name=name, node=node, group="recipe", package="_global_")


@cache
def _store_schema() -> None:
    """`base` holds every default but those of model and data; these are `schema/model/KIND` and `schema/data/KIND`."""
    store = ConfigStore.instance()
    base = {field: _default(info.get_default(call_default_factory=True)) for field, info in Recipe.model_fields.items()}
    store.store(name="base", node=OmegaConf.create(base | {"data": {}}))
    for section, union in _UNIONS.items():
        for settings in get_args(get_args(union)[0]):
            store.store(name=settings.model_fields["kind"].default, node=_template(settings), group=f"schema/{section}")


def _template(settings: type[BaseModel]) -> DictConfig:
    """A kind's fields with their defaults, ??? where there is none."""
    fields = {
        name: "???" if field.is_required() else _default(field.get_default(call_default_factory=True))
        for name, field in settings.model_fields.items()
    }
    return OmegaConf.create(fields)


def _default(value: Any) -> Any:
    """A default as OmegaConf holds it. The user's own mappings take new keys without Hydra's '+'."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [_default(item) for item in value]
    return OmegaConf.create({}, flags={"struct": False}) if value == {} else value


def _chosen_groups(overrides: Sequence[str]) -> set[str]:
    return {_key(override) for override in overrides} & group_choices().keys()


def _key(argument: str) -> str:
    """The key of key=value, +key=value or ++key=value; '' for anything else."""
    key, equals, _ = argument.partition("=")
    return key.lstrip("+") if equals and not argument.startswith("-") else ""


# Hydra's errors in the user's words.


@contextmanager
def _explained(name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Turns a composition error into a RecipeError.

    Raises:
        RecipeError: for every error of Hydra and OmegaConf, which call some of theirs ValueError or TypeError.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(name, [_problem(error, arguments)]) from None


def _problem(error: Exception, arguments: Sequence[str]) -> Problem:
    text = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, word = error.missing_cfg_file.rpartition("/")
        listed = group_choices() | {"recipe": list(recipe_files(config_dirs(arguments)))}
        known = listed.get(group) or list(error.options or [])
        return Problem(group or "command line", f"'{word}' is not known; {choices(word, known)}")
    if isinstance(error, OverrideParseException):
        return Problem(
            "command line",
            f"can't read '{error.override}'; write key=value, with quotes around odd values and never around keys",
        )
    if "hydra." in text.split("\n")[0]:
        return Problem("command line", f"{text.splitlines()[0]} (--hydra-help lists Hydra's own settings)")
    if isinstance(error, InterpolationResolutionError):
        return Problem(str(error.full_key or "recipe"), text.splitlines()[0])
    if match := re.search(r"(?:Could not override|Key) '(?:[+~]*)([^'@]+)'", text):
        return _unknown_key(match[1], arguments)
    return Problem("command line", " ".join(text.split()))


def _unknown_key(key: str, arguments: Sequence[str]) -> Problem:
    """The longest part of a dotted key that is legal, and what may follow it."""
    kinds = _kinds(arguments)
    parts = key.split(".")
    if parts[0] in _UNIONS and parts[0] not in kinds:
        return Problem(key, f"no {parts[0]} is chosen yet; add {parts[0]}=KIND ({', '.join(_kind_names(parts[0]))})")
    for depth in range(len(parts)):
        legal = legal_keys(Recipe, tuple(parts[:depth]), kinds)
        if parts[depth] not in legal:
            where = ".".join(parts[: depth + 1])
            return Problem(
                where, f"no such setting; {choices(parts[depth], legal)}" if legal else "has no settings inside"
            )
    return Problem(key, "can't be set this way")


def _kinds(arguments: Sequence[str]) -> dict[str, str]:
    """Which kinds of model and data the command line's groups and recipe lead to."""
    groups = [argument for argument in arguments if _key(argument) in {"recipe", *_UNIONS}]
    try:
        with _loader():
            settings = _plain(hydra.compose("config", groups))
    except (HydraException, OmegaConfBaseException):
        return {}
    return {section: settings[section]["kind"] for section in _UNIONS if settings.get(section)}


def _kind_names(section: str) -> list[str]:
    return group_choices()[section]
