"""Attacks on all that others may give: each is refused by name or computed as the reference does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quantflow.runtimes import native_library

#: Words in the names of the attacks that a run of the tests makes; all of them with QUANTFLOW_ATTACKS=all.
WORDS = (
    "input:", "C:", "cache:", "settings: a value too long", "settings: an end of line", "settings: named like",
    "settings: Hydra's folder",
    "settings: a folder below", "settings: an escape to", "settings: the beginning", "settings: Hydra's search",
    "settings: the environment", "artifact: results.json runtime/float", "artifact: results.json warmup/variants",
    "artifact: plan.json rows/0", "artifact: results.json plan",
    "file: an artifact's weights whose header has", "file: a pickle", "file: a function",
    "file: an array of objects", "file: an array of a header",
)  # fmt: skip
KINDS = {"artifact": 3, "C": 30, "cache": 20, "file": 8, "input": 54, "settings": 9}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("attacked")
    words = () if os.environ.get("QUANTFLOW_ATTACKS") == "all" else WORDS
    command = [sys.executable, "-m", "tests.security.forked", "tests.security.attacks", str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("kind", KINDS)
def test_is_refused_or_computed_as_the_reference_does(found: dict[str, str], kind: str) -> None:
    if kind == "C" and native_library.library_path("libquantflow_native.so") is None:
        pytest.skip("the native library was not built")
    outcomes = {name: outcome for name, outcome in found.items() if name.startswith(f"{kind}:")}
    assert len(outcomes) >= KINDS[kind]
    wrong = {name: outcome for name, outcome in outcomes.items() if not outcome.startswith(("refused", "computed"))}
    assert not wrong


def test_foreign_settings_are_refused_for_what_they_hold(found: dict[str, str]) -> None:
    told = found["settings: Hydra's search path"]
    assert "x.yaml: Hydra's own settings belong on the command line" in told


def test_a_place_for_a_programs_numbers_is_looked_at(found: dict[str, str]) -> None:
    for name in ("with its memory freed", "cut to half of its memory", "functional"):
        assert "has no memory that holds all of its numbers" in found[f"input: {name}"]
    assert "whose numbers only its class knows" in found["input: fake"]
    assert "has no numbers yet" in found["input: uninitialized"]
