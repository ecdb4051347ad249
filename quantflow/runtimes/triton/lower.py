"""Program nodes → steps: what is called with which values, node by node, and with neighbours joined for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantflow.ir.aten_policy import aten_op
from quantflow.ir.graph import SIZE_FUNCTIONS
from quantflow.ir.ops import LINEAR_OPS
from quantflow.ir.program import Node, Program, TensorRef, referenced_tensors, substitute
from quantflow.ir.recurrence import STATE_STEPS, initial, reach, state_codes, steps
from quantflow.numerics.affine import QParams
from quantflow.runtimes.reference import qparams_of
from quantflow.runtimes.triton import operators
from quantflow.runtimes.triton.cards import Card
from quantflow.runtimes.triton.joins import joined
from quantflow.runtimes.triton.layers import Finish, Layer
from quantflow.runtimes.triton.operators import Pool
from quantflow.runtimes.triton.pads import Around, surrounded
from quantflow.runtimes.triton.precision import Halves

Values = Mapping[str, Any]
#: Ops that have no kernel → why PyTorch computes them.
WITHOUT_KERNEL = {"recurrence": "its steps follow each other: exact products in float64, one PyTorch call per step"}
#: Float convolutions, which PyTorch would compute in TF32: 10 bits of each operand.
_CONVOLUTIONS = ("conv1d.default", "conv2d.default", "conv3d.default", "convolution.default")


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        nodes: the program's nodes that it computes; the last one names it.
        reads, writes: values.
        run: values → what it writes, in order.
    """

    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Values], tuple[Any, ...]]


class Lowering:
    """A program on a card.

    Attributes:
        outputs: values that the program returns.
        alone: a step per node, on values as the program defines them.
        whole: a step per node of a whole run, which may hold floats in half precision.
        together: the steps of a whole run, neighbours joined.
    """

    def __init__(self, program: Program, card: Card, held: torch.dtype = torch.float32) -> None:
        """
        Args:
            held: how a whole run holds floats where that is tolerated.
        """
        self.program, self.card = program, card
        self._readers: dict[str, list[int]] = {}
        for index, node in enumerate(program.nodes):
            for name in node.refs():
                self._readers.setdefault(name, []).append(index)
        self._makers = {node.output: index for index, node in enumerate(program.nodes)}
        self.outputs = set(program.output_names())
        wanted = {name for node in program.nodes for name in referenced_tensors((node.args, dict(node.kwargs)))}
        wanted |= set(referenced_tensors(program.output))
        #: Tensors that steps and the output read as they are, on the card.
        self.tensors = {name: program.tensors[name].to(card.device) for name in sorted(wanted)}
        self.layers: dict[int, Layer] = {}
        self.halves = Halves(program, self._readers, torch.float32)
        self.alone = self.whole = [self._step(index) for index in range(len(program.nodes))]
        if held is not torch.float32:
            self.halves = Halves(program, self._readers, held)
            self._half_tensors: dict[str, Tensor] = {}
            self.whole = [self._step(index) for index in range(len(program.nodes))]
        self.together = joined(self)

    def _step(self, index: int) -> Step:
        node = self.program.nodes[index]
        run = self._call(index, node)
        return Step((index,), tuple(dict.fromkeys(node.refs())), (node.output,), lambda values: (run(values),))

    def _call(self, index: int, node: Node) -> Callable[[Values], Any]:
        program, out, held = self.program, qparams_of(self.program, node.output), self.halves.of(node)
        match node.op:
            case "quantize":
                channels_last, (x,) = self.wants_channels_last(node.output), node.args
                return lambda values: operators.quantize(self.value(x, values), _known(out), channels_last)
            case "dequantize":
                q, (x,) = _known(qparams_of(program, node.args[0].name)), node.args
                return lambda values: operators.dequantize(values[x.name], q, held)
            case "conv" | "linear":
                layer = self.layers.get(index) or self.layer(node)
                self.layers[index] = layer
                x, residual = node.args
                return lambda values: layer(values[x.name], None if residual is None else values[residual.name], held)
            case "matmul":
                (a, b), (qa, qb) = node.args, (_known(qparams_of(program, r.name)) for r in node.args)
                return lambda values: operators.matmul(values[a.name], qa, values[b.name], qb, out, held)
            case "add" | "mul":
                (a, b), (qa, qb) = node.args, (_known(qparams_of(program, r.name)) for r in node.args)
                return lambda values: operators.pair(
                    values[a.name], qa, values[b.name], qb, out, node.epilogue, is_product=node.op == "mul", held=held
                )
            case "max_pool" | "avg_pool":
                return self._pool(node, out, held)
            case "clamp":
                x, low, high = node.args[0].name, node.attrs["low"], node.attrs["high"]
                return lambda values: values[x].clamp(low, high)
            case "recurrence":
                return self._recurrence(node)
            case "size" | "shape" if node.target in SIZE_FUNCTIONS:
                function = SIZE_FUNCTIONS[node.target]
                return lambda values: function(*self.value(node.args, values))
            case "shape" if "upsample" in node.target:
                op = aten_op(node.target)
                # PyTorch moves bytes up, but no int8.
                return lambda values: _as_bytes(op, *self.value(node.args, values), **self.value(node.kwargs, values))
            case _:
                return self._aten(node)

    def value(self, argument: Any, values: Values) -> Any:
        return substitute(argument, lambda r: self.tensors[r.name] if isinstance(r, TensorRef) else values[r.name])

    def full(self, argument: Any, values: Values) -> Any:
        """As `value`, what is held in half precision as float32."""
        return substitute(
            argument,
            lambda r: self.tensors[r.name] if isinstance(r, TensorRef) else self.as_float32(r.name, values[r.name]),
        )

    def as_float32(self, name: str, value: Any) -> Any:
        """A value of the program as the program defines it."""
        is_half = name in self.halves and isinstance(value, Tensor) and value.dtype is self.halves.held
        return value.to(torch.float32) if is_half else value

    def half(self, argument: Any, values: Values) -> Any:
        """As `value`, in half precision what is float32."""
        return substitute(
            argument,
            lambda r: (
                self._half_tensor(r.name) if isinstance(r, TensorRef) else _to_half(values[r.name], self.halves.held)
            ),
        )

    def _half_tensor(self, name: str) -> Tensor:
        if name not in self._half_tensors:
            self._half_tensors[name] = _to_half(self.tensors[name], self.halves.held)
        return self._half_tensors[name]

    def wants_channels_last(self, name: str) -> bool | None:
        """How those who read codes take them."""
        ops = {self.program.nodes[reader].op for reader in self._readers.get(name, ())}
        if ops & {"conv", "max_pool"}:
            return True
        return False if "linear" in ops else None

    def readers(self, name: str) -> list[int]:
        """Nodes that read a value."""
        return self._readers.get(name, [])

    def only_reader(self, name: str) -> int | None:
        """The one node that reads a value; None: several do, or none, or whoever calls the program."""
        found = self.readers(name)
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def maker(self, name: str) -> int | None:
        """The node that makes a value; None: it is an input."""
        return self._makers.get(name)

    def qparams(self, name: str) -> QParams:
        """How a value that is codes is coded."""
        return _known(qparams_of(self.program, name))

    def call_aten(self, node: Node, values: Values) -> Any:
        """An op of PyTorch on given values."""
        return aten_op(node.target)(*self.value(node.args, values), **self.value(dict(node.kwargs), values))

    def call_half(self, node: Node, values: Values) -> Any:
        """An op of PyTorch in half precision."""
        return aten_op(node.target)(*self.half(node.args, values), **self.half(dict(node.kwargs), values))

    def layer(self, node: Node, kind: type[Layer] = Layer, around: Around | None = None) -> Layer:
        """A node's layer; `around`: what its operand is padded with in front of and behind each dimension, too."""
        program, a = self.program, node.attrs
        tensors, (x, residual) = program.tensors, node.args
        qr = None if residual is None else qparams_of(program, residual.name)
        finish = Finish(
            _known(qparams_of(program, x.name)), qparams_of(program, node.output), qr,
            residual is not None and qr is None, node.epilogue,
        )  # fmt: skip
        geometry = surrounded(node, around) if node.op == "conv" else None
        bias = None if a["bias"] is None else tensors[a["bias"]]
        return kind(tensors[a["weight"]], tensors[a["weight_scale"]], bias, geometry, finish, self.card)

    def _pool(self, node: Node, out: QParams | None, held: torch.dtype) -> Callable[[Values], Any]:
        x = node.args[0].name
        pool = Pool(node.target, _known(qparams_of(self.program, x)), out)
        names = [argument.name for argument in aten_op(node.target)._schema.arguments[1:]]  # type: ignore[attr-defined]

        def run(values: Values) -> Tensor:
            given = dict(zip(names, self.value(node.args[1:], values), strict=False))
            return pool(values[x], given | self.value(dict(node.kwargs), values), held)

        return run

    def _recurrence(self, node: Node) -> Callable[[Values], Any]:
        a, tensors, device = node.attrs, self.program.tensors, self.card.device
        weight = tensors[a["weight"]].to(device).t()
        bias = None if a["bias"] is None else tensors[a["bias"]].to(device)
        scale = (
            None
            if a["weight_scale"] is None
            else tensors[a["weight_scale"]].to(device)
            * torch.tensor(1 / STATE_STEPS, dtype=torch.float32, device=device)
        )
        wide = weight if scale is None else weight.to(torch.float64)

        def run(values: Values) -> Tensor:
            gates, h0, c0 = self.full(node.args, values)
            h = initial(gates, a["cell"], h0)
            c = initial(gates, a["cell"], c0) if a["cell"] == "lstm" else None
            if scale is None:
                return steps(a["cell"], lambda state: state @ weight, gates, bias, h, c, a["reverse"])
            r = reach(h)

            def product(state: Tensor) -> Tensor:
                return (state_codes(state, r).to(torch.float64) @ wide).to(torch.float32) * scale * r

            return steps(a["cell"], product, gates, bias, h, c, a["reverse"])

        return run

    def _aten(self, node: Node) -> Callable[[Values], Any]:
        """An op of PyTorch, on the card: what it makes from nothing is made there."""
        op, device = aten_op(node.target), self.card.device
        args = tuple(device if isinstance(v, torch.device) else v for v in node.args)
        kwargs: dict[str, Any] = {k: device if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
        schema = op._schema  # type: ignore[attr-defined]
        if device not in args and any(argument.name == "device" for argument in schema.arguments):
            has_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
            if not has_tensors or kwargs.get("device") is not None:
                kwargs["device"] = device
        value = self.half if self.halves.computes(node) else self.value if node.output in self.halves else self.full
        if node.target in _CONVOLUTIONS:
            return lambda values: _float_convolution(op, value(args, values), value(kwargs, values))
        return lambda values: op(*value(args, values), **value(kwargs, values))


def last_uses(made: Sequence[Step], kept: set[str]) -> dict[int, list[str]]:
    """Step → values that no later step reads, but for those that are kept."""
    last = {name: index for index, step in enumerate(made) for name in step.reads}
    frees: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            frees.setdefault(index, []).append(name)
    return frees


def int8_layers(program: Program) -> int:
    """The layers of a program that kernels of int8 products compute."""
    return sum(node.op in LINEAR_OPS for node in program.int8_layers().values())


def _float_convolution(op: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    dims = given["weight"].dim() - 2
    if given["input"].dim() != dims + 2:
        return op(*args, **kwargs)

    def spread(name: str, default: int) -> list[int]:
        value = given.get(name, default)
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    return torch.ops.aten._convolution(
        given["input"], given["weight"], given.get("bias"), spread("stride", 1), spread("padding", 0),
        spread("dilation", 1), given.get("transposed", False), spread("output_padding", 0), given.get("groups", 1),
        False, False, True, False,
    )  # fmt: skip


def _to_half(value: Any, held: torch.dtype) -> Any:
    return value.to(held) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def _as_bytes(op: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> Any:
    return op(x.view(torch.uint8), *rest, **kwargs).view(x.dtype)


def _known(qparams: QParams | None) -> QParams:
    assert qparams is not None, "the program was checked when it was built"
    return qparams
