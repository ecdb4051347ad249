"""Every error quantflow raises on purpose, and the exit code each one ends with.

    QuantflowError                 1  something went wrong inside; please report it
    ├── UsageError                 2  the request can't be carried out as written
    │   ├── RecipeError            2  one or more fields of a recipe (lists every problem)
    │   ├── ModelError             2  the model can't be loaded or its weights don't fit
    │   ├── DataError              2  no samples, NaN/Inf, wrong shapes, unreadable files
    │   ├── CaptureError           2  the model can't be turned into a graph in this mode
    │   ├── CalibrationError       2  a layer saw NaN/Inf or nothing at all
    │   ├── NothingQuantizedError  2  the plan or the program holds no int8 layer
    │   └── ArtifactError          2  missing, truncated, tampered with, or from a newer format
    ├── UnavailableError           4  asked for what this machine does not have
    ├── VerificationError          1  a runtime disagrees with the reference
    └── WorkerError                1  a process that shared the work crashed or was killed

A failed gate is a verdict, not an exception: the run finishes, saves everything and exits with 3.
Messages are small letters: where, what was found, what is legal, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_PASSED = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130

#: Exit code → what it means, from best to worst: a sweep ends with its worst job's.
VERDICTS = {
    EXIT_PASSED: "passed",
    EXIT_GATE: "a gate failed",
    EXIT_UNAVAILABLE: "not possible on this machine",
    EXIT_USAGE: "can't run as written",
    EXIT_CRASH: "crashed",
}


class QuantflowError(Exception):
    """Base class. `exit_code` is what the command line ends with."""

    exit_code = EXIT_CRASH


class UsageError(QuantflowError):
    """The request can't be carried out as written."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the field's dotted path and a sentence with the cure."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class RecipeError(UsageError):
    """Everything wrong with a recipe, all at once."""

    def __init__(self, recipe: str, problems: Sequence[Problem]) -> None:
        self.recipe = recipe
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"recipe '{recipe}' can't run ({count}):\n{lines}")


class ModelError(UsageError):
    """The model can't be loaded, or its weights do not fit it."""


class DataError(UsageError):
    """Calibration or evaluation data is missing, unreadable, not finite, or of the wrong shape."""


class CaptureError(UsageError):
    """The model can't be turned into a graph in the requested mode."""


class CalibrationError(UsageError):
    """A layer saw NaN or Inf, or no data at all, during calibration."""


class NothingQuantizedError(UsageError):
    """No layer would run, or ran, in int8."""


class ArtifactError(UsageError):
    """An artifact is missing, truncated, tampered with, or written by a newer format."""


class UnavailableError(QuantflowError):
    """The request names a device, runtime, package or file that this machine does not have."""

    exit_code = EXIT_UNAVAILABLE


class VerificationError(QuantflowError):
    """A runtime's output disagrees with the reference beyond the stated tolerance."""


class WorkerError(QuantflowError):
    """A process that shared the work crashed or was killed."""


def worst(exit_codes: Iterable[int]) -> int:
    """The worst of several jobs' exit codes; one that is not in `VERDICTS` is worse than all that are."""
    ranks = list(VERDICTS)
    return max(exit_codes, key=lambda code: ranks.index(code) if code in ranks else len(ranks), default=EXIT_PASSED)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cause_line(error: BaseException) -> str:
    """The line that says what happened: TorchScript puts it after its own traceback, as `RuntimeError: …`."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line.startswith("RuntimeError: ")), first_line(error))


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, as text for an error message; all of a short list when none is close."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.4)
    chosen = close or sorted(candidates)[:count]
    return ", ".join(chosen) if chosen else "none"


def found_at(path: Path) -> str:
    """What is at `path` where a file or directory of another kind is expected, as text for an error message."""
    if path.is_dir():
        return "a directory"
    if path.is_file():
        return "a file"
    return "neither a file nor a directory" if path.exists() else "missing"
