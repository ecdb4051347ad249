"""A file that is whole at any moment: the old one or the new one."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from quantflow.errors import ArtifactError


def write_whole(path: Path, data: bytes) -> None:
    """`replace_file`, where all writers are on this machine: what killed ones have left beside the path goes first.

    Raises:
        ArtifactError: it can't be written.
    """
    try:
        if path.parent.is_dir():
            _tidy(path)
        replace_file(path, data)
    except OSError as error:
        raise ArtifactError(
            f"'{path}' can't be written ({error.strerror or error}); free some space, or choose another output="
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the path, sync, then rename over it.

    Raises:
        OSError: it can't be written; what was at the path is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _tidy(path: Path) -> None:
    """Removes what runs that were killed while they wrote have left beside the path."""
    for other in path.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)\.partial", other.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (PermissionError, OverflowError):  # alive and another user's, or no process number
            continue
