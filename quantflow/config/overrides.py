"""The command line's words, as we read them before Hydra does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantflow.config.recipe_file import group_choices
from quantflow.errors import Problem
from quantflow.schema import DataSpec, ModelSpec
from quantflow.schema.problems import choices

#: Sections whose keys depend on their kind: choosing a kind replaces the whole section.
UNIONS = {"model": ModelSpec, "data": DataSpec}
#: Ends the names under which the user's own recipes are composed: Hydra would take a file of the same name in a
#: --config-dir for the recipe, as it is, and the stored one for its schema.
OWN = ".own"


def key_of(argument: str) -> str:
    """The key of key=value, +key=value or ++key=value; '' for anything else."""
    key, equals, _ = argument.partition("=")
    return key.lstrip("+") if equals and not argument.startswith("-") else ""


def chosen_groups(overrides: Sequence[str]) -> set[str]:
    return {key_of(override) for override in overrides} & group_choices().keys()


def requested_recipe(arguments: Sequence[str]) -> str:
    """What errors call the recipe: its name, in a sweep their names, and custom when none was asked for."""
    value = next((argument.partition("=")[2] for argument in arguments if key_of(argument) == "recipe"), "custom")
    return ",".join(word.removesuffix(OWN) for word in value.split(","))


def misused_group(argument: str) -> Problem | None:
    """What Hydra would take for a plain value, or refuse without naming the group."""
    key, word = key_of(argument), argument.partition("=")[2]
    section = key.removesuffix(".kind")
    if key in group_choices() and word.startswith("["):
        legal = ", ".join(group_choices()[key])
        return Problem(key, f"takes one name here ({legal}); a list belongs in the recipe's file")
    if section != key and section in UNIONS:
        return Problem(key, f"a kind brings its own settings; choose it as {section}={word}")
    if key in group_choices() and re.fullmatch(r"|null|true|false|[\d.]+", word):
        return Problem(key, f"'{word}' is not known; {choices(word, group_choices()[key])}")
    return None
