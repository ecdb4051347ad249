"""The results as one HTML page that answers, in this order: did it pass; how accurate and how fast; did int8 run and
where not; which layers cost accuracy; which cost time; what exactly was run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from quantflow.report import tables
from quantflow.report.charts import Bars, Histogram, Line, histogram_of, line_through
from quantflow.report.fields import MISSING, is_number, items, number, section, text
from quantflow.report.page import MOST_ROWS, Cell, Column, DataTable, Row, number_cell, plain_table, render, shortened
from quantflow.report.picture import Picture, picture_of

#: As many layers as the lists of the slowest and the worst show.
LISTED = 10
#: As many entries as other lists show: groups of float layers, names in each, notices, gates.
NAMED = 60
#: The page is cut until it is no larger; the JSON holds everything.
LARGEST_BYTES = 1_900_000

#: Where the chart of errors ends: a layer that far from its noise costs nothing.
BEYOND_DB = 80

_OUTCOMES = {"passed": "Passed", "failed": "Failed"}


@dataclass(frozen=True)
class Tile:
    """One headline figure: what it is, the figure, what it means, and how the baseline compares."""

    title: str
    figure: str
    text: str = ""
    against: str = ""
    tone: str = ""


@dataclass(frozen=True)
class FloatGroup:
    """Layers that stay float for one reason."""

    reason: str
    ops: str
    layers: tuple[str, ...]
    more: int


@dataclass(frozen=True)
class Layer:
    """One row of the layer table, joined from plan, errors and times by the layer's name."""

    name: str
    op: str
    precision: str
    kernel: str
    reason: str
    sqnr_db: Any = None
    own_sqnr_db: Any = None
    max_error: Any = None
    ms: Any = None


def html(results: Mapping[str, Any]) -> str:
    """The page. Sections that did not run are left out; whatever `results` holds, it stays below `LARGEST_BYTES`.

    Args:
        results: the results, as read by `from_json` or as measured.
    """
    layers, most = _layers(results), MOST_ROWS
    while len((page := _page(results, layers, most)).encode()) > LARGEST_BYTES and most:
        most //= 2
    return page


def _page(results: Mapping[str, Any], layers: Sequence[Layer], most: int) -> str:
    """The page with at most that many rows, nodes and names."""
    recipe = section(results, "recipe")
    return render(
        "report.html",
        scripts=("graph.js",),
        name=shortened(text(recipe.get("name"))) if recipe else "results",
        description=shortened(text(recipe["description"]), 400) if recipe.get("description") else "",
        headline=shortened(tables.headline(results), 300),
        outcome=str(results.get("verdict")) if str(results.get("verdict")) in _OUTCOMES else "none",
        verdict_title=_OUTCOMES.get(str(results.get("verdict")), "Not judged"),
        verdict_text=_verdict_text(results),
        gates=_gates(results),
        notices=[shortened(notice, 600) for notice in tables.notices(results)[:NAMED]],
        tiles=list(_tiles(results)),
        latencies=_latencies(results),
        figures=_plain("figures", tables.figures(results)),
        algorithms=_plain("algorithms", tables.algorithms(results)),
        baseline=_plain("baseline", tables.baseline(results)),
        baseline_name=shortened(text(section(results, "baseline").get("artifact"))),
        differences=[shortened(text(d)) for d in _texts(section(results, "baseline").get("differences"))[:NAMED]],
        proof=_proof(results),
        coverage=_coverage(results),
        float_groups=_float_groups(results, min(most, NAMED)),
        picture=_picture(results, layers, most),
        error_chart=_error_chart(layers),
        worst=_worst(layers),
        histograms=_histograms(results),
        time_by_op=_time_by_op(results),
        slowest=_slowest(layers),
        time_note=_time_note(results),
        layer_table=_layer_table(layers, most),
        settings=_plain("settings", _settings(results)),
        stages=_stages(results),
        recipe_text=_recipe_text(recipe.get("settings")),
    )


# --- did it pass


def _verdict_text(results: Mapping[str, Any]) -> str:
    rows = tables.gates(results).rows
    if not rows:
        return "The recipe sets no gates, so there is nothing to pass or fail."
    failed = [row[0] for row in rows if row[1] != "passed"]
    if failed:
        return shortened(f"{len(failed)} of {len(rows)} gates failed: {', '.join(failed)}.", 300)
    return f"All {len(rows)} gates passed." if len(rows) > 1 else "The one gate passed."


def _gates(results: Mapping[str, Any]) -> DataTable:
    rows = tuple(
        Row((Cell(shortened(name)), Cell(outcome, tone="good" if outcome == "passed" else "bad"), Cell(shortened(why))))
        for name, outcome, why in tables.gates(results).rows[:NAMED]
    )
    columns = (Column("Gate"), Column("Outcome", is_whole=True), Column("Figure and limit"))
    return DataTable("gates", "Gates", columns, rows)


# --- how accurate, how fast


def _tiles(results: Mapping[str, Any]) -> Iterator[Tile]:
    base = section(results, "baseline")
    accuracy, before = section(results, "accuracy"), section(base, "accuracy")
    metric, metric_before = section(accuracy, "metric"), section(before, "metric")
    if is_number(metric.get("int8")):
        show = tables.percent if metric.get("name") == "top1" else number
        against = f"baseline {show(metric_before['int8'])}" if is_number(metric_before.get("int8")) else ""
        name = str(metric.get("name"))
        title = tables.METRIC_NAMES.get(name, shortened(text(name))).capitalize()
        yield Tile(title, show(metric["int8"]), f"float {show(metric.get('float'))}", against)
    if is_number(accuracy.get("agreement")):
        against = f"baseline {tables.percent(before['agreement'])}" if is_number(before.get("agreement")) else ""
        samples = text(accuracy.get("samples"))
        yield Tile("Same top-1 class as float", tables.percent(accuracy["agreement"]), f"of {samples} samples", against)
    if is_number(accuracy.get("sqnr_db")):
        against = f"baseline {tables.db(before['sqnr_db'])}" if is_number(before.get("sqnr_db")) else ""
        yield Tile("SQNR of the output", tables.db(accuracy["sqnr_db"]), "signal to quantization noise", against)
    yield from _speed_tile(results, base)
    disk, disk_before = section(section(results, "benchmark"), "size"), section(section(base, "benchmark"), "size")
    if is_number(disk.get("int8_bytes")):
        against = f"baseline {tables.size(disk_before['int8_bytes'])}" if disk_before.get("int8_bytes") else ""
        share = f"{number(disk.get('ratio'), 3)} of float's {tables.size(disk.get('float_bytes'))}"
        yield Tile("Size on disk", tables.size(disk["int8_bytes"]), share, against)
    proof, proof_before = section(results, "int8_proof"), section(base, "int8_proof")
    if is_number(proof.get("coverage")):
        against = (
            f"baseline {tables.percent(proof_before['coverage'])}" if is_number(proof_before.get("coverage")) else ""
        )
        counted = f"{text(proof.get('int8_layers'))} of {text(proof.get('core_layers'))} layers with weights"
        yield Tile("In int8", tables.percent(proof["coverage"]), counted, against)


def _speed_tile(results: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Tile]:
    configs = items(section(results, "benchmark"), "configs")
    if not configs or not is_number(configs[0].get("speedup")):
        return
    first = configs[0]
    before = next(
        (c for c in items(section(base, "benchmark"), "configs") if c.get("batch_size") == first.get("batch_size")), {}
    )
    milliseconds = [section(first, name).get("median_ms") for name in ("float", "int8")]
    against = tables.ms(section(before, "int8").get("median_ms"))
    yield Tile(
        "Faster than float",
        f"{number(first['speedup'], 3)}x",
        f"{tables.ms(milliseconds[1])}, float {tables.ms(milliseconds[0])}, batch {text(first.get('batch_size'))}",
        f"baseline {against}" if against != MISSING else "",
    )


def _latencies(results: Mapping[str, Any]) -> list[tuple[str, list[Bars]]]:
    """Per batch size: float, the baseline's int8 and this int8, on one scale."""
    before = {
        c.get("batch_size"): c
        for c in items(section(section(results, "baseline"), "benchmark"), "configs")
        if isinstance(c.get("batch_size"), int)
    }
    groups = []
    for config in items(section(results, "benchmark"), "configs")[:NAMED]:
        size = config.get("batch_size")
        timings = [("float", section(config, "float"), "float")]
        if isinstance(size, int) and size in before:
            timings.append(("baseline, int8", section(before[size], "int8"), "base"))
        timings.append(("int8", section(config, "int8"), "int8"))
        shown = [(name, t["median_ms"], t, tint) for name, t, tint in timings if _is_finite(t.get("median_ms"))]
        if shown:
            groups.append(
                (f"Batch {text(size)}", _bars([(n, ms, tables.latency(t), tint) for n, ms, t, tint in shown]))
            )
    return groups


# --- did int8 run


def _proof(results: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What was checked, each with whether it speaks for int8."""
    proof, warm = section(results, "int8_proof"), section(results, "warmup")
    said = []
    if proof:
        run, planned = proof.get("int8_layers_run"), proof.get("int8_layers")
        counted = f"{text(run)} layers were counted running in int8 in the compiled model"
        said.append((bool(run) and run == planned, f"{counted}; {text(planned)} planned."))
        if proof.get("output_differs") is not None:
            differs = bool(proof["output_differs"])
            said.append((differs, f"The int8 output {'differs from' if differs else 'IS IDENTICAL to'} float's."))
    if is_number(warm.get("layers_checked")):
        apart = text(warm.get("one_code_differences"))
        compared = (
            f"{warm['layers_checked']} int8 operations were compared with the exact integer reference, code by code"
        )
        said.append((True, f"{compared}. One code apart, next to a rounding tie: {apart}; further apart: none."))
    return said


def _coverage(results: Mapping[str, Any]) -> list[Bars]:
    rows = items(results, "plan")
    int8 = sum(row.get("precision") == "int8" for row in rows)
    if not rows:
        return []
    parts = [("int8", int8, "int8"), ("float", len(rows) - int8, "float")]
    return [
        Bars(f"{count} of {len(rows)} layers in {name}", "", 100 * count / len(rows), tint)
        for name, count, tint in parts
        if count
    ]


def _float_groups(results: Mapping[str, Any], most: int) -> list[FloatGroup]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in items(results, "plan"):
        if row.get("precision") != "int8":
            groups.setdefault(text(row.get("reason")), []).append(row)
    found = []
    for reason, rows in sorted(groups.items(), key=lambda group: -len(group[1])):
        counts: dict[str, int] = {}
        for row in rows:
            counts[text(row.get("op"))] = counts.get(text(row.get("op")), 0) + 1
        ops = ", ".join(f"{count} {op}" for op, count in sorted(counts.items(), key=lambda pair: -pair[1]))
        names = tuple(shortened(text(row.get("name"))) for row in rows[:most])
        found.append(FloatGroup(shortened(reason, 400), shortened(ops, 300), names, len(rows) - len(names)))
    return found[:most]


def _picture(results: Mapping[str, Any], layers: Sequence[Layer], most: int) -> Picture | None:
    known = {layer.name: layer for layer in layers}
    own = {name: layer.own_sqnr_db for name, layer in known.items()}
    taken = {name: layer.ms for name, layer in known.items()}
    return picture_of(section(results, "graph"), own, taken, most)


# --- which layers cost accuracy


def _layers(results: Mapping[str, Any]) -> list[Layer]:
    """Every layer of the plan in its order, then kernels that belong to none of them (quantize, copies)."""
    errors = {text(row.get("name")): row for row in items(section(results, "accuracy"), "per_layer")}
    times: dict[str, list[Mapping[str, Any]]] = {}
    for row in items(section(results, "benchmark"), "per_layer"):
        times.setdefault(text(row.get("name")), []).append(row)
    layers = []
    for row in items(results, "plan"):
        name = text(row.get("name"))
        error, taken = errors.pop(name, {}), times.pop(name, [])
        kernel = ", ".join(dict.fromkeys(text(t.get("kernel")) for t in taken)) or text(row.get("kernel"))
        layers.append(
            Layer(
                name, text(row.get("op")), text(row.get("precision")), kernel, text(row.get("reason")),
                error.get("sqnr_db"), error.get("own_sqnr_db"), error.get("max_error"), _sum(taken),
            )
        )  # fmt: skip
    for name in dict.fromkeys((*errors, *times)):
        error, taken = errors.get(name, {}), times.get(name, [])
        first = taken[0] if taken else {}
        layers.append(
            Layer(
                name, text(first.get("op")), "between", text(first.get("kernel")), MISSING,
                error.get("sqnr_db"), error.get("own_sqnr_db"), error.get("max_error"), _sum(taken),
            )
        )  # fmt: skip
    return layers


def _sum(taken: Sequence[Mapping[str, Any]]) -> float | None:
    found = [row["ms"] for row in taken if _is_finite(row.get("ms"))]
    return sum(found) if found else None


@dataclass(frozen=True)
class ErrorChart:
    """Two lines over the layers in execution order, on one scale of decibels."""

    own: Line
    together: Line
    low: str
    high: str
    layers: int


def _error_chart(layers: Sequence[Layer]) -> ErrorChart | None:
    rows = [layer for layer in layers if is_number(layer.sqnr_db) or is_number(layer.own_sqnr_db)][:MOST_ROWS]
    finite = [v for layer in rows for v in (layer.sqnr_db, layer.own_sqnr_db) if _is_finite(v)]
    if len(rows) < 2 or not finite:
        return None
    low = math.floor(max(-BEYOND_DB, min(finite)) / 10) * 10
    high = max(math.ceil(min(BEYOND_DB, max(finite)) / 10) * 10, low + 10)
    return ErrorChart(
        line_through([layer.own_sqnr_db for layer in rows], low, high),
        line_through([layer.sqnr_db for layer in rows], low, high),
        f"{number(low)} dB",
        f"{number(high)} dB" + (" or more" if max(finite) > high else ""),
        len(rows),
    )


def _worst(layers: Sequence[Layer]) -> list[tuple[str, list[Bars]]]:
    """The worst layers by their own error, and with the errors before them; bars of noise / signal = 10^(-dB / 20)."""
    lists = []
    for title, figures in (
        ("Worst alone", [(layer.own_sqnr_db, layer) for layer in layers]),
        ("Worst together", [(layer.sqnr_db, layer) for layer in layers]),
    ):
        rows = sorted(((db, layer) for db, layer in figures if _is_finite(db)), key=lambda row: row[0])[:LISTED]
        bars = [
            (layer.name, 10 ** (-max(-200.0, min(200.0, db)) / 20), tables.db(db), layer.precision)
            for db, layer in rows
        ]
        if bars:
            lists.append((title, _bars(bars)))
    return lists


def _histograms(results: Mapping[str, Any]) -> list[tuple[str, list[Histogram]]]:
    groups = []
    for entry in items(section(results, "accuracy"), "histograms")[:LISTED]:
        parts = (("input", "Input"), ("weight", "Weight"), ("output", "Output"))
        shown = [h for key, title in parts if (h := histogram_of(section(entry, key), title)) is not None]
        if shown:
            groups.append((shortened(text(entry.get("name"))), shown))
    return groups


# --- which layers cost time


def _time_by_op(results: Mapping[str, Any]) -> list[Bars]:
    totals: dict[str, float] = {}
    for row in items(section(results, "benchmark"), "per_layer"):
        if _is_finite(row.get("ms")):
            op = shortened(text(row.get("op")).partition(".")[0], 40)
            totals[op] = totals.get(op, 0.0) + row["ms"]
    ordered = sorted(totals.items(), key=lambda pair: -pair[1])
    whole = sum(totals.values()) or 1.0
    return _bars([(op, ms, f"{ms:.3f} ms, {ms / whole:.1%}", "int8") for op, ms in ordered[:LISTED]])


def _slowest(layers: Sequence[Layer]) -> list[Bars]:
    rows = sorted((layer for layer in layers if _is_finite(layer.ms)), key=lambda layer: -layer.ms)
    whole = sum(layer.ms for layer in rows) or 1.0
    return _bars([(row.name, row.ms, f"{row.ms:.3f} ms, {row.ms / whole:.1%}", row.precision) for row in rows[:LISTED]])


def _time_note(results: Mapping[str, Any]) -> str:
    benchmark = section(results, "benchmark")
    configs = items(benchmark, "configs")
    if not configs:
        return ""
    taken = tables.layer_times(results).caption
    return f"Batch {text(configs[0].get('batch_size'))}, {text(benchmark.get('threads'))} threads; {taken}."


# --- all layers


def _layer_table(layers: Sequence[Layer], most: int) -> DataTable:
    columns = (
        Column("#", is_number=True, is_extra=True),
        Column("Layer"),
        Column("Runs in", is_whole=True),
        Column("Op", is_extra=True),
        Column("SQNR alone, dB", is_number=True),
        Column("SQNR, dB", is_number=True),
        Column("Max error", is_number=True, is_extra=True),
        Column("Time, ms", is_number=True, first="descending"),
        Column("Kernel", is_extra=True),
        Column("Reason", is_extra=True),
    )
    rows = []
    for index, layer in enumerate(layers[:most]):
        tone = layer.precision if layer.precision in ("int8", "float") else "other"
        rows.append(
            Row(
                (
                    number_cell(index + 1, str(index + 1)),
                    Cell(shortened(layer.name)),
                    Cell(shortened(layer.precision, 20), tone=tone),
                    Cell(shortened(layer.op, 60)),
                    number_cell(layer.own_sqnr_db, _bare_db(layer.own_sqnr_db)),
                    number_cell(layer.sqnr_db, _bare_db(layer.sqnr_db)),
                    number_cell(layer.max_error, number(layer.max_error)),
                    number_cell(layer.ms, MISSING if layer.ms is None else f"{layer.ms:.4f}"),
                    Cell(shortened(layer.kernel, 80)),
                    Cell(shortened(layer.reason)),
                ),
                id=f"layer-{index}",
                kind=layer.precision if layer.precision in ("int8", "float") else "between",
            )
        )
    kinds = tuple(kind for kind in ("int8", "float", "between") if any(row.kind == kind for row in rows))
    left = len(layers) - len(rows)
    note = f"{left} more layers are in results.json." if left else ""
    return DataTable(
        "layers-table", "All layers, in execution order", columns, tuple(rows), header_column=1, is_sortable=True,
        is_filterable=True, kinds=kinds, kinds_title="Runs in", note=note,
    )  # fmt: skip


# --- what was run


def _settings(results: Mapping[str, Any]) -> tables.Table:
    """The settings with a row for each part of the data; lists of samples are counted."""
    table = tables.settings(results)
    data = section(results, "data")
    rows: list[tuple[str, ...]] = [row for row in table.rows if row[0] != "data"]
    for key, value in data.items():
        counted = f"{len(value)} names" if isinstance(value, (list, tuple)) else text(value)
        rows.append((f"data: {text(key).replace('_', ' ')}", counted))
    return tables.Table(table.title, ("Setting", "Value"), tuple(rows))


def _stages(results: Mapping[str, Any]) -> list[Bars]:
    rows = [(text(stage.get("name")), stage.get("seconds")) for stage in items(results, "stages")]
    return _bars([(name, s, tables.seconds(s), "other") for name, s in rows if _is_finite(s)][:100])


def _recipe_text(settings: Any) -> str:
    if not isinstance(settings, Mapping) or not settings:
        return ""
    written = yaml.safe_dump(_plain_data(settings), sort_keys=False, allow_unicode=True, width=100)
    return shortened(written, 20_000)


# --- small things


def _plain(id: str, table: tables.Table) -> DataTable:
    return plain_table(
        id,
        table.title,
        [title or "Figure" for title in table.headers],
        table.rows[: 5 * NAMED],
        numbers=table.right,
        note=shortened(table.caption, 400),
    )


def _bars(rows: Sequence[tuple[str, float, str, str]]) -> list[Bars]:
    """(label, value, text, tint) as bars; the largest value is 100 %."""
    most = max((value for _, value, _, _ in rows), default=0.0) or 1.0
    return [
        Bars(
            shortened(label, 80),
            said,
            max(0.0, 100 * value / most),
            tint if tint in ("int8", "float", "base") else "other",
        )
        for label, value, said, tint in rows
    ]


def _bare_db(value: Any) -> str:
    """Under a heading that names the unit."""
    return tables.db(value).removesuffix(" dB")


def _texts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _plain_data(value: Any) -> Any:
    """What YAML's safe writer takes; other things as text."""
    if isinstance(value, Mapping):
        return {text(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else text(value)


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
