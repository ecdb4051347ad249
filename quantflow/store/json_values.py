"""The results as JSON that every reader accepts.

JSON has no infinity and no NaN. As in protobuf's JSON mapping they are written as the strings "Infinity",
"-Infinity" and "NaN", and read back as floats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

#: What moves a terminal's cursor or changes its title, and halves of characters, which no file can hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
#: How JSON may write such a character.
_ESCAPED = re.compile(rb"\\u00[0-9][0-9a-f]|\\ud[89a-f]|\\[bf]|\x7f|\xc2[\x80-\x9f]", re.IGNORECASE)


class RepeatedKeyError(ValueError):
    """An object of a JSON text gives a key twice."""


_NONFINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def to_json(results: Mapping[str, Any]) -> bytes:
    """Indented UTF-8 JSON.

    Raises:
        TypeError: if the results hold anything but mappings, sequences, strings, numbers, booleans and None.
    """
    return (json.dumps(encoded(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def from_json(content: bytes) -> dict[str, Any]:
    """What `to_json` wrote. Sequences come back as lists."""
    results: dict[str, Any] = decoded(json.loads(content))
    return results


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of keys that differ (an `object_pairs_hook`): of two equal ones each reader might take another.

    Raises:
        RepeatedKeyError: names the key.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def encoded(value: Any) -> Any:
    """The value with every number that JSON has not as a string, and control characters replaced."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {encoded(key): encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    return value


def decoded(value: Any) -> Any:
    """What `encoded` was given."""
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return value


def is_unshowable(text: str) -> bool:
    """Whether it holds control characters besides tabs and ends of lines, or halves of characters."""
    return _CONTROL.search(text) is not None


def unshowable(content: bytes, value: Any) -> str | None:
    """The first key or text of a JSON value that `is_unshowable`; None if none is.

    Args:
        content: what the value was read from.
    """
    if not _ESCAPED.search(content):
        return None
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and is_unshowable(item):
            return item
    return None
