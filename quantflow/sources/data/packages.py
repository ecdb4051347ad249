"""Models and data that arrive inside installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from quantflow.errors import UnavailableError


def package_directory(package: str, *, purpose: str, distribution: str | None = None) -> Path:
    """The directory of an installed package, found without importing it.

    Raises:
        UnavailableError: the package is not installed; the message says what needs it and how to install it.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(distribution or package, purpose=purpose)
    return Path(next(iter(spec.submodule_search_locations)))


def missing_package(distribution: str, *, purpose: str) -> UnavailableError:
    """The error for a package that is not installed."""
    return UnavailableError(
        f"{purpose} needs the package '{distribution}', which is not installed; "
        'install everything the zoo uses with: pip install "quantflow[zoo]"'
    )


def file_in_package(package: str, path: str, *, purpose: str, distribution: str | None = None) -> Path:
    """A file inside an installed package.

    Raises:
        UnavailableError: the package is not installed, or this version of it does not hold the file.
    """
    file = package_directory(package, purpose=purpose, distribution=distribution) / path
    if not file.is_file():
        raise UnavailableError(
            f"{purpose} needs the file {path} of the package '{distribution or package}', which the installed version "
            'does not hold; install the versions the zoo was tested with: pip install "quantflow[zoo]"'
        )
    return file
