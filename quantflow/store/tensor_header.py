"""The header of a .safetensors file names every tensor once: of two equal names each reader might take another."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from quantflow.store.json_values import RepeatedKeyError, distinct


def require_distinct(content: bytes) -> None:
    """What else is wrong with the header is left to the reader.

    Args:
        content: the file's, from its beginning to the end of the header at least.

    Raises:
        SafetensorError: a name, or a key of its entry, is given twice; names it.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        json.loads(content[8 : 8 + length], object_pairs_hook=distinct)
    except RepeatedKeyError as error:
        raise SafetensorError(f"in the .safetensors header {error}") from error
    except (ValueError, RecursionError):
        return


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
