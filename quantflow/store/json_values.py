"""The results as JSON that every reader accepts.

JSON has no infinity and no NaN. As in protobuf's JSON mapping they are written as the strings "Infinity",
"-Infinity" and "NaN", and read back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

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


def encoded(value: Any) -> Any:
    """The value with every number that JSON has not as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
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
