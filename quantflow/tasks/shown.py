"""A path as a person reads it."""

from __future__ import annotations

import contextlib
from pathlib import Path


def shown(path: Path) -> str:
    """Relative to the working folder where that is shorter."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
