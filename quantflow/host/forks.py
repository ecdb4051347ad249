"""What a forked child must forget: it has none of the parent's other threads, and what they held stays held."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()


def lock() -> threading.Lock:
    """A lock that is free in a forked child, whoever held it in the parent."""
    made = threading.Lock()
    _locks.add(made)
    return made


def in_forked_child(function: Callable[[], None]) -> None:
    """Call the function in every child that this process forks, after its locks are free. Nothing on Windows."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def is_forked_child() -> bool:
    """Whether this process was forked, by Python, from one that had imported this."""
    return os.getpid() != _imported_in


_imported_in = os.getpid()


def _free_locks() -> None:
    for held in list(_locks):
        held._at_fork_reinit()  # type: ignore[attr-defined]


in_forked_child(_free_locks)
