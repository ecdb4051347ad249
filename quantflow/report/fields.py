"""Reading results that may lack anything and hold anything: a view never fails on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

MISSING = "-"


def section(results: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """results[key] where that is a section; else an empty one."""
    found = results.get(key)
    return found if isinstance(found, Mapping) else {}


def items(section: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """section[key] where that is a list of sections; else none."""
    found = section.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, (list, tuple)) else []


def is_number(value: Any) -> TypeGuard[float]:
    """An int too large for a float is not one that a report can show."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)


def number(value: Any, digits: int = 4) -> str:
    """A bare number with `digits` significant digits."""
    if not is_number(value):
        return MISSING
    return "NaN" if math.isnan(value) else f"{value:.{digits}g}"


def text(value: Any) -> str:
    """One line of printable text: names come from users' models and may hold anything, terminal codes too."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{text(key)}={text(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, (list, tuple)):
        return " ".join(text(item) for item in value) or MISSING
    if isinstance(value, float):
        return number(value)
    return "".join(character if character.isprintable() else " " for character in str(value))
