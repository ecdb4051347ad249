"""Hostile programs in processes of their own, many in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What the worker's own lines begin with.
MARK = "@program "
#: A process that takes longer for one program hangs.
PATIENCE_S = 240


def outcomes(programs: Sequence[dict[str, Any]], *options: str) -> list[str]:
    """What becomes of each: "refused …", "failed …" (PyTorch refuses it as it runs), "computed", "differs …", or
    "signal N" where it ended the process, which goes on with the next one in another.

    Args:
        options: "--border" hands them to the native library as they are.
    """
    found: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "programs")
        while len(found) < len(programs):
            left = [i for i in range(len(programs)) if i not in found]
            file.write_text("".join(f"{i} {json.dumps(programs[i])}\n" for i in left))
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.security.worker", str(file), *options]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False
                )
                output, code, errors = done.stdout, done.returncode, done.stderr
            except subprocess.TimeoutExpired as late:
                output, code, errors = (late.stdout or b"").decode(), 0, "took too long"
            begun = None
            for line in output.splitlines():
                if not line.startswith(MARK):
                    continue  # some ops print
                number, _, outcome = line.removeprefix(MARK).partition(" ")
                if outcome == "begins":
                    begun = int(number)
                else:
                    found[int(number)] = outcome
            if begun is not None and begun not in found:
                found[begun] = f"signal {-code} ({errors[-300:]})"
            elif begun is None:
                raise AssertionError(f"the worker did not begin: {errors[-2000:]}")
    return [found[i] for i in range(len(programs))]
