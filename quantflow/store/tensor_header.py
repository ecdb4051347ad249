"""The header of a .safetensors file names every tensor once: of two equal names each reader might take another."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def require_distinct(content: bytes) -> None:
    """What else is wrong with the header is left to the reader.

    Args:
        content: the file's, from its beginning to the end of the header at least.

    Raises:
        SafetensorError: a name, or a key of its entry, is given twice; names it.
    """
    length = int.from_bytes(content[:8], "little")
    with suppress(ValueError, RecursionError):
        json.loads(content[8 : 8 + length], object_pairs_hook=_distinct)


def require_distinct_file(path: Path) -> None:
    """
    Raises:
        SafetensorError: as `require_distinct`.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length <= path.stat().st_size:
            require_distinct(start + file.read(length))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SafetensorError(f"the .safetensors header gives {twice!r} twice")
    return found
