"""Hydra → dict → Recipe.

Defaults come from the schema and are put into Hydra's ConfigStore; `conf/` and `recipes/` say what differs.
A recipe's values win over its groups; a group chosen on the command line replaces what the recipe says about it;
single values on the command line win over everything.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_args

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel

from quantflow.config.foreign import check_config_dirs, is_about_hydra, search_path, targets_in
from quantflow.config.overrides import OWN, UNIONS, chosen_groups, key_of, misused_group, requested_recipe
from quantflow.config.recipe_file import config_dirs, group_choices, read_recipe, recipe_files, shipped, unwritten_kinds
from quantflow.config.wording import explained
from quantflow.errors import Problem, RecipeError
from quantflow.schema import Recipe

VERSION_BASE = "1.3"
JOB_NAME = "quantflow"

#: What a group says, where it is not the section of its own name.
_SECTION = {"observer": ("qconfig", "activation", "observer")}
#: The name under which an artifact's recipe is composed.
_STORED = "_stored"


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that file, with overrides in the command line's syntax.

    Raises:
        RecipeError: unknown name, unreadable file, or anything in it that is not legal; lists every problem.
    """
    arguments = prepare([f"recipe={os.fspath(name_or_path)}", *overrides])
    name = requested_recipe(arguments)
    return Recipe.from_dict(compose(arguments, name), name)


def overlay(base: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """An artifact's recipe with the command line's overrides on top, group choices included.

    Args:
        base: what Recipe.to_dict returned.
        overrides: as in ["task=evaluate", "artifact=DIR", "data=folder", "data.path=DIR"].

    Raises:
        RecipeError: an override can't be applied, or names another recipe.
    """
    name = str(base.get("name", "custom"))
    if any(key_of(override) == "recipe" for override in overrides):
        raise RecipeError(name, [Problem("recipe", "an artifact holds its own recipe; leave recipe=… out")])
    _store_schema()
    _store_recipe(_STORED, _as_node(base, name, chosen_groups(overrides)))
    return compose([f"recipe={_STORED}", *overrides], name)


def compose(arguments: Sequence[str], name: str) -> dict[str, Any]:
    with explained(name, arguments, kinds_of), _loader():
        return plain(hydra.compose("config", list(arguments)))


def kinds_of(arguments: Sequence[str]) -> dict[str, str]:
    """Which kinds of model and data the command line's groups and recipe lead to."""
    groups = [argument for argument in arguments if key_of(argument) in {"recipe", *UNIONS}]
    try:
        with _loader():
            settings = plain(hydra.compose("config", groups))
    except (HydraException, OmegaConfBaseException):
        return {}
    return {section: settings[section]["kind"] for section in UNIONS if settings.get(section)}


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


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Plain data without the ??? that stand for required values nobody gave."""
    with _environment_unread():
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    if found := targets_in(settings):
        raise RecipeError(
            str(settings.get("name", "custom")) if isinstance(settings, dict) else "custom",
            [Problem(place, "no such setting; it would have an object built") for place in found],
        )
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


def prepare(arguments: Sequence[str]) -> list[str]:
    """Stores schema and recipes where Hydra finds them; recipes given as files are replaced by their names."""
    _store_schema()
    ConfigStore.instance().repo.pop("recipe", None)
    known = recipe_files()
    check_config_dirs([*config_dirs(arguments), *search_path(arguments)], requested_recipe(arguments))
    own = {name: file for name, file in recipe_files(config_dirs(arguments)).items() if file != known.get(name)}
    prepared = []
    for argument in arguments:
        if key_of(argument) == "recipe":
            value = argument.partition("=")[2]
            words = [value] if Path(value).is_file() else value.split(",")
            names = [_recipe_name(word, own, known) for word in words]
            argument = f"recipe={','.join(name + OWN if name in own else name for name in names)}"
        prepared.append(argument)
    problems = [problem for argument in arguments if (problem := misused_group(argument))]
    if problems:
        raise RecipeError(requested_recipe(prepared), problems)
    _store_recipes(requested_recipe(prepared).split(","), known, own, chosen_groups(arguments))
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
            node = _as_node(read_recipe(files[name]), name, chosen)
        except RecipeError:
            if wanted:
                raise
            continue
        inherited = [entry for entry in node["defaults"] if isinstance(entry, str) and entry in files and entry != name]
        waiting += [entry for entry in inherited if entry not in stored]
        node["defaults"] = [entry + OWN if entry in inherited and entry in own else entry for entry in node["defaults"]]
        _store_recipe(name + OWN if name in own else name, node)


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
    if "hydra" in body or any(is_about_hydra(str(word)) for entry in defaults for word in _words(entry)):
        raise RecipeError(name, [Problem("hydra", "Hydra's own settings belong on the command line")])
    for group in group_choices():
        if group in chosen:
            _drop(body, _SECTION.get(group, (group,)))
        section = body.get(group)
        word = section.get("kind") if group in UNIONS and isinstance(section, dict) else section
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


def _words(entry: object) -> list[object]:
    return [word for pair in entry.items() for word in pair] if isinstance(entry, dict) else [entry]


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
    for section, union in UNIONS.items():
        for settings in get_args(get_args(union)[0]):
            store.store(name=settings.model_fields["kind"].default, node=_template(settings), group=f"schema/{section}")
    for group, names in unwritten_kinds().items():
        for name in names:
            store.store(name=name, node={"kind": name}, group=group)


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
