"""convert(prepared, table) → Program: the integer program, from the plan's decisions and the measured ranges."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from quantflow.ir.activations import as_epilogue
from quantflow.ir.graph import arguments, op_name
from quantflow.ir.ops import PAIR_OPS
from quantflow.ir.plan import PlannedUnit, nonnegative_values
from quantflow.ir.program import Node, Program, Ref, TensorRef, Value
from quantflow.ir.recurrence import cell_of
from quantflow.ir.structure import Leaf, replaced
from quantflow.ir.units import (
    CLAMP,
    CORE,
    RECURRENCE,
    SHAPE,
    SIZE,
    pad_fill,
)
from quantflow.numerics.affine import dequantize, quantize
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import (
    LayerNumbers,
    Refined,
    float_numbers,
    left_over,
    left_over_qparams,
    unrefined,
)


def convert(prepared: Prepared, table: CalibrationTable, refined: Refined | None = None) -> Program:
    """Write the integer program.

    Args:
        refined: what the algorithms made of the table's numbers; None takes these as they are.

    Raises:
        CalibrationError: the table lacks a value that the plan needs, or a weight holds NaN or Inf.
    """
    return _Converter(prepared, refined or unrefined(prepared, table)).run()


@dataclass(frozen=True)
class _Product:
    """What a second term adds to a layer's sum: codes times a weight; `attrs` as a node's."""

    name: str
    x: Ref
    attrs: dict[str, Any]


class _Converter:
    """Walks the planned units in execution order and emits program nodes."""

    def __init__(self, prepared: Prepared, refined: Refined) -> None:
        self._graph = prepared.graph
        self._plan = prepared.plan
        self._qparams = refined.qparams
        self._layers = refined.layers
        self._nodes: list[Node] = []
        self._values: dict[str, Value] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._converted: set[str] = set()
        self._nonnegative = nonnegative_values(prepared.plan)
        self._moving = {p.unit.output: p for p in prepared.plan.units if p.is_int8 and p.unit.kind == SHAPE}

    def run(self) -> Program:
        emit = {CORE: self._linear, CLAMP: self._clamp} | dict.fromkeys(PAIR_OPS, self._pair)
        for planned in self._plan.units:
            if planned.unit.kind == RECURRENCE:
                self._recurrence(planned)
            elif not planned.is_int8:
                for node in planned.unit.nodes:
                    is_size = planned.unit.kind == SIZE or node.target is operator.getitem
                    self._float(node, "size" if is_size else "aten")
            else:
                emit.get(planned.unit.kind, self._named)(planned)
        (out,) = (node for node in self._graph.fx.nodes if node.op == "output")
        output = self._output(out.args[0])
        return Program(
            self._graph.inputs,
            tuple(self._nodes),
            self._values,
            self._tensors,
            output,
            self._graph.batch_is_dynamic,
            self._graph.arguments,
            self._graph.limits,
        )

    def _output(self, outputs: Any) -> Any:
        """The model's output over values and stored tensors; a stored size as the number it is."""
        if self._graph.structure is None:
            return fx.map_arg(outputs, self._as_float)
        held = [self._as_float(value) if isinstance(value, fx.Node) else value for value in outputs]
        return replaced(self._graph.structure, lambda leaf: held[leaf.index] if isinstance(leaf, Leaf) else leaf)

    # -- operands

    def _as_codes(self, node: fx.Node) -> Ref:
        """The operand as codes; a float value is quantized where it is first needed."""
        if node.name in self._values:
            return Ref(node.name)
        name = f"{node.name}.codes"
        if name not in self._converted:
            self._converted.add(name)
            self._values[name] = self._value(node)
            self._nodes.append(Node(f"{node.meta['layer']}.quantize", "quantize", name, (Ref(node.name),)))
        return Ref(name)

    def _left_over(self, node: fx.Node) -> Ref:
        """What the operand's codes leave over of it, as codes of its own."""
        name = f"{node.name}.rest"
        if name in self._converted:
            return Ref(name)
        self._converted.add(name)
        first, layer = self._as_codes(node), node.meta["layer"]
        qparams = self._values[first.name].qparams
        assert qparams is not None
        self._values[name] = Value(left_over_qparams(qparams))
        if node in self._moving:

            def rest_of(fill: float) -> float:
                return fill - float(dequantize(quantize(torch.tensor(fill), qparams), qparams))

            self._move(self._moving[node], name, self._left_over, rest_of)
        else:
            operands = Ref(node.name), Ref(f"{name}.first")
            self._nodes += [
                Node(f"{layer}.rest.dequantize", "dequantize", f"{name}.first", (first,)),
                Node(f"{layer}.rest.sub", "aten", f"{name}.float", operands, target="sub.Tensor"),
                Node(f"{layer}.rest.quantize", "quantize", name, (Ref(f"{name}.float"),)),
            ]
        return Ref(name)

    def _as_float(self, node: fx.Node) -> Ref | TensorRef:
        """The operand as float32 (or whatever it was captured as)."""
        if node.op == "get_attr":
            name = str(node.target)
            self._tensors.setdefault(name, self._graph.constants[name].contiguous())
            return TensorRef(name)
        if node.name not in self._values:
            return Ref(node.name)
        name = f"{node.name}.float"
        if name not in self._converted:
            self._converted.add(name)
            self._nodes.append(Node(f"{node.meta['layer']}.dequantize", "dequantize", name, (Ref(node.name),)))
        return Ref(name)

    def _define(self, planned: PlannedUnit) -> str:
        """Name the unit's output and, if it is written as codes, record how."""
        name = planned.unit.output.name
        if planned.writes_codes:
            self._values[name] = self._value(planned.unit.output)
        return name

    def _value(self, node: fx.Node) -> Value:
        """How a graph value is held as codes."""
        qparams = self._qparams[self._plan.codes[node.name]]
        symmetric = qparams.dtype == "int8" and qparams.zero_point == 0
        return Value(qparams, symmetric and node.name in self._nonnegative)

    # -- int8 units

    def _linear(self, planned: PlannedUnit) -> None:
        unit, numbers = planned.unit, self._layers[planned.unit.name]
        x, residual = self._as_codes(unit.inputs[0]), None
        if unit.residual is not None:
            residual = self._as_codes(unit.residual)
        geometry: dict[str, Any] = {}
        if unit.op != "linear":
            ops, dims = arguments(unit.anchor), numbers.codes.dim() - 2
            geometry = {key: _spread(ops[key], dims) for key in ("stride", "padding", "dilation")}
            geometry["groups"] = ops["groups"]
        further: list[_Product] = []
        if planned.qconfig.weight.terms == 2:
            weight, bias = float_numbers(self._graph, planned)
            low = left_over(weight, numbers)
            numbers = replace(numbers, bias=bias)
            further.append(_Product(f"{unit.name}.low", x, self._weights(f"{unit.name}.low", low)))
        main = self._weights(unit.name, numbers)
        if planned.qconfig.input_terms == 2:
            further.append(_Product(f"{unit.name}.rest", self._left_over(unit.inputs[0]), main | {"bias": None}))
        output = self._define(planned)
        op = "linear" if unit.op == "linear" else "conv"
        for product in further:
            # Kept in float32: rounded again, much of what a second term adds would be lost.
            attrs = product.attrs | geometry
            self._nodes.append(Node(product.name, op, product.name, (product.x, residual), attrs=attrs))
            residual = Ref(product.name)
        self._nodes.append(Node(unit.name, op, output, (x, residual), epilogue=unit.epilogue, attrs=main | geometry))

    def _weights(self, name: str, numbers: LayerNumbers) -> dict[str, Any]:
        bias, channels = numbers.bias, numbers.codes.shape[0]
        if bias is not None and bias.numel() == 1:  # one value for all of them, which PyTorch takes
            bias = bias.reshape(1).expand(channels).contiguous() if channels > 1 else bias.reshape(1)
        return {
            "weight": self._store(f"{name}.weight_int8", numbers.codes),
            "weight_scale": self._store(f"{name}.weight_scale", numbers.scale),
            "bias": None if bias is None else self._store(f"{name}.bias_float", bias),
        }

    def _recurrence(self, planned: PlannedUnit) -> None:
        """The steps of a recurrent layer, in float32 where the plan says so."""
        unit = planned.unit
        gates, weight, bias, h0, c0, reverse = unit.anchor.args
        args = tuple(None if x is None else self._as_float(x) for x in (gates, h0, c0))  # type: ignore[arg-type]
        if planned.is_int8:
            held = self._weights(unit.name, self._layers[unit.name])
        else:
            stored = [None if x is None else self._as_float(x).name for x in (weight, bias)]  # type: ignore[arg-type]
            held = {"weight": stored[0], "weight_scale": None, "bias": stored[1]}
        attrs = {"cell": cell_of(unit.anchor), "reverse": reverse, **held}
        self._nodes.append(Node(unit.name, "recurrence", self._define(planned), args, attrs=attrs))

    def _pair(self, planned: PlannedUnit) -> None:
        unit = planned.unit
        args = tuple(self._as_codes(value) for value in unit.inputs)
        output = self._define(planned)
        self._nodes.append(Node(unit.name, unit.kind, output, args, epilogue=unit.epilogue))

    def _clamp(self, planned: PlannedUnit) -> None:
        unit = planned.unit
        epilogue = as_epilogue(unit.anchor)
        assert epilogue is not None
        assert epilogue.bounds
        x = self._as_codes(unit.inputs[0])
        output = self._define(planned)
        bounds = quantize(torch.tensor(epilogue.bounds), self._values[output].qparams)  # type: ignore[arg-type]
        attrs = {"low": int(bounds[0]), "high": int(bounds[1])}
        self._nodes.append(Node(unit.name, "clamp", output, (x,), attrs=attrs))

    def _named(self, planned: PlannedUnit) -> None:
        """Ops that keep their ATen name and run on codes."""
        self._move(planned, self._define(planned), self._as_codes)

    def _move(
        self,
        planned: PlannedUnit,
        output: str,
        operand: Callable[[fx.Node], Ref],
        filled: Callable[[float], float] = lambda fill: fill,
    ) -> None:
        """The unit's op on operands of any kind; `filled` is what stands around a padded one."""
        unit, node = planned.unit, planned.unit.anchor
        operands = set(unit.inputs)
        args = fx.map_arg(node.args, lambda n: operand(n) if n in operands else Ref(n.name))
        kwargs = fx.map_arg(node.kwargs, lambda n: operand(n) if n in operands else Ref(n.name))
        target = _target(node)
        if op_name(node) in ("constant_pad_nd", "pad"):
            fill = filled(pad_fill(node))
            qparams = self._values[output].qparams
            assert qparams is not None
            args = (args[0], args[1], int(quantize(torch.tensor(fill), qparams)))
            kwargs, target = {}, "constant_pad_nd.default"
        name = unit.name if output == unit.output.name else f"{unit.name}.rest"
        self._nodes.append(Node(name, unit.kind, output, tuple(args), dict(kwargs), target=target))

    # -- everything else

    def _float(self, node: fx.Node, op: str) -> None:
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node) and source.name in self._values:
            # A part of a tensor that was split as codes.
            part = Ref(f"{node.name}.codes")
            self._values[part.name] = self._values[source.name]
            args = (Ref(source.name), node.args[1])
            self._nodes.append(Node(str(node.meta["layer"]), "shape", part.name, args, target="getitem"))
            self._nodes.append(Node(f"{node.meta['layer']}.dequantize", "dequantize", node.name, (part,)))
            return
        # Sizes do not depend on how a value is held, so they are read off the codes.
        of = (lambda n: Ref(n.name)) if op == "size" else self._as_float
        args, kwargs = fx.map_arg(node.args, of), fx.map_arg(node.kwargs, of)
        self._nodes.append(
            Node(str(node.meta["layer"]), op, node.name, tuple(args), dict(kwargs), target=_target(node))
        )

    def _store(self, name: str, tensor: torch.Tensor) -> str:
        self._tensors[name] = tensor.contiguous()
        return name


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{op_name(node)}.{node.target._overloadname}"
    if node.target is operator.getitem:
        return "getitem"
    return op_name(node)


def _spread(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * dims if len(values) == 1 else values)]
