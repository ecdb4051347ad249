"""A file that is whole at any moment: the old one or the new one."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from quantflow.errors import ArtifactError

#: What a disk, or what stands in the way on it, refuses: no mistake of ours.
_DISK = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
})  # fmt: skip


def read_regular(path: Path) -> bytes:
    """A file's content.

    Raises:
        OSError: it can't be read, or is no regular file: a named pipe would be waited for.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        require_regular(file.fileno(), path)
        return file.read()


def require_regular(file: int, path: Path) -> None:
    """
    Raises:
        OSError: the open file is none that bytes are kept in.
    """
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def disk_trouble(error: BaseException | None) -> str:
    """What to tell of an error that is the disk's, or of one that comes from such an error; "" for any other."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f"'{error.filename}' can't be used" if error.filename else "a file can't be written"
            return (
                f"{where} ({error.strerror}); free some space, move what is in the way, or choose another output= "
                "(a sweep: hydra.sweep.dir=…)"
            )
        error = error.__cause__
    return ""


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
