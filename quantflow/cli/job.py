"""`python -m quantflow.cli.job REQUEST PARENT`: one job of a sweep, in a process of its own.

How it ended goes into REQUEST's .ending file; a process that was killed leaves none. It dies with the process that
started it, so that nobody runs a job twice at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from quantflow.cli import command as cli
from quantflow.config.app import Job
from quantflow.store.whole_file import disk_trouble, replace_file

_PR_SET_PDEATHSIG = 1


def run_request(request: Path) -> int:
    """Runs the job that the file describes and writes how it ended, where the disk has room for that."""
    content = json.loads(request.read_text())
    ending = cli.run_job(Job(content["name"], content["settings"], tuple(content["overrides"])))
    told = {"exit_code": ending.exit_code, "reason": ending.reason}
    try:
        replace_file(request.with_suffix(".ending"), json.dumps(told).encode())
    except OSError as error:
        if not disk_trouble(error):
            raise
        print(disk_trouble(error), file=sys.stderr)
    return ending.exit_code


def main() -> None:
    request, parent = Path(sys.argv[1]), int(sys.argv[2])
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(cli.EXIT_CRASH)
    try:
        _hear_once()
        code = run_request(request)
    except KeyboardInterrupt:
        code = cli.EXIT_INTERRUPTED
    raise SystemExit(code)


def _hear_once() -> None:
    """Takes Ctrl-C from here on, also one that came while this process was starting; the terminal and the sweep both
    send it, and the second must not cut the end short."""
    was_pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal was_pressed
        if not was_pressed:
            was_pressed = True
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, press)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


if __name__ == "__main__":
    main()
