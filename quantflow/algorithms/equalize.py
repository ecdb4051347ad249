"""Cross-layer equalization: channels are rescaled between linear ops, so that all of them use the codes.

Values that linear ops write and others read, with nothing but positively homogeneous ops and additions between them
(see `channels.py`), are divided by s > 0 per channel:

    W1' = W1 / s,  b1' = b1 / s  (rows of what writes them)        W2' = W2 s  (columns of what reads them)

    s = r1^alpha r2^(alpha - 1)   r1: largest |x| of the channel; with one scale per weight tensor also the row's
                                      largest |W1|, each relative to the largest of all channels
                                  r2: largest |W2| of the column
    s = r1                        where rescaling the reader costs nothing: a depthwise one with a scale per channel, a
                                  BatchNorm that is not folded, a product with a constant, a float layer

alpha is the one of a few (1/2 is Nagel's) that promises the least noise in what the readers compute, averaged over
their outputs j and relative to each one's signal; where none promises less than the factors at hand, these stay:

    noise_j = (max|x| / 127)^2 / 12 sum_k W2_jk^2  +  (max_k|W2_jk| / 127)^2 / 12 sum_k E[x_k^2]

This is Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1, with
measured ranges in r1 (which makes their absorption of high biases unnecessary), and with a residual stream as one set
of channels that all its writers and readers share.

A clamp to [0, m] is not homogeneous. A tensor m per channel is divided by s, too, and is what r1 takes for the largest
|x| where any channel comes near it: other data may reach what the samples did not. A number m (ReLU6) would have to
become one, so its channels stay as they are; `clip_margin` rescales those that keep so far below it on the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from quantflow.algorithms.channels import ChannelSet, find_sets
from quantflow.algorithms.outcome import Change, Material, Outcome, Rewriting
from quantflow.ir.activations import as_epilogue
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, arguments, floating_outputs, interpret, is_aten
from quantflow.ir.ops import LINEARS
from quantflow.ir.plan import Plan, PlannedUnit
from quantflow.ir.units import CORE
from quantflow.numerics.measures import sqnr_db

if TYPE_CHECKING:
    from quantflow.ir.batch import Batch
    from quantflow.schema import EqualizeAlgorithm

NAME = "equalize"
MEASURE = "largest over median range of the channels"
#: A rescaled model must give float's output up to rounding; below this it is not the same model.
MIN_SQNR_DB = 60.0
#: On how many samples the two are compared: a wrong factor shows on any.
COMPARED = 2
#: Sweeps stop when no factor changes by more than this.
CONVERGED = 1e-3
#: Samples of each batch that a channel's power is taken from.
POWER_SAMPLES = 8
#: The exponents tried, and how much less noise one must promise.
ALPHAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.98
#: A channel is near its bound when it reaches this part of it.
NEAR = 2
#: Factors stay within this range, far from float32's ends.
SMALLEST, LARGEST = 1e-8, 1e8


def equalize(settings: EqualizeAlgorithm, graph: Graph, plan: Plan, material: Material) -> Rewriting:
    """Rescale channels in the graph's constants; its nodes stay as they are. A set of channels is a part."""
    sets, axes = find_sets(graph, plan, NAME, material.fixed)
    skipped = tuple((s.title, s.obstacle) for s in sets if s.writers and s.obstacle)
    sets = [
        s for s in sets if s.writers and s.readers and not s.obstacle and any(v.name in plan.codes for v in s.values)
    ]
    batches = material.first(settings.samples)
    if not sets or not batches:
        return Rewriting((), lambda _: (graph, Outcome(MEASURE, (), skipped)))
    measured = _Measured(graph, plan, sets, axes, batches, material)
    work = _Factors(graph, plan, sets, axes)
    for s in sets:
        work.estimate_unseen(s, measured)
        work.expect_bounds(s, measured)
    for _ in range(settings.iterations):
        if max(work.improve(s, measured, settings.clip_margin) for s in sets) < CONVERGED:
            break
    rescaled = replace(graph, constants=work.constants())
    few = batches[0].head(COMPARED) if material.batch_is_dynamic else batches[0]
    outputs = zip(_outputs(graph, few), _outputs(rescaled, few), strict=True)
    found = min((sqnr_db(*pair) for pair in outputs), default=math.inf)
    if not found >= MIN_SQNR_DB:
        notice = f"equalize: undone, because the rescaled float model differs from the original ({found:.1f} dB)"
        return Rewriting((), lambda _: (graph, Outcome(MEASURE, (), skipped, (notice,))))
    factors = dict(work.of)
    changes = tuple(
        Change(s.title, _spread(measured.ranges[id(s)]), _spread(measured.ranges[id(s)] / factors[id(s)])) for s in sets
    )

    def make(chosen: Sequence[int]) -> tuple[Graph, Outcome]:
        work.of = {
            id(s): factors[id(s)] if part in chosen else torch.ones_like(factors[id(s)]) for part, s in enumerate(sets)
        }
        rescaled = replace(graph, constants=work.constants())
        return rescaled, Outcome(MEASURE, tuple(changes[part] for part in chosen), skipped)

    return Rewriting(changes, make)


class _Measured:
    """Largest |x| per channel on the calibration data.

    Attributes:
        ranges: id of a set → over those of its values that are held as codes.
        power: id of a set → E[x^2] per channel, the sum over those values.
        clipped: clamp → over what it clamps, positive side.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        sets: Sequence[ChannelSet],
        axes: Mapping[fx.Node, int],
        batches: Sequence[Batch],
        material: Material,
    ) -> None:
        def nothing(s: ChannelSet) -> torch.Tensor:
            return torch.zeros(s.size, dtype=torch.float64, device=material.place)

        self.ranges = {id(s): nothing(s) for s in sets}
        self.power = {id(s): nothing(s) for s in sets}
        self.clipped = {clip: nothing(s) for s in sets for clip in s.clips}
        placed = graph.at(material.place)
        owner = {v: s for s in sets for v in s.values if v.name in plan.codes and v.meta["shape"][axes[v]] == s.size}
        clamped: dict[fx.Node, list[fx.Node]] = {}
        for clip in self.clipped:
            clamped.setdefault(clip.all_input_nodes[0], []).append(clip)

        def on_value(node: fx.Node, x: Any) -> None:
            if node not in owner and node not in clamped:
                return
            inner = [d for d in range(1, x.dim()) if d != axes[node] % x.dim()]
            high = _over_all(torch.amax, x, inner)
            if node in owner:
                seen = self.ranges[id(owner[node])]
                torch.maximum(seen, torch.maximum(high, -_over_all(torch.amin, x, inner)).double(), out=seen)
                some = x[:POWER_SAMPLES]
                self.power[id(owner[node])] += _power(some, inner) * high.numel() / some.numel() / len(batches)
            for clip in clamped.get(node, ()):
                torch.maximum(self.clipped[clip], high.double(), out=self.clipped[clip])

        with torch.inference_mode():
            for done, batch in enumerate(batches, start=1):
                interpret(placed, bind(graph, batch.args, batch.kwargs), on_value)
                material.update(done, len(batches))
        for found in (self.ranges, self.power, self.clipped):
            found.update({of: values.cpu() for of, values in found.items()})  # type: ignore[misc,attr-defined]


@dataclass(frozen=True)
class _Matrix:
    """A linear op as |W|: the largest of each (output, input) pair's window, grouped.

    Attributes:
        size, square: (groups, outputs per group, inputs per group): largest |W|, sum of W^2.
        counts: whether rescaling its inputs changes how well its weight is coded.
        one_scale: whether its weight has one scale for all rows.
    """

    size: torch.Tensor
    square: torch.Tensor
    counts: bool
    one_scale: bool


class _Factors:
    """One factor per channel and set, and what they do to the constants."""

    def __init__(self, graph: Graph, plan: Plan, sets: Sequence[ChannelSet], axes: Mapping[fx.Node, int]) -> None:
        self.graph = graph
        self.sets = sets
        self.axes = axes
        self.of = {id(s): torch.ones(s.size, dtype=torch.float64) for s in sets}
        self.writes = {op: s for s in sets for op in s.writers}
        self.reads = {op: s for s in sets for op in s.readers}
        units = {p.unit.anchor: p for p in plan.units if p.is_int8 and p.unit.kind == CORE}
        ops = {*self.writes, *self.reads}
        self.matrices = {op: self._matrix(op, units.get(op)) for op in ops if is_aten(op, *LINEARS)}

    def _matrix(self, op: fx.Node, planned: PlannedUnit | None) -> _Matrix:
        weight = self.graph.constants[str(op.args[1].target)]  # type: ignore[union-attr]
        groups = arguments(op).get("groups", 1)
        windows = weight.double().reshape(*weight.shape[:2], -1)
        largest, square = windows.abs().amax(2), windows.square().sum(2)
        one_scale = planned is not None and planned.qconfig.weight.granularity == "per_tensor"
        counts = planned is not None and (one_scale or largest.shape[1] > 1)
        shape = (groups, -1, largest.shape[1])
        return _Matrix(largest.reshape(shape), square.reshape(shape), counts, one_scale)

    def rows(self, op: fx.Node) -> torch.Tensor | float:
        """The factors of what the op writes."""
        return self.of[id(self.writes[op])] if op in self.writes else 1.0

    def columns(self, op: fx.Node, inputs: int) -> torch.Tensor | float:
        """The factors of what the op reads, one per input: a flattened map repeats its channel's."""
        if op not in self.reads:
            return 1.0
        factors = self.of[id(self.reads[op])]
        return factors.repeat_interleave(inputs // factors.numel())

    def scaled(self, op: fx.Node, matrix: _Matrix) -> torch.Tensor:
        """|W| with all current factors."""
        groups, outputs, inputs = matrix.size.shape
        rows = torch.as_tensor(self.rows(op), dtype=torch.float64).expand(groups * outputs)
        columns = torch.as_tensor(self.columns(op, groups * inputs), dtype=torch.float64).expand(groups * inputs)
        return matrix.size / rows.reshape(groups, outputs, 1) * columns.reshape(groups, 1, inputs)

    def estimate_unseen(self, s: ChannelSet, measured: _Measured) -> None:
        """Channels that were 0 on all samples get the range that their writers' rows suggest, beside the others'.

        They may be large on other data; left as they came, one of them would then decide the whole tensor's range.
        """
        rows = torch.zeros(s.size, dtype=torch.float64)
        for op in s.writers:
            matrix = self.matrices.get(op)
            if matrix is None:
                continue
            groups, _, inputs = matrix.size.shape
            read = measured.ranges.get(id(self.reads[op])) if op in self.reads else None
            entering = torch.ones(groups * inputs) if read is None else read
            entering = entering.double().repeat_interleave(groups * inputs // entering.numel())
            rows = torch.maximum(rows, (matrix.size * entering.reshape(groups, 1, inputs)).amax(2).flatten())
        ranges = measured.ranges[id(s)]
        known = (ranges > 0) & (rows > 0)
        if bool(known.any()):
            estimated = rows * (ranges[known] / rows[known]).median()
            measured.ranges[id(s)] = torch.where(ranges > 0, ranges, estimated)

    def expect_bounds(self, s: ChannelSet, measured: _Measured) -> None:
        """Where channels come near bounds of their own, every channel may: samples only show what they did reach."""
        for _, bound in s.bounds:
            limits = self.graph.constants[str(bound.target)].double().flatten().expand(s.size)
            if bool((measured.ranges[id(s)] >= limits / NEAR).any()):
                measured.ranges[id(s)] = torch.maximum(measured.ranges[id(s)], limits)

    def noise(self, s: ChannelSet, factors: torch.Tensor, measured: _Measured) -> float:
        """What rounding would do to the readers' outputs, relative to these; see the top of the file."""
        step = float((measured.ranges[id(s)] / factors).max()) / 127
        total = 0.0
        for op in s.readers:
            matrix = self.matrices.get(op)
            if matrix is None or not matrix.counts:
                continue
            groups, _, inputs = matrix.size.shape
            columns = factors.repeat_interleave(groups * inputs // s.size).reshape(groups, 1, inputs)
            power = measured.power[id(s)].repeat_interleave(groups * inputs // s.size).reshape(groups, 1, inputs)
            signal = (matrix.square * power).sum(2)
            coarse = (matrix.size * columns).amax(2) / 127
            if matrix.one_scale:
                coarse = coarse.max().expand_as(coarse)
            found = step**2 * (matrix.square * columns**2).sum(2) + coarse**2 * (power / columns**2).sum(2)
            total += float((found / signal)[signal > 0].sum()) / signal.numel()
        return total

    def improve(self, s: ChannelSet, measured: _Measured, clip_margin: float | None) -> float:
        """Set new factors for one set; returns the largest change, as a logarithm."""
        factors = self.of[id(s)]
        ranges = measured.ranges[id(s)]
        r1 = _relative(ranges / factors)
        for op in s.writers:
            matrix = self.matrices.get(op)
            if matrix is not None and matrix.one_scale:
                r1 = torch.maximum(r1, _relative(self.scaled(op, matrix).amax(2).flatten()))
        r2 = torch.zeros_like(r1)
        for op in s.readers:
            matrix = self.matrices.get(op)
            if matrix is not None and matrix.counts:
                columns = self.scaled(op, matrix).amax(1).flatten()
                r2 = torch.maximum(r2, columns.reshape(s.size, -1).amax(1))
        if not any(op in self.matrices and self.matrices[op].counts for op in s.readers):
            wanted = _bounded(s, factors, r1, ranges, measured, clip_margin)
        else:
            tried = [
                _bounded(s, factors, r1**alpha * r2 ** (alpha - 1), ranges, measured, clip_margin) for alpha in ALPHAS
            ]
            noise = [self.noise(s, each, measured) for each in tried]
            best = min(range(len(tried)), key=noise.__getitem__)
            # One scale for a whole weight: the writers' rows gain, too, which the noise at the readers does not show.
            pays = noise[best] < WORTH * self.noise(s, factors, measured) or self._writers_share(s)
            wanted = tried[best] if pays else factors
        self.of[id(s)] = wanted
        return float((wanted / factors).log().abs().max())

    def _writers_share(self, s: ChannelSet) -> bool:
        return any(op in self.matrices and self.matrices[op].one_scale for op in s.writers)

    def constants(self) -> dict[str, torch.Tensor]:
        """The graph's constants, those of the ops that write or read rescaled channels changed."""
        constants = dict(self.graph.constants)
        for op in dict.fromkeys([*self.writes, *self.reads]):
            if op in self.matrices:
                self._rescale_linear(op, constants)
            elif is_aten(op, "batch_norm"):
                self._rescale_norm(op, constants)
            else:
                self._rescale_product(op, constants)
        for s in self.sets:
            for value, bound in s.bounds:
                name = str(bound.target)
                constants[name] = self._along(value, constants[name], 1 / self.of[id(s)])
        return constants

    def _rescale_linear(self, op: fx.Node, constants: dict[str, torch.Tensor]) -> None:
        matrix, name = self.matrices[op], str(op.args[1].target)  # type: ignore[union-attr]
        groups, outputs, inputs = matrix.size.shape
        weight = constants[name]
        rows = torch.as_tensor(self.rows(op), dtype=torch.float64).expand(groups * outputs)
        columns = torch.as_tensor(self.columns(op, groups * inputs), dtype=torch.float64).expand(groups * inputs)
        grouped = weight.double().reshape(groups, outputs, inputs, -1)
        grouped = grouped / rows.reshape(groups, outputs, 1, 1) * columns.reshape(groups, 1, inputs, 1)
        constants[name] = grouped.reshape(weight.shape).float()
        if len(op.args) > 2 and op.args[2] is not None:
            bias = str(op.args[2].target)  # type: ignore[union-attr]
            constants[bias] = (constants[bias].double() / rows).float()

    def _rescale_norm(self, op: fx.Node, constants: dict[str, torch.Tensor]) -> None:
        """y / s_out = (x / s_in - mean / s_in) / sqrt(var + eps) * (gamma s_in / s_out) + beta / s_out."""
        a = arguments(op)
        mean, gamma, beta = (str(a[role].target) for role in ("running_mean", "weight", "bias"))
        written, read = self.rows(op), self.columns(op, constants[mean].numel())
        constants[mean] = (constants[mean].double() / read).float()
        constants[gamma] = (constants[gamma].double() * read / written).float()
        constants[beta] = (constants[beta].double() / written).float()

    def _rescale_product(self, op: fx.Node, constants: dict[str, torch.Tensor]) -> None:
        """y / s_out = (x / s_in) * (c s_in / s_out), or a quotient likewise."""
        name = str(op.args[1].target)  # type: ignore[union-attr]
        size = self._channels(op)
        ratio = torch.as_tensor(self.columns(op, size) / self.rows(op), dtype=torch.float64).expand(size)
        constants[name] = self._along(op, constants[name], ratio if is_aten(op, "mul") else 1 / ratio)

    def _channels(self, op: fx.Node) -> int:
        """Channels of a value."""
        return int(op.meta["shape"][self.axes[op]])

    def _along(self, value: fx.Node, constant: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """A constant that broadcasts against `value`, times a factor per channel."""
        shape = [1] * len(value.meta["shape"])
        shape[self.axes[value]] = -1
        return (constant.double() * factors.reshape(shape)).float()


def _bounded(
    s: ChannelSet,
    factors: torch.Tensor,
    change: torch.Tensor,
    ranges: torch.Tensor,
    measured: _Measured,
    clip_margin: float | None,
) -> torch.Tensor:
    """The changed factors of channels that may change: those that hold anything, and no clamp to a number bounds.

    A global factor is free: it is chosen so that the geometric mean of the factors is 1, over the bounded channels
    where there are any.
    """
    alive = change.isfinite() & (change > 0) & (ranges > 0)
    wanted = torch.where(alive, factors * change, torch.ones_like(factors))
    pinned, least = torch.zeros_like(alive), torch.zeros_like(wanted)
    for clip in s.clips:
        epilogue = as_epilogue(clip)
        assert epilogue is not None
        assert epilogue.bounds
        bound, seen = epilogue.bounds[1], measured.clipped[clip]
        if clip_margin is None:
            pinned[:] = True
            continue
        pinned |= seen * clip_margin > bound
        least = torch.maximum(least, seen * clip_margin / bound)
    deciding = pinned if bool((pinned & alive).any()) else alive
    if bool((deciding & alive).any()):
        wanted = wanted / wanted[deciding & alive].log().mean().exp()
    wanted = torch.maximum(torch.where(alive, wanted, torch.ones_like(wanted)), least)
    return torch.where(pinned, torch.ones_like(wanted), wanted).clamp(SMALLEST, LARGEST)


def _over_all(reduce: Callable[..., torch.Tensor], x: torch.Tensor, inner: list[int]) -> torch.Tensor:
    """Over the inner axes, then over the batch: on channels-last tensors all at once takes twice as long."""
    return reduce(reduce(x, inner) if inner else x, 0)


def _power(x: torch.Tensor, inner: list[int]) -> torch.Tensor:
    """sum x^2 per channel."""
    return torch.linalg.vector_norm(x, dim=inner).double().square().sum(0) if inner else x.double().square().sum(0)


def _relative(ranges: torch.Tensor) -> torch.Tensor:
    largest = ranges.max()
    return ranges / largest if float(largest) > 0 else ranges


def _spread(ranges: torch.Tensor) -> float:
    """max / median over the channels that hold anything; 1 where none does."""
    alive = ranges[ranges > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0


def _outputs(graph: Graph, batch: Batch) -> list[torch.Tensor]:
    with torch.inference_mode():
        inputs = bind(graph, batch.args, batch.kwargs)
        return floating_outputs(graph, lambda on_value: interpret(graph, inputs, on_value))
