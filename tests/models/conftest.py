"""The tier of real models runs when it is asked for: `python -m pytest -m models tests/models`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Reading its list alone imports every package that the models are from."""
    asked = "models" in str(config.getoption("markexpr"))
    return True if collection_path.name == "test_real_models.py" and not asked else None
