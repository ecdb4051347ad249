"""Settings in somebody's `--config-dir`, looked at before Hydra composes them: none may make it build objects.

Hydra instantiates what its own configuration names (callbacks, launchers, sweepers), wherever in the configuration a
file puts it. So a file in a `--config-dir` holds settings, and says nothing of Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from quantflow.config.recipe_file import checked_events
from quantflow.errors import Problem, RecipeError

#: What Hydra instantiates.
TARGETS = ("_target_", "_partial_", "_recursive_", "_convert_")
_HYDRA = re.compile(r"(?<![\w.-])hydra(?![\w-])")
_HEADER = re.compile(r"^\s*#\s*@package\b.*hydra", re.MULTILINE)
_MAX_FILES = 10_000


def check_config_dirs(folders: Sequence[Path], name: str) -> None:
    """Every file that Hydra could take a group from.

    Raises:
        RecipeError: one names an object to build, or Hydra's own settings; names the files.
    """
    problems = []
    for folder in folders:
        for count, file in enumerate(sorted(folder.rglob("*.y*ml"))):
            if count >= _MAX_FILES:
                raise RecipeError(name, [Problem(str(folder), f"holds over {_MAX_FILES} files; name the right folder")])
            inside = file.relative_to(folder)
            if inside.parts[0] == "hydra":
                problems.append(Problem(str(file), "Hydra's own settings belong on the command line"))
            elif reason := _reason(file):
                problems.append(Problem(str(file), reason))
    if problems:
        raise RecipeError(name, problems)


def _reason(file: Path) -> str:
    """What is wrong with a file of settings; '' if nothing is, or if it can't be read, which Hydra says better."""
    try:
        text = file.read_text("utf-8")
        scalars = [str(event.value) for event in checked_events(text) if isinstance(event, yaml.ScalarEvent)]
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError):
        return ""
    if _HEADER.search(text) or any(is_about_hydra(value) for value in scalars):
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
