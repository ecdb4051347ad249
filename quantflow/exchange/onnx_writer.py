"""Writes ONNX nodes: names, constants, sizes, and what is known of every value."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantflow.errors import UnavailableError, UsageError
from quantflow.ir.program import Node, Program, Ref, TensorRef
from quantflow.numerics.affine import QParams

#: The oldest opset with LayerNormalization, which most runtimes in use take. Its QuantizeLinear is per channel.
OPSET = 17
IR_VERSION = 8


def onnx_package() -> Any:
    """
    Raises:
        UnavailableError: it is not installed.
    """
    return _package("onnx")


def onnxruntime_package() -> Any:
    """
    Raises:
        UnavailableError: it is not installed.
    """
    return _package("onnxruntime")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"ONNX: the package {name} is not installed ({error}); run pip install 'quantflow[onnx]'"
        ) from error


class Writer:
    """The ONNX graph so far.

    Args:
        program: whose nodes are written.
        seen: value → what it was in one run: a tensor, a size, or a list of tensors.
    """

    def __init__(self, program: Program, seen: Mapping[str, Any]) -> None:
        self.onnx = onnx_package()
        self.program, self.seen = program, seen
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.names: dict[str, Any] = {}
        self.float_layers: dict[str, str] = {}
        self.at = program.nodes[0]
        self._count = 0

    # -- what is written

    def fresh(self, hint: str) -> str:
        self._count += 1
        return f"{self.at.output}/{hint}_{self._count}"

    def add(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """A node with one result; gives its name."""
        output = output or self.fresh(op)
        name = f"{self.at.name}/{op}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def add_many(self, op: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        outputs = [self.fresh(op) for _ in range(count)]
        name = f"{self.at.name}/{op}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return outputs

    def tensor(self, x: torch.Tensor, name: str | None = None) -> str:
        """An initializer."""
        name = name or self.fresh("constant")
        if name not in self.initializers:
            if x.dtype is torch.bfloat16:
                raise self.refused("a bfloat16 tensor")
            array = x.detach().cpu().contiguous().numpy()
            self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        return self.tensor(torch.tensor(values, dtype=torch.int64))

    def number(self, value: float, dtype: torch.dtype) -> str:
        return self.tensor(torch.tensor(value, dtype=dtype))

    def cast(self, name: str, found: torch.dtype, wanted: torch.dtype) -> str:
        return name if found is wanted else self.add("Cast", [name], to=self.onnx_type(wanted))

    def onnx_type(self, dtype: torch.dtype) -> int:
        array = torch.empty(0, dtype=dtype).numpy()
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(array.dtype))

    # -- what is read

    def of(self, argument: Any) -> str:
        """The name of an argument that is a tensor."""
        if isinstance(argument, Ref):
            found = self.names[argument.name]
            assert isinstance(found, str), "several results are taken apart by getitem"
            return found
        if isinstance(argument, TensorRef):
            return self.tensor(self.program.tensors[argument.name], argument.name)
        raise self.refused(f"{argument!r} in a tensor's place")

    def value(self, argument: Any) -> Any:
        """What the argument was in the run that was seen."""
        if isinstance(argument, Ref):
            return self.seen[argument.name]
        return self.program.tensors[argument.name] if isinstance(argument, TensorRef) else argument

    def rank(self, argument: Any) -> int:
        return int(self.value(argument).dim())

    def dtype(self, argument: Any) -> torch.dtype:
        found: torch.dtype = self.value(argument).dtype
        return found

    def is_size(self, argument: Any) -> bool:
        return isinstance(argument, Ref) and isinstance(self.seen[argument.name], (int, bool))

    def size(self, argument: Any) -> str:
        """A whole number, known or computed, as an int64 tensor of one element."""
        if self.is_size(argument):
            return self.of(argument)
        if isinstance(argument, int):
            return self.ints(argument)
        raise self.refused(f"{argument!r} as a size")

    def sizes(self, arguments: Sequence[Any]) -> str:
        """Several as an int64 vector."""
        if all(isinstance(each, int) for each in arguments):
            return self.ints(*arguments)
        return self.add("Concat", [self.size(each) for each in arguments], axis=0)

    def as_operand(self, argument: Any, dtype: torch.dtype) -> str:
        """A tensor, size or number as a tensor of that dtype."""
        if isinstance(argument, (bool, int, float)):
            return self.number(argument, dtype)
        if self.is_size(argument):
            return self.cast(self.of(argument), torch.int64, dtype)
        return self.cast(self.of(argument), self.dtype(argument), dtype)

    # -- codes

    def coded(self, x: str, q: QParams, output: str) -> str:
        """x rounded to codes, as the real numbers that these stand for."""
        self.names[output] = output
        return self.decoded(self.add("QuantizeLinear", [x, *self.scale_and_zero(q)], f"{output}.codes"), q, output)

    def decoded(self, codes: str, q: QParams, output: str) -> str:
        return self.add("DequantizeLinear", [codes, *self.scale_and_zero(q)], output)

    def scale_and_zero(self, q: QParams) -> tuple[str, str]:
        return (
            self.tensor(torch.tensor(q.scale, dtype=torch.float32)),
            self.tensor(torch.tensor(q.zero_point, dtype=q.torch_dtype)),
        )

    def qparams(self, argument: Any) -> QParams | None:
        name = argument.name if isinstance(argument, Ref) else argument
        value = self.program.values.get(name)
        return None if value is None else value.qparams

    def refused(self, what: str, node: Node | None = None) -> UsageError:
        node = node or self.at
        op = node.target or node.op
        return UsageError(
            f"ONNX: layer '{node.name}' ({op}) can't be written: {what} has no form in QDQ ONNX (opset {OPSET}); "
            "export a model without it, or a part of the model"
        )
