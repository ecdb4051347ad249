"""Another artifact's figures beside this run's: what a report calls the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantflow.errors import ArtifactError
from quantflow.store.artifact import RESULTS, parse_json, read_artifact
from quantflow.store.json_values import from_json

#: Sections of the baseline's results that are kept, and fields of them that would make it large.
_SECTIONS = ("recipe", "verdict", "environment", "model", "data", "mode", "device", "runtime", "int8_proof", "accuracy",
             "benchmark")  # fmt: skip
_LARGE = ("settings", "calibration_ids", "evaluation_ids", "cosine_per_sample", "histograms", "rounds", "others")
#: Where the two differ in one of these, their figures are of different things.
_CONDITIONS = {
    "model": ("model", "name"),
    "weights": ("model", "weights_used"),
    "data": ("data", "content_sha256"),
    "processor": ("environment", "cpu"),
    "threads": ("benchmark", "threads"),
    "device": ("device",),
}


def read_baseline(directory: str) -> dict[str, Any]:
    """The figures of the artifact in `directory`, without its long lists.

    Raises:
        ArtifactError: there is no artifact, or it was changed.
    """
    files = read_artifact(Path(directory))
    if RESULTS not in files:
        raise ArtifactError(f"report.baseline: '{directory}' lacks {RESULTS}; name the folder that a run wrote")
    parse_json(files[RESULTS], f"report.baseline: '{directory}': {RESULTS}")
    results = from_json(files[RESULTS])
    return {"artifact": directory} | {name: _small(results[name]) for name in _SECTIONS if name in results}


def beside(baseline: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The results' `baseline` section: its figures, and `differences`, the conditions in which the two differ."""
    return {**baseline, "differences": list(_differences(baseline, results))}


def _differences(baseline: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    for name, path in _CONDITIONS.items():
        theirs, ours = _at(baseline, path), _at(results, path)
        if theirs is not None and ours is not None and theirs != ours:
            yield f"{name}: {_brief(theirs)} there, {_brief(ours)} here"


def _at(section: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


def _brief(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def _small(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _small(item) for key, item in value.items() if key not in _LARGE}
    if isinstance(value, list):
        return [_small(item) for item in value]
    return value
