"""plan(graph, …) → Plan: what runs in int8, what stays float, and why.

A tensor is held as codes where that pays: where an int8 op reads it, directly or through ops that can work on codes
(the demand), and where its producer can write codes (the supply). Everything else stays float32, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from quantflow.errors import NothingQuantizedError
from quantflow.ir.graph import Graph
from quantflow.ir.ops import MOVING_OPS
from quantflow.ir.plan import FLOAT32, IMPERATIVE, INT8, Plan, PlannedUnit, PlanRow
from quantflow.ir.units import (
    ADD,
    CAT,
    CORE,
    FLOAT,
    MATMUL,
    MUL,
    RECURRENCE,
    SHAPE,
    SIZE,
    Unit,
    find_units,
    fuse_residual,
)
from quantflow.numerics.affine import MAX_REDUCTION
from quantflow.schema import LayerOverride, PolicySettings, QConfig
from quantflow.stages.overrides import Overrides

NO_POLICY = PolicySettings()
#: Int8 units that can write float32 as well as codes.
_WRITING_FLOAT = (CORE, MATMUL, RECURRENCE)
#: With fewer hidden units a recurrent layer takes as long with its steps' weight in int8 as in float32: of 16 to 48
#: units 0.9 to 1.3 times, of 64 to 256 units 0.6 to 1.0 times (native runtime, 64 steps, batches of 1 and 16, two cores
#: of a Xeon with AVX512-VNNI).
LEAST_HIDDEN = 64
#: Units that are int8 by themselves, whatever lies around them.
_BY_THEMSELVES = (CORE, MATMUL, RECURRENCE)


def make_plan(
    graph: Graph,
    qconfig: QConfig,
    layers: Mapping[str, str | LayerOverride] | None = None,
    *,
    mode: str = "export",
    kernel_of: Callable[[PlannedUnit], str] = lambda planned: planned.unit.op,
    reduce_range: bool = False,
    recipe_name: str = "custom",
    left_float: Mapping[str, str] | None = None,
    unreachable: Mapping[str, str] | None = None,
    policy: PolicySettings = NO_POLICY,
) -> Plan:
    """Decide precision, fusion and shared qparams for every unit of the graph.

    Args:
        layers: overrides by exact name, glob or op type.
        mode: "imperative" knows no layers in two terms, and no integer recurrences.
        kernel_of: the runtime's name for the kernel that will run a unit.
        left_float: layers that measurements say must stay float, with the reason; `layers` has precedence.
        unreachable: units that can't be int8 whoever asks for it, with the reason.
        policy: which additions, products, concatenations and matmuls may run in int8.

    Raises:
        RecipeError: an override matches nothing, or asks for int8 where there is no int8 form.
        NothingQuantizedError: no convolution or linear would run in int8.
    """
    units, unreachable = find_units(graph), unreachable or {}
    overrides = Overrides(layers or {}, units, qconfig, recipe_name, policy)
    core = {
        unit: unreachable.get(unit.name, "") or _why_float(unit, graph, overrides, left_float or {})
        for unit in units
        if unit.kind in _BY_THEMSELVES
    }
    unreachable = {**_joins_left_float(units, overrides, left_float or {}), **unreachable}
    units, int8, exact = _chosen(units, core, overrides, unreachable)
    if mode == IMPERATIVE:
        overrides.require_one_term(unit for unit in units if unit in int8 and unit.kind == CORE)
    in_float = {unit.output for unit in int8 if unit.kind in _WRITING_FLOAT and unit.output in exact}
    written = _written(units, int8) - in_float
    if not any(unit.kind == CORE for unit in int8):
        raise NothingQuantizedError(_nothing(core))

    planned = []
    for unit in units:
        reason = _reason(unit, unit in int8, core, overrides, unreachable)
        planned.append(
            PlannedUnit(
                unit, unit in int8, unit.output in written, overrides.qconfig(unit), reason, overrides.without(unit)
            )
        )
    codes, deciding = _share_qparams(planned)
    specs = {root: p.qconfig.activation for root, p in deciding.items()}
    layer_of = {node.name: node.name for node in graph.fx.nodes} | {u.output.name: u.name for u in units}
    rows = tuple(_row(p, codes, layer_of, kernel_of) for p in planned if p.unit.kind not in (SHAPE, SIZE))
    linear = {unit.name for unit in int8 if unit.kind == CORE}
    notes = (*graph.notes, *overrides.without_effect({p.unit.name for p in deciding.values()}, linear))
    return Plan(rows, tuple(planned), codes, specs, reduce_range, notes, frozenset(value.name for value in exact))


def _why_float(unit: Unit, graph: Graph, overrides: Overrides, left_float: Mapping[str, str]) -> str:
    """Why a linear op or matmul stays float; empty if it becomes int8."""
    asked, pattern = overrides.precision(unit)
    if unit.float_reason:
        return unit.float_reason
    if unit.kind == MATMUL and pattern == "policy.matmul" and asked == FLOAT32:
        return 'matmul of two activations is float unless asked for (policy.matmul, or layers: {"matmul": int8})'
    if asked == FLOAT32:
        return f"the recipe says so: {pattern}"
    if asked is None and unit.name in left_float:
        return left_float[unit.name]
    if unit.kind == MATMUL:
        return ""
    weight = graph.constants[str(unit.anchor.args[1].target)]  # type: ignore[union-attr]
    reduction = weight[0].numel()
    if unit.kind == RECURRENCE and asked is None and reduction < LEAST_HIDDEN:
        return f"its {reduction} hidden units are too few to gain from int8 products; at least {LEAST_HIDDEN} do"
    if reduction > MAX_REDUCTION:
        return f"its reduction of {reduction} products could overflow int32; at most {MAX_REDUCTION} are safe"
    return ""


def _joins_left_float(units: Sequence[Unit], overrides: Overrides, left_float: Mapping[str, str]) -> dict[str, str]:
    """Those that measurements say must stay float, unless `layers` asks for int8."""
    joins = (unit for unit in units if unit.kind in (ADD, CAT) and unit.name in left_float)
    asked = {unit.name for unit in units if overrides.precision(unit)[1].startswith("layers.")}
    return {unit.name: left_float[unit.name] for unit in joins if unit.name not in asked}


def _chosen(
    units: Sequence[Unit], core: Mapping[Unit, str], overrides: Overrides, unreachable: Mapping[str, str]
) -> tuple[list[Unit], set[Unit], set[fx.Node]]:
    """The units with residuals fused, those that run on codes, and the values that no codes may stand for alone."""
    rounding: set[Unit] = set()
    while True:
        fused, int8 = _fuse_residuals(units, _spread_int8(units, core, overrides, unreachable, rounding))
        exact = _exact(fused, int8, overrides)
        found = {unit for unit in int8 if unit.output in exact and unit.kind not in (*_WRITING_FLOAT, SHAPE)}
        if not found:
            return fused, int8, exact
        rounding |= found


def _exact(units: Sequence[Unit], int8: set[Unit], overrides: Overrides) -> set[fx.Node]:
    """What layers read in two terms. Data movement on codes moves both terms, so what it reads counts, too."""
    exact: set[fx.Node] = set()
    for unit in reversed(units):
        if unit not in int8:
            continue
        in_two_terms = unit.kind == CORE and overrides.qconfig(unit).input_terms == 2
        if in_two_terms or (unit.kind == SHAPE and unit.output in exact):
            exact.add(unit.inputs[0])
    return exact


def _spread_int8(
    units: Sequence[Unit],
    core: Mapping[Unit, str],
    overrides: Overrides,
    unreachable: Mapping[str, str],
    rounding: set[Unit],
) -> set[Unit]:
    """The units that run on codes: the linear ops, and what lies between them for as long as codes are at hand.

    Args:
        rounding: units whose result may not be rounded to codes.
    """

    def capable(unit: Unit) -> bool:
        if unit in rounding:
            return False
        if unit in core:
            return core[unit] == ""
        if unit.name in unreachable:
            return False
        return unit.kind not in (FLOAT, SIZE) and not unit.float_reason and overrides.precision(unit)[0] != FLOAT32

    int8 = {unit for unit in units if capable(unit)}
    while True:
        written = _written(units, int8)
        kept = {unit for unit in int8 if unit in core or (unit.output in written and _has_codes(unit, written))}
        if kept == int8:
            return int8
        int8 = kept


def _written(units: Sequence[Unit], int8: set[Unit]) -> set[fx.Node]:
    """Values that exist as codes: written by an int8 unit and read by another."""
    read = {value for unit in int8 for value in (*unit.inputs, unit.residual)}
    return {unit.output for unit in units if unit in int8 and unit.kind != RECURRENCE and unit.output in read}


def _has_codes(unit: Unit, written: set[fx.Node]) -> bool:
    if unit.kind in (ADD, MUL, CAT):
        return any(value in written for value in unit.inputs)
    return unit.inputs[0] in written


def _fuse_residuals(units: Sequence[Unit], int8: set[Unit]) -> tuple[list[Unit], set[Unit]]:
    """Merge every int8 `a + b` into the linear op that computes a or b, where nothing else reads that op's output.

    With two candidates (a block with a projection shortcut) the later one takes the sum, so that the other exists.
    """
    producer = {unit.output: unit for unit in units}
    position = {unit.output: index for index, unit in enumerate(units)}
    fused = list(units)
    for unit in units:
        if unit.kind != ADD or unit not in int8 or unit.inputs[0] is unit.inputs[1]:
            continue
        a, b = unit.inputs
        if a.meta["shape"] != b.meta["shape"]:
            continue
        candidates = [
            (producer[x], other)
            for x, other in ((a, b), (b, a))
            if x in producer
            and producer[x] in int8
            and producer[x].kind == CORE
            and producer[x].epilogue is None
            and producer[x].residual is None
            and len(x.users) == 1
        ]
        if not candidates:
            continue
        core, residual = max(candidates, key=lambda pair: position[pair[0].output])
        merged = fuse_residual(unit, core, residual)
        fused.remove(core)
        fused[fused.index(unit)] = merged
        int8 = (int8 - {core, unit}) | {merged}
        producer[merged.output] = merged
    return fused, int8


def _share_qparams(planned: Sequence[PlannedUnit]) -> tuple[dict[str, str], dict[str, PlannedUnit]]:
    """Which values use one scale and zero point, and whose settings measure it.

    These are the settings of the unit that writes the codes, or of the first reader where a float value becomes codes.
    """
    parent: dict[str, str] = {}
    first: dict[str, PlannedUnit] = {}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for p in planned:
        if not p.is_int8:
            continue
        read = [value for value in (*p.unit.inputs, p.unit.residual) if value is not None]
        for value in read:
            parent.setdefault(value.name, value.name)
            first.setdefault(value.name, p)
        if p.writes_codes:
            parent.setdefault(p.unit.output.name, p.unit.output.name)
            first.setdefault(p.unit.output.name, p)
        if p.unit.kind in MOVING_OPS:
            root = find(p.unit.inputs[0].name)
            for other in (*p.unit.inputs[1:], p.unit.output):
                parent[find(other.name)] = root
    codes = {name: find(name) for name in parent}
    return codes, {root: first[root] for root in dict.fromkeys(codes.values())}


def _reason(
    unit: Unit, is_int8: bool, core: Mapping[Unit, str], overrides: Overrides, unreachable: Mapping[str, str]
) -> str:
    if is_int8:
        folded = unit.anchor.meta.get("batch_norm")
        qconfig, is_core = overrides.qconfig(unit), unit.kind == CORE
        phases = unit.anchor.meta.get("transposed")
        named = (
            (f"transposed: {_counted(phases.count, 'phase')}" if phases else "", phases),
            ("BatchNorm folded", folded),
            ("residual added", unit.residual),
            ("state and gates float32", unit.kind == RECURRENCE),
            ("weight in two terms", is_core and qconfig.weight.terms == 2),
            ("input in two terms", is_core and qconfig.input_terms == 2),
        )
        parts = [part for part, there in named if there]
        return ", ".join(parts)
    if core.get(unit):
        return core[unit]
    asked, pattern = overrides.precision(unit)
    if asked == FLOAT32:
        return f"the recipe says so: {pattern}"
    if unit.float_reason:
        return unit.float_reason
    if unit.name in unreachable:
        return unreachable[unit.name]
    return "no int8 op reads its result, or none of its inputs is int8"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _row(
    p: PlannedUnit, codes: Mapping[str, str], layer_of: Mapping[str, str], kernel_of: Callable[[PlannedUnit], str]
) -> PlanRow:
    value = p.unit.output.name
    if not p.is_int8:
        qparams = ""
    elif not p.writes_codes:
        qparams = "float32 out"
    else:
        qparams = "own" if codes[value] == value else f"shared with {layer_of[codes[value]]}"
    return PlanRow(
        name=p.unit.name,
        op=p.unit.layer_type,
        precision=INT8 if p.is_int8 or p.unit.is_int8_table else FLOAT32,
        group=p.unit.layers,
        kernel=kernel_of(p) if p.is_int8 or p.unit.kind == RECURRENCE else _float_kernel(p.unit),
        qparams=qparams,
        reason=p.reason,
    )


def _float_kernel(unit: Unit) -> str:
    return unit.op if "::" in unit.op else f"aten.{unit.op}"


def _nothing(core: Mapping[Unit, str]) -> str:
    if not core:
        return "the model has no convolution and no linear layer, so nothing can be quantized"
    named = "; ".join(f"{unit.name}: {reason}" for unit, reason in list(core.items())[:5])
    return f"no layer would run in int8: {named}; relax `layers` or choose another mode"
