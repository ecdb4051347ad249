"""The integer program: pure data that any runtime can execute.

A program is a list of nodes over named values, plus the tensors they read. It is saved as JSON and safetensors and
holds neither code nor import paths: an op is a name from `ops.OPS`, or the name of a functional ATen op.
`program_rules` says what a legal program is, `aten_policy` which ATen ops it may call, `program_json` how it is saved.

What the int8 ops compute (see design: "The numbers, decided once"):

    quantize      q = quantize(x)
    dequantize    x = dequantize(q)
    conv, linear  acc = sum (q_x - zp_x) * q_w;  r = acc * (scale_x * scale_w[c]) + bias[c];
                  r += (q_r - zp_r) * scale_r, or a float32 residual;
                  r = epilogue(r);  then quantized, or left float32.
                  Codes without an activation or behind one that clamps, and no float32 residual: scales and bias are
                  divided by the output's scale beforehand, and each product is added with one rounding: kernels can be
                  equal to the bit
    matmul        acc = sum (q_a - zp_a) * (q_b - zp_b);  r = acc * (scale_a * scale_b)
    add, mul      r = a + b or a * b of the dequantized operands;  r = epilogue(r);  quantized
    avg_pool      r = exact mean of the dequantized operand;  quantized
    cat, max_pool, clamp, shape
                  move or compare codes; output and inputs share one scale and zero point
    recurrence    the steps of an LSTM, GRU or RNN (see `recurrence`) on float32 gates and states, whose product is
                  r = max(1, max|h0|) per sample;  q = quantize(h / r) with scale 1 / 127;
                  p = sum q * q_w * (scale_w[c] / 127) * r;  float32 products without a weight_scale
    aten, size    a float op by its ATen name; arithmetic on sizes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from quantflow.ir.activations import Epilogue
from quantflow.ir.calls import Arguments, Input, Limit
from quantflow.ir.ops import LINEAR_OPS
from quantflow.ir.structure import leaves_of, replaced
from quantflow.numerics.affine import QParams


@dataclass(frozen=True)
class Ref:
    """A value computed earlier, or an input."""

    name: str


@dataclass(frozen=True)
class TensorRef:
    """A tensor stored with the program."""

    name: str


@dataclass(frozen=True)
class Value:
    """How a value is held. `qparams` is None for everything that is not int8 codes.

    `is_nonnegative`: a symmetric int8 value whose codes all lie in [0, 127]; its bytes are also valid uint8 codes.
    """

    qparams: QParams | None = None
    is_nonnegative: bool = False


@dataclass(frozen=True)
class Node:
    """One step. `name` is the layer's name, `output` the value it defines.

    Attributes:
        target: for NAMED_OPS, the ATen overload ("softmax.int"), another library's ("my::gelu.default") or a size
            function.
        attrs: conv and linear: stride, padding, dilation, groups, weight, weight_scale, bias (tensor names);
            clamp: low, high (codes);
            recurrence: cell, reverse, weight, weight_scale, bias (tensor names or None).
    """

    name: str
    op: str
    output: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    epilogue: Epilogue | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def refs(self) -> Iterator[str]:
        """The values it reads."""
        return iter(self._refs)

    @cached_property
    def _refs(self) -> tuple[str, ...]:
        # Loading a program asks for them several times per node.
        return tuple(referenced_values((self.args, tuple(self.kwargs.values()))))

    @property
    def fused_name(self) -> str:
        """What is computed in one kernel: "conv_sum_relu"."""
        parts = [self.op]
        if self.op in LINEAR_OPS and self.args[1] is not None:
            parts.append("sum")
        if self.epilogue is not None:
            parts.append(self.epilogue.kind)
        return "_".join(parts)


@dataclass(frozen=True)
class Program:
    """Inputs, nodes in execution order, values, tensors and the structure of the output.

    Attributes:
        output: a tree over values, stored tensors and constants (`ir.structure`).
        batch_is_dynamic: whether the number of samples varies.
        arguments: where the inputs lie among the model's arguments; None: they are these.
        limits: what the sizes of a call must fulfil.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    tensors: Mapping[str, torch.Tensor]
    output: Any
    batch_is_dynamic: bool = True
    arguments: Arguments | None = None
    limits: tuple[Limit, ...] = ()

    def int8_nodes(self) -> list[Node]:
        """The convolutions and linears: those that exist in a program are int8."""
        return [node for node in self.nodes if node.op in LINEAR_OPS]

    def int8_layers(self) -> dict[int, Node]:
        """By index, the nodes that multiply by int8 weights: convolutions, linears, and recurrent steps on codes."""
        found = ((index, node) for index, node in enumerate(self.nodes))
        return {i: n for i, n in found if n.op in LINEAR_OPS or n.attrs.get("weight_scale") is not None}

    def output_names(self) -> list[str]:
        """The values the model returns, in the order of its output structure."""
        return list(referenced_values(self.output))

    def last_uses(self) -> dict[int, list[str]]:
        """Node index → values nothing reads after it."""
        last = {ref: index for index, node in enumerate(self.nodes) for ref in node.refs()}
        kept = set(referenced_values(self.output))
        frees: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in kept:
                frees.setdefault(index, []).append(name)
        return frees

    def to_json(self) -> dict[str, Any]:
        """What program.json holds."""
        from quantflow.ir import program_json

        return program_json.to_json(self)

    @staticmethod
    def from_json(data: Any, tensors: Mapping[str, torch.Tensor], operators: Sequence[str] | None = ()) -> Program:
        """Rebuild and check a program. Nothing is executed, and nothing that the program names is imported.

        Args:
            operators: patterns of the operators that it may call besides ATen's ("my::*"); None: it is read, never run.

        Raises:
            ArtifactError: names the node and the field that is not legal.
        """
        from quantflow.ir import program_json

        return program_json.from_json(data, tensors, operators)


def referenced_values(value: Any) -> Iterator[str]:
    """The values that a nesting of arguments names."""
    yield from (ref.name for ref in leaves_of(value) if isinstance(ref, Ref))


def referenced_tensors(value: Any) -> Iterator[str]:
    """The stored tensors that it names."""
    yield from (ref.name for ref in leaves_of(value) if isinstance(ref, TensorRef))


def substitute(value: Any, of: Callable[[Ref | TensorRef], Any]) -> Any:
    """The same nesting with every reference replaced."""
    return replaced(value, lambda leaf: of(leaf) if isinstance(leaf, (Ref, TensorRef)) else leaf)
