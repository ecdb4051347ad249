"""Which layers int8 hurts: what int8 in a layer alone costs, and what float in it alone gives back.

    int8 alone    every other layer float: the layer's own error, as it reaches the model's output
    float alone   every other layer int8: the error that is gone without it

Both are programs as a run would make them, compared with the float model on calibration samples. The two differ where
errors of several layers cancel or add up; a search needs the second, an explanation the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantflow.errors import NothingQuantizedError
from quantflow.journal import Journal
from quantflow.workbench import Setting, Workbench

FORMAT = 1
#: What is listed of the comparison with float; the metric's drop comes beside them.
FIGURES = ("sqnr_db", "max_error", "agreement", "cosine_mean", "cosine_min")


def measure_sensitivity(
    bench: Workbench,
    setting: Setting,
    journal: Journal,
    *,
    before_each: Callable[[], None] = lambda: None,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Every int8 layer of a setting, most harmful first.

    Args:
        journal: keeps what was measured, layer by layer.
        before_each: called before a layer that is not in the journal yet; may raise to stop.
        progress: called with (layers done, layers) after each.

    Returns:
        {"format", "setting", "all_int8": figures, "layers": [{"rank", "layer", "op", "int8_alone": figures (None for a
        matmul of activations, which can't be the only int8 layer), "float_alone": figures, "gain_db": float alone minus
        all int8, "noise_back": the share of all noise power that is gone, "noise_alone": int8 alone's noise as a share
        of the same, "added_ms": what float costs}]}.
    """
    mark = setting.digest
    whole = journal.measure(f"{mark} all int8", lambda: _figures(bench.ranking_errors(setting)))
    layers = bench.candidates(setting)
    rows = []
    for done, (name, op) in enumerate(layers):
        if progress is not None:
            progress(done, len(layers))
        step = f"{mark} layer {name}"
        if step not in journal.records:
            before_each()
        others = [other for other, _ in layers if other != name]
        found = journal.measure(step, lambda name=name, others=others: _layer(bench, setting, name, others))  # type: ignore[misc]
        rows.append({"layer": name, "op": op, **{key: value for key, value in found.items() if key != "seconds"}})
    if progress is not None:
        progress(len(layers), len(layers))
    for row in rows:
        row["gain_db"] = _difference(row["float_alone"]["sqnr_db"], whole["sqnr_db"])
        row["noise_back"] = 1 - noise(row["float_alone"]) / noise(whole) if noise(whole) else 0.0
        row["noise_alone"] = _share(row["int8_alone"], whole)
    rows.sort(key=lambda row: -row["noise_back"])
    return {
        "format": FORMAT,
        "setting": setting.to_json(),
        "all_int8": {key: value for key, value in whole.items() if key != "seconds"},
        "layers": [{"rank": rank, **row} for rank, row in enumerate(rows, start=1)],
    }


def noise(figures: Mapping[str, Any]) -> float:
    """Noise power over signal power, 10^(-SQNR/10); infinite for an output that is not finite."""
    sqnr_db = figures["sqnr_db"]
    return math.inf if math.isnan(sqnr_db) else float(10 ** (-sqnr_db / 10))


def plot_ready(sensitivity: Mapping[str, Any]) -> dict[str, Any]:
    """The same with one flat record per layer, as plotting libraries take it; None where there is no finite number."""
    whole = sensitivity["all_int8"]
    records = []
    for row in sensitivity["layers"]:
        record = {key: row[key] for key in ("rank", "layer", "op", "gain_db", "noise_back", "noise_alone", "added_ms")}
        for which in ("int8_alone", "float_alone"):
            figures = row[which] or {}
            record |= {f"{which}_{key}": figures.get(key) for key in (*FIGURES, "drop")}
        for key in (*FIGURES[2:], "drop"):
            record[f"{key}_change"] = _difference(row["float_alone"].get(key), whole.get(key))
        records.append({key: _finite(value) for key, value in record.items()})
    return {**sensitivity, "all_int8": {k: _finite(v) for k, v in whole.items()}, "layers": records}


def _layer(bench: Workbench, setting: Setting, name: str, others: Sequence[str]) -> dict[str, Any]:
    float_alone = setting.with_float([name])
    try:
        alone = _figures(bench.ranking_errors(setting.with_float(others)))
    except NothingQuantizedError:
        alone = None
    try:
        back = _figures(bench.ranking_errors(float_alone))
        added_ms = bench.added_ms(setting, float_alone)
    except NothingQuantizedError:  # the only one: without it the model is float
        back, added_ms = {**dict.fromkeys(FIGURES), "sqnr_db": math.inf, "max_error": 0.0, "drop": None}, math.nan
    return {"int8_alone": alone, "float_alone": back, "added_ms": added_ms}


def _figures(errors: Mapping[str, Any]) -> dict[str, Any]:
    metric = errors["metric"]
    return {**{key: errors[key] for key in FIGURES}, "drop": None if metric is None else metric["drop"]}


def _share(figures: Mapping[str, Any] | None, whole: Mapping[str, Any]) -> float | None:
    return None if figures is None or not noise(whole) else noise(figures) / noise(whole)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
