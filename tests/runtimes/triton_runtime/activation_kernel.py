"""A kernel that is nothing but an activation. Imported where Triton interprets: names of a kernel are its module's."""

from __future__ import annotations

import triton
import triton.language as tl

from quantflow.runtimes.triton.formulas import activated


@triton.jit
def activate(x, y, NUMBER: tl.constexpr, SIZE: tl.constexpr):
    """y = the activation of that number of x."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, activated(tl.load(x + at), 0.0, 0.0, NUMBER))
