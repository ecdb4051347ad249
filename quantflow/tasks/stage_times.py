"""How long each stage took the last time, in the user's cache: what a run's progress expects."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from quantflow.errors import ArtifactError
from quantflow.host.environment import cache_folder
from quantflow.report import Progress, stage_times
from quantflow.schema import Recipe
from quantflow.store.artifact import RESULTS
from quantflow.store.json_values import from_json, to_json
from quantflow.store.whole_file import read_regular, write_whole


def earlier_times(recipe: Recipe, directory: Path) -> dict[str, float]:
    """Stage → seconds, of this machine's last run on the model, and of the one whose artifact is in the output folder.

    Nothing of what can't be read.
    """
    times: dict[str, float] = {}
    for file in (_file(recipe), directory / RESULTS):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            times |= stage_times(from_json(read_regular(file)))
    return times


def remember_times(recipe: Recipe, progress: Progress) -> None:
    """For the next run on the same model, whatever else differs in its recipe."""
    with contextlib.suppress(ArtifactError):
        write_whole(_file(recipe), to_json({"stages": progress.stages}))


def _file(recipe: Recipe) -> Path:
    settings = recipe.to_dict()
    depends_on = json.dumps({section: settings[section] for section in ("model", "data", "mode")}, sort_keys=True)
    return cache_folder() / "stages" / f"{hashlib.sha256(depends_on.encode()).hexdigest()[:16]}.json"
