"""Imperative mode: the official eager workflow's steps on an ordinary nn.Module.

    insert_observers   a copy of the module with an observer in front of every layer that will be int8
    swap_modules       a copy with those layers replaced by int8 ones whose repr shows their qparams

Everything else stays the user's own code and computes in float, a residual `+` included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.passes.transposed_convolutions import Phases
from quantflow.ir.plan import Plan, PlannedUnit
from quantflow.ir.program import Node, Program, Ref
from quantflow.ir.units import CORE
from quantflow.numerics.affine import QParams
from quantflow.runtimes import Runtime
from quantflow.runtimes.ordinary import Fixed, below_autograd, ordinary, outside_compilers, refuse_export

OnValue = Callable[[str, torch.Tensor], None]


def called_modules(module: nn.Module, batch: Batch) -> dict[str, int]:
    """Modules that are called as modules (not just read for their weight) → how often in one forward."""
    counts: dict[str, int] = {}
    hooks = []
    for name, child in module.named_modules():
        hooks.append(child.register_forward_hook(_counter(counts, name)))
    try:
        with torch.inference_mode():
            module(*batch.args, **batch.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def _counter(counts: dict[str, int], name: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    return count


def fixed_constants(module: nn.Module, graph: Graph) -> frozenset[str]:
    """The constants that `carry_over` can't write back: those that are no parameter or buffer as they stand."""
    return frozenset(graph.constants.keys() - _carried(module, graph).keys())


def carry_over(module: nn.Module, original: Graph, rewritten: Graph) -> nn.Module:
    """The module with the constants in which `rewritten` differs from `original`; itself where none differs.

    A layer whose BatchNorm was folded gets the folded numbers, and the BatchNorm becomes Identity.
    """
    changed = {name: value for name, value in rewritten.constants.items() if value is not original.constants.get(name)}
    if not changed:
        return module
    copied, places = _copied(module), _carried(module, original)
    folded = {f"{n.meta['layer']}.folded_weight": n for n in original.fx.nodes if "batch_norm" in n.meta}
    # A folded layer needs both of its numbers as soon as one of them changed.
    for name in [n for n in folded if n in changed or n.replace("folded_weight", "folded_bias") in changed]:
        for role in (name, name.replace("folded_weight", "folded_bias")):
            changed.setdefault(role, rewritten.constants[role])
        _replace(copied, folded[name].meta["batch_norm"], nn.Identity())
    for name, value in changed.items():
        owner, role = places[name]
        layer = copied.get_submodule(owner)
        if role in layer._buffers:
            layer.register_buffer(role, value)
        else:
            layer.register_parameter(role, nn.Parameter(value, requires_grad=False))
    return copied


def _carried(module: nn.Module, graph: Graph) -> dict[str, tuple[str, str]]:
    """Constant → (module, attribute) that holds it, or will once its BatchNorm is gone."""
    places: dict[str, tuple[str, str]] = {}
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name in graph.constants and graph.constants[name].shape == value.shape:
            owner, _, role = name.rpartition(".")
            places[name] = (owner, role)
    for node in graph.fx.nodes:
        if "batch_norm" in node.meta:
            for role in ("weight", "bias"):
                places[f"{node.meta['layer']}.folded_{role}"] = (str(node.meta["owner"]), role)
    return places


class Observed(nn.Module):
    """A float layer that shows its input to an observer first. `values` are the graph's names of that input."""

    def __init__(self, layer: nn.Module, values: tuple[str, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.values = values
        self.on_value: OnValue | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.on_value is not None:
            for value in self.values:
                self.on_value(value, x)
        return self.layer(x, *args, **kwargs)


def insert_observers(module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the module in which every layer that will be int8 is wrapped in `Observed`."""
    observed = _copied(module)
    for name, units in _int8_modules(plan).items():
        values = tuple(dict.fromkeys(p.unit.inputs[0].name for p in units))
        layer = observed.get_submodule(name)
        wrapped = Observed(layer, values)
        _move_hooks(layer, wrapped, "_forward_pre_hooks")
        _replace(observed, name, wrapped)
    return observed


def run_observed(module: nn.Module, batch: Batch, on_value: OnValue) -> Any:
    """One forward of a module from `insert_observers`."""
    layers = [child for child in module.modules() if isinstance(child, Observed)]
    try:
        for layer in layers:
            layer.on_value = on_value
        return module(*batch.args, **batch.kwargs)
    finally:
        for layer in layers:
            layer.on_value = None


class Int8Layer(Fixed, nn.Module):
    """A convolution or linear that computes in int8 and exchanges float32 tensors with its neighbours.

    The input is quantized, the kernel's float32 result has the folded BatchNorm and the fused activation applied. Of a
    transposed convolution the kernel computes the phases, which are put together here.
    """

    _immutable = ("node", "qparams", "_program", "weight", "weight_scale", "bias")

    def __init__(self, node: Node, program: Program, runtime: Runtime, phases: Phases | None = None) -> None:
        super().__init__()
        assert runtime.layer is not None, "a runtime that serves imperative mode computes layers"
        x = node.args[0]
        assert isinstance(x, Ref)
        qparams = program.values[x.name].qparams
        assert qparams is not None
        self.node = node
        self.phases = phases
        self.qparams: QParams = qparams
        self.runtime = runtime.name
        self._compute = runtime.layer
        a = node.attrs
        self.register_buffer("weight", program.tensors[a["weight"]])
        self.register_buffer("weight_scale", program.tensors[a["weight_scale"]])
        self.register_buffer("bias", None if a["bias"] is None else program.tensors[a["bias"]])
        self._program = Program((), (node,), {x.name: program.values[x.name]}, program.tensors, None)

    @outside_compilers
    def forward(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """
        Args:
            output_size: what a transposed convolution may be asked for.

        Raises:
            ValueError: it is another size than the captured one's, of which the layer holds nothing.
        """
        refuse_export()
        with below_autograd():
            y = self._compute(self._program, x)
            if self.phases is not None:
                y = self.phases.put_together(y)
        sizes = list(y.shape[2:])
        if output_size is not None and list(output_size)[-len(sizes) :] != sizes:
            raise ValueError(
                f"int8 {self.node.name}: output_size {list(output_size)} is not possible, this input gives {sizes}; "
                "the output padding is the one of the calibration data"
            )
        result: torch.Tensor = ordinary(y, (x,))
        return result

    def extra_repr(self) -> str:
        q, shape = self.qparams, "x".join(map(str, self.weight.shape))
        per = "per_channel" if self.weight_scale.numel() > 1 else "per_tensor"
        return (
            f"{self.node.fused_name}, weight=int8[{shape}] {per}, "
            f"input={q.dtype}(scale={q.scale:.6g}, zero_point={q.zero_point}), runtime={self.runtime}"
        )


def swap_modules(module: nn.Module, plan: Plan, program: Program, runtime: Runtime) -> nn.Module:
    """A copy of the module with int8 layers in place and folded BatchNorms replaced by Identity."""
    swapped = _copied(module).eval()
    nodes = {node.name: node for node in program.int8_nodes()}
    for name, units in _int8_modules(plan).items():
        anchor = units[0].unit.anchor
        layer = Int8Layer(nodes[units[0].unit.name], program, runtime, anchor.meta.get("transposed"))
        _move_hooks(swapped.get_submodule(name), layer, "_forward_pre_hooks", "_forward_hooks")
        _replace(swapped, name, layer)
        folded = anchor.meta.get("batch_norm")
        if folded:
            _replace(swapped, folded, nn.Identity())
    for parameter in swapped.parameters():
        parameter.requires_grad_(False)
    return swapped


def int8_calls(module: nn.Module, batch: Batch) -> int:
    """Calls of int8 layers in one forward of a swapped module."""
    called = called_modules(module, batch)
    return sum(called.get(name, 0) for name, child in module.named_modules() if isinstance(child, Int8Layer))


def int8_layers(module: nn.Module) -> int:
    """Int8 layers in a swapped module."""
    return sum(isinstance(child, Int8Layer) for child in module.modules())


def _int8_modules(plan: Plan) -> Mapping[str, list[PlannedUnit]]:
    modules: dict[str, list[PlannedUnit]] = {}
    for p in plan.units:
        if p.is_int8 and p.unit.kind == CORE:
            modules.setdefault(module_name(p), []).append(p)
    return modules


def module_name(planned: PlannedUnit) -> str:
    """The module behind a unit: its weight's owner, whatever number the unit's name carries."""
    return str(planned.unit.anchor.meta.get("owner", planned.unit.name))


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever the module holds may refuse in its own way
        raise CaptureError(
            f"mode: imperative works on a copy of the module, which can't be made ({error}); use mode=export"
        ) from error


def _move_hooks(old: nn.Module, new: nn.Module, *kinds: str) -> None:
    """Forward hooks are part of what the user's model computes; `kinds` of "_forward_hooks", "_forward_pre_hooks"."""
    for kind in kinds:
        for registry in (kind, f"{kind}_with_kwargs"):
            getattr(new, registry).update(getattr(old, registry))
            getattr(old, registry).clear()


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    if not name:
        raise CaptureError("mode: the model is a single layer; wrap it in nn.Sequential, or use mode=export")
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)
