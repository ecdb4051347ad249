"""What torch functions mean for `Coded` tensors and `Weight`s: one rule per kind of function, and which it is for.

A rule answers NotImplemented wherever the call is not exactly what a unit of the plan expects; float32 is right then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from quantflow.ir.activations import Epilogue, epilogue_of
from quantflow.ir.graph import arguments
from quantflow.ir.units import ADD as ADD_UNIT
from quantflow.ir.units import AVG_POOL, CAT, CLAMP, MATMUL, MAX_POOL, MUL
from quantflow.runtimes.ordinary import ordinary
from quantflow.stages.imperative.calls import ADD, BATCH_NORM, Pending, UnitCall, one_of, spread
from quantflow.stages.imperative.tensors import RULES, Coded, Rule, Weight, in_float

Args = tuple[Any, ...]
Keywords = Mapping[str, Any]
T = torch.Tensor


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Let a rule stand for these functions."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return add


def named(names: Sequence[str], args: Args, kwargs: Keywords) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _in_place(func: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return bool(given.get("inplace")) or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _finished(x: Coded, result: torch.Tensor, in_place: bool) -> torch.Tensor:
    return x.become(result) if in_place else result


# -- what is asked about a tensor


def _about(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    x = args[0]
    if type(x) is Weight:
        return func(x.plain, *args[1:], **kwargs)
    if type(x) is Coded and x.shown is not None:
        return func(x.shown, *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


RULES.update(
    dict.fromkeys(
        (
            T.size, T.dim, T.numel, T.nelement, T.ndimension, T.is_floating_point, T.is_complex, T.__len__,
            torch.is_tensor, torch.numel, torch.is_floating_point, torch.is_complex, T.get_device, T.is_inference,
            *(
                getattr(T, name).__get__
                for name in (
                    "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_xpu", "is_cpu", "is_sparse",
                    "is_quantized", "is_meta", "is_nested", "layout", "is_leaf", "grad_fn", "grad", "is_mkldnn",
                )
            ),
        ),
        _about,
    )
)  # fmt: skip


# -- layers with weights


@rule(F.linear)
def _linear(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    given = named(("input", "weight", "bias"), args, kwargs)
    return _weighted(func, args, kwargs, given["input"], given["weight"], given.get("bias"), ())


@rule(torch.addmm, T.addmm)
def _addmm(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    given = named(("input", "mat1", "mat2"), args, kwargs)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or "out" in given:
        return NotImplemented
    return _weighted(func, args, kwargs, given["mat1"], given["mat2"], given["input"], (), is_held_transposed=True)


def _convolution(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    g = named(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
    geometry = (g.get("stride", 1), g.get("padding", 0), g.get("dilation", 1), g.get("groups", 1))
    return _weighted(func, args, kwargs, g["input"], g["weight"], g.get("bias"), geometry)


def _transposed(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    g = named(names, args, kwargs)
    geometry = (g.get("stride", 1), g.get("padding", 0), g.get("dilation", 1), g.get("groups", 1))
    geometry = (*geometry, g.get("output_padding", 0))
    return _weighted(func, args, kwargs, g["input"], g["weight"], g.get("bias"), geometry)


for _function in (F.conv1d, F.conv2d, F.conv3d):
    RULES[_function] = _convolution
for _function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    RULES[_function] = _transposed


def _weighted(
    func: Callable[..., Any],
    args: Args,
    kwargs: Keywords,
    x: Any,
    weight: Any,
    bias: Any,
    geometry: Args,
    *,
    is_held_transposed: bool = False,
) -> Any:
    """A convolution or linear, if it is the one that the plan knows."""
    if type(weight) is not Weight or not isinstance(x, T) or type(bias) in (Weight, Coded):
        return NotImplemented
    call = weight.site.call()
    held = is_held_transposed
    if call is None or call.is_held_transposed is not held or not fits(call, x, weight, bias, geometry):
        missed(weight)
        return NotImplemented
    return begun(
        call, weight, x, lambda y: in_float(func, _with(args, x, y), {k: _is(v, x, y) for k, v in kwargs.items()})
    )


def _form(x: T) -> tuple[tuple[int, ...], torch.device]:
    return (x.sizes, x.place) if type(x) is Coded and x.shown is None else (tuple(x.shape), x.device)


def _with(args: Args, x: Any, y: Any) -> Args:
    return tuple(_is(each, x, y) for each in args)


def _is(each: Any, x: Any, y: Any) -> Any:
    return y if each is x else each


def begun(call: UnitCall, weight: Weight, x: T, apply: Callable[[T], T]) -> Any:
    """The first call of a unit, on an input that it can take; `apply` is the call in float32."""
    tracked = is_tracked(x)
    result = opened(call, weight, x, apply).completed()
    if tracked:
        return ordinary(result.as_float() if type(result) is Coded else result, (x,))
    return result


def is_tracked(x: T) -> bool:
    """Whether a gradient is asked for."""
    return type(x) is not Coded and x.requires_grad and torch.is_grad_enabled()


def opened(call: UnitCall, weight: Weight, x: T, apply: Callable[[T], T]) -> Pending:
    """`begun` up to what may follow."""
    engine, name = call.engine, call.operands[0]
    shape, device = _form(x)
    codes = engine.coded(x, name)
    made = () if not call.expects else call.shapes.get(shape)
    if made is None:
        made = call.shapes[shape] = _shape(call, weight, shape)
    replay = lambda: apply(engine.decode(codes, engine.codes[name]))  # noqa: E731
    return Pending(call, {name: codes}, 0, (replay,), made, device)


def _shape(call: UnitCall, weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the layer's result; asked of torch itself, once per shape of input."""
    held = weight.plain
    x = torch.empty(shape, device="meta")
    w = torch.empty(tuple(held.shape), device="meta")
    unit = call.planned.unit
    if call.geometry:
        dims = w.dim() - 2
        stride, padding, dilation, groups, *rest = call.geometry
        if rest:
            made = getattr(F, f"conv_transpose{dims}d")(x, w, None, stride, padding, rest[0], groups, dilation)
        else:
            made = getattr(F, f"conv{dims}d")(x, w, None, stride, padding, dilation, groups)
        return tuple(made.shape)
    features = unit.anchor.meta["shape"][-1] if "shape" in unit.anchor.meta else None
    return (*shape[:-1], int(features) if features is not None else w.shape[0])


def missed(weight: Any) -> None:
    """A call of an int8 layer that is none of those that were captured: it is computed in float32."""
    if type(weight) is Weight:
        weight.site.engine.missed(weight.site)


def fits(call: UnitCall, x: T, weight: Weight, bias: Any, geometry: Args) -> bool:
    """Whether these are the arguments of the unit's call."""
    if bias is not weight.biases[call]:
        return False
    held, (sizes, device) = weight.plain, _form(x)
    is_real = type(x) is Coded or call.engine.is_real(x)
    if is_real and held.device == device and call.accepts(sizes, geometry):
        return True  # as it did before
    if held.dtype is not torch.float32 or not is_real or 0 in sizes:
        return False
    if held.device != device or (not geometry) != (not call.geometry):
        return False
    if not geometry:
        if not len(sizes) == _rank(call, len(sizes)) > 0:
            return False
        call.accepted.add((sizes, geometry))
        return True
    if len(geometry) != len(call.geometry) or len(sizes) != held.dim():
        return False
    geometry = tuple(tuple(g) if isinstance(g, list) else g for g in geometry)
    dims = held.dim() - 2
    stride, padding, dilation, groups, *rest = geometry
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(spread(dilation, dims), held.shape[2:], strict=True)]
        if any(size % 2 for size in reach):
            return False
        padding = tuple(size // 2 for size in reach)
    elif padding == "valid":
        padding = 0
    found = (*(spread(each, dims) for each in (stride, padding, dilation)), groups, *(spread(r, dims) for r in rest))
    if found != call.geometry:
        return False
    call.accepted.add((sizes, geometry))
    return True


def _rank(call: UnitCall, found: int) -> int:
    shape = call.planned.unit.inputs[0].meta.get("shape")
    return found if shape is None else len(shape)


# -- what completes a unit


@rule(F.batch_norm)
def _batch_norm(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = named(names, args, kwargs)
    x, mean = given["input"], given["running_mean"]
    if type(x) is not Coded or given.get("training") or mean is None:
        return NotImplemented
    return normed(x, getattr(mean, "folded_into", None), lambda y: in_float(func, (y, *args[1:]), kwargs))


def normed(x: Coded, call: UnitCall | None, step: Callable[[T], T]) -> Any:
    """The BatchNorm that was folded into `call`."""
    pending = x.unfinished()
    if pending is None or pending.call is not call or pending.next != BATCH_NORM:
        return NotImplemented
    return pending.advanced(step)


@rule(torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__)
def _add(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    if len(args) != 2 or kwargs.keys() - {"alpha"} or kwargs.get("alpha", 1) != 1:
        return NotImplemented
    in_place = _in_place(func, {})
    for x, other in (args, args[::-1]):
        if type(x) is not Coded or not isinstance(other, T):
            continue
        pending = x.unfinished()
        if pending is None or pending.next != ADD or other is x or (in_place and type(args[0]) is not Coded):
            continue
        if _form(other)[0] != pending.shape or (
            type(other) is not Coded and (not pending.call.engine.is_real(other) or other.requires_grad)
        ):
            continue
        engine, name = pending.call.engine, pending.call.operands[-1]
        codes = engine.coded(other, name)
        done = pending.advanced(lambda y: y + engine.decode(codes, engine.codes[name]), **{name: codes})  # noqa: B023
        return _finished(args[0], done, in_place)
    return _pair(ADD_UNIT, args, in_place)


@rule(torch.mul, T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__)
def _mul(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    return _pair(MUL, args, _in_place(func, {}))


@rule(torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm)
def _matmul(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    if type(args[1]) is Weight:
        return _weighted(func, args, kwargs, args[0], args[1], None, (), is_held_transposed=True)
    return _pair(MATMUL, args, False)


def _pair(kind: str, args: Args, in_place: bool) -> Any:
    """An int8 unit of two operands, of which one at least is a known value of the graph."""
    a, b = args
    if not (isinstance(a, T) and isinstance(b, T)) or (in_place and type(a) is not Coded):
        return NotImplemented
    call = _reader(kind, a, b)
    if call is None or (in_place and tuple(torch.broadcast_shapes(a.shape, b.shape)) != tuple(a.shape)):
        return NotImplemented
    result = _run(call, (a, b), _PAIRS[kind])
    return result if result is NotImplemented else _finished(a, result, in_place)


_PAIRS: dict[str, Callable[..., T]] = {ADD_UNIT: torch.add, MUL: torch.mul, MATMUL: torch.matmul}


def _reader(kind: str, *operands: Any) -> UnitCall | None:
    """The one unit of a kind that reads these values, in any order for two."""
    known = [x for x in operands if type(x) is Coded and x.node is not None and x.current() is not None]
    if not known:
        return None
    first = known[0]
    assert first.node is not None
    found = []
    for call in first.engine.readers.get(first.node.name, ()):
        if call.planned.unit.kind != kind or len(call.operands) != len(operands):
            continue
        free = list(call.operands)
        for x in known:
            if x.node is not None and x.node.name in free:
                free.remove(x.node.name)
            else:
                break
        else:
            others = [x for x in operands if not any(x is each for each in known)]
            if len(free) == len(others) and all(isinstance(x, T) and first.engine.is_real(x) for x in others):
                found.append(call)
    return found[0] if len(found) == 1 else None


def _run(call: UnitCall, operands: Sequence[Any], apply: Callable[..., T]) -> Any:
    """A unit that is no layer; `apply` is its first call on the operands in float32."""
    if torch.is_grad_enabled() and any(type(x) is not Coded and x.requires_grad for x in operands):
        return NotImplemented
    engine, free = call.engine, list(call.operands)
    names: list[str] = []
    for x in operands:
        known = type(x) is Coded and x.node is not None and x.node.name in free
        names.append(x.node.name if known else "")
        if known:
            free.remove(x.node.name)
    names = [name or free.pop(0) for name in names]
    held = [engine.coded(x, name) for x, name in zip(operands, names, strict=True)]

    def replay() -> T:
        return apply(*(engine.decode(codes, engine.codes[name]) for codes, name in zip(held, names, strict=True)))

    shape: tuple[int, ...] = ()
    if call.expects:
        shape = tuple(apply(*(torch.empty(tuple(x.shape), device="meta") for x in operands)).shape)
    pending = Pending(call, dict(zip(names, held, strict=True)), 0, (replay,), shape, operands[0].device)
    return pending.completed()


#: Function → (its ATen op, its parameters).
_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...], dict[str, Any]]] = {}


def _activations(op: str, parameters: tuple[str, ...], defaults: dict[str, Any], *functions: Any) -> None:
    _ACTIVATIONS.update(dict.fromkeys(functions, (op, parameters, defaults)))


_activations("relu", ("inplace",), {}, F.relu, torch.relu, T.relu, torch.relu_, T.relu_, F.relu_)
_activations("relu6", ("inplace",), {}, F.relu6)
_activations("hardtanh", ("min_val", "max_val", "inplace"), {"min_val": -1.0, "max_val": 1.0}, F.hardtanh, F.hardtanh_)
_activations("hardswish", ("inplace",), {}, F.hardswish)
_activations("hardsigmoid", ("inplace",), {}, F.hardsigmoid)
_activations("silu", ("inplace",), {}, F.silu)
_activations("sigmoid", (), {}, torch.sigmoid, T.sigmoid, F.sigmoid, torch.sigmoid_, T.sigmoid_)
_activations("tanh", (), {}, torch.tanh, T.tanh, F.tanh, torch.tanh_, T.tanh_)
_activations("gelu", ("approximate",), {"approximate": "none"}, F.gelu)
_activations(
    "leaky_relu", ("negative_slope", "inplace"), {"negative_slope": 0.01}, F.leaky_relu, F.leaky_relu_
)  # fmt: skip
_activations(
    "clamp", ("min", "max"), {"min": None, "max": None},
    torch.clamp, T.clamp, T.clamp_, torch.clamp_, torch.clip, T.clip, T.clip_,
)  # fmt: skip


@rule(*_ACTIVATIONS)
def _activation(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    if not args or type(args[0]) is not Coded or "out" in kwargs:
        return NotImplemented
    x: Coded = args[0]
    try:
        found, in_place = asked(func, args[1:], tuple(kwargs.items()))
    except TypeError:  # bounds that are tensors
        return NotImplemented
    if found is None:
        return NotImplemented

    def apply(y: T) -> T:
        return found.activation.formula(y, *found.values)

    pending = x.unfinished()
    if pending is not None:
        return NotImplemented if pending.next is not found else _finished(x, pending.advanced(apply), in_place)
    call = _reader(CLAMP, x)
    if call is None or epilogue_of(call.planned.unit.op, arguments(call.planned.unit.anchor)) != found:
        return NotImplemented
    return _finished(x, _run(call, (x,), apply), in_place)


@functools.lru_cache(maxsize=1024, typed=True)
def asked(
    func: Callable[..., Any], args: Args = (), kwargs: tuple[tuple[str, Any], ...] = ()
) -> tuple[Epilogue | None, bool]:
    """The activation that a function with these arguments behind the tensor computes, and whether in place."""
    op, names, defaults = _ACTIVATIONS[func]
    given = defaults | named(names, args, dict(kwargs))
    found = epilogue_of(op, given)
    return None if found is None else one_of(found), _in_place(func, given)


# -- pools and joins


_POOLS: dict[Any, tuple[str, tuple[str, ...]]] = {}
_WINDOW = ("kernel_size", "stride", "padding")
for _dims in (1, 2, 3):
    for _pool in (getattr(F, f"max_pool{_dims}d"), getattr(torch, f"max_pool{_dims}d")):
        _POOLS[_pool] = (MAX_POOL, (*_WINDOW, "dilation", "ceil_mode", "return_indices"))
    _POOLS[getattr(F, f"avg_pool{_dims}d")] = (
        AVG_POOL, (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override"),
    )  # fmt: skip
    _POOLS[getattr(F, f"adaptive_avg_pool{_dims}d")] = (AVG_POOL, ("output_size",))
for _mean in (torch.mean, T.mean):
    _POOLS[_mean] = (AVG_POOL, ("dim", "keepdim"))


@rule(*_POOLS)
def _pool(func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    kind, names = _POOLS[func]
    given = named(("input", *names), args, kwargs)
    x = given.pop("input")
    if type(x) is not Coded or given.pop("return_indices", False) or "dtype" in given or "out" in given:
        return NotImplemented
    if x.current() is None or x.node is None:
        return NotImplemented
    calls = [
        call for call in x.engine.readers.get(x.node.name, ())
        if call.planned.unit.kind == kind and _asks_for(call, given)
    ]  # fmt: skip
    if len(calls) != 1:
        return NotImplemented
    return _run(calls[0], (x,), lambda y: func(y, **given))


def _asks_for(call: UnitCall, given: Mapping[str, Any]) -> bool:
    """Whether the unit's op has these arguments; of the captured op, those that the call leaves out are what it has."""
    op = arguments(call.planned.unit.anchor)
    return set(given) <= set(op) and all(_alike(value, op[name]) for name, value in given.items())


def _alike(a: Any, b: Any) -> bool:
    """Whether arguments mean the same: one number stands for all dimensions, an empty list for none given."""
    x, y = (list(v) if isinstance(v, (list, tuple)) else [] if v is None else [v] for v in (a, b))
    return x == y or (len(x) == 1 and x * len(y) == y) or (len(y) == 1 and y * len(x) == x)


@rule(torch.cat, torch.concat, torch.concatenate)
def _cat(_func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
    given = {"dim": 0} | named(("tensors", "dim"), args, kwargs)
    tensors = given["tensors"]
    if "out" in given or not isinstance(tensors, (list, tuple)) or not all(isinstance(x, T) for x in tensors):
        return NotImplemented
    call = _reader(CAT, *tensors)
    if call is None or not tensors[0].dim():
        return NotImplemented
    rank = tensors[0].dim()
    if arguments(call.planned.unit.anchor)["dim"] % rank != given["dim"] % rank:
        return NotImplemented
    return _run(call, tensors, lambda *parts: torch.cat(parts, given["dim"]))


# -- functions of several layers


def _never(*_: Any) -> bool:
    return False


def _opened(function: Any) -> Any:
    """A function of torch.nn.functional that does not ask whether its tensors are special."""
    scope = dict(function.__globals__, has_torch_function=_never, has_torch_function_variadic=_never)
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def see_through(function: Any) -> None:
    """Let the weights that a function of several layers is given be found inside it."""
    opened = _opened(function)

    def inside(_func: Callable[..., Any], args: Args, kwargs: Keywords) -> Any:
        return opened(*args, **kwargs)

    RULES[function] = inside


see_through(F.multi_head_attention_forward)
