"""A module whose weights' calls an engine computes: observed, or in int8.

Only parameters are exchanged, each for a `Weight` that reads like it: what the module computes, calls and shows stays
its own code. A layer of a class of torch's own, of exactly that class, also gets a shorter way to its kernel and a repr
with its scales.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan, PlannedUnit
from quantflow.ir.program import Program
from quantflow.ir.units import CORE, SHAPE
from quantflow.runtimes import AbstractRunner
from quantflow.runtimes.ordinary import outside_compilers, refuse_export
from quantflow.stages.imperative.calls import Pending, Site, UnitCall, calls_of
from quantflow.stages.imperative.chains import NORMS, STARTS, block_class, chained_class, has_chains
from quantflow.stages.imperative.encoders import encoder_class, is_encoder_layer
from quantflow.stages.imperative.engines import Engine, Observing, OnValue, Running
from quantflow.stages.imperative.functions import begun, fits, is_tracked, missed, normed, opened
from quantflow.stages.imperative.joins import LAYERS, is_block
from quantflow.stages.imperative.tensors import Coded, Weight, in_float, refuse_pickling

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOT_REACHED = (
    "the module's own code does not call it in a way that int8 can be put behind (as an op of torch on this weight, "
    "with the captured arguments); mode=export quantizes it"
)


def run_module(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One forward of the module from `insert_observers` or `swap_modules`; ordinary tensors come out.

    A module that stands for one of another dtype takes and gives that; how its layers hold floats does not show.
    """
    with _engine_of(module).forward(args, kwargs):
        return _called(module, args, kwargs)


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    engine = _engine_of(module)
    dtype = engine.stands_for
    if dtype is torch.float32 is engine.held:
        return numbers(module(*args, **kwargs))
    if dtype is not torch.float32:
        args, kwargs = with_tensors((args, dict(kwargs)), lambda x: x.float() if x.dtype is dtype else x)
    with engine.between():
        output = module(*args, **kwargs)
    return with_tensors(numbers(output), lambda y: y.to(dtype) if engine.is_real(y) else y)


def insert_observers(module: nn.Module, graph: Graph, plan: Plan, stands_for: torch.dtype = torch.float32) -> nn.Module:
    """A copy of the module whose int8 units compute in float32 and show the values that become codes.

    Args:
        stands_for: the dtype of the model that the module is a float32 copy of.
    """
    return _attached(module, graph, plan, Observing(plan, stands_for))


def run_observed(module: nn.Module, batch: Batch, on_value: OnValue) -> Any:
    """One forward of a module from `insert_observers`."""
    engine = _engine_of(module)
    assert isinstance(engine, Observing)
    try:
        engine.on_value = on_value
        with engine.forward():
            return _called(module, batch.args, batch.kwargs)
    finally:
        del engine.on_value


def not_reached(
    module: nn.Module, graph: Graph, plan: Plan, batch: Batch, stands_for: torch.dtype = torch.float32
) -> dict[str, str]:
    """The int8 units that the module's own code does not call as the plan has them, each with the reason."""
    observed = insert_observers(module, graph, plan, stands_for)
    with torch.no_grad(), _engine_of(observed).forward() as ran:
        _called(observed, batch.args, batch.kwargs)
    complete = {call.name for call in ran.complete}
    wanted = [p.unit for p in plan.units if p.is_int8 and p.unit.kind != SHAPE]
    return {unit.name: NOT_REACHED for unit in wanted if unit.name not in complete}


def swap_modules(
    module: nn.Module,
    graph: Graph,
    plan: Plan,
    program: Program,
    runner: AbstractRunner,
    stands_for: torch.dtype = torch.float32,
) -> nn.Module:
    """A copy of the module in which the runner's kernels compute the int8 units."""
    engine = Running(plan, program, runner, stands_for)
    swapped = _attached(module, graph, plan, engine).eval()
    for layer in swapped.modules():
        if type(layer) in _LAYERS and isinstance(layer._parameters.get("weight"), Weight):
            layer.__class__ = _int8_class(type(layer))
        elif type(layer) in _NORMS and _folded_into(layer) is not None:
            layer.__class__ = _folded_class(type(layer))
    for layer in reversed(list(swapped.modules())):  # what is inside first
        if has_chains(layer):
            layer.__class__ = chained_class(type(layer), tuple(_COPIED.items()))
        elif is_block(layer):
            layer.__class__ = block_class(type(layer), tuple(_COPIED.items()))
        elif is_encoder_layer(layer):
            layer.__class__ = encoder_class(type(layer), tuple(_COPIED.items()))
    for parameter in swapped.parameters():
        parameter.requires_grad_(False)
    return swapped


def moved(module: nn.Module, place: torch.device) -> nn.Module:
    """The module on another device, whose BatchNorms are still known for folded: `to` makes new buffers."""
    folded = {each: call for each in module.modules() if (call := _folded_into(each)) is not None}
    module.to(place)
    for norm, call in folded.items():
        norm.running_mean.folded_into = call  # type: ignore[union-attr]
    return module


def _folded_into(norm: nn.Module) -> UnitCall | None:
    return getattr(norm._buffers.get("running_mean"), "folded_into", None)


def put_in_place(module: nn.Module, swapped: nn.Module) -> None:
    """Give a module what its swapped copy has, as far down as the two have the same parts."""
    module.__class__ = swapped.__class__
    module._parameters, module._buffers = swapped._parameters, swapped._buffers
    if "_quantflow" in swapped.__dict__:
        module.__dict__["_quantflow"] = swapped.__dict__["_quantflow"]
    for name, part in swapped._modules.items():
        own = module._modules.get(name)
        if own is None or part is None or isinstance(part, nn.Identity):
            module._modules[name] = part
        else:
            put_in_place(own, part)


def numbers(output: Any) -> Any:
    """A module's output with ordinary tensors in it."""
    return with_tensors(output, lambda y: y.as_float() if type(y) is Coded else y)


def with_tensors(value: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with other tensors in it."""
    if isinstance(value, torch.Tensor):
        return of(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (Mapping, type)):
        for each in dataclasses.fields(value):
            object.__setattr__(value, each.name, with_tensors(getattr(value, each.name), of))
        return value
    # A torch.Size is a tuple to pytree, and would come back as one.
    return tree_map_only(torch.Tensor, of, value, is_leaf=lambda x: isinstance(x, torch.Size))


def int8_calls(module: nn.Module, batch: Batch) -> int:
    """Int8 layers that run in one forward of a swapped module; one that computes the same several times counts once."""
    with torch.inference_mode(), _engine_of(module).forward(batch.args, batch.kwargs) as ran:
        _called(module, batch.args, batch.kwargs)
    return len({call.planned.unit.name for call in ran.complete if call.planned.unit.kind == CORE})


def int8_layers(module: nn.Module) -> int:
    """Int8 layers in a swapped module."""
    return len({call for site in _sites(module) for call in site.calls})


def _sites(module: nn.Module) -> list[Site]:
    found = [weight.site for weight in module.parameters() if isinstance(weight, Weight)]
    return list({id(site): site for site in found}.values())


def _engine_of(module: nn.Module) -> Engine:
    engine: Engine = module.__dict__["_quantflow"]
    return engine


# -- attaching


def _attached(module: nn.Module, graph: Graph, plan: Plan, engine: Engine) -> nn.Module:
    attached = copied_module(module)
    parameters = dict(attached.named_parameters(remove_duplicate=False))
    modules = dict(attached.named_modules(remove_duplicate=False))
    sites: dict[int, Site] = {}
    biases: dict[int, dict[UnitCall, torch.Tensor | None]] = {}
    for planned in plan.units:
        if not planned.is_int8 or planned.unit.kind == SHAPE:
            continue
        norm = modules.get(planned.unit.anchor.meta.get("batch_norm"))  # type: ignore[arg-type]
        folds = norm is not None and not isinstance(norm, nn.Identity)
        call = calls_of(engine, planned, plan.codes, folds)
        if planned.unit.kind != CORE:
            for name in dict.fromkeys(call.operands):
                engine.readers.setdefault(name, []).append(call)
            continue
        weight, call.is_held_transposed = _weight_of(planned, graph, parameters)
        if weight is None:
            continue
        biases.setdefault(id(weight), {})[call] = _bias_of(planned, parameters, modules)
        if folds:
            norm.running_mean.folded_into = call  # type: ignore[union-attr]
        sites.setdefault(id(weight), Site(engine, [])).calls.append(call)
    for name, parameter in parameters.items():
        if id(parameter) in sites:
            owner, _, role = name.rpartition(".")
            held = modules[owner]._parameters
            if not isinstance(held[role], Weight):
                made = Weight.of(parameter, sites[id(parameter)], biases[id(parameter)])
                for other, same in parameters.items():  # tied ones stay tied
                    if same is parameter:
                        place, _, other_role = other.rpartition(".")
                        modules[place]._parameters[other_role] = made
    attached.__dict__["_quantflow"] = engine
    return attached


def _weight_of(
    planned: PlannedUnit, graph: Graph, parameters: Mapping[str, nn.Parameter]
) -> tuple[nn.Parameter | None, bool]:
    """The parameter whose calls the unit is, and whether it holds a linear's weight transposed."""
    anchor = planned.unit.anchor
    name, owner = str(anchor.args[1].target), str(anchor.meta["owner"])  # type: ignore[union-attr]
    value = graph.constants[name]
    exact = parameters.get(name)
    if exact is not None and exact.shape == value.shape:
        return exact, False
    if "batch_norm" in anchor.meta or "transposed" in anchor.meta:
        return parameters.get(f"{owner}.weight" if owner else "weight"), False
    other = parameters.get(name.rpartition("_")[0])
    if other is not None and other.dim() == 2 and other.shape[::-1] == value.shape and torch.equal(other.t(), value):
        return other, True
    return None, False


def _bias_of(
    planned: PlannedUnit, parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]
) -> torch.Tensor | None:
    """What is passed beside the weight."""
    anchor = planned.unit.anchor
    if "batch_norm" in anchor.meta or "transposed" in anchor.meta:
        found = modules[str(anchor.meta["owner"])]._parameters.get("bias")
        return found
    bias = anchor.args[2] if len(anchor.args) > 2 else None
    return parameters.get(str(bias.target)) if isinstance(bias, fx.Node) else None


def copied_module(module: nn.Module) -> nn.Module:
    """A copy of its own.

    Raises:
        CaptureError: the module can't be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever the module holds may refuse in its own way
        raise CaptureError(
            f"mode: imperative works on a copy of the module, which can't be made ({error}); use mode=export"
        ) from error


# -- layers of torch's own classes


def _deepcopied(self: Any, memo: dict[int, Any]) -> Any:
    made = memo[id(self)] = type(self).__new__(type(self))
    made.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return made


_COPIED: dict[str, Any] = {"__deepcopy__": _deepcopied, "__reduce_ex__": refuse_pickling}


@cache
def _int8_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a swapped layer: isinstance of the one that it was."""
    made = {"extra_repr": _extra_repr, "__module__": __name__, **_COPIED}
    if base is nn.Linear:
        made["forward"] = _linear
    elif base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        made["forward"] = _convolution
    swapped = type(f"Int8{base.__name__}", (base,), made)
    if "forward" in made:
        STARTS[swapped] = _started
        LAYERS.add(swapped)
    return swapped


@outside_compilers
def _linear(self: Any, input: torch.Tensor) -> torch.Tensor:
    refuse_export()
    weight, bias = _own(self)
    call = weight.site.call() if type(weight) is Weight else None
    if call is None or call.is_held_transposed or not fits(call, input, weight, bias, ()):
        missed(weight)
        return nn.functional.linear(*_plain(input, weight, bias))
    return begun(call, weight, input, lambda y: in_float(nn.functional.linear, (y, weight, bias), {}))  # type: ignore[no-any-return]


@outside_compilers
def _convolution(self: Any, input: torch.Tensor) -> torch.Tensor:
    refuse_export()
    weight, bias = _own(self)
    if self.padding_mode != "zeros" or type(weight) is not Weight:
        return self._conv_forward(input, weight, bias)  # type: ignore[no-any-return]
    call = weight.site.call()
    geometry = (self.stride, self.padding, self.dilation, self.groups)
    if call is None or not fits(call, input, weight, bias, geometry):
        missed(weight)
        return self._conv_forward(*_plain(input, weight, bias))  # type: ignore[no-any-return]
    return begun(call, weight, input, lambda y: self._conv_forward(*_plain(y, weight, bias)))  # type: ignore[no-any-return]


def _own(self: Any) -> tuple[Any, Any]:
    """The layer's weight and bias; what is no parameter now by the longer way."""
    parameters = self._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return self.weight, self.bias


def _started(self: Any, x: Any) -> Pending | None:
    """A layer's call of its weight, if it has but one and this is it."""
    weight, bias = _own(self)
    if type(weight) is not Weight or len(weight.site.calls) != 1 or not isinstance(x, torch.Tensor) or is_tracked(x):
        return None
    call, is_linear = weight.site.calls[0], isinstance(self, nn.Linear)
    if call.is_held_transposed or not (is_linear or self.padding_mode == "zeros"):
        return None
    if not fits(call, x, weight, bias, () if is_linear else (self.stride, self.padding, self.dilation, self.groups)):
        return None
    if is_linear:
        return opened(call, weight, x, lambda y: nn.functional.linear(*_plain(y, weight, bias)))
    return opened(call, weight, x, lambda y: self._conv_forward(*_plain(y, weight, bias)))


def _plain(*tensors: Any) -> Sequence[Any]:
    """As ordinary tensors: the call was counted, and must not be again."""
    return [t.as_float() if type(t) is Coded else t.plain if type(t) is Weight else t for t in tensors]


def _extra_repr(self: Any) -> str:
    weight = self._parameters["weight"]
    base: str = super(type(self), self).extra_repr()
    if type(weight) is not Weight or not isinstance(weight.site.engine, Running):
        return base
    return f"{base}, {', '.join(weight.site.engine.described(call) for call in weight.site.calls)}"


@cache
def _folded_class(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if type(input) is Coded and not self.training:
            result = normed(input, _folded_into(self), partial(base.forward, self))
            if result is not NotImplemented:
                return result  # type: ignore[no-any-return]
        return super(type(self), self).forward(input)  # type: ignore[no-any-return]

    def moved(self: Any, fn: Any, recurse: bool = True) -> Any:
        call = _folded_into(self)
        base._apply(self, fn, recurse)
        self.running_mean.folded_into = call  # in a new buffer, maybe
        return self

    members = {"forward": forward, "_apply": moved, "__module__": __name__, **_COPIED}
    folded = type(f"Folded{base.__name__}", (base,), members)
    NORMS[folded] = base
    LAYERS.add(folded)
    return folded
