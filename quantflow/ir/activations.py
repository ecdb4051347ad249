"""The activations that one kernel computes behind a sum: all that is known about each, in one table.

Adding one takes a row here and one in the native library's table (native/src), which `quantflow selftest` and the tests
then hold against each other. `quantflow.runtimes.kernels` names those that PyTorch's int8 kernels compute themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from quantflow.ir.graph import arguments, is_aten, op_name
from quantflow.numerics.agreement import TIE_CODES, TRANSCENDENTAL_TIE_CODES


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One row.

    Attributes:
        formula: f(r, *numbers) in float32. This is the specification; every kernel is compared with it.
        aten: its op in a captured graph.
        when: arguments of that op that tell it from other activations.
        numbers: the op's arguments that become its numbers, in order.
        example: such numbers, for the self-test.
        bounds: of a clamp: (low, high) from its numbers. Codes are clamped as real numbers are.
        is_nonnegative: f(x) >= 0 for every x. A clamp's bounds say so by themselves, here and in the next.
        keeps_nonnegative: f(x) >= 0 for every x >= 0.
        is_homogeneous: f(c x) = c f(x) for every c > 0.
        is_approximated: libraries approximate it, each in its own way.
    """

    formula: Callable[..., torch.Tensor]
    aten: str
    when: Mapping[str, Any] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    example: tuple[float, ...] = ()
    bounds: Callable[..., tuple[float, float]] | None = None
    is_nonnegative: bool = False
    keeps_nonnegative: bool = False
    is_homogeneous: bool = False
    is_approximated: bool = False


#: By the names that programs use.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(formula=F.relu, aten="relu", bounds=lambda: (0.0, math.inf), is_homogeneous=True),
    "hardtanh": Activation(
        formula=lambda r, low, high: r.clamp(low, high),
        aten="hardtanh",
        numbers=("min_val", "max_val"),
        example=(-0.4, 1.3),
        bounds=lambda low, high: (low, high),
    ),
    "hardswish": Activation(formula=F.hardswish, aten="hardswish", keeps_nonnegative=True, is_approximated=True),
    "hardsigmoid": Activation(formula=F.hardsigmoid, aten="hardsigmoid", is_nonnegative=True, is_approximated=True),
    "silu": Activation(formula=F.silu, aten="silu", keeps_nonnegative=True, is_approximated=True),
    "sigmoid": Activation(formula=torch.sigmoid, aten="sigmoid", is_nonnegative=True, is_approximated=True),
    "gelu": Activation(
        formula=F.gelu, aten="gelu", when={"approximate": "none"}, keeps_nonnegative=True, is_approximated=True
    ),
    "gelu_tanh": Activation(
        formula=lambda r: F.gelu(r, approximate="tanh"),
        aten="gelu",
        when={"approximate": "tanh"},
        keeps_nonnegative=True,
        is_approximated=True,
    ),
    "leaky_relu": Activation(
        formula=F.leaky_relu,
        aten="leaky_relu",
        numbers=("negative_slope",),
        example=(0.1,),
        keeps_nonnegative=True,
        is_homogeneous=True,
    ),
    "tanh": Activation(formula=torch.tanh, aten="tanh", keeps_nonnegative=True, is_approximated=True),
}
#: Other spellings of a clamp: (low, high) from the op's arguments, None for a side left open.
_CLAMPS: dict[str, Callable[[Mapping[str, Any]], tuple[Any, Any]]] = {
    "relu6": lambda _: (0.0, 6.0),
    "clamp": lambda given: (given["min"], given["max"]),
    "clamp_min": lambda given: (given["min"], None),
    "clamp_max": lambda given: (None, given["max"]),
}
#: The table's ATen ops, each once.
ATEN = tuple(dict.fromkeys(activation.aten for activation in ACTIVATIONS.values()))
#: Those that scale with their input.
HOMOGENEOUS = tuple(activation.aten for activation in ACTIVATIONS.values() if activation.is_homogeneous)


@dataclass(frozen=True)
class Epilogue:
    """An activation applied to the float32 accumulator before it is quantized.

    `kind` is a name in ACTIVATIONS, `values` are its numbers (hardtanh: low, high; leaky_relu: slope).
    """

    kind: str
    values: tuple[float, ...] = ()

    @property
    def activation(self) -> Activation:
        """Its row of the table."""
        found = ACTIVATIONS.get(self.kind)
        if found is None:
            raise ValueError(f"epilogue {self.kind!r} is not known")
        return found

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(low, high) of a clamp; None for the others."""
        bounds = self.activation.bounds
        return None if bounds is None else bounds(*self.values)

    @property
    def is_nonnegative(self) -> bool:
        """Whether f(x) >= 0 for every x."""
        return min(self.bounds) >= 0 if self.bounds else self.activation.is_nonnegative

    @property
    def keeps_nonnegative(self) -> bool:
        """Whether x >= 0 gives f(x) >= 0."""
        if self.bounds:
            return self.bounds[1] >= 0
        return self.is_nonnegative or self.activation.keeps_nonnegative


def as_epilogue(node: fx.Node) -> Epilogue | None:
    """The activation a node computes, or None."""
    if not is_aten(node, *ATEN, *_CLAMPS):
        return None
    return epilogue_of(op_name(node), arguments(node))


def epilogue_of(op: str, given: Mapping[str, Any]) -> Epilogue | None:
    """The activation that an ATen op computes with arguments of these names, or None."""
    if op in _CLAMPS:
        return _clamp(*_CLAMPS[op](given))
    for kind, activation in ACTIVATIONS.items():
        if activation.aten == op and all(given[name] == value for name, value in activation.when.items()):
            numbers = tuple(float(given[name]) for name in activation.numbers)
            return None if any(map(math.isnan, numbers)) else Epilogue(kind, numbers)
    return None


def _clamp(low: Any, high: Any) -> Epilogue | None:
    """A clamp to numbers; None leaves a side open."""
    if not all(bound is None or (isinstance(bound, (int, float)) and bound == bound) for bound in (low, high)):
        return None
    if low == 0 and high is None:
        return Epilogue("relu")
    return Epilogue("hardtanh", (-math.inf if low is None else float(low), math.inf if high is None else float(high)))


def apply_epilogue(r: torch.Tensor, epilogue: Epilogue | None) -> torch.Tensor:
    """The fused activation, in float32."""
    return r if epilogue is None else epilogue.activation.formula(r, *epilogue.values)


def tie_tolerance(epilogue: Epilogue | None) -> float:
    """How far from a tie, in codes, a difference between two runtimes is still legal after this activation."""
    is_approximated = epilogue is not None and epilogue.activation.is_approximated
    return TRANSCENDENTAL_TIE_CODES if is_approximated else TIE_CODES
