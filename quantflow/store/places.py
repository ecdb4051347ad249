"""Directories as the system knows them: where a file system begins, who may write, and how two change places."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def is_mounted(directory: Path) -> bool:
    """Whether a file system begins at the directory, which then can't change places with another."""
    return os.path.ismount(directory)


def is_writable(folder: Path) -> bool:
    """Whether a folder can be made in it: who may write anywhere still can't on a read-only file system."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    probe = folder / f".quantflow.{secrets.token_hex(8)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def exchange(a: Path, b: Path) -> bool:
    """Lets two directories change places in one system call; False where the system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def sync_directory(path: Path) -> None:
    """Flushes the names in a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
