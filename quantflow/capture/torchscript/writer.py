"""The graph that an import has written so far: its nodes, and the names of its layers and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quantflow.capture.torchscript.failure import CURE, DependsOnBatch
from quantflow.capture.torchscript.values import Module, TracedSize, TracedTensor
from quantflow.errors import CaptureError
from quantflow.ir.calls import Limit

#: Ops that name their constants.
_LINEAR = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_convolution",
    "_convolution_mode", "linear", "batch_norm",
))  # fmt: skip


#: A condition that holds for all sizes below is no limit.
_SEEN = 400


class Writer:
    """Graph, constants and notes, and the module that the walk is in.

    Attributes:
        modules: the modules entered and not left, the innermost last.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.modules: list[Module] = []
        self._constant_nodes: dict[int, tuple[TracedTensor, int, fx.Node]] = {}
        self._notes: dict[str, None] = {}
        self._limits: dict[str, Limit] = {}
        self._nearest = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, each once."""
        return tuple(self._notes)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What branches that were taken ask of sizes."""
        return tuple(self._limits.values())

    def limit(self, condition: str, holds: bool) -> bool:
        """Keep that a branch was taken for this condition; False where the condition can't be kept."""
        if not condition:
            return False
        limit = Limit(condition if holds else f"not ({condition})", self.where().removeprefix(" in ").strip("'"))
        try:
            if all(limit.holds(dict.fromkeys(limit.names, size)) for size in range(1, _SEEN)):
                return True
        except (ValueError, LookupError):
            return False
        self._limits[limit.expression] = limit
        return True

    def note(self, text: str) -> None:
        self._notes[text] = None

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A node for the call, placed in its module."""
        return self._placed(self.graph.call_function(function, args, kwargs))

    def where(self) -> str:
        """For messages: the module that the walk is in."""
        path = self.modules[-1].path if self.modules else ""
        return f" in '{path}'" if path else ""

    def unsupported(self, what: str) -> CaptureError:
        return CaptureError(
            f"mode: TorchScript's {what}{self.where()} can't be imported; {CURE}, or write it with ATen ops"
        )

    def _placed(self, node: fx.Node) -> fx.Node:
        """Say which module the op is in; a graph without calls (a frozen one) goes by the nearest weight."""
        module = self.modules[-1]
        node.meta["module"] = module.path or self._nearest
        node.meta["module_is_leaf"] = bool(module.path) and module.is_leaf
        return node

    def described(self, tensor: TracedTensor) -> fx.Node:
        """The tensor's node, with its shape and dtype; what differs between the runs follows the batch."""
        assert tensor.node is not None
        shapes = [value.shape for value in tensor.values]
        if len({len(shape) for shape in shapes}) > 1:
            raise DependsOnBatch(f"a tensor's rank{self.where()} depends on the batch size")
        tensor.node.meta["shape"] = tuple(s[0] if len(set(s)) == 1 else None for s in zip(*shapes, strict=True))
        tensor.node.meta["dtype"] = tensor.values[0].dtype
        return tensor.node

    def name_weights(self, op: Any, args: list[Any]) -> None:
        """A linear op's constants are named after its module, unless they are parameters with names of their own."""
        name = op._schema.name.removeprefix("aten::")
        if name not in _LINEAR or not isinstance(args[1], TracedTensor) or args[1].node is not None:
            return
        weight = args[1]
        if not weight.is_attribute and not weight.name.endswith("weight"):
            path = self.modules[-1].path or name.lstrip("_").replace("convolution", "conv")
            weight.name = self._free_name(path, ".weight") + ".weight"
        layer = weight.name.removesuffix(".weight")
        if not self.modules[-1].path and layer != weight.name:
            self._nearest = layer.rpartition(".")[0]
        if isinstance(args[2], TracedTensor) and args[2].node is None and not args[2].is_attribute:
            args[2].name = f"{layer}.bias"

    def _free_name(self, wanted: str, suffix: str = "") -> str:
        name, count = wanted, 0
        while name + suffix in self.constants:
            count += 1
            name = f"{wanted}_{count}"
        return name

    def nodes(self, value: Any) -> Any:
        """The value as FX sees it."""
        if isinstance(value, TracedTensor):
            return value.node if value.node is not None else self._constant_node(value)
        if isinstance(value, TracedSize):
            if value.node is None:
                raise DependsOnBatch(
                    f"a number{self.where()} depends on the batch size in a way that can't be written down"
                )
            return value.node
        if isinstance(value, dict):
            return {key: self.nodes(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.nodes(item) for item in value)
        return value

    def _constant_node(self, constant: TracedTensor) -> fx.Node:
        value = constant.values[0]
        known = self._constant_nodes.get(id(value))
        if known is not None and known[1] == value._version:
            return known[2]
        wanted = constant.name or f"constant_{len(self.constants)}"
        if constant.is_attribute and wanted in self.constants and self.constants[wanted].data_ptr() == value.data_ptr():
            name = wanted
        else:
            name = self._free_name(wanted)
        owned = value if constant.is_attribute else value.clone(memory_format=torch.contiguous_format)
        self.constants[name] = owned
        node = self.graph.get_attr(name)
        node.meta = {"shape": tuple(value.shape), "dtype": value.dtype}
        # The tensor is kept so that its id stays its own.
        self._constant_nodes[id(value)] = (constant, value._version, node)
        return node
