"""What is running, how far it is and how long it may still take: bars in a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from quantflow.host.cores import CORES
from quantflow.report.fields import is_number, items, text

#: In a pipe, a stage that takes longer says so this often.
HEARTBEAT_S = 10.0


@dataclass
class Stage:
    """One running stage. `update` is what a stage calls with (done, total); total may be unknown.

    `expected`: the seconds it took last time, or is likely to take, where it can't count.
    """

    name: str
    expected: float | None = None
    done: int = 0
    total: int | None = None
    _started: float = field(default_factory=time.perf_counter)
    _first: tuple[float, int] | None = None  # seconds and count at the first update
    _bar: tuple[bars.Progress, bars.TaskID] | None = None

    def update(self, done: int, total: int | None = None) -> None:
        self.done, self.total = done, total
        self._first = self._first or (self.seconds, done)
        if self._bar is not None:
            view, task = self._bar
            view.update(task, completed=done, total=total)

    def expect(self, seconds: float) -> None:
        """What it is likely to take, where no earlier run tells."""
        self.expected = seconds if self.expected is None else self.expected

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def count(self) -> str:
        return f" {self.done}/{self.total}" if self.total else f" {self.done}" if self.done else ""

    @property
    def remaining(self) -> str:
        """At the speed since counting began; without a count, what is left of the time that was expected."""
        if self.total:
            since, first = self._first or (0.0, 0)
            since, first = (since, first) if self.done > first else (0.0, 0)
            todo, counted = self.total - self.done, self.done - first
            left = (self.seconds - since) * todo / counted if counted and todo > 0 else None
        else:
            left = self.expected - self.seconds if self.expected is not None else None
        return f"  about {left:.0f} s left" if left is not None and left > 0 else ""


class Progress:
    """Shows stages one after the other and keeps their times.

        with Progress(console) as progress:
            with progress.stage("calibrate") as stage:
                calibrate(..., progress=stage.update)
        progress.stages  # [{"name": "calibrate", "seconds": 1.9}]

    A stage shares the cores with other runs, or has them alone where it measures time (quantflow.host.cores).
    When quiet it shows nothing; the times are kept all the same.

    Args:
        expected: stage → seconds it took last time, for stages that can't count what they do.
        waits: whether a stage waits for other runs on this machine.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        expected: Mapping[str, float] | None = None,
        waits: bool = True,
    ) -> None:
        self.stages: list[dict[str, str | float]] = []
        self._expected = dict(expected or {})
        self._console = console
        self._quiet = quiet
        self._waits = waits
        self._view = _bars(console) if console.is_terminal and not quiet else None

    def silent(self) -> Progress:
        """For runs inside this one: nothing is shown, and they wait for others as it does."""
        return Progress(self._console, quiet=True, waits=self._waits)

    def __enter__(self) -> Self:
        if self._view is not None:
            self._view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._view is not None:
            self._view.stop()

    def alone(self) -> AbstractContextManager[None]:
        """The part of a stage that measures time: no other run computes meanwhile."""
        return CORES.alone(self._announce) if self._waits else nullcontext()

    @contextmanager
    def stage(self, name: str, *, alone: bool = False) -> Iterator[Stage]:
        """Runs one stage; an exception passes through and marks it as failed. Waiting for the cores does not count."""
        shared: AbstractContextManager[None] = CORES.shared(self._announce) if self._waits else nullcontext()
        with self.alone() if alone else shared, self._shown(name) as stage:
            yield stage

    def _announce(self, text: str) -> None:
        if not self._quiet:
            self._console.print(Text(text))

    @contextmanager
    def _shown(self, name: str) -> Iterator[Stage]:
        stage = Stage(name, self._expected.get(name))
        if self._view is not None:
            stage._bar = (self._view, self._view.add_task(name, total=None, stage=stage))
        beating: AbstractContextManager[None] = nullcontext()
        if self._view is None and not self._quiet:
            beating = self._heartbeat(stage)
        outcome = "failed"
        try:
            with beating:
                yield stage
            outcome = "done"
        finally:
            elapsed = stage.seconds
            self.stages.append({"name": name, "seconds": elapsed})
            if stage._bar is not None:
                view, task = stage._bar
                view.remove_task(task)
            if not self._quiet:
                colour = "green" if outcome == "done" else "red"
                line = Text.assemble(f"{name:<12} ", (f"{outcome:<6}", colour), f" {elapsed:8.1f} s {stage.count}")
                line.rstrip()
                self._console.print(line)

    @contextmanager
    def _heartbeat(self, stage: Stage) -> Iterator[None]:
        finished = threading.Event()

        def beat() -> None:
            while not finished.wait(HEARTBEAT_S):
                line = f"{stage.name:<12} running {stage.seconds:6.0f} s {stage.count}{stage.remaining}"
                self._console.print(Text(line.rstrip()))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


def stage_times(results: Any) -> dict[str, float]:
    """Stage → seconds, as far as an earlier run's results tell."""
    rows = items(results, "stages") if isinstance(results, Mapping) else []
    times = ((text(row.get("name")), row.get("seconds")) for row in rows)
    return {name: seconds for name, seconds in times if is_number(seconds) and math.isfinite(seconds)}


class _Count(bars.ProgressColumn):
    """done/total, or nothing while a stage only takes time."""

    def render(self, task: bars.Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total else "")


class _Remaining(bars.ProgressColumn):
    """The time left, once it can be told."""

    def render(self, task: bars.Task) -> Text:
        return Text(task.fields["stage"].remaining.strip())


def _bars(console: Console) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description:<12}", markup=False),
        bars.BarColumn(bar_width=24),
        _Count(),
        bars.TimeElapsedColumn(),
        _Remaining(),
        console=console,
        transient=True,
    )
