"""The user's own code, named as `package.module:callable`."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from quantflow.errors import UsageError, nearest


def import_entry(entry: str, field: str, error: type[UsageError]) -> Any:
    """The object that `package.module:name` names. The working directory joins sys.path, as under `python -m`.

    Args:
        entry: "package.module:name"; the name may be dotted.
        field: the recipe field that holds it, for messages: "model.entry" or "data.entry".
        error: the class of error to raise.

    Raises:
        error: not of that form, no such module or name, or the module fails while it is imported.
    """
    module_name, _, name = entry.partition(":")
    if not module_name or not name:
        raise error(f"{field}: '{entry}' is not of the form package.module:callable")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        if problem.name and (module_name == problem.name or module_name.startswith(f"{problem.name}.")):
            raise error(
                f"{field}: '{entry}': no module '{problem.name}' on the Python path or in {directory}; "
                "run from the directory that holds it, or install it"
            ) from problem
        raise _failed(error, field, entry, "importing it", problem) from problem
    except (Exception, SystemExit) as problem:
        raise _failed(error, field, entry, "importing it", problem) from problem
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            known = [n for n in dir(target) if not n.startswith("_")]
            raise error(f"{field}: '{entry}': '{module_name}' has no '{name}'; nearest names: {nearest(part, known)}")
        target = getattr(target, part)
    return target


def call_entry(target: Any, kwargs: dict[str, Any], entry: str, field: str, error: type[UsageError]) -> Any:
    """`target(**kwargs)`, with whatever it raises turned into an `error` that says where."""
    if not callable(target):
        raise error(f"{field}: '{entry}' is a {type(target).__name__}, expected something to call")
    try:
        return target(**kwargs)
    except (Exception, SystemExit) as problem:
        given = f"calling it with {kwargs}" if kwargs else "calling it"
        raise _failed(error, field, entry, given, problem) from problem


def _failed(
    error: type[UsageError], field: str, entry: str, action: str, problem: Exception | SystemExit
) -> UsageError:
    frames = traceback.extract_tb(problem.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return error(f"{field}: '{entry}': {action} raised {type(problem).__name__}{where}: {problem}")
