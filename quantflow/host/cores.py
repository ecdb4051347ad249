"""This machine's cores: shared by the runs that compute, and given to one alone while it measures time.

Two files that every quantflow process of the user locks with flock, so that a process that dies lets go:

    cores   held shared by whoever computes, exclusive by whoever times
    gate    passed on the way to `cores`; who waits for the exclusive lock keeps it, so that no one computing gets ahead

A run holds the cores stage by stage and passes the gate in between: a timing stage waits for the stages that the
others are in, not for their runs.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

#: Names the descriptor of a lock that a process inherits: it holds the cores from its first instruction on.
INHERITED = "QUANTFLOW_CORES"
#: Waiting for longer is announced.
PATIENCE_S = 1.0
POLL_S = 0.01

Use = Literal["none", "shared", "alone"]
Announce = Callable[[str], None]


class Cores:
    """A process's hold on the cores. Nested uses count once; time alone inside shared use lets go of that meanwhile.

    Threads of one process are not told apart. Where no lock can be made, everything goes on without one.

    Args:
        folder: where the two files are; it must be on this machine, not on a network.
        inherited: a descriptor of `cores` that is held shared already.
    """

    def __init__(self, folder: Path, inherited: int | None = None) -> None:
        self._folder = folder
        self._file = inherited
        self._use: Use = "none" if inherited is None else "shared"
        self._depth = 0

    @contextmanager
    def shared(self, announce: Announce = print) -> Iterator[None]:
        """For computing: beside others, and not while somebody times."""
        with self._during("shared", announce):
            yield

    @contextmanager
    def alone(self, announce: Announce = print) -> Iterator[None]:
        """For timing: nobody else computes or times."""
        with self._during("alone", announce):
            yield

    @contextmanager
    def released(self) -> Iterator[None]:
        """For waiting on others that may want to time."""
        before, depth = self._use, self._depth
        self._let_go()
        self._depth = 0
        try:
            yield
        finally:
            self._take(before, print)
            self._depth = depth

    @contextmanager
    def lent(self, announce: Announce = print) -> Iterator[int | None]:
        """The descriptor of a shared hold for a child process to inherit; None where no lock can be made."""
        lent = Cores(self._folder)
        lent._take("shared", announce)
        try:
            yield lent._file
        finally:
            if lent._file is not None:
                os.close(lent._file)  # not unlocked: the child's copy keeps the hold

    def holders(self) -> list[int]:
        """The processes that hold the cores now, as far as the system tells."""
        with suppress(OSError):
            inode = (self._folder / "cores").stat().st_ino
            lines = Path("/proc/locks").read_text().splitlines()
            found = (re.match(rf"\d+: FLOCK +ADVISORY +\w+ (\d+) \S+:{inode} ", line) for line in lines)
            return sorted({int(match[1]) for match in found if match})
        return []

    @contextmanager
    def _during(self, use: Use, announce: Announce) -> Iterator[None]:
        before = self._use
        if before == "none" or (before != use and use == "alone") or self._depth == 0:
            self._take(use, announce)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._use != before:
                self._take(before, announce)

    def _take(self, use: Use, announce: Announce) -> None:
        self._let_go()
        if use == "none":
            return
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._file is None:
                self._file = os.open(self._folder / "cores", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            gate = os.open(self._folder / "gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._wait(gate, fcntl.LOCK_EX, use, announce)
                self._wait(self._file, fcntl.LOCK_EX if use == "alone" else fcntl.LOCK_SH, use, announce)
            finally:
                os.close(gate)
        self._use = use

    def _wait(self, file: int, operation: int, use: Use, announce: Announce) -> None:
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE_S:
            with suppress(BlockingIOError):
                fcntl.flock(file, operation | fcntl.LOCK_NB)
                return
            time.sleep(POLL_S)
        others = ", ".join(str(number) for number in self.holders() if number != os.getpid()) or "unknown"
        reason = "to measure time alone" if use == "alone" else "until another run has measured its times"
        announce(f"waiting {reason}; the cores are held by quantflow processes {others}")
        fcntl.flock(file, operation)

    def _let_go(self) -> None:
        if self._file is not None and self._use != "none":
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._use = "none"


def _cores() -> Cores:
    try:
        temporary = tempfile.gettempdir()
    except OSError:  # a full disk: Python finds no place to write in, but locks that are there need no room
        temporary = "/tmp"
    folder = Path(temporary, f"quantflow-{os.getuid()}")
    with suppress(ValueError, OSError):
        inherited = int(os.environ.pop(INHERITED, ""))
        os.set_inheritable(inherited, False)
        return Cores(folder, inherited)
    return Cores(folder)


#: This process's.
CORES = _cores()
