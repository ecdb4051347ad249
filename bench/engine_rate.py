"""What int8 products the processor's own instructions reach: the rate that kernels are measured against.

`engine_rate.c` holds a loop of products for each instruction set, operands in registers; a C compiler makes it a
program. A part of `vs_peers` and `linears`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("engine_rate.c")
SECONDS = 0.1
#: Of instruction sets whose operands other instructions load: the loops with these, from the L1 cache, one instruction
#: right behind the other and with empty ones between.
FROM_L1 = {"amx_int8": ("amx_int8_from_l1", "amx_int8_spaced")}


class NoEngineRate(Exception):
    """The rate can't be measured here; the message says why."""


def built(folder: Path) -> Path:
    """The program, compiled into `folder`.

    Raises:
        NoEngineRate: there is no C compiler, or it refuses the source.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoEngineRate("no C compiler on the path (cc, gcc)")
    program = folder / "engine_rate"
    done = subprocess.run(
        [compiler, "-O2", "-pthread", "-o", program, SOURCE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NoEngineRate(f"{compiler}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return program


def engine_rate(program: Path, isa: str, threads: int) -> float:
    """Int8 multiply-accumulates a second, in GMAC/s, of `threads` threads together on `isa` (or a loop of `FROM_L1`).

    Raises:
        NoEngineRate: the processor, or the program, doesn't know `isa`.
    """
    done = subprocess.run([program, isa, str(threads), str(SECONDS)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoEngineRate(f"no loop of products that runs here on {isa} (the program ended with {done.returncode})")
    return float(done.stdout)
