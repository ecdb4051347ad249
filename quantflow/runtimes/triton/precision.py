"""Which float values of a program are held in half precision, where that is asked for.

Ops that tolerate it compute in it and hand it on; moves hand on what they are given; every other op of PyTorch gets
float32, and what the program returns is float32. An int8 layer writes half precision where somebody wants it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantflow.ir.ops import SHAPES
from quantflow.ir.program import Node, Program

#: Ops whose error in half precision is that of their operands and of one rounding: sums inside are float32.
_TOLERANT = frozenset(
    f"{name}.{overload}"
    for overload, names in {
        "default": ("layer_norm", "group_norm", "rms_norm", "scaled_dot_product_attention", "gelu", "relu", "silu",
                    "sigmoid", "tanh", "hardtanh", "hardswish", "leaky_relu", "elu", "linear", "matmul", "bmm",
                    "conv1d", "conv2d", "conv3d", "convolution"),
        "Tensor": ("add", "sub", "mul"),
        "int": ("softmax",),
    }.items()
    for name in names
)  # fmt: skip
#: They hand on what they are given.
_HANDING_ON = frozenset({*SHAPES, "cat", "stack", "contiguous", "clone", "getitem"})
#: Ops on codes that give floats where nobody wants codes.
_LAYERS = frozenset({"conv", "linear", "matmul", "dequantize", "add", "mul", "avg_pool"})
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Halves:
    """The values that are held in half precision.

    Attributes:
        held: the type; float32: none is.
    """

    def __init__(self, program: Program, readers: Mapping[str, Sequence[int]], held: torch.dtype) -> None:
        self.held = held
        self._program = program
        outputs = set(program.output_names())
        self._wanted: set[str] = set()
        if held is not torch.float32:
            for node in reversed(program.nodes):
                if node.output not in outputs and any(
                    self._asks(program.nodes[i]) for i in readers.get(node.output, ())
                ):
                    self._wanted.add(node.output)
        self._halves: set[str] = set()
        for node in program.nodes:
            if self._makes(node):
                self._halves.add(node.output)

    def __contains__(self, name: str) -> bool:
        """Whether a value, if it is a float, is held in half precision."""
        return name in self._halves

    def __len__(self) -> int:
        return len(self._halves)

    def computes(self, node: Node) -> bool:
        """Whether PyTorch computes the op in half precision."""
        return self.held is not torch.float32 and node.op == "aten" and node.target in _TOLERANT

    def of(self, node: Node) -> torch.dtype:
        """The type of a node's result, if it is a float."""
        return self.held if node.output in self else torch.float32

    def _asks(self, reader: Node) -> bool:
        return self.computes(reader) or (_hands_on(reader) and reader.output in self._wanted)

    def _makes(self, node: Node) -> bool:
        if node.op in _LAYERS:
            value = self._program.values.get(node.output)
            return (value is None or value.qparams is None) and node.output in self._wanted
        return self.computes(node) or (_hands_on(node) and any(name in self._halves for name in node.refs()))


def _hands_on(node: Node) -> bool:
    return node.op in ("aten", "shape") and node.target.partition(".")[0] in _HANDING_ON
