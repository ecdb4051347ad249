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
    return (json.dumps(_encode(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def from_json(content: bytes) -> dict[str, Any]:
    """What `to_json` wrote. Sequences come back as lists."""
    decoded: dict[str, Any] = _decode(json.loads(content))
    return decoded


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
