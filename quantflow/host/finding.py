"""What a look at the machine found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it (empty: nothing)."""

    topic: str
    found: str
    cure: str = ""
