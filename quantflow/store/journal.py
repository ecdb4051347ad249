"""Measurements that survive a kill: one JSON line each, on disk before the next one begins.

A job that is deterministic but for what it measures asks the journal for every measurement. Started again, it gets the
recorded ones back, so it takes the same decisions and goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from quantflow.errors import ArtifactError, UsageError
from quantflow.store.json_values import decoded, encoded
from quantflow.store.whole_file import require_regular

FORMAT = 1


class Journal:
    """An append-only file of records by name.

    with Journal(path, key="what the measurements depend on") as journal:
        record = journal.measure("layer conv1", lambda: {"sqnr_db": ...})

    Attributes:
        records: name → record, in the order of measurement. Each has "seconds", what the measurement took.
        resumed: how many of them were found in the file.
        notice: what the user should hear about the file that was found, or "".
    """

    def __init__(self, path: Path | None, key: str, *, is_cache: bool = False) -> None:
        """
        Args:
            path: None keeps the records in memory only.
            key: a file with another key, or none that can be read, is started anew.
            is_cache: the job can do without the file: where that can't be used, a notice says so.

        Raises:
            UsageError: another process writes this journal, or the file can't be opened.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.notice = ""
        self._file, self._is_cache = None, is_cache
        try:
            self._file = None if path is None else _locked(path)
        except UsageError as error:
            if not is_cache:
                raise
            self._do_without(error)
        if self._file is not None:
            try:
                self._read(key)
            except BaseException:
                self.__exit__()
                raise
        self.resumed = len(self.records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what was not written has been told
                self._file.close()

    @property
    def spent_s(self) -> float:
        """Seconds that all recorded measurements took, in this process and in earlier ones."""
        return float(sum(record["seconds"] for record in self.records.values()))

    def content(self) -> bytes:
        """The file: a header, then a line per record."""
        return b"" if self.path is None else self.path.read_bytes()

    def measure(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The record of that name; `work` is called, and its result written, only where there is none."""
        if name not in self.records:
            start = time.perf_counter()
            found = dict(work())
            self.records[name] = record = {**found, "seconds": time.perf_counter() - start}
            self._append({"name": name, **record})
        return self.records[name]

    def _read(self, key: str) -> None:
        """Take over what fits, and cut off what does not: a line that a kill left unfinished, or another job's."""
        assert self._file is not None
        self._file.seek(0)
        kept, header = 0, None
        for line in self._file:
            entry = _parsed(line)
            if entry is None:
                break
            if header is None:
                header = entry
                if header != {"format": FORMAT, "key": key}:
                    break
            elif not isinstance(entry.get("name"), str) or not isinstance(entry.get("seconds"), float):
                break
            else:
                self.records[entry.pop("name")] = entry
            kept += len(line)
        if kept == 0 and self._file.seek(0, os.SEEK_END):
            self.notice = f"started clean: the journal {self.path} belongs to another job, or to other settings"
        self._file.truncate(kept)
        if kept == 0:
            self._append({"format": FORMAT, "key": key})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(encoded(entry), allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            problem = ArtifactError(
                f"journal '{self.path}' can't be written ({error.strerror}); free some space, or choose another output="
            )
            if not self._is_cache:
                raise problem from error
            with suppress(OSError):  # what it holds back can't be written either
                self._file.close()
            self._do_without(problem)

    def _do_without(self, problem: Exception) -> None:
        """A cache that can't be used: measurements stay in memory."""
        self.notice = f"measurements are not kept for later runs: {str(problem).partition(';')[0]}"
        self.path = self._file = None


def _locked(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: opening a named pipe must not wait for its other end. O_NOFOLLOW: what is cut off here is ours.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            require_regular(descriptor, path)
            file: IO[bytes] = os.fdopen(descriptor, "a+b")
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        raise UsageError(
            f"journal '{path}' can't be opened ({error.strerror or error}); move what is there, or choose another "
            "output="
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(
            f"journal '{path}' is in use: the same job runs in another process; wait for it, or choose another output="
        ) from None
    return file


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = decoded(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
