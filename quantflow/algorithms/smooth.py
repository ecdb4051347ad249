"""SmoothQuant: the outliers of a linear op's input move into its weight (Xiao et al. 2022, arXiv:2211.10438).

    y = x W^T = (x / s) (W s)^T,   s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)    or    s_j = max(max|x_j|, phi max|x|)

with j the input channels, shared by all linears that read x. The activation has one scale for all channels and the
weight one per row, so that a channel of x that is far larger than the others costs all of them their codes. For each
group of linears that read one value, alpha or phi is the one of a grid with the smallest error of what it computes,

    e(s) = sum_i |Q(x / s) Q(W_i s)^T - x W_i^T|^2 / |x W_i^T|^2

on a sample of rows of x; no smoothing is one of the candidates. phi only lowers what is far larger than the rest and
leaves the rest of the weight's columns as they are.

alpha makes the whole range of each channel depend on the rows that were seen: of n rows' values, the next one is
larger than all with probability 1 / (n + 1). It is therefore left out where one clipped channel or more per row would
have to be expected, channels > n.

1 / s is folded into what makes x, where that can take it up: the weight and bias of a LayerNorm or RMSNorm, the rows of
a linear that reaches x through ops that treat channels alike (data movement, ReLU, the probabilities' side of an
attention, the other operand of a gate). Elsewhere x is multiplied by 1 / s at run time, where that gains enough.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from quantflow.algorithms.outcome import Change, Material, Outcome, Rewriting, db
from quantflow.ir.activations import HOMOGENEOUS
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, arguments, copied, interpret, is_aten
from quantflow.ir.ops import SHAPES
from quantflow.ir.passes.normalize import add_constant
from quantflow.ir.plan import Plan
from quantflow.ir.units import CORE
from quantflow.numerics.affine import activation_qparams, dequantize_weight, quantize_weight, weight_scale
from quantflow.numerics.observers import make_observer, weight_max_abs
from quantflow.schema import ActivationSpec, SmoothAlgorithm, WeightSpec

aten = torch.ops.aten

MEASURE = "SQNR of the linears' outputs, dB"
#: Rows of x that errors are measured on: this many numbers or the fewest rows, and at most the settings' rows.
ROW_NUMBERS = 2**19
FEWEST_ROWS = 128
#: The first grids: of alpha, and of -log2(phi).
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
OCTAVES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
#: A channel counts as at least this share of the largest one; zero channels of x and W would give s = 0 or infinity.
SMALLEST_SHARE = 1e-5
#: What an attention does to V's channels is the same for every key.
_ATTENTIONS = ("matmul", "bmm", "scaled_dot_product_attention")
#: A channel index in padding: zeros may belong to any channel.
_ANY = -1
_NO_SOURCE = "nothing in front of it can take up the factors"


@dataclass
class _Group:
    """The int8 linears that read one value.

    Attributes:
        x: the value.
        linears: its readers.
        low, high: extremes of each channel over all rows seen.
        seen: how many these were.
        rows: a sample of x, (rows, channels).
    """

    x: fx.Node
    linears: list[fx.Node]
    activation: ActivationSpec
    weights: list[WeightSpec]
    reduce_range: bool
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    seen: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        first = str(self.linears[0].meta["layer"])
        return first if len(self.linears) == 1 else f"{first} and {len(self.linears) - 1} more"

    def observe(self, x: torch.Tensor, count: int, generator: torch.Generator) -> None:
        """Take in one batch's value and keep `count` of its rows."""
        rows = x.detach().reshape(-1, x.shape[-1])
        low, high, self.seen = rows.amin(0), rows.amax(0), self.seen + len(rows)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.rows.append(rows[torch.randperm(len(rows), generator=generator)[:count]].clone())


@dataclass(frozen=True)
class _Source:
    """What can take up 1 / s: its constants, and for each channel of x the source's channel.

    `constants`: names of the tensors to divide along axis 0.
    """

    node: fx.Node
    constants: tuple[str, ...]
    channels: torch.Tensor
    size: int


@dataclass(frozen=True)
class _Part:
    """A group and its factors; without a source they are multiplied at run time."""

    group: _Group
    source: _Source | None
    factors: torch.Tensor


@dataclass(frozen=True)
class _Choice:
    """The best of the candidates: an empty `how` leaves the group as it is."""

    how: str
    factors: torch.Tensor
    before_db: float
    after_db: float


def smooth(settings: SmoothAlgorithm, graph: Graph, plan: Plan, material: Material) -> Rewriting:
    """The same float function with smoother inputs of its int8 linears.

    Returns:
        A part per group of linears, with the SQNR of their outputs (rounded input and weight) before and after.
    """
    groups, skipped = _groups(plan, material.fixed)
    batches = material.first(settings.samples)
    sources = _sources(graph, groups, batches, material)
    if not (settings.insert and material.may_insert):
        obstacle = _NO_SOURCE + ("" if material.may_insert else ", and this mode inserts no op")
        skipped += [(group.name, obstacle) for group in groups if sources[group.x] is None]
        groups = [group for group in groups if sources[group.x] is not None]
    if groups:
        _observe(groups, graph.at(material.place), batches, settings.rows, material.seed)
    parts: list[_Part] = []
    changes: list[Change] = []
    for done, group in enumerate(groups, start=1):
        source = sources[group.x]
        choice = _search(settings, graph, group, source)
        gain = choice.after_db - choice.before_db
        if not choice.how:
            skipped.append((group.name, "no factors lower the error"))
        elif source is None and gain < settings.min_gain_db:
            skipped.append((group.name, f"a multiplication at run time would gain only {gain:.1f} dB"))
        else:
            parts.append(_Part(group, source, choice.factors))
            where = f"folded into {source.node.meta['layer']}" if source else "multiplied at run time"
            changes.append(Change(group.name, choice.before_db, choice.after_db, f"{choice.how}, {where}"))
        group.rows.clear()
        material.update(done, len(groups))

    def make(chosen: Sequence[int]) -> tuple[Graph, Outcome]:
        smoothed = replace(graph, fx=copied(graph.fx), constants=dict(graph.constants))
        for part in chosen:
            _apply(smoothed, parts[part])
        inserted = sum(parts[part].source is None for part in chosen)
        notice = (
            f"smooth: {inserted} of {len(groups)} inputs are multiplied by factors per channel at run time, because "
            "nothing in front of them can take these up (algorithms: smooth with insert: false leaves them out)"
        )
        kept = tuple(changes[part] for part in chosen)
        return smoothed, Outcome(MEASURE, kept, tuple(skipped), (notice,) if inserted else ())

    costly = frozenset(number for number, part in enumerate(parts) if part.source is None)
    return Rewriting(tuple(changes), make, costly)


def _groups(plan: Plan, fixed: frozenset[str]) -> tuple[list[_Group], list[tuple[str, str]]]:
    """Every value that int8 linears read, with them; and the linears that can't take part."""
    groups: dict[fx.Node, _Group] = {}
    skipped = []
    for planned in plan.units:
        if planned.unit.kind != CORE or not planned.is_int8 or planned.unit.op != "linear":
            continue
        linear = planned.unit.anchor
        x, weight = linear.args[0], linear.args[1]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        if not planned.allows(SmoothAlgorithm.model_fields["name"].default):
            skipped.append((planned.unit.name, "the recipe says so"))
        elif len(weight.users) > 1 or str(weight.target) in fixed:
            skipped.append((planned.unit.name, "its weight is shared, or can't be changed in this mode"))
        else:
            spec = plan.specs[plan.codes[x.name]]
            group = groups.setdefault(x, _Group(x, [], spec, [], plan.reduce_range))
            group.linears.append(linear)
            group.weights.append(planned.qconfig.weight)
    return list(groups.values()), skipped


def _sources(
    graph: Graph, groups: Sequence[_Group], batches: Sequence[Batch], material: Material
) -> dict[fx.Node, _Source | None]:
    """What can take up each group's factors, by the group's value."""
    if not groups:
        return {}
    sample = batches[0].head(1) if material.batch_is_dynamic else batches[0]
    sizes: dict[fx.Node, Any] = {}
    shapes: dict[fx.Node, torch.Size] = {}

    def on_value(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            shapes[node] = value.shape
        else:
            sizes[node] = value

    with torch.inference_mode():
        interpret(graph, bind(graph, sample.args, sample.kwargs), on_value)
    return {group.x: _find_source(graph, group, sizes, shapes, material.fixed) for group in groups}


def _observe(groups: Sequence[_Group], graph: Graph, batches: Sequence[Batch], most: int, seed: int) -> None:
    """Run the batches and fill the groups."""
    group_of = {group.x: group for group in groups}
    generator = torch.Generator().manual_seed(seed)

    def on_value(node: fx.Node, value: Any) -> None:
        if node in group_of:
            wanted = min(max(ROW_NUMBERS // value.shape[-1], FEWEST_ROWS), most)
            group_of[node].observe(value, -(-wanted // len(batches)), generator)

    with torch.inference_mode():
        for batch in batches:
            interpret(graph, bind(graph, batch.args, batch.kwargs), on_value)


# --- alpha


def _search(settings: SmoothAlgorithm, graph: Graph, group: _Group, source: _Source | None) -> _Choice:
    x = torch.cat(group.rows)
    constants = [graph.constants[str(linear.args[1].target)] for linear in group.linears]  # type: ignore[union-attr]
    weights = [weight.to(x.device) for weight in constants]
    outputs = [x @ weight.t() for weight in weights]
    assert group.low is not None
    assert group.high is not None
    reach = torch.maximum(-group.low, group.high)
    heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    if source is not None:
        reach, heaviest = (_per_source(values, source) for values in (reach, heaviest))
    reach, heaviest = (values.clamp_min(values.max() * SMALLEST_SHARE).clamp_min(1e-30) for values in (reach, heaviest))

    def error(factors: torch.Tensor) -> float:
        rounded = _rounded_input(x, group, factors)
        total = 0.0
        for weight, spec, output in zip(weights, group.weights, outputs, strict=True):
            found = rounded @ _rounded_weight(weight * factors, spec).t()
            total += float((found - output).square().sum() / output.square().sum().clamp_min(1e-30))
        return total / len(weights)

    def by_alpha(alpha: float) -> torch.Tensor:
        return spread(reach.pow(alpha) / heaviest.pow(1 - alpha))

    def by_floor(share: float) -> torch.Tensor:
        return spread(reach.clamp_min(float(reach.max()) * share))

    def spread(s: torch.Tensor) -> torch.Tensor:
        s = s / s.log().mean().exp()
        return s if source is None else s[source.channels]

    plain = torch.ones(x.shape[1], device=x.device)
    with torch.inference_mode():
        before = error(plain)
        found = [(before, "", plain)]
        if settings.alpha != "search":
            found.append((error(by_alpha(settings.alpha)), f"alpha {settings.alpha:g}", by_alpha(settings.alpha)))
        else:
            if group.seen >= x.shape[1]:
                alpha, after = _best(lambda alpha: error(by_alpha(alpha)), ALPHAS, settings.refinements)
                found.append((after, f"alpha {alpha:g}", by_alpha(alpha)))
            octave, after = _best(lambda octave: error(by_floor(2**-octave)), OCTAVES, settings.refinements)
            found.append((after, f"phi {2**-octave:.2g}", by_floor(2**-octave)))
        after, how, factors = min(found, key=lambda each: each[0])
        return _Choice(how, factors.clone().cpu(), db(1.0, before), db(1.0, after))


def _best(error: Callable[[float], float], grid: Sequence[float], refinements: int) -> tuple[float, float]:
    """(place, its error): the best of an even grid, then of its neighbours at half the distance, and so on."""
    found = {place: error(place) for place in grid}
    reach = grid[1] - grid[0]
    for _ in range(refinements):
        reach /= 2
        center = min(found, key=found.__getitem__)
        found |= {p: error(p) for p in (center - reach, center + reach) if grid[0] <= p <= grid[-1]}
    best = min(found, key=found.__getitem__)
    return best, found[best]


def _per_source(values: torch.Tensor, source: _Source) -> torch.Tensor:
    """The largest of the values that share one channel of the source; channels that x does not show get 0."""
    found = torch.zeros(source.size, device=values.device)
    return found.scatter_reduce(0, source.channels.to(values.device), values, "amax")


def _rounded_input(x: torch.Tensor, group: _Group, factors: torch.Tensor) -> torch.Tensor:
    """x / s on the grid of the codes that its whole range asks for."""
    spec, scaled = group.activation, x / factors
    if spec.observer == "minmax":
        assert group.low is not None
        assert group.high is not None
        low, high = float((group.low / factors).min()), float((group.high / factors).max())
    else:
        observer = make_observer(spec)
        observer.observe(scaled)
        low, high = observer.range()
    qparams = activation_qparams(low, high, dtype=spec.dtype, qscheme=spec.qscheme, reduce_range=group.reduce_range)
    qmin, qmax = qparams.range
    q = scaled.div_(qparams.scale).round_()
    return q.clamp_(qmin - qparams.zero_point, qmax - qparams.zero_point).mul_(qparams.scale)


def _rounded_weight(weight: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    axis = 0 if spec.granularity == "per_channel" else None
    scale = weight_scale(weight_max_abs(weight, spec, axis)).reshape(-1)
    return dequantize_weight(quantize_weight(weight, scale, axis), scale, axis)


# --- where the factors go


def _apply(graph: Graph, part: _Part) -> None:
    """Multiply the linears' columns by s, and divide the source, or x itself, by it.

    Args:
        graph: a copy of the one that the part was found in.
    """
    constants, factors, source = graph.constants, part.factors, part.source
    assert isinstance(constants, dict)
    nodes = {node.name: node for node in graph.fx.nodes}
    linears = [nodes[linear.name] for linear in part.group.linears]
    for linear in linears:
        weight = str(linear.args[1].target)  # type: ignore[union-attr]
        constants[weight] = constants[weight] * factors
    if source is not None:
        inverse = torch.ones(source.size)
        inverse[source.channels] = 1 / factors
        for name in source.constants:
            value = constants[name]
            constants[name] = value * inverse.reshape(-1, *[1] * (value.dim() - 1))
        return
    multiply_input(graph, nodes[part.group.x.name], linears, 1 / factors)


def multiply_input(graph: Graph, x: fx.Node, readers: Sequence[fx.Node], factors: torch.Tensor) -> None:
    """Have linears read x * factors, per channel. The graph's ops and constants are changed."""
    constants, first = graph.constants, readers[0]
    assert isinstance(constants, dict)
    constant = add_constant(graph.fx, constants, first, f"{first.meta['layer']}.smooth", factors)
    constant.meta["layer"] = f"{first.meta['layer']}.smooth"
    with graph.fx.inserting_before(first):
        product = graph.fx.call_function(aten.mul.Tensor, (x, constant))
    product.meta = {
        "shape": x.meta["shape"],
        "dtype": torch.float32,
        "layer": f"{first.meta['layer']}.smooth_mul",
    }
    for reader in readers:
        reader.args = (product, *reader.args[1:])


def _find_source(
    graph: Graph,
    group: _Group,
    sizes: Mapping[fx.Node, Any],
    shapes: Mapping[fx.Node, torch.Size],
    fixed: frozenset[str],
) -> _Source | None:
    """What writes the channels of x, if it can take up 1 / s and nothing else reads those channels."""
    if set(group.x.users) != set(group.linears):
        return None
    for path in _paths(group.x):
        names = _divisible(graph, path[0], fixed)
        if names is None:
            continue
        channels = _channels(path, sizes, shapes)
        if channels is not None:
            return _Source(path[0], names, channels, shapes[path[0]][-1])
    return None


def _paths(x: fx.Node) -> Iterator[list[fx.Node]]:
    """Chains of nodes [source, …, x] along which channels stay apart, with every node that could be the source."""
    pending = [[x]]
    while pending:
        path = pending.pop()
        yield path
        node = path[0]
        if len(node.args) == 0 or not isinstance(node.args[0], fx.Node):
            continue
        if is_aten(node, *SHAPES, *HOMOGENEOUS) or node.target is operator.getitem:
            pending.append([node.args[0], *path])
        elif is_aten(node, "matmul", "bmm"):
            pending.append([node.args[1], *path])  # type: ignore[list-item]
        elif is_aten(node, "scaled_dot_product_attention"):
            pending.append([node.args[2], *path])  # type: ignore[list-item]
        elif is_aten(node, "mul"):
            a, b = node.args[:2]
            if isinstance(b, fx.Node) and a is not b and a.meta.get("shape") == b.meta.get("shape"):
                pending += [[a, *path], [b, *path]]


def _divisible(graph: Graph, node: fx.Node, fixed: frozenset[str]) -> tuple[str, ...] | None:
    """The constants that divide a node's channels when they are divided; None where there are none."""
    if is_aten(node, "linear"):
        used = node.args[1:3]
    elif is_aten(node, "layer_norm", "rms_norm"):
        a = arguments(node)
        if len(a["normalized_shape"]) != 1 or a["weight"] is None:
            return None
        used = (a["weight"], a.get("bias"))
    elif is_aten(node, "mul"):
        used = tuple(a for a in node.args[:2] if isinstance(a, fx.Node) and a.op == "get_attr")
        others = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(used) != 1 or len(others) != 1 or others[0].meta.get("shape") != node.meta.get("shape"):
            return None
        if graph.constants[str(used[0].target)].shape != node.meta["shape"][-1:]:
            return None
    else:
        return None
    given = [a for a in used if a is not None]
    if not given or not all(isinstance(a, fx.Node) and a.op == "get_attr" and len(a.users) == 1 for a in given):
        return None
    names = tuple(str(a.target) for a in given)  # type: ignore[union-attr]
    return None if any(name in fixed for name in names) else names


def _channels(
    path: Sequence[fx.Node], sizes: Mapping[fx.Node, Any], shapes: Mapping[fx.Node, torch.Size]
) -> torch.Tensor | None:
    """For each channel of the path's end, the channel of its source; None where that differs between positions.

    Found by sending channel numbers through the path's own ops. Readers beside the path are harmless if they see none
    of these channels, as K and Q do behind a split.
    """
    shape = shapes[path[0]]
    values: list[Any] = [torch.arange(shape[-1]).expand(shape)]
    for node, following in itertools.pairwise(path):
        found = _moved(following, node, values[-1], sizes, shapes)
        if found is None:
            return None
        values.append(found)
    rows = values[-1].reshape(-1, values[-1].shape[-1])
    channels = rows.amax(0)
    if bool(((rows != channels) & (rows != _ANY)).any()) or bool((channels == _ANY).any()):
        return None
    for node, following, value in zip(path, path[1:], values, strict=False):
        for user in node.users:
            if user is following:
                continue
            seen = _moved(user, node, value, sizes, shapes) if _is_moving(user) else None
            if not isinstance(seen, torch.Tensor) or bool(torch.isin(seen, channels).any()):
                return None
    return channels


def _is_moving(node: fx.Node) -> bool:
    return is_aten(node, *SHAPES) or node.target is operator.getitem


def _moved(
    node: fx.Node, source: fx.Node, value: Any, sizes: Mapping[fx.Node, Any], shapes: Mapping[fx.Node, torch.Size]
) -> Any:
    """The channel numbers of a node's value, from those of one operand; None where they mix."""
    if is_aten(node, *HOMOGENEOUS, "mul"):
        return value
    if is_aten(node, *_ATTENTIONS):
        first = value[..., :1, :]
        if bool((value != first).any()):
            return None
        shape = shapes[node]
        heads = shape[1] // value.shape[1] if len(shape) == 4 and value.dim() == 4 else 1
        first = first.repeat_interleave(heads, 1) if heads > 1 else first
        return first.expand(shape) if first.shape[:-2] == shape[:-2] else None
    if is_aten(node, "constant_pad_nd", "pad"):
        a = arguments(node)
        return aten.constant_pad_nd.default(value, a["pad"], _ANY) if float(a.get("value") or 0) == 0 else None
    if any(n is not source and n not in sizes for n in node.all_input_nodes):
        return None
    args = fx.map_arg(node.args, lambda n: value if n is source else sizes[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: value if n is source else sizes[n])
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)
