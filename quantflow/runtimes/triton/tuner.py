"""Which of several ways to launch a kernel is the fastest, found by measurement and kept.

What a key and a way mean is known to whoever asks. Ways are kept in memory, in the user's cache per card, and in the
rows of a report.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from quantflow.host.forks import lock
from quantflow.store.whole_file import replace_file

Way = tuple[int, ...]
#: Measured runs of one way.
RUNS = 10


class Tuner:
    """Key → the fastest way. Safe to use from several threads; only a thread inside `measuring` measures.

    Args:
        file: where the ways are kept between processes; None: nowhere.
        timed: (call, runs) → the time of one of that many runs in ms, on the device.
        started: entered by each thread that launches, so that it launches on the right device.
    """

    def __init__(
        self,
        file: Path | None,
        timed: Callable[[Callable[[], None], int], float],
        started: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._file = file
        self._timed = timed
        self._started = started
        self._lock = lock()
        self._mine = threading.local()
        self._ways: dict[str, Way] = _read(file)

    def way(self, key: str, ways: Callable[[], Sequence[Way]], run: Callable[[Way], None]) -> Way:
        """The way kept for the key; else the fastest, where this thread measures; else the first.

        Args:
            ways: what could be tried, the most promising first.
            run: launches one of them; it may be called any number of times.
        """
        kept = self._ways.get(key)
        if kept is not None:
            return kept
        deadline: float | None = getattr(self._mine, "deadline", None)
        if deadline is None or time.monotonic() > deadline:
            return tuple(ways()[0])
        return self._measured(key, ways(), run, deadline)

    def _measured(self, key: str, ways: Sequence[Way], run: Callable[[Way], None], deadline: float) -> Way:
        best, best_ms = ways[0], float("inf")
        for way in self._compiled(ways, run):
            ms = self._timed(partial(run, way), RUNS)
            if ms < best_ms:
                best, best_ms = way, ms
            if time.monotonic() > deadline:
                break
        self._mine.rows.append({"kernel": key, "way": list(best), "tried": len(ways), "ms": best_ms, "chosen": True})
        with self._lock:
            self._ways[key] = best
        return best

    def _compiled(self, ways: Sequence[Way], run: Callable[[Way], None]) -> list[Way]:
        """Those that the card can run, each run once: compiling takes most of the time, and all cores."""

        def first(way: Way) -> Exception | None:
            try:
                with self._started():
                    run(way)
            except Exception as error:  # noqa: BLE001 a way that the card refuses: too much memory on the chip
                return error
            return None

        with ThreadPoolExecutor(max_workers=min(len(ways), _cores())) as pool:
            found = list(pool.map(first, ways))
        fitting = [way for way, error in zip(ways, found, strict=True) if error is None]
        if not fitting:
            raise next(error for error in found if error is not None)
        return fitting

    @contextmanager
    def measuring(self, seconds: float) -> Iterator[list[dict[str, Any]]]:
        """In this thread, measure what has no way yet, for about that long; the rows are filled with what was found."""
        self._mine.deadline, self._mine.rows = time.monotonic() + seconds, []
        rows: list[dict[str, Any]] = self._mine.rows
        try:
            yield rows
        finally:
            self._mine.deadline = None
        if rows:
            self._write()

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep what rows of `measuring` say, where nothing is kept yet."""
        with self._lock:
            for row in rows:
                self._ways.setdefault(str(row["kernel"]), tuple(row["way"]))

    def _write(self) -> None:
        if self._file is None:
            return
        with self._lock:
            self._ways = {**_read(self._file), **self._ways}
            text = json.dumps({key: list(way) for key, way in sorted(self._ways.items())}, indent=0)
        try:
            replace_file(self._file, text.encode())
        except OSError:
            return  # a cache that can't be written costs time, nothing else


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(file: Path | None) -> dict[str, Way]:
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): tuple(int(number) for number in way) for key, way in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
