"""Settings of somebody else: none may make Hydra build objects, and none names code that is then run.

Hydra instantiates what its own configuration names (callbacks, launchers, sweepers), wherever in the configuration a
file puts it. So a file in a `--config-dir` holds settings, and says nothing of Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from quantflow.config.overrides import key_of
from quantflow.config.recipe_file import checked_events, config_dirs
from quantflow.errors import Problem, RecipeError

#: Kinds of models whose file is a program.
RUN_FROM_FILE = ("scriptmodule", "exported")
#: What Hydra instantiates.
TARGETS = ("_target_", "_partial_", "_recursive_", "_convert_")
_HYDRA = re.compile(r"(?<![\w.-])hydra(?![\w-])")
_HEADER = re.compile(r"\s*#\s*@package\b.*hydra")
_MAX_FILES = 10_000


def check_config_dirs(folders: Sequence[Path], name: str) -> None:
    """Every file that Hydra could take a group from, in folders of `--config-dir` and of Hydra's search path.

    Raises:
        RecipeError: one names an object to build, or Hydra's own settings; names the files.
    """
    problems = []
    for folder in folders:
        for count, file in enumerate(_files(folder)):
            if count >= _MAX_FILES:
                raise RecipeError(name, [Problem(str(folder), f"holds over {_MAX_FILES} files; name the right folder")])
            inside = file.relative_to(folder)
            if "hydra" in (*inside.parts, file.stem):
                problems.append(Problem(str(file), "Hydra's own settings belong on the command line"))
            elif reason := _reason(file):
                problems.append(Problem(str(file), reason))
    if problems:
        raise RecipeError(name, problems)


def search_path(arguments: Sequence[str]) -> list[Path]:
    """The folders of `hydra.searchpath=[…]`; a package there is installed, and trusted as such."""
    found = []
    for argument in arguments:
        if key_of(argument) == "hydra.searchpath":
            places = argument.partition("=")[2].strip().removeprefix("[").removesuffix("]").split(",")
            named = (place.strip().strip("'\"").removeprefix("file://") for place in places)
            found += [Path(place) for place in named if place and "://" not in place]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Every file of settings below a folder; Hydra follows links to folders, so they are followed here."""
    seen = set()
    for place, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()  # a link that leads back
            continue
        seen.add(real)
        inner.sort()
        yield from (Path(place, file) for file in sorted(files) if Path(file).suffix in (".yaml", ".yml"))


def strangers(arguments: Sequence[str]) -> list[str]:
    """What the command line takes settings from that is not the user's own.

    Recipe files and `--config-dir`s outside the working folder, links followed, and Hydra's search path.
    """
    here, found = Path.cwd().resolve(), []
    files = []
    for argument in arguments:
        value = argument.partition("=")[2]
        if key_of(argument) == "recipe":
            files += [word for word in (value, *value.split(",")) if Path(word).expanduser().is_file()]
        if key_of(argument) == "hydra.searchpath":
            found.append(argument)
    for place in (*files, *map(str, config_dirs(arguments))):
        if not Path(place).expanduser().resolve().is_relative_to(here):
            found.append(place)
    return list(dict.fromkeys(found))


def require_named(settings: Mapping[str, Any], overrides: Sequence[str], places: Sequence[str], name: str) -> None:
    """Code and model files that are programs run when the command line names them, or a recipe of the working folder.

    Args:
        settings: what was composed, in part from `places`, which are somebody else's.

    Raises:
        RecipeError: they name such code; says how to have it run.
    """
    if not places:
        return
    named, problems = {key_of(override) for override in overrides}, []
    for section, kinds, field in (("model", ("entry",), "entry"), ("data", ("entry",), "entry"),
                                  ("model", RUN_FROM_FILE, "path")):  # fmt: skip
        spec = settings.get(section)
        if not isinstance(spec, Mapping) or spec.get("kind") not in kinds or f"{section}.{field}" in named:
            continue
        what = "code" if field == "entry" else "a model file that is a program"
        problems.append(
            Problem(
                f"{section}.{field}",
                f"{', '.join(places)} is not in the working folder and names {what} ({spec.get(field)!r}), which is "
                f"not run unless you say so: add {section}.{field}={spec.get(field)}",
            )
        )
    if problems:
        raise RecipeError(name, problems)


def _reason(file: Path) -> str:
    """What is wrong with a file of settings; '' if nothing is, or if it is no text or YAML, which Hydra says better."""
    try:
        text = file.read_text("utf-8")
        scalars = [str(event.value) for event in checked_events(text) if isinstance(event, yaml.ScalarEvent)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    except ValueError as error:  # what is too large to be looked at whole
        return str(error)
    # Hydra's headers end where Python's lines do.
    if any(map(_HEADER.match, text.splitlines())) or any(is_about_hydra(value) for value in scalars):
        return "Hydra's own settings belong on the command line"
    if any("@" in value and "${" in value for value in scalars):
        return "packages are written out here; '${…}' is not replaced"
    found = next((value for value in scalars if value in TARGETS), None)
    return f"{found}: no such setting; it would have an object built" if found else ""


def is_about_hydra(entry: str) -> bool:
    """Whether an entry of a defaults list, or a key, speaks of Hydra's own settings."""
    return _HYDRA.search(entry) is not None and (entry.strip() == "hydra" or re.search(r"[@/.]", entry) is not None)


def targets_in(settings: Any, place: str = "") -> list[str]:
    """Where composed settings hold a key that Hydra would instantiate."""
    if isinstance(settings, dict):
        own = [f"{place}{key}" for key in settings if key in TARGETS]
        return own + [found for key, value in settings.items() for found in targets_in(value, f"{place}{key}.")]
    if isinstance(settings, (list, tuple)):
        return [found for i, value in enumerate(settings) for found in targets_in(value, f"{place}{i}.")]
    return []
