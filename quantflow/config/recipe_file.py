"""The files that settings come from: what ships, the user's recipes, and a recipe's file read safely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quantflow.errors import Problem, RecipeError
from quantflow.schema.settings import DeviceSettings, RuntimeSettings
from quantflow.store.json_values import is_unshowable

#: Bounds of a recipe file: far above what a person writes, far below what could hurt.
_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 50
_MAX_PLAIN = 1000


def recipe_files(config_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """Name → file of every recipe that ships with the package or lies in the `recipe` folder of a `--config-dir`."""
    folders = [shipped("recipes"), *(folder / "recipe" for folder in config_dirs)]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def recipe_description(file: Path) -> str:
    """The recipe's `description`, else its first comment line."""
    with suppress(RecipeError):
        return str(read_recipe(file)["description"])
    return "(not readable)"


@cache
def group_choices() -> dict[str, list[str]]:
    """Group → the names it accepts: files in conf/, and kinds of the schema that need none."""
    unwritten = unwritten_kinds()
    return {group: sorted([*names, *unwritten.get(group, ())]) for group, names in _written().items()}


def unwritten_kinds() -> dict[str, list[str]]:
    """Group → the schema's names that have no file in conf/, for the groups that choose a name and nothing else."""
    groups = {"runtime": RuntimeSettings, "device": DeviceSettings}
    return {
        group: [kind for kind in get_args(settings.model_fields["kind"].annotation) if kind not in _written()[group]]
        for group, settings in groups.items()
    }


@cache
def _written() -> dict[str, list[str]]:
    folders = sorted(path for path in shipped("conf").iterdir() if path.is_dir())
    return {folder.name: [file.stem for file in folder.glob("*.yaml")] for folder in folders}


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that `--config-dir DIR` names, or a beginning of it, which Python's parser takes as well."""
    folders = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, _, value = argument.partition("=")
        if flag == "-cd" or ("--config-dir".startswith(flag) and flag.startswith("--config-d")):
            folders.append(Path(value or following))
    return folders


def shipped(name: str) -> Path:
    """conf or recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def read_recipe(file: Path) -> dict[str, Any]:
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


def _check_size(text: str) -> None:
    for _ in checked_events(text):
        pass


def checked_events(text: str) -> Iterator[yaml.Event]:
    """The events of a YAML text; refused is what grows out of a small file: nesting, aliases of aliases, long numbers.

    So is what a terminal would obey.

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
            if is_unshowable(event.value):
                where = f"line {event.start_mark.line + 1}"
                raise ValueError(f"{where} holds control characters, which no value may: {event.value[:80]!a}")
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
        yield event
