"""compare(baseline, candidate): what became worse from one artifact to another, and in which layer.

Read from the artifacts alone: the results that their runs measured, and the programs themselves. Nothing is executed,
so code that a recipe names is neither needed nor touched. Speed is compared as the ratio to the float model that was
timed in turn with int8, which holds across machines; `task=benchmark` and `task=evaluate` measure again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from quantflow.errors import UsageError
from quantflow.host.environment import environment
from quantflow.ir.ops import LINEAR_OPS
from quantflow.ir.program import Node, Program
from quantflow.numerics.measures import sqnr_db
from quantflow.schema import CompareSettings, Recipe
from quantflow.stages.gates import GateResult, hold, verdict
from quantflow.stages.record import Record, weights_bytes

#: Sections of a recipe that leave the program's numbers as they are.
_WITHOUT_NUMBERS = {
    *("name", "description", "task", "artifact", "baseline", "candidate", "output"),
    *("runtime", "device", "calibrate", "warmup", "evaluate", "benchmark", "gates", "compare", "report"),
}
#: Above this a layer is exact for every purpose; it keeps the difference of infinite ratios finite.
_EXACT_DB = 100.0
#: As many names as a gate's sentence holds.
_NAMED = 5
_BORDERS = ("quantize", "dequantize")
_FLOAT = ("aten", "size")


@dataclass(frozen=True)
class _Side:
    """One artifact, with what is known of each layer by its name."""

    place: str
    record: Record
    recipe: Recipe
    nodes: dict[str, Node]
    rows: dict[str, Mapping[str, Any]]
    sqnr_db: dict[str, float]
    ms: dict[str, float]

    @classmethod
    def of(cls, place: str, record: Record) -> _Side:
        results = record.results
        return cls(
            place,
            record,
            Recipe.from_dict(record.recipe),
            _by_name(record.program),
            _rows(record.plan["rows"]),
            _figures(_at(results, "accuracy", "per_layer"), "sqnr_db"),
            _figures(_at(results, "benchmark", "per_layer"), "ms"),
        )

    def names(self) -> list[str]:
        """The program's layers in the order of execution, then those that only the plan knows."""
        return [*self.nodes, *(name for name, row in self.rows.items() if row.get("name") == name)]

    def precision(self, name: str) -> str | None:
        """int8, float, or None for a layer that is not there. Fused into another layer, it is what that one is."""
        if (node := self.nodes.get(name)) is not None and node.op not in _BORDERS:
            return "float" if node.op in _FLOAT else "int8"
        return str(self.rows[name].get("precision")) if name in self.rows else None

    def facts(self, name: str) -> dict[str, Any] | None:
        """The layer as this side has it."""
        node, precision = self.nodes.get(name), self.precision(name)
        if node is None and precision is None:
            return None
        value = self.record.program.values.get(node.output) if node is not None else None
        qparams = value.qparams if value is not None else None
        return {
            "op": node.fused_name if node is not None else self.rows[name].get("op"),
            "precision": precision,
            "dtype": qparams.dtype if qparams else None,
            "scale": qparams.scale if qparams else None,
            "zero_point": qparams.zero_point if qparams else None,
            "sqnr_db": self.sqnr_db.get(name),
            "ms": self.ms.get(name),
        }


@dataclass(frozen=True)
class _Pair:
    """Both sides, their layers, and what is different where it should be the same."""

    old: _Side
    new: _Side
    layers: list[dict[str, Any]]
    differences: list[str]
    unlike: list[str]


def compare(
    baseline: Record, candidate: Record, settings: CompareSettings, places: tuple[str, str] = ("baseline", "candidate")
) -> dict[str, Any]:
    """The candidate held against the baseline.

    Args:
        places: where the two artifacts lie, for messages.

    Returns:
        JSON-ready: recipe, baseline and candidate (which artifacts), figures, layers in the order of execution,
        notices, gates and verdict, the last three as in a run's results.

    Raises:
        UsageError: they come from different models or data, and `settings.allow_different` does not say so.
        RecipeError: the recipe of one of them is not one that this quantflow reads.
    """
    old, new = (_Side.of(place, record) for place, record in zip(places, (baseline, candidate), strict=True))
    if (problems := _differences(old, new)) and not settings.allow_different:
        raise UsageError(
            f"compare: '{new.place}' can't be held against '{old.place}': {'; '.join(problems)}. Compare runs of one "
            "model on the same samples, or say compare.allow_different=true"
        )
    pair = _Pair(old, new, _layers(old, new), problems, problems or _unlike_settings(old, new))
    gates, notices = _judge(settings, pair)
    return {
        "format": 1,
        "recipe": {"name": new.recipe.name, "hash": new.recipe.hash()},
        "environment": environment(),
        "baseline": _identity(old),
        "candidate": _identity(new),
        "figures": list(_figures_of(old, new)),
        "layers": pair.layers,
        "notices": [*_notices(old, new, pair.unlike), *notices],
        "gates": [vars(gate) for gate in gates],
        "verdict": verdict(gates),
    }


def _identity(side: _Side) -> dict[str, Any]:
    return {"place": side.place, "recipe": side.recipe.name, "hash": side.recipe.hash()} | {
        key: side.record.results.get(key) for key in ("environment", "verdict")
    }


# --- may they be compared?


def _differences(old: _Side, new: _Side) -> list[str]:
    """What is not the same model or the same evaluation data."""
    found = []
    for key in ("name", "weights_used", "parameters"):
        a, b = _at(old.record.results, "model", key), _at(new.record.results, "model", key)
        if a != b:
            found.append(f"model.{key}: {b!r} against {a!r}")
    inputs = [[(i.keyword, i.dtype, i.shape) for i in side.record.program.inputs] for side in (old, new)]
    if inputs[0] != inputs[1]:
        found.append("the models take different inputs")
    data = [_at(side.record.results, "data") for side in (old, new)]
    if _samples(data[0], "evaluation") != _samples(data[1], "evaluation"):
        found.append("data: they were evaluated on different samples")
    elif _samples(data[0], "calibration") == _samples(data[1], "calibration") and data[0] != data[1]:
        found.append("data: the samples have the same names and different content")
    return found


def _samples(data: Any, part: str) -> tuple[Any, ...]:
    return _at(data, "kind"), _at(data, f"{part}_samples"), _at(data, f"{part}_ids")


def _unlike_settings(old: _Side, new: _Side) -> list[str]:
    """Sections of the recipes that differ and can change the program's numbers."""
    a, b = old.recipe.to_dict(), new.recipe.to_dict()
    unlike = [section for section in a if section not in _WITHOUT_NUMBERS and a[section] != b[section]]
    same_data = _at(old.record.results, "data") == _at(new.record.results, "data")
    return unlike + ([] if same_data or "data" in unlike else ["data"])


def _notices(old: _Side, new: _Side, unlike: list[str]) -> Iterator[str]:
    if unlike:
        yield f"the recipes ask for different numbers ({'; '.join(unlike)}): ranges and weights may differ"
    machines = [
        {key: _at(side.record.results, "environment", key) for key in ("cpu", "cores", "threads", "torch")}
        for side in (old, new)
    ]
    if other := [key for key in machines[0] if machines[0][key] != machines[1][key]]:
        yield f"they were timed on different machines or versions ({', '.join(other)}): speed is the ratio to float"
    for side in (old, new):
        if side.record.results.get("verdict") == "failed":
            yield f"'{side.place}' failed its own gates"


# --- layers


def _layers(old: _Side, new: _Side) -> list[dict[str, Any]]:
    rows = [_layer(name, old, new) for name in dict.fromkeys([*old.names(), *new.names()])]
    return [row for row in rows if row["baseline"] is not None and (row["candidate"] is not None or row["is_lost"])]


def _layer(name: str, old: _Side, new: _Side) -> dict[str, Any]:
    a, b = old.facts(name), new.facts(name)
    weight, scale_ratio = _weight_change(old, new, name)
    is_lost = old.precision(name) == "int8" and new.precision(name) != "int8"
    return {
        "name": name,
        "baseline": a,
        "candidate": b,
        "is_lost": is_lost,
        "reason": str(new.rows[name].get("reason", "")) if is_lost and name in new.rows else "",
        "sqnr_drop_db": _drop_db(old.sqnr_db.get(name), new.sqnr_db.get(name)),
        "range_change": _range_change(old, new, name),
        "weight_sqnr_db": weight,
        "weight_scale_ratio": scale_ratio,
        "slowdown": _ratio(new.ms.get(name), old.ms.get(name)),
        "exceeds": [],
    }


def _range_change(old: _Side, new: _Side, name: str) -> float | None:
    """How far the ends of the output's range moved, as a share of the baseline's range; None where it has no codes."""
    ranges = []
    for side in (old, new):
        node = side.nodes.get(name)
        value = side.record.program.values.get(node.output) if node is not None else None
        if value is None or value.qparams is None:
            return None
        q = value.qparams
        ranges.append([(end - q.zero_point) * q.scale for end in q.range])
    (low, high), moved = ranges
    return max(abs(moved[0] - low), abs(moved[1] - high)) / (high - low)


def _weight_change(old: _Side, new: _Side, name: str) -> tuple[float | None, float | None]:
    """SQNR of the candidate's weights and bias against the baseline's (the worse), and the largest ratio of scales."""
    tensors = []
    for side in (old, new):
        node = side.nodes.get(name)
        if node is None or node.op not in LINEAR_OPS:
            return None, None
        tensors.append([_tensor(side, node, role) for role in ("weight", "weight_scale", "bias")])
    (weight, scale, bias), (new_weight, new_scale, new_bias) = tensors
    assert weight is not None
    assert new_weight is not None
    assert scale is not None
    assert new_scale is not None
    if weight.shape != new_weight.shape or (bias is None) != (new_bias is None):
        return -math.inf, None
    changes = [sqnr_db(_real(weight, scale), _real(new_weight, new_scale))]
    if bias is not None and new_bias is not None:
        changes.append(sqnr_db(bias, new_bias))
    ratios = new_scale.double() / scale.double()  # one of them may be per tensor
    return min(changes), float(ratios[ratios.log().abs().argmax()])


def _tensor(side: _Side, node: Node, role: str) -> torch.Tensor | None:
    name = node.attrs[role]
    return None if name is None else side.record.program.tensors[name]


def _real(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.double() * scale.double().reshape(-1, *[1] * (weight.dim() - 1))


def _drop_db(before: float | None, after: float | None) -> float | None:
    """How much of a ratio in dB is lost; infinite where the candidate's is not a number."""
    if before is None or after is None or math.isnan(before):
        return None
    return math.inf if math.isnan(after) else min(before, _EXACT_DB) - min(after, _EXACT_DB)


# --- figures


def _figures_of(old: _Side, new: _Side) -> Iterator[dict[str, Any]]:
    """Everything that two runs measured, side by side."""
    a, b = old.record.results, new.record.results

    def row(name: str, unit: str, *path: str) -> dict[str, Any]:
        return {"name": name, "unit": unit, "baseline": _number(a, *path), "candidate": _number(b, *path)}

    metric = _at(b, "accuracy", "metric", "name") or "metric"
    yield row("sqnr", "dB", "accuracy", "sqnr_db")
    yield row(str(metric), "", "accuracy", "metric", "int8")
    yield row("agreement", "", "accuracy", "agreement")
    for size, before, after in _configs(old, new):
        for name, unit, path in (("float latency", "ms", "float"), ("int8 latency", "ms", "int8")):
            figures = (_number(before, path, "median_ms"), _number(after, path, "median_ms"))
            named = {"name": f"{name}, batch {size}", "unit": unit}
            yield named | dict(zip(("baseline", "candidate"), figures, strict=True))
        speedups = (_number(before, "speedup"), _number(after, "speedup"))
        named = {"name": f"speedup, batch {size}", "unit": "x"}
        yield named | dict(zip(("baseline", "candidate"), speedups, strict=True))
    sizes = [float(len(weights_bytes(side.record.program))) for side in (old, new)]
    yield {"name": "size", "unit": "bytes", "baseline": sizes[0], "candidate": sizes[1]}
    yield row("coverage", "", "int8_proof", "coverage")
    yield row("int8 layers", "", "int8_proof", "int8_layers_run")


def _configs(old: _Side, new: _Side) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any]]]:
    """Batch sizes that both were timed at."""
    tables = []
    for side in (old, new):
        configs = _at(side.record.results, "benchmark", "configs")
        found = [c for c in configs if isinstance(c, Mapping)] if isinstance(configs, list) else []
        tables.append({config.get("batch_size"): config for config in found})
    for size, config in tables[0].items():
        if size in tables[1]:
            yield size, config, tables[1][size]


# --- gates


class _Missing(Exception):
    """The baseline has the figure and the candidate has not."""


class _NotJudged(Exception):
    """There is nothing to hold against: why."""


@dataclass(frozen=True)
class _FigureGate:
    """A figure of the whole model: (value, what it belongs to)."""

    unit: str
    figure: Callable[[_Pair], tuple[float, str]]


@dataclass(frozen=True)
class _LayerGate:
    """A figure that every layer has; `needs_same` where the recipes must ask for the same numbers."""

    key: str
    unit: str
    is_minimum: bool = False
    needs_same: bool = False


def _judge(settings: CompareSettings, pair: _Pair) -> tuple[list[GateResult], list[str]]:
    """Every gate that has a limit, in the order of `GATES`, and why some could not be judged; marks the layers."""
    results, notices = [], []
    for name, gate in GATES.items():
        limit = getattr(settings, name)
        if limit is None:
            continue
        try:
            if isinstance(gate, _LayerGate):
                results.append(_judge_layers(name, limit, gate, pair))
            else:
                value, where = gate.figure(pair)
                results.append(hold(name, limit, value, is_minimum=False, unit=gate.unit, where=where))
        except _Missing as missing:
            results.append(GateResult(name, limit, None, False, f"not measured: {missing}"))
        except _NotJudged as reason:
            notices.append(f"{name} was not judged: {reason}")
    return results, notices


def _judge_layers(name: str, limit: float, gate: _LayerGate, pair: _Pair) -> GateResult:
    """The worst layer decides; those beyond the limit are named in the order of execution."""
    if gate.needs_same and pair.unlike:
        raise _NotJudged("the recipes ask for different numbers")
    rows = [row for row in pair.layers if row[gate.key] is not None]
    if not rows:
        raise _NotJudged("no layer has this figure in both")
    exceeding = [
        row for row in rows if not hold(name, limit, row[gate.key], is_minimum=gate.is_minimum, unit="").passed
    ]
    for row in exceeding:
        row["exceeds"].append(name)
    worst = (min if gate.is_minimum else max)(rows, key=lambda row: float(row[gate.key]))
    if any(math.isnan(row[gate.key]) for row in rows):
        worst = next(row for row in rows if math.isnan(row[gate.key]))
    where = f"worst {worst['name']}"
    if exceeding:
        where = f"first {exceeding[0]['name']}, worst {worst['name']}, {len(exceeding)} in all"
    return hold(name, limit, float(worst[gate.key]), is_minimum=gate.is_minimum, unit=gate.unit, where=where)


def _drop(*path: str, cure: str) -> Callable[[_Pair], tuple[float, str]]:
    """baseline - candidate of a figure in the results."""

    def figure(pair: _Pair) -> tuple[float, str]:
        before, after = _both(pair, *path, cure=cure)
        return before - after if before != after else 0.0, f"{after:.4g} after {before:.4g}"

    return figure


def _sqnr_drop(pair: _Pair) -> tuple[float, str]:
    before, after = _both(pair, "accuracy", "sqnr_db", cure="set evaluate.enabled=true")
    drop = _drop_db(before, after)
    return math.nan if drop is None else drop, f"{after:.4g} dB after {before:.4g} dB"


def _lost_layers(pair: _Pair) -> tuple[float, str]:
    """Layers in int8 before that are float now, or gone."""
    if pair.differences:
        raise _NotJudged("the models or data are different ones")
    lost = [row for row in pair.layers if row["is_lost"]]
    for row in lost:
        row["exceeds"].append("max_lost_layers")
    names = [f"{row['name']} ({row['reason']})" if row["reason"] else str(row["name"]) for row in lost]
    return float(len(lost)), ", ".join(names[:_NAMED]) + (f", {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")


def _size_growth(pair: _Pair) -> tuple[float, str]:
    before, after = (len(weights_bytes(side.record.program)) for side in (pair.old, pair.new))
    return after / before, f"{after} bytes after {before}"


def _slowdown(pair: _Pair) -> tuple[float, str]:
    """How much slower at least: lower quartile of the baseline's speedups / upper quartile of the candidate's.

    A round's speedup is float's time / int8's time within it. The quartiles take what the timings scatter out of the
    verdict; the worst batch size counts.
    """
    slowdowns = []
    for size, before, after in _configs(pair.old, pair.new):
        a, b = _speedups(before), _speedups(after)
        if a and b:
            slowdowns.append((_quartiles(a)[0] / _quartiles(b)[2], f"batch {size}, beyond the spread of the rounds"))
    if not slowdowns:
        measured = [bool(_at(side.record.results, "benchmark", "configs")) for side in (pair.old, pair.new)]
        if measured == [True, False]:
            raise _Missing("the candidate's benchmark did not run; set benchmark.enabled=true")
        raise _NotJudged("the two were not timed at a common batch size; set benchmark.enabled=true")
    return max(slowdowns)


def _speedups(config: Mapping[str, Any]) -> list[float]:
    rounds = [_at(config, name, "rounds") for name in ("float", "int8")]
    if not all(isinstance(each, list) and each and all(_is_positive(x) for x in each) for each in rounds):
        return []
    return [a / b for a, b in zip(*rounds, strict=False)]


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def _both(pair: _Pair, *path: str, cure: str) -> tuple[float, float]:
    before, after = (_number(side.record.results, *path) for side in (pair.old, pair.new))
    if before is None:
        raise _NotJudged(f"the baseline has no such figure; {cure}")
    if after is None:
        raise _Missing(f"the baseline has the figure, the candidate has not; {cure}")
    return before, after


_LABELS = "use data with labels"

#: Gate's name, as in `compare` of a recipe → how it is judged.
GATES: dict[str, _FigureGate | _LayerGate] = {
    "max_sqnr_drop_db": _FigureGate(" dB", _sqnr_drop),
    "max_accuracy_drop": _FigureGate("", _drop("accuracy", "metric", "int8", cure=_LABELS)),
    "max_agreement_drop": _FigureGate("", _drop("accuracy", "agreement", cure="set evaluate.enabled=true")),
    "max_coverage_drop": _FigureGate("", _drop("int8_proof", "coverage", cure="use task=run")),
    "max_lost_layers": _FigureGate("", _lost_layers),
    "max_layer_sqnr_drop_db": _LayerGate("sqnr_drop_db", " dB"),
    "max_range_change": _LayerGate("range_change", " of the range", needs_same=True),
    "min_weight_sqnr_db": _LayerGate("weight_sqnr_db", " dB", is_minimum=True, needs_same=True),
    "max_size_growth": _FigureGate("x", _size_growth),
    "max_slowdown": _FigureGate("x", _slowdown),
    "max_layer_slowdown": _LayerGate("slowdown", "x"),
}


# --- an artifact's JSON may hold anything


def _by_name(program: Program) -> dict[str, Node]:
    """Layer → node; a layer that is called again becomes NAME#2."""
    nodes: dict[str, Node] = {}
    for node in program.nodes:
        name, count = node.name, 1
        while name in nodes:
            count += 1
            name = f"{node.name}#{count}"
        nodes[name] = node
    return nodes


def _rows(rows: list[Any]) -> dict[str, Mapping[str, Any]]:
    """Layer → the plan's row, under the names of the layers that it fuses, too."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in (row for row in rows if isinstance(row, Mapping)):
        group = row.get("group")
        for name in [row.get("name"), *(group if isinstance(group, list) else [])]:
            found.setdefault(str(name), row)
    return found


def _figures(rows: Any, key: str) -> dict[str, float]:
    if not isinstance(rows, list):
        return {}
    found = ((str(row.get("name")), _number(row, key)) for row in rows if isinstance(row, Mapping))
    return {name: value for name, value in found if value is not None}


def _at(data: Any, *path: str) -> Any:
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _number(data: Any, *path: str) -> float | None:
    value = _at(data, *path)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None and b > 0 else None


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
