"""The results as rows of text, the same for every view. A section that is missing gives no rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantflow.report.fields import MISSING, number
from quantflow.report.fields import is_number as _is_number
from quantflow.report.fields import items as _list
from quantflow.report.fields import section as _section
from quantflow.report.fields import text as _text
from quantflow.runtimes.runner import STEPS_ON_LINES

#: Name of the metric in the results → what people call it.
METRIC_NAMES = {"top1": "top-1 accuracy", "spearman": "Spearman with ratings"}
#: How many layers one line names.
MOST_NAMED = 5


@dataclass(frozen=True)
class Table:
    """A title, one header per column, rows of as many texts, and the conditions they were measured under."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()  #: columns aligned to the right
    caption: str = ""

    def without(self, header: str) -> Table:
        """The same table with one column less; itself where it has no such column."""
        if header not in self.headers:
            return self
        gone = self.headers.index(header)
        headers, *rows = (row[:gone] + row[gone + 1 :] for row in (self.headers, *self.rows))
        right = frozenset(column - (column > gone) for column in self.right if column != gone)
        return replace(self, headers=headers, rows=tuple(rows), right=right)


def figures(results: Mapping[str, Any]) -> Table:
    """Float beside int8: accuracy, latency, size, memory, and the proof that int8 ran."""
    rows = (*_accuracy(results), *_benchmark(results), *_proof(results), *_warmup(results))
    return Table("Figures", ("", "float", "int8", "compared"), rows, frozenset({1, 2}), _conditions(results))


def gates(results: Mapping[str, Any]) -> Table:
    """One row per gate of the recipe."""
    rows = tuple(
        (_text(gate.get("name")), "passed" if gate.get("passed") else "FAILED", _text(gate.get("text")))
        for gate in _list(results, "gates")
    )
    return Table("Gates", ("gate", "outcome", "figure and limit"), rows)


def baseline(results: Mapping[str, Any]) -> Table:
    """The baseline's figures beside this run's, and how they changed; empty without one."""
    before = _section(results, "baseline")
    rows = tuple(row for row in _changes(before, results) if row[1:3] != (MISSING, MISSING)) if before else ()
    return Table("Against the baseline", ("", "baseline", "this run", "change"), rows, frozenset({1, 2, 3}))


def plan(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per layer: what it runs in, with what, and why. Columns that are empty throughout are left out."""
    headers = ("layer", "op", "runs in", "group", "kernel", "qparams", "reason")
    keys = ("name", "op", "precision", "group", "kernel", "qparams", "reason")
    cells = [tuple(_text(row.get(key)) for key in keys) for row in rows]
    used = [i for i in range(len(keys)) if i < 3 or any(row[i] not in (MISSING, "") for row in cells)]
    return Table("Plan", tuple(headers[i] for i in used), tuple(tuple(row[i] for i in used) for row in cells))


def plan_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many rows are int8, and how many stay float for which reason."""
    int8 = sum(row.get("precision") == "int8" for row in rows)
    text = f"{int8} of {len(rows)} layers in int8"
    reasons: dict[str, int] = {}
    for row in rows:
        if row.get("precision") != "int8":
            reason = _text(row.get("reason"))
            reasons[reason] = reasons.get(reason, 0) + 1
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    return "; ".join([text, *(f"{count} float: {reason}" for reason, count in ordered)])


def layer_errors(results: Mapping[str, Any]) -> Table:
    """Each layer's error, the worst first."""
    layers = _list(_section(results, "accuracy"), "per_layer")
    rows = tuple(
        (_text(layer.get("name")), db(layer.get("sqnr_db")), number(layer.get("max_error")))
        for layer in sorted(layers, key=_badness)
    )
    return Table("Layers, worst first", ("layer", "SQNR", "max error"), rows, frozenset({1, 2}))


def sensitivity(found: Mapping[str, Any]) -> Table:
    """One row per layer; columns of figures that the task does not have are left out."""
    whole = found["all_int8"]
    named = [
        (key, label)
        for key, label in (("agreement", "agreement"), ("cosine_min", "least cosine"), ("drop", "metric drop"))
        if whole.get(key) is not None
    ]
    rows = tuple(
        (
            row["layer"],
            row["op"],
            db((row["int8_alone"] or {}).get("sqnr_db")),
            db(row["float_alone"]["sqnr_db"]),
            db(row["float_alone"]["gain_db"]),
            percent(row["float_alone"]["noise_back"]),
            *(number((row[which] or {}).get(key)) for key, _ in named for which in ("int8_alone", "float_alone")),
            ms(row["float_alone"]["added_ms"]),
        )
        for row in found["layers"]
    )
    more = (f"{label}, {which} alone" for _, label in named for which in ("int8", "float"))
    headers = ("layer", "op", "int8 alone", "float alone", "gain", "noise", *more, "float adds")
    figures = ", ".join([db(whole["sqnr_db"]), *(f"{label} {number(whole[key])}" for key, label in named)])
    caption = (
        f"{found['samples']} calibration samples; all in int8: {figures}; "
        "noise: share of the error's power that goes when the layer alone is float"
    )
    return Table("Sensitivity", headers, rows, frozenset(range(2, len(headers))), caption)


def tune(results: Mapping[str, Any]) -> str:
    """What a search came to, in a sentence."""
    found = _section(results, "tune")
    return f"search: {_text(found.get('verdict'))}: {_text(found.get('text'))}"


def stages(results: Mapping[str, Any]) -> Table:
    """What took how long."""
    rows = tuple((_text(stage.get("name")), seconds(stage.get("seconds"))) for stage in _list(results, "stages"))
    return Table("Stages", ("stage", "time"), rows, frozenset({1}))


def algorithms(results: Mapping[str, Any]) -> Table:
    """What each accuracy algorithm did, and what the whole model had before and after it, where that was measured."""
    rows = []
    for applied in _list(results, "algorithms"):
        model = _section(applied, "model")
        undone = sum("rolled back" in _text(each.get("reason")) for each in _list(applied, "skipped"))
        changed = len(_list(applied, "layers"))
        before, after, whole = (model.get(key) for key in ("before_db", "after_db", "all_db"))
        figures = (db(before), db(after if whole is None else whole), db(after))
        rows.append((_text(applied.get("name")), seconds(applied.get("seconds")), str(changed), str(undone), *figures))
    headers = (
        "algorithm",
        "time",
        "changes kept",
        "rolled back",
        "model before",
        "with all of it",
        "with what was kept",
    )
    caption = (
        "SQNR of the whole model, simulated, on calibration samples that the algorithm did not see" if rows else ""
    )
    return Table("Accuracy algorithms", headers, tuple(rows), frozenset(range(1, 7)), caption)


def settings(results: Mapping[str, Any]) -> Table:
    """What ran, on what: recipe, model, data, mode, runtime, device, calibration, machine."""
    return Table("Settings", ("", ""), tuple(_settings(results)))


def headline(results: Mapping[str, Any]) -> str:
    """One line: recipe, model and weights, mode, runtime, device."""
    recipe, model, runtime = (_section(results, key) for key in ("recipe", "model", "runtime"))
    weights = f" (weights: {_text(model['weights_used'])})" if model.get("weights_used") else ""
    parts = [
        _text(recipe.get("name")),
        f"{_text(model['name'])}{weights}" if model.get("name") else "",
        f"mode {_text(results['mode'])}" if results.get("mode") else "",
        f"runtime {_text(runtime['chosen'])}" if runtime.get("chosen") else "",
        f"device {_text(results['device'])}" if results.get("device") else "",
    ]
    return ", ".join(part for part in parts if part)


def notices(results: Mapping[str, Any]) -> list[str]:
    """What the user must not miss."""
    found = results.get("notices")
    return [_text(notice) for notice in found] if isinstance(found, (list, tuple)) else []


def verdict(results: Mapping[str, Any]) -> str:
    """The verdict with the gates counted."""
    outcome, rows = _text(results.get("verdict")), gates(results).rows
    if not rows:
        return outcome
    return f"{outcome} ({sum(row[1] == 'passed' for row in rows)} of {len(rows)} gates passed)"


# Two artifacts beside each other, as `compare` returns them


def comparison_headline(comparison: Mapping[str, Any]) -> str:
    """One line: which candidate, against which baseline."""
    sides = [_section(comparison, side) for side in ("candidate", "baseline")]
    return " against ".join(f"{_text(side.get('place'))} ({_text(side.get('recipe'))})" for side in sides)


def comparison_figures(comparison: Mapping[str, Any]) -> Table:
    """Accuracy, speed, size and coverage; rows that neither side has are left out."""
    rows = tuple(
        (_text(row.get("name")), _figure(row, "baseline"), _figure(row, "candidate"))
        for row in _list(comparison, "figures")
        if _is_number(row.get("baseline")) or _is_number(row.get("candidate"))
    )
    return Table("Figures", ("", "baseline", "candidate"), rows, frozenset({1, 2}))


def comparison_layers(comparison: Mapping[str, Any], *, only_exceeding: bool = False) -> Table:
    """What changed in each layer, in the order of execution; the last column names the limits it exceeds."""
    rows = tuple(
        (_text(row.get("name")), _sides(row, "op"), _sides(row, "precision"), _sides(row, "sqnr_db", db),
         _sides(row, "scale", number), _sides(row, "zero_point"), db(row.get("weight_sqnr_db")),
         number(row.get("weight_scale_ratio")), _sides(row, "ms", number), _text(row.get("exceeds")))
        for row in _list(comparison, "layers")
        if row.get("exceeds") or not only_exceeding
    )  # fmt: skip
    headers = (
        *("layer", "op", "runs in", "SQNR", "scale", "zero_point", "weight SQNR", "weight scale ratio", "ms"),
        "exceeds",
    )
    title = "Layers beyond a limit" if only_exceeding else "Layers"
    caption = "weight SQNR: the candidate's weights and bias against the baseline's" if rows else ""
    used = [i for i in range(len(headers)) if i == 0 or any(row[i] != MISSING for row in rows)]
    shown = tuple(tuple(row[i] for i in used) for row in rows)
    return Table(title, tuple(headers[i] for i in used), shown, frozenset(range(3, len(used) - 1)), caption)


def _figure(row: Mapping[str, Any], side: str) -> str:
    value, unit = row.get(side), row.get("unit")
    if unit == "bytes":
        return size(value)
    return f"{number(value)} {unit}".rstrip() if _is_number(value) else MISSING


def _sides(row: Mapping[str, Any], key: str, form: Callable[[Any], str] | None = None) -> str:
    """Before and after, or one text where nothing changed."""
    before, after = ((form or _text)(_section(row, side).get(key)) for side in ("baseline", "candidate"))
    return after if before == after else f"{before} -> {after}"


# Figures as text, with their units


def db(value: Any) -> str:
    """A signal to noise ratio; infinite means no noise at all."""
    if not _is_number(value) or math.isnan(value):
        return number(value)
    return "exact" if value == math.inf else f"{value:.2f} dB"


def ms(value: Any) -> str:
    return f"{number(value)} ms" if _is_number(value) else MISSING


def seconds(value: Any) -> str:
    return f"{value:.1f} s" if _is_number(value) else MISSING


def percent(value: Any) -> str:
    """A share, 0 to 1, in percent."""
    return f"{100 * value:.2f} %" if _is_number(value) else MISSING


def size(value: Any) -> str:
    """Bytes, in MB of 10^6 bytes."""
    return f"{value / 1e6:.1f} MB" if _is_number(value) else MISSING


# Sections


def _accuracy(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    accuracy = _section(results, "accuracy")
    if not accuracy:
        return
    metric = _section(accuracy, "metric")
    if metric:
        yield _metric(metric)
    if "sqnr_db" in accuracy and accuracy["sqnr_db"] is None:
        yield "same classes or flags", "", percent(accuracy.get("agreement")), ""
        return
    yield "SQNR of the output", "", db(accuracy.get("sqnr_db")), ""
    reach = f"float reaches {number(accuracy.get('float_max_abs'))}" if accuracy.get("float_max_abs") else ""
    yield "max error", "", number(accuracy.get("max_error")), reach
    if accuracy.get("agreement") is not None:
        yield "same top-1 class", "", percent(accuracy["agreement"]), ""
    if accuracy.get("cosine_mean") is not None:
        lowest = f"lowest {number(accuracy.get('cosine_min'))}"
        yield "cosine, mean", "", number(accuracy["cosine_mean"]), lowest
    nonfinite = _section(accuracy, "nonfinite")
    if nonfinite.get("float") or nonfinite.get("int8"):
        yield "NaN or infinite", _text(nonfinite.get("float")), _text(nonfinite.get("int8")), "output elements"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "verdict", _text(before.get("verdict")), _text(now.get("verdict")), ""
    accuracies = [_section(side, "accuracy") for side in (before, now)]
    metrics = [_section(accuracy, "metric") for accuracy in accuracies]
    if metrics[0].get("name") == metrics[1].get("name") == "top1":
        yield _change("top-1 accuracy", [metric.get("int8") for metric in metrics], percent, 100, " points")
    elif metrics[1] and metrics[0].get("name") == metrics[1].get("name"):
        label = METRIC_NAMES.get(str(metrics[1].get("name")), _text(metrics[1].get("name")))
        yield _change(label, [metric.get("int8") for metric in metrics], number)
    yield _change("same top-1 class", [accuracy.get("agreement") for accuracy in accuracies], percent, 100, " points")
    yield _change("SQNR of the output", [accuracy.get("sqnr_db") for accuracy in accuracies], db, 1, " dB")
    benchmarks = [_section(side, "benchmark") for side in (before, now)]
    old = {str(config.get("batch_size")): config for config in _list(benchmarks[0], "configs")}
    for config in _list(benchmarks[1], "configs"):
        batch = str(config.get("batch_size"))
        if batch in old:
            sides = (old[batch], config)
            yield _ratio(
                f"latency, batch {_text(batch)}", [_section(side, "int8").get("median_ms") for side in sides], ms
            )
            yield _ratio("times as fast as float", [side.get("speedup") for side in sides], lambda x: number(x, 3))
    yield _ratio("size on disk", [_section(benchmark, "size").get("int8_bytes") for benchmark in benchmarks], size)
    proofs = [_section(side, "int8_proof") for side in (before, now)]
    yield _change("int8 coverage", [proof.get("coverage") for proof in proofs], percent, 100, " points")


def _change(
    label: str, values: Sequence[Any], show: Callable[[Any], str], factor: float = 1, unit: str = ""
) -> tuple[str, ...]:
    """A row that says by how much the second value is above the first."""
    old, new = values
    changed = f"{factor * (new - old):+.4g}{unit}" if _is_number(old) and _is_number(new) else MISSING
    changed = "same" if old == new else changed
    return label, show(old), show(new), changed


def _ratio(label: str, values: Sequence[Any], show: Callable[[Any], str]) -> tuple[str, ...]:
    """A row that says how many percent the second value is above the first."""
    old, new = values
    changed = f"{100 * (new / old - 1):+.1f} %" if _is_number(old) and _is_number(new) and old else MISSING
    changed = "same" if old == new else changed
    return label, show(old), show(new), changed


def _metric(metric: Mapping[str, Any]) -> tuple[str, ...]:
    name, drop, error = metric.get("name"), metric.get("drop"), metric.get("standard_error")
    label = METRIC_NAMES.get(str(name), _text(name))
    if name == "top1":
        margin = f" +- {100 * error:.2f}" if _is_number(error) else ""
        compared = f"drop {100 * drop:+.2f}{margin} points" if _is_number(drop) else MISSING
        return label, percent(metric.get("float")), percent(metric.get("int8")), compared
    compared = f"drop {drop:+.4f}" if _is_number(drop) else MISSING
    return label, number(metric.get("float")), number(metric.get("int8")), compared


def _benchmark(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    benchmark = _section(results, "benchmark")
    for config in _list(benchmark, "configs"):
        cells = [latency(_section(config, name)) for name in ("float", "int8")]
        speedup = f"{number(config.get('speedup'), 3)}x as fast" if _is_number(config.get("speedup")) else MISSING
        yield f"latency, batch {_text(config.get('batch_size'))}", *cells, speedup
        half = _section(config, "bfloat16")
        if half:
            beside = config.get("speedup_bfloat16")
            compared = f"{number(beside, 3)}x as fast" if _is_number(beside) else MISSING
            yield f"bfloat16, compiled, batch {_text(config.get('batch_size'))}", latency(half), cells[1], compared
        rates = [_section(config, name).get("throughput_per_s") for name in ("float", "int8")]
        if any(map(_is_number, rates)):
            yield "samples per second", *(number(rate) for rate in rates), ""
    disk = _section(benchmark, "size")
    if disk:
        ratio = f"{number(disk.get('ratio'), 3)} of float" if _is_number(disk.get("ratio")) else MISSING
        yield "size on disk", size(disk.get("float_bytes")), size(disk.get("int8_bytes")), ratio
    if benchmark.get("card_memory_bytes"):
        yield "peak memory of the card", "", size(benchmark["card_memory_bytes"]), "by torch, float and int8"
    if benchmark.get("peak_memory_bytes"):
        yield "peak memory", "", size(benchmark["peak_memory_bytes"]), "whole process"


def layer_times(results: Mapping[str, Any]) -> Table:
    """Where the int8 model's time goes, kernel by kernel, slowest first; empty unless it was measured."""
    rows = [row for row in _list(_section(results, "benchmark"), "per_layer") if _is_number(row.get("ms"))]
    total = sum(row["ms"] for row in rows) or 1.0
    cells = tuple(
        (_text(row.get("name")), _text(row.get("op")), _text(row.get("kernel")), f"{row['ms']:.4f}",
         f"{row['ms'] / total:.1%}")
        for row in sorted(rows, key=lambda row: -row["ms"])
    )  # fmt: skip
    caption = f"{len(cells)} kernels, {total:.3f} ms in all when each is timed by itself" if cells else ""
    return Table("Time per layer", ("layer", "op", "kernel", "ms", "share"), cells, frozenset({3, 4}), caption)


def latency(timing: Mapping[str, Any]) -> str:
    """Median and interquartile range of a timing."""
    if not _is_number(timing.get("median_ms")):
        return MISSING
    spread = f" +- {number(timing['spread_ms'], 2)}" if _is_number(timing.get("spread_ms")) else ""
    return f"{number(timing['median_ms'])}{spread} ms"


def _conditions(results: Mapping[str, Any]) -> str:
    """How many samples, threads and rounds the figures stand on, and what +- means."""
    parts = []
    accuracy, benchmark = _section(results, "accuracy"), _section(results, "benchmark")
    if accuracy:
        margin = " (+- standard error)" if _section(accuracy, "metric").get("standard_error") is not None else ""
        parts.append(f"accuracy: {_text(accuracy.get('samples'))} samples{margin}")
    if _list(benchmark, "configs"):
        threads, rounds = _text(benchmark.get("threads")), _text(benchmark.get("rounds"))
        where = f"events on {_text(benchmark['on'])}" if benchmark.get("on") else f"{threads} threads"
        parts.append(f"latency: {where}, median of {rounds} interleaved rounds +- interquartile range")
    return "; ".join(parts)


def _proof(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    proof = _section(results, "int8_proof")
    if not proof:
        return
    yield "layers run in int8", "", _text(proof.get("int8_layers_run")), f"{_text(proof.get('int8_layers'))} planned"
    core = _text(proof.get("core_layers"))
    yield "int8 coverage", "", percent(proof.get("coverage")), f"of {core} layers with weights"
    left = [f"{_text(each.get('name'))} ({_text(each.get('op'))})" for each in _list(proof, "float_layers")]
    if left:
        more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
        yield "with weights, in float", "", str(len(left)), ", ".join(left[:MOST_NAMED]) + more
    differs = proof.get("output_differs")
    if differs is not None:
        yield "int8 output", "", "differs" if differs else "IDENTICAL", "from float's" if differs else "to float's"


def _runs_together(row: Mapping[str, Any]) -> int:
    """How many runs of steps pass line by line, of those that one row of `warmup.choices` is about."""
    lines, kept, count = [way.get("rows") for way in _list(row, "ways")], row.get("kept"), row.get("count")
    known = type(kept) is int and type(count) is int and all(type(each) is int for each in lines)
    if row.get("kernel") != STEPS_ON_LINES or not known or not 0 <= kept < len(lines):
        return 0
    return count if lines[kept] < max(lines) else 0


def _warmup(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    warmup = _section(results, "warmup")
    if not warmup:
        return
    steady = f"then {ms(warmup.get('steady_ms'))} a batch"
    yield "first result", "", seconds(warmup.get("time_to_first_result_s")), steady
    if warmup.get("sqnr_vs_reference_db") is not None:
        yield "runtime", "", db(warmup["sqnr_vs_reference_db"]), "against the reference"
    choices = _section(warmup, "choices")
    if choices:
        layers = [row for batch in _list(choices, "batches") for row in _list(batch, "layers")]
        ways, other = sum(len(_list(row, "ways")) for row in layers), sum(bool(row.get("kept")) for row in layers)
        joined = sum(map(_runs_together, layers))
        rates = _section(choices, "rates")
        by = f"rates {_text(rates.get('source'))} {_text(rates.get('measured_at'))}".strip()
        note = f"; {_text(rates['note'])}" if rates.get("note") else ""
        lines = f"{joined} runs of steps line by line, " if joined else ""
        found = f"{len(layers)} shapes, {other} not as predicted, {lines}{by}{note}"
        yield "cuts of int8 steps", "", f"{ways} tried", found


def _settings(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, model, runtime, calibration, machine = (
        _section(results, key) for key in ("recipe", "model", "runtime", "calibration", "environment")
    )
    if recipe:
        yield "recipe", _text(recipe.get("name")) + (f" (sha256 {_text(recipe['hash'])})" if recipe.get("hash") else "")
        if recipe.get("overrides"):
            yield "overrides", _text(recipe["overrides"])
    if model:
        yield "model", _text(model.get("name"))
        used, asked = _text(model.get("weights_used")), _text(model.get("weights_requested"))
        yield "weights", f"{used} (asked for: {asked})"
        if _is_number(model.get("parameters")):
            yield "parameters", f"{model['parameters'] / 1e6:.2f} M, {size(model.get('float_bytes'))} in float"
    if results.get("data"):
        yield "data", _text(results["data"])
    if results.get("mode"):
        yield "mode", _text(results["mode"])
    if runtime:
        reason = f": {_text(runtime['reason'])}" if runtime.get("reason") else ""
        yield "runtime", f"{_text(runtime.get('chosen'))} (asked for: {_text(runtime.get('requested'))}){reason}"
        if runtime.get("float", "float32") != "float32" or runtime.get("float_reason"):
            reason = f" ({_text(runtime['float_reason'])})" if runtime.get("float_reason") else ""
            yield "floats", f"{_text(runtime.get('float'))}{reason}"
    if results.get("device"):
        yield "device", _text(results["device"])
    for key, value in _section(results, "card").items():
        yield f"card: {_text(key)}", _text(value)
    if calibration:
        resumed = ", resumed" if calibration.get("resumed") else ""
        amount = f"{_text(calibration.get('samples'))} samples in {_text(calibration.get('batches'))} batches"
        yield "calibration", f"{amount}, {seconds(calibration.get('seconds'))}{resumed}"
    for key, value in machine.items():
        yield _text(key), _text(value)


def _badness(layer: Mapping[str, Any]) -> float:
    """Sorts NaN before every number."""
    sqnr = layer.get("sqnr_db")
    return sqnr if _is_number(sqnr) and not math.isnan(sqnr) else -math.inf
