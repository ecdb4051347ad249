"""quantflow-validate FILE…: whether recipe files compose and are legal. No model, no data, nothing executed.

For pre-commit and CI: every file's problems are printed, and the exit code is 2 if there is any.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from quantflow.config.compose import load_recipe
from quantflow.errors import EXIT_PASSED, EXIT_USAGE, RecipeError

_USAGE = "usage: quantflow-validate FILE...   (recipe files; exit code 0: all are legal, 2: some are not)"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (default: sys.argv) and exits with its code."""
    raise SystemExit(run(sys.argv[1:] if arguments is None else arguments))


def run(files: Sequence[str]) -> int:
    """Validates each file and returns the exit code."""
    if not files or any(file.startswith("-") for file in files):
        print(_USAGE, file=sys.stderr)
        return EXIT_PASSED if {"-h", "--help"} & set(files) else EXIT_USAGE
    failed = False
    for file in files:
        try:
            load_recipe(_as_path(file))
        except RecipeError as error:
            failed = True
            print(f"{file}: {error}", file=sys.stderr)
    return EXIT_USAGE if failed else EXIT_PASSED


def _as_path(file: str) -> str:
    """A bare name would be taken for a shipped recipe's."""
    return file if "/" in file else f"./{file}"


if __name__ == "__main__":
    main()
