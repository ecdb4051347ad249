"""Every model of the table that `docs/models.md` shows, of the packages that are installed, in every mode.

python -m pytest -m models tests/models -n 2 [-k 'timm and export']
"""

from __future__ import annotations

import warnings

import pytest

from bench.model_table import MODES, Entry, entries, run

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ENTRIES = {f"{package} {entry.name}": entry for package, entry in entries()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_it_is_right_or_refused_in_words(entry: Entry, mode: str) -> None:
    result = run(entry, mode)
    if result.verdict == "refused":
        pytest.skip(result.note)
    assert result.verdict == "ok", result.note
