"""Which layers int8 hurts: what int8 in a layer alone costs, and what float in it alone gives back.

    int8 alone    every other layer float: the layer's own error, as it reaches the model's output
    float alone   every other layer int8: the error that is gone without it
    weight terms  every other layer float, and this one's weight in two int8 terms: the error that its input leaves
    input terms   every other layer float, and this one's input in two int8 terms: the error that its weight leaves

All are programs as a run would make them, compared with the float model on calibration samples. The first two differ
where errors of several layers cancel or add up, as they do most on samples that an algorithm fitted the layers to; what
one layer costs alone is told apart from the others' errors, so a search goes by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantflow.errors import NothingQuantizedError
from quantflow.search.workbench import FLOAT, INPUT_TERMS, WEIGHT_TERMS, Candidate, Setting, Workbench
from quantflow.store.journal import Journal

FORMAT = 1
INT8_ALONE, FLOAT_ALONE = "int8_alone", "float_alone"
#: What task=sensitivity shows; a search asks for SEARCHED.
SHOWN = (INT8_ALONE, FLOAT_ALONE)
TERMS = {"weight_terms": WEIGHT_TERMS, "input_terms": INPUT_TERMS}
#: The change that is measured for a kind.
CHANGE = {FLOAT_ALONE: FLOAT, **TERMS}
SEARCHED = (INT8_ALONE, *CHANGE)
#: What is listed of the comparison with float; the metric's drop comes beside them.
FIGURES = ("sqnr_db", "max_error", "agreement", "cosine_mean", "cosine_min")


def measure_sensitivity(
    bench: Workbench,
    setting: Setting,
    journal: Journal,
    kinds: Sequence[str] = SHOWN,
    *,
    before_each: Callable[[], None] = lambda: None,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Every int8 layer of a setting, most harmful first.

    Args:
        journal: keeps what was measured, one record per layer and kind.
        before_each: called before what is not in the journal yet; may raise to stop.
        progress: called with (layers done, layers) after each.

    Returns:
        {"format", "setting", "all_int8": figures, "layers": [{"rank", "layer", "op", and for each kind its figures}]}.
        Those of a kind are None where it can't be: a matmul of activations can't be the only int8 layer, and has no
        weight. Beside FIGURES they hold "drop" (of the task's metric), "gain_db" (minus all int8), "noise" (as a share
        of the noise of all int8), "noise_back" (1 - noise), and but for int8 alone "added_ms", what the change costs in
        the model that is all int8.
    """
    mark = setting.digest
    whole = journal.measure(f"{mark} all int8", lambda: _figures(bench.ranking_errors(setting)))
    layers = bench.candidates(setting)
    rows = []
    for done, layer in enumerate(layers):
        if progress is not None:
            progress(done, len(layers))
        row: dict[str, Any] = {"layer": layer.name, "op": layer.op}
        for kind in kinds:
            step = f"{mark} {kind} {layer.name}"
            if step not in journal.records:
                before_each()
            found = journal.measure(step, lambda kind=kind, layer=layer: _measured(bench, setting, kind, layer, layers))  # type: ignore[misc]
            row[kind] = None if "sqnr_db" not in found else _compared(found, whole)
        rows.append(row)
    if progress is not None:
        progress(len(layers), len(layers))
    rows.sort(key=lambda row: -row[FLOAT_ALONE]["noise_back"])
    return {
        "format": FORMAT,
        "setting": setting.to_json(),
        "all_int8": _without_seconds(whole),
        "layers": [{"rank": rank, **row} for rank, row in enumerate(rows, start=1)],
    }


def plot_ready(sensitivity: Mapping[str, Any]) -> dict[str, Any]:
    """The same with one flat record per layer, as plotting libraries take it; None where there is no finite number."""
    records = []
    for row in sensitivity["layers"]:
        record: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, Mapping):
                record |= {f"{key}_{name}": _finite(figure) for name, figure in value.items()}
            else:
                record[key] = value
        records.append(record)
    whole = {key: _finite(value) for key, value in sensitivity["all_int8"].items()}
    return {**sensitivity, "all_int8": whole, "layers": records}


def noise(figures: Mapping[str, Any]) -> float:
    """Noise power over signal power, 10^(-SQNR/10); infinite for an output that is not finite.

    Of classes and flags, which have no signal: the share that differs.
    """
    sqnr_db = figures["sqnr_db"]
    if sqnr_db is None:
        return 1.0 - float(figures["agreement"])
    return math.inf if math.isnan(sqnr_db) else float(10 ** (-sqnr_db / 10))


def noise_db(figures: Mapping[str, Any]) -> float:
    """SQNR, or what the noise of classes and flags comes to on its scale, in dB."""
    if figures["sqnr_db"] is not None:
        return float(figures["sqnr_db"])
    return -10 * math.log10(noise(figures)) if noise(figures) > 0 else math.inf


def _measured(
    bench: Workbench, setting: Setting, kind: str, layer: Candidate, layers: Sequence[Candidate]
) -> dict[str, Any]:
    others = [(other.name, FLOAT) for other in layers if other is not layer]
    if kind == INT8_ALONE:
        try:
            return _figures(bench.ranking_errors(setting.with_changes(others)))
        except NothingQuantizedError:
            return {}
    if CHANGE[kind] not in layer.changes:
        return {}
    changed = setting.with_changes([(layer.name, CHANGE[kind])])
    try:
        added_ms = bench.added_ms(setting, changed)
        judged = changed if kind == FLOAT_ALONE else setting.with_changes([*others, (layer.name, CHANGE[kind])])
        return {**_figures(bench.ranking_errors(judged)), "added_ms": added_ms}
    except NothingQuantizedError:  # the only int8 layer: without it the model is float
        exact = {**dict.fromkeys(FIGURES), "sqnr_db": math.inf, "max_error": 0.0, "drop": None}
        return {**exact, "added_ms": math.nan}


def _figures(errors: Mapping[str, Any]) -> dict[str, Any]:
    metric = errors["metric"]
    return {**{key: errors[key] for key in FIGURES}, "drop": None if metric is None else metric["drop"]}


def _compared(found: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    share = noise(found) / noise(whole) if noise(whole) else 1.0
    gain_db = noise_db(found) - noise_db(whole) if share != 1.0 else 0.0
    return {**_without_seconds(found), "gain_db": gain_db, "noise": share, "noise_back": 1 - share}


def _without_seconds(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
