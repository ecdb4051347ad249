"""Attacks, each in a child process of its own with little memory and time: what becomes of them.

`python -m tests.security.forked MODULE FOLDER [WORD …]` prints a JSON list for each attack whose name holds one of
the words: its name, and "refused …", "computed", "crashed …", "exit N …", "signal N", "took too long" or "touched …".
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from quantflow.cli import command as cli
from quantflow.errors import QuantflowError

#: Beyond what the process has when it starts.
MEMORY_BYTES = 2 << 30
PATIENCE_S = 30
#: What no attack may change.
FOREIGN = "foreign.txt"


def command(*words: str) -> str:
    """What the command line makes of it."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli.run(list(words))
    said = " ".join(errors.getvalue().split())
    if "Traceback" in said:
        return f"crashed {said[-600:]}"
    if any(not (c.isprintable() or c.isspace()) for c in out.getvalue() + errors.getvalue()):
        return "crashed: it writes control characters of somebody else's to the terminal"
    return "computed" if code == 0 else f"refused {said[:600]}" if code in (2, 3, 4) else f"exit {code} {said[-600:]}"


def outcomes(attacks: Mapping[str, Callable[[], str | None]], folder: Path) -> dict[str, str]:
    """What becomes of each, which runs in a new folder below `folder`."""
    found = {}
    for number, (name, attack) in enumerate(attacks.items()):
        place = folder / str(number) / "here"
        place.mkdir(parents=True)
        (place.parent / FOREIGN).write_text("mine")
        found[name] = _one(attack, place)
        beside = sorted(path.name for path in place.parent.iterdir())
        if beside != [FOREIGN, "here"] or (place.parent / FOREIGN).read_text() != "mine":
            found[name] = f"touched {beside}"
        if list(place.rglob("pwned")):
            found[name] = "ran code"
        print(json.dumps([name, found[name]]), flush=True)
    return found


def _one(attack: Callable[[], str | None], place: Path) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            os.chdir(place)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            told = _told(attack)
            os.write(writer, told.encode(errors="backslashreplace")[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    late = time.monotonic() + PATIENCE_S
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > late:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return "took too long"
        time.sleep(0.002)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read().decode()
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else told or "nothing was told"


def guarded(attack: Callable[[], object]) -> str:
    """What becomes of a call, with what it prints looked at."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        told = _told(attack)  # type: ignore[arg-type]
    odd = sorted({c for c in said.getvalue() if not (c.isprintable() or c.isspace())})
    return f"crashed: prints {odd}" if odd else told


def _told(attack: Callable[[], object]) -> str:
    try:
        told = attack()
        return told if isinstance(told, str) else "computed"
    except QuantflowError as error:
        return f"refused {error}"
    except BaseException as error:  # noqa: BLE001 whatever it is, it is a crash
        where = " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__))
        )
        return f"crashed {type(error).__name__}: {str(error)[:300]} at {where[:300]}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module, folder, *wanted = sys.argv[1:]
    os.fsync = lambda _: None  # type: ignore[assignment]
    every = importlib.import_module(module).attacks(Path(folder))
    chosen = {name: attack for name, attack in every.items() if not wanted or any(word in name for word in wanted)}
    outcomes(chosen, Path(folder, "attacks"))
