"""Data-parallel stages: each worker takes a part of the batches, and all get every worker's result.

    torchrun --nproc-per-node 4 -m quantflow recipe=…

Worker r of n takes the r-th of n contiguous parts, so that results joined in the workers' order are those of the
batches' order: an observer that depends on it (moving_average) gives the same table for any n.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, overload

import torch.distributed

from quantflow.errors import QuantflowError, WorkerError
from quantflow.host.cores import CORES

T = TypeVar("T")

#: A worker may wait this long for another that still computes; one that has died is noticed at once.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Workers:
    """This process among those that share the work; by default it is the only one.

    `known` are the errors that all of them have raised.
    """

    rank: int = 0
    count: int = 1
    known: list[QuantflowError] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process plans, times, prints and saves; the others only compute their parts."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Part[T]:
        """This worker's items: contiguous, in order, sizes differing by one at most."""
        return Part(items, len(items) * self.rank // self.count, len(items) * (self.rank + 1) // self.count)

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """Every worker's `compute()`, in their order, on every worker.

        Raises:
            QuantflowError: what the first worker that failed raised, on all of them.
            WorkerError: a worker crashed or was killed.
        """
        if self.count == 1:
            return [compute()]
        try:
            mine: tuple[Any, ...] = (None, compute())
        except QuantflowError as error:
            mine = (type(error), str(error))
        except Exception:  # noqa: BLE001 told to all, raised below
            mine = (WorkerError, f"worker {self.rank} of {self.count} crashed:\n{traceback.format_exc()}")
        everyone: list[Any] = [None] * self.count
        with CORES.released():
            self._wait(lambda: torch.distributed.all_gather_object(everyone, mine))
        for kind, message in everyone:
            if kind is not None:
                self.known.append(kind(message))
                raise self.known[-1]
        return [value for _, value in everyone]

    def from_first(self, compute: Callable[[], T]) -> T:
        """The first worker's `compute()`, on every worker; only the first one calls it."""
        return self.gather(compute if self.is_first else lambda: None)[0]  # type: ignore[return-value,arg-type]

    def _wait(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except RuntimeError as error:
            ended = (
                f"worker {self.rank} of {self.count}: another one ended in the middle of the run; torchrun says which"
            )
            self.known.append(WorkerError(ended))
            raise self.known[-1] from error

    def tell(self, error: QuantflowError) -> None:
        """Makes the others, who are in the same or a later `gather`, raise this process's error."""

        def fail() -> None:
            raise error

        if self.count > 1 and error not in self.known:
            with suppress(QuantflowError):
                self.gather(fail)


class Part(Sequence[T]):
    """Some of a sequence's items, fetched when asked for. `first` is the position of its first one in the whole."""

    def __init__(self, items: Sequence[T], first: int, end: int) -> None:
        self._items = items
        self.first = first
        self._end = end

    def __len__(self) -> int:
        return self._end - self.first

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._items[self.first + index]


def rank_and_count() -> tuple[int, int]:
    """What torchrun says about this process; (0, 1) where it was not started by it."""
    count = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0")
    return (int(rank), int(count)) if rank.isdigit() and count.isdigit() else (0, 1)


@contextmanager
def joined() -> Iterator[Workers]:
    """The workers that torchrun has started, connected by gloo; a single one without it."""
    rank, count = rank_and_count()
    if count == 1:
        yield Workers()
        return

    def stop(*_: object) -> None:
        raise WorkerError(f"worker {rank} of {count}: stopped, because another one ended; torchrun says which")

    before = signal.signal(signal.SIGTERM, stop) if rank == 0 else None
    workers = Workers(rank, count)
    try:
        _connect()
        try:
            yield workers
        except QuantflowError as error:
            _end_in_peace(rank)
            workers.tell(error)
            raise
        finally:
            torch.distributed.destroy_process_group()
    except BaseException:
        _end_in_peace(rank)
        raise
    if rank == 0:
        signal.signal(signal.SIGTERM, before)


def _end_in_peace(rank: int) -> None:
    """The first worker is about to say why it ends; torchrun's signal, sent for the same reason, must not stop that."""
    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _connect() -> None:
    """Meets the other workers, in a thread: only so can the main one be told meanwhile that one of them has ended."""
    failed: list[Exception] = []

    def meet() -> None:
        try:
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        except Exception as error:  # noqa: BLE001 raised below
            failed.append(error)

    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join()
    if failed:
        raise failed[0]
