"""Hydra's and OmegaConf's errors in the user's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from quantflow.config.overrides import UNIONS
from quantflow.config.recipe_file import config_dirs, group_choices, recipe_files
from quantflow.errors import Problem, RecipeError, first_line
from quantflow.schema import Recipe
from quantflow.schema.problems import choices, legal_keys

KindsOf = Callable[[Sequence[str]], Mapping[str, str]]


@contextmanager
def explained(name: str, arguments: Sequence[str], kinds_of: KindsOf) -> Iterator[None]:
    """Turns a composition error into a RecipeError.

    Args:
        name: what errors call the recipe.
        kinds_of: what arguments lead to: section → the kind that is chosen.

    Raises:
        RecipeError: for every error of Hydra and OmegaConf, which call some of theirs ValueError or TypeError.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(name, [_problem(error, arguments, kinds_of)]) from None


def _problem(error: Exception, arguments: Sequence[str], kinds_of: KindsOf) -> Problem:
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
        return Problem("command line", f"{first_line(error)} (--hydra-help lists Hydra's own settings)")
    if isinstance(error, InterpolationResolutionError):
        return Problem(str(error.full_key or "recipe"), first_line(error))
    if match := re.search(r"(?:Could not override|Key) '(?:[+~]*)([^'@]+)'", text):
        return _unknown_key(match[1], kinds_of(arguments))
    return Problem("command line", " ".join(text.split()))


def _unknown_key(key: str, kinds: Mapping[str, str]) -> Problem:
    """The longest part of a dotted key that is legal, and what may follow it."""
    parts = key.split(".")
    if parts[0] in UNIONS and parts[0] not in kinds:
        return Problem(key, f"no {parts[0]} is chosen yet; add {parts[0]}=KIND ({', '.join(_kind_names(parts[0]))})")
    for depth in range(len(parts)):
        legal = legal_keys(Recipe, tuple(parts[:depth]), kinds)
        if parts[depth] not in legal:
            where = ".".join(parts[: depth + 1])
            return Problem(
                where, f"no such setting; {choices(parts[depth], legal)}" if legal else "has no settings inside"
            )
    return Problem(key, "can't be set this way")


def _kind_names(section: str) -> list[str]:
    return group_choices()[section]
