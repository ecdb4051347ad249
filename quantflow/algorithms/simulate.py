"""Two streams through the planned graph: what float computes, and what the integers would.

The second one computes in float32 on quantized values (x' = (q - zero_point) scale, w' = q_w scale), which is the
integer result up to float32's rounding. `walk` runs both layer by layer over all batches at once, so that an algorithm
can change a layer's numbers before anything behind it is computed; `simulate` runs the second one alone on a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, arguments, call, laid_out, last_uses
from quantflow.ir.plan import Plan, PlannedUnit
from quantflow.ir.units import CORE
from quantflow.numerics.affine import QParams
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import LayerNumbers, Refined, float_numbers, left_over_qparams

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Layer:
    """A linear op that has both its inputs: one entry per batch.

    Attributes:
        inputs: on the codes' grid, as the int8 layer sees them.
        float_inputs, float_outputs: of the float model; outputs are those of the linear op alone, without activation.
    """

    planned: PlannedUnit
    inputs: Sequence[torch.Tensor]
    float_inputs: Sequence[torch.Tensor]
    float_outputs: Sequence[torch.Tensor]

    @property
    def name(self) -> str:
        return self.planned.unit.name

    def run(self, numbers: LayerNumbers) -> Iterator[torch.Tensor]:
        """The linear op on its quantized inputs with these numbers, batch by batch."""
        weight, bias = numbers.weight(), numbers.bias
        for x in self.inputs:
            weight, bias = _beside(x, weight, bias)
            yield linear_op(self.planned.unit.anchor, x, weight, bias)

    def channel_axis(self) -> int:
        """The outputs' axis of channels."""
        return -1 if self.planned.unit.op == "linear" else 1


def walk(
    prepared: Prepared,
    refined: Refined,
    batches: Sequence[Batch],
    on_layer: Callable[[Layer], LayerNumbers | None],
    update: Callable[[int, int | None], None] = lambda done, total: None,  # noqa: ARG005
    place: torch.device = CPU,
) -> Refined:
    """Run both streams on a device; `on_layer` sees every int8 linear op in order and may return other numbers for it.

    Returns:
        The numbers with what `on_layer` returned in place.
    """
    graph, plan = prepared.graph.at(place), prepared.plan
    unit_of = {node: planned for planned in plan.units for node in planned.unit.nodes}
    total = plan.int8_products
    streams = [_Stream(graph, bind(graph, b.args, b.kwargs)) for b in batches]
    frees, done = last_uses(graph.fx), 0
    with torch.inference_mode():
        for node in graph.fx.nodes:
            planned = unit_of.get(node)
            if planned is None or not planned.is_int8:
                for stream in streams:
                    stream.run(node)
            else:
                for stream in streams:
                    _code_operands(node, planned, plan.codes, refined.qparams, stream.simulated, stream.coded)
                if planned.unit.kind == CORE and node is planned.unit.anchor:
                    for stream in streams:
                        stream.run_float(node)
                    layer = Layer(
                        planned,
                        [_linear_input(planned, plan, refined, stream.simulated, stream.coded) for stream in streams],
                        [stream.float[planned.unit.inputs[0]] for stream in streams],
                        [stream.float[node] for stream in streams],
                    )
                    changed = on_layer(layer)
                    if changed is not None:
                        refined = refined.with_layer(planned.unit.name, changed)
                    for stream, y in zip(streams, layer.run(refined.layers[planned.unit.name]), strict=True):
                        stream.simulated[node] = y
                    done += 1
                    update(done, total)
                else:
                    for stream in streams:
                        stream.run(node, planned)
                if node is planned.unit.output and planned.writes_codes:
                    qparams, is_exact = refined.qparams[plan.codes[node.name]], node.name in plan.exact
                    for stream in streams:
                        _write_codes(node, qparams, is_exact, stream.simulated, stream.coded)
            for dead in frees.get(node, ()):
                for stream in streams:
                    stream.forget(dead)
    return refined


def simulate(
    prepared: Prepared,
    refined: Refined,
    batch: Batch,
    on_value: Callable[[fx.Node, Any], None] | None = None,
) -> Any:
    """What the int8 model returns for a batch: the second stream of `walk` alone, where the graph computes.

    Args:
        on_value: called with every node and its value.
    """
    graph, plan = prepared.graph, prepared.plan
    unit_of = {node: planned for planned in plan.units if planned.is_int8 for node in planned.unit.nodes}
    inputs = iter(bind(graph, batch.args, batch.kwargs))
    frees = last_uses(graph.fx)
    values: Values = {}
    coded: Values = {}
    with torch.inference_mode():
        for node in graph.fx.nodes:
            planned = unit_of.get(node)
            if node.op == "output":
                break
            if node.op == "placeholder":
                values[node] = laid_out(next(inputs).to(graph.place))
            elif node.op == "get_attr":
                values[node] = graph.constants[str(node.target)]
            elif planned is None:
                values[node] = call(node, values.__getitem__, graph.place)
            else:
                _code_operands(node, planned, plan.codes, refined.qparams, values, coded)
                if planned.unit.kind == CORE and node is planned.unit.anchor:
                    weight, bias = _weight_and_bias(prepared, planned, refined)
                    x = _linear_input(planned, plan, refined, values, coded)
                    values[node] = linear_op(node, x, *_beside(x, weight, bias))
                else:
                    values[node] = call(node, _reader(planned, values, coded), graph.place)
                if node is planned.unit.output and planned.writes_codes:
                    _write_codes(node, refined.qparams[plan.codes[node.name]], node.name in plan.exact, values, coded)
            if on_value is not None:
                on_value(node, values[node])
            for dead in frees.get(node, ()):
                values.pop(dead, None)
                coded.pop(dead, None)
    return fx.map_arg(node.args[0], values.__getitem__)


def _weight_and_bias(
    prepared: Prepared, planned: PlannedUnit, refined: Refined
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the int8 layer multiplies with. Two terms give the float weight back but for 1 part in 60000."""
    if planned.qconfig.weight.terms == 2:
        return float_numbers(prepared.graph, planned)
    numbers = refined.layers[planned.unit.name]
    return numbers.weight(), numbers.bias


def _linear_input(planned: PlannedUnit, plan: Plan, refined: Refined, values: Values, coded: Values) -> torch.Tensor:
    """What the int8 layer multiplies: the codes, and with two terms also those of what they leave over."""
    x = planned.unit.inputs[0]
    first: torch.Tensor = coded[x]
    if planned.qconfig.input_terms == 1:
        return first
    return with_second_term(values[x], first, refined.qparams[plan.codes[x.name]])


def _write_codes(node: fx.Node, qparams: QParams, is_exact: bool, values: Values, coded: Values) -> None:
    """Round what a unit computed from codes. A value that is exact, too, is the same data movement on exact ones."""
    coded[node] = _rounded(values[node], qparams)
    values[node] = call(node, values.__getitem__) if is_exact else coded[node]


def _code_operands(
    node: fx.Node,
    planned: PlannedUnit,
    codes: Mapping[str, str],
    qparams: Mapping[str, QParams],
    values: Values,
    coded: Values,
) -> None:
    """Put what an int8 unit's node reads on its grid, where that is not done yet."""
    for source in node.all_input_nodes:
        if source in _operands(planned) and source not in coded:
            coded[source] = on_grid(values[source], qparams[codes[source.name]])


def _operands(planned: PlannedUnit) -> set[fx.Node | None]:
    return {*planned.unit.inputs, planned.unit.residual}


def _reader(planned: PlannedUnit, values: Values, coded: Values) -> Callable[[fx.Node], Any]:
    """An int8 unit reads codes; others read the value itself, though some int8 unit may read its codes."""
    operands = _operands(planned)
    return lambda n: coded[n] if n in operands else values[n]


class _Stream:
    """The values of one batch that are still needed."""

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        self.constants, self.place = graph.constants, graph.place
        self.inputs = iter(inputs)
        self.float: Values = {}
        self.simulated: Values = {}
        self.coded: Values = {}

    def run(self, node: fx.Node, planned: PlannedUnit | None = None) -> None:
        """Both values of a node; the simulated one is the float one until something was quantized.

        Args:
            planned: the int8 unit that the node belongs to.
        """
        self.run_float(node)
        if node.op not in ("call_function", "output"):
            self.simulated[node] = self.float[node]
        elif node.op == "call_function":
            read = _reader(planned, self.simulated, self.coded) if planned else self.simulated.__getitem__
            same = all(read(n) is self.float[n] for n in node.all_input_nodes)
            self.simulated[node] = self.float[node] if same else call(node, read, self.place)

    def run_float(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.float[node] = laid_out(next(self.inputs).to(self.place))
        elif node.op == "get_attr":
            self.float[node] = self.constants[str(node.target)]
        elif node.op == "call_function":
            self.float[node] = call(node, self.float.__getitem__, self.place)

    def forget(self, node: fx.Node) -> None:
        for values in (self.float, self.simulated, self.coded):
            values.pop(node, None)


def _beside(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's numbers where its input is."""
    return weight.to(x.device), None if bias is None else bias.to(x.device)


def _rounded(x: Any, qparams: QParams) -> Any:
    """`on_grid` of a tensor, or of each part of one that was split."""
    return [on_grid(part, qparams) for part in x] if isinstance(x, (list, tuple)) else on_grid(x, qparams)


def on_grid(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """x' = (clamp(round(x / scale) + zero_point) - zero_point) scale, in float32: `dequantize(quantize(x))`."""
    qmin, qmax = qparams.range
    q = (x / qparams.scale).round_()
    return q.clamp_(qmin - qparams.zero_point, qmax - qparams.zero_point).mul_(qparams.scale)


def with_second_term(x: torch.Tensor, first: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """x on the grid of two terms; `first`: on the grid of one, whose codes `qparams` are."""
    return first + on_grid(x - first, left_over_qparams(qparams))


def linear_op(node: fx.Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a convolution or linear node computes, with another input, weight and bias."""
    a = arguments(node)
    rest = [a[name] for name in ("stride", "padding", "dilation", "groups") if name in a]
    y: torch.Tensor = node.target(x, weight, bias, *rest)  # type: ignore[operator]
    return y


def weight_shape(planned: PlannedUnit) -> tuple[int, ...]:
    shape: tuple[int, ...] = planned.unit.anchor.args[1].meta["shape"]  # type: ignore[union-attr]
    return shape


def shared_weight(planned: PlannedUnit) -> bool:
    """Whether another op reads the layer's weight: then it can't be changed for this one alone."""
    weight = planned.unit.anchor.args[1]
    assert isinstance(weight, fx.Node)
    return len(weight.users) > 1
