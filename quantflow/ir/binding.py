"""A call's arguments, bound to the inputs of a graph or program by name, position, structure, shape and dtype."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from quantflow.errors import DataError
from quantflow.ir.batch import Batch
from quantflow.ir.calls import BATCH, Arguments, Input, Limit
from quantflow.ir.structure import Leaf, Typed, type_name

#: Forms of tensors that a model is remembered to take, at most.
KEPT_FORMS = 1024
#: Where tensors lie when nothing else is said.
HOST = (torch.empty(0).cpu().device.type,)


class Callee(Protocol):
    """A graph or a program, as far as its calls are concerned."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Its tensors."""

    @property
    def arguments(self) -> Arguments | None:
        """Where they lie among its arguments; None: they are these, by position or keyword."""

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What its sizes must fulfil."""


def bind(
    model: Callee,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    devices: Sequence[str] = HOST,
    taken: set[Any] | None = None,
) -> list[torch.Tensor]:
    """The call's tensors in the order of the model's inputs, each with its numbers in memory as they are.

    Args:
        devices: where they may lie.
        taken: what `bind` has found legal for this model and these devices, which it need not look at again; it adds
            to it. None: every call is looked at.

    Raises:
        DataError: too few or too many arguments, an unknown keyword, a constant that is not the captured one, a
            tensor of another shape, dtype, layout or device, or sizes that the model can't take; names it and what is
            legal.
    """
    inputs = model.inputs
    bound = _flat(inputs, args, kwargs) if model.arguments is None else _nested(model.arguments, inputs, args, kwargs)
    form = None
    # Of a subclass nobody knows what its attributes are the next time; a nested tensor has no shape.
    if taken is not None and all(type(x) is torch.Tensor and not x.is_nested for x in bound):
        form = tuple([(x.shape, x.dtype, x.device, x.layout) for x in bound])
        if form in taken:
            return [_plain(item, x) for item, x in zip(inputs, bound, strict=True)]
    sizes: dict[str, int] = {}
    bound = [_itself(item, x) for item, x in zip(inputs, bound, strict=True)]
    for item, value in zip(inputs, bound, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"input '{_called(item)}' is a {type(value).__name__}, not a tensor")
        if value.is_nested or value.layout is not torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise DataError(f"input '{_called(item)}' is a {kind} tensor; the model takes dense ones: x.to_dense()")
        if value.dim() != len(item.shape):
            raise DataError(
                f"input '{_called(item)}' has shape {tuple(value.shape)}; the model takes {_shape(item.shape)}"
            )
        for dim, (found, wanted) in enumerate(zip(value.shape, item.shape, strict=True)):
            if wanted is None:
                sizes.setdefault(BATCH, found)
            elif isinstance(wanted, str):
                if sizes.setdefault(wanted, found) != found:
                    raise DataError(
                        f"input '{_called(item)}' has {found} in dimension {dim}, where '{wanted}' is "
                        f"{sizes[wanted]} in the inputs before it"
                    )
            elif found != wanted:
                raise DataError(
                    f"input '{_called(item)}' has shape {tuple(value.shape)}; the model was captured for "
                    f"{_shape(item.shape)}, so dimension {dim} must be {wanted}: calibrate on batches whose sizes "
                    "differ there (dynamic: auto finds it), or name it in `dynamic`"
                )
        if _name(value.dtype) != item.dtype:
            raise DataError(f"input '{_called(item)}' is {_name(value.dtype)}; the model takes {item.dtype}")
    bound = [_in_memory(item, value, devices) for item, value in zip(inputs, bound, strict=True)]
    for limit in model.limits:
        if not limit.holds(sizes):
            found = ", ".join(f"{name} = {sizes[name]}" for name in limit.names)
            place = f" ({limit.place})" if limit.place else ""
            raise DataError(f"the model can't take {found}: it holds only where {limit.expression}{place}")
    if taken is not None and form is not None:
        if len(taken) >= KEPT_FORMS:
            taken.clear()
        taken.add(form)
    return bound


def _in_memory(item: Input, value: torch.Tensor, devices: Sequence[str]) -> torch.Tensor:
    """The tensor, or a copy where its memory holds something else than its numbers."""
    if value.device.type not in devices:
        where = "has no data" if value.is_meta else f"is on {value.device}"
        raise DataError(f"input '{_called(item)}' {where}; the model takes tensors on {' or '.join(devices)}")
    return _plain(item, value)


def _itself(item: Input, value: Any) -> Any:
    """A tensor of a subclass as PyTorch holds it, whatever its Python attributes say."""
    if not isinstance(value, torch.Tensor) or type(value) in (torch.Tensor, nn.Parameter, nn.Buffer):
        return value
    if isinstance(value, nn.parameter.UninitializedTensorMixin):
        raise DataError(f"input '{_called(item)}' is an {type(value).__name__}, which has no numbers yet")
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise DataError(
            f"input '{_called(item)}' is a {type(value).__name__}, whose numbers only its class knows; the model takes "
            "plain tensors"
        )
    return torch.Tensor.as_subclass(value, torch.Tensor)


def _plain(item: Input, value: torch.Tensor) -> torch.Tensor:
    if value.is_neg() or value.is_conj():
        return value.resolve_conj().resolve_neg()
    if value._is_zerotensor():
        return value.clone()
    try:
        address, held = value.data_ptr(), value.untyped_storage().nbytes()
    except RuntimeError:
        return value  # a wrapper of torch.func's, which gives its memory to nobody
    # Freed or cut by resize_, or a compiler's stand-in for a tensor.
    is_short = held < value.nbytes + value.storage_offset() * value.itemsize and held < _bytes_needed(value)
    if value.numel() and (not address or is_short):
        raise DataError(f"input '{_called(item)}' has no memory that holds all of its numbers; give a tensor that has")
    return value


def _bytes_needed(value: torch.Tensor) -> int:
    """How long a tensor's storage must be."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (value.storage_offset() + last + 1) * value.itemsize


def sizes_of(model: Callee, batch: Batch) -> dict[str, int]:
    """What a batch has for each size that varies."""
    tensors = bind(model, batch.args, batch.kwargs)
    named = [
        (BATCH if name is None else name, size)
        for item, x in zip(model.inputs, tensors, strict=True)
        for name, size in zip(item.shape, x.shape, strict=True)
    ]
    return {name: size for name, size in named if isinstance(name, str)}


def _flat(inputs: tuple[Input, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    if not kwargs and len(args) == len(inputs):
        return list(args)
    remaining, named, bound = list(args), dict(kwargs), []
    for item in inputs:
        name = _called(item)
        if name in named:
            bound.append(named.pop(name))
        elif remaining:
            bound.append(remaining.pop(0))
        else:
            raise DataError(f"input '{name}' is missing; the model takes ({_expected(inputs)})")
    if remaining or named:
        extra = f"{len(remaining)} more positional" if remaining else f"unknown keyword {', '.join(named)}"
        raise DataError(f"the call has {extra} arguments; the model takes ({_expected(inputs)})")
    return bound


def by_parameter(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name; "*2" for the third one where positions have no name.

    Raises:
        DataError: one is given by position and by keyword.
    """
    given = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    if twice := sorted(given.keys() & kwargs.keys()):
        raise DataError(f"the call gives '{twice[0]}' by position and by keyword; give it once")
    return given | dict(kwargs)


def _nested(
    arguments: Arguments, inputs: tuple[Input, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    given = by_parameter(arguments.names, args, kwargs)
    bound: list[Any] = [None] * len(inputs)
    left_out: list[tuple[str, int]] = []
    for name, tree in arguments.parameters.items():
        if isinstance(tree, Leaf) and name in arguments.neutral and given.get(name) is None:
            given.pop(name, None)
            left_out.append((name, tree.index))
        elif name in given:
            _match(tree, given.pop(name), name, bound)
        elif isinstance(tree, Leaf) or _has_leaf(tree):
            raise DataError(f"input '{name}' is missing; the model takes ({', '.join(arguments.parameters)})")
    for name, value in given.items():
        _leave_out(arguments, name, value)
    for name, index in left_out:
        like = next(x for x in bound if isinstance(x, torch.Tensor))
        dtype = getattr(torch, inputs[index].dtype)
        bound[index] = torch.full(like.shape[: len(inputs[index].shape)], arguments.neutral[name], dtype=dtype)
    return bound


def _leave_out(arguments: Arguments, name: str, value: Any) -> None:
    """An argument that the model was not captured with: legal where float would compute the same without it."""
    if name in arguments.defaults and _equal(value, arguments.defaults[name]):
        return
    if isinstance(value, torch.Tensor) and name in arguments.neutral:
        if bool((value == arguments.neutral[name]).all()):
            return
        raise DataError(
            f"input '{name}' holds other values than {arguments.neutral[name]:g}, and the model was calibrated without "
            "it; calibrate on batches that have it"
        )
    if name in arguments.defaults or name in arguments.names or name.startswith("*"):
        raise DataError(
            f"input '{name}' was not among the calibration inputs, where it was {arguments.defaults.get(name)!r}; "
            f"found {_shown(value)}: leave it out, or calibrate on batches that have it"
        )
    if not arguments.catches:
        raise DataError(f"the call has an unknown keyword {name}; the model takes ({', '.join(arguments.parameters)})")
    if value is not None:
        warnings.warn(
            f"quantflow: the keyword '{name}' is ignored: the model was calibrated without it; calibrate on batches "
            "that have it if the model reads it",
            RuntimeWarning,
            stacklevel=4,
        )


def _match(tree: Any, value: Any, place: str, bound: list[Any]) -> None:
    """Put the value's tensors where the tree says, and hold its constants against the captured ones."""
    if isinstance(tree, Leaf):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"input '{place}' is {_shown(value)}; the model was captured with a tensor there")
        bound[tree.index] = value
        return
    entries, found = _entries(tree), _entries(value)
    if entries is None:
        if isinstance(value, torch.Tensor) or not _equal(tree, value):
            raise DataError(
                f"input '{place}' is {_shown(value)}; the model was captured with {tree!r}, which is a constant of it: "
                f"give that, or quantize another model with {_shown(value)}"
            )
        return
    if found is None or entries.keys() != found.keys():
        kind = type_name(value) if found is None else f"{len(found)} entries ({', '.join(map(str, found))})"
        raise DataError(
            f"input '{place}' is {kind}; the model was captured with {len(entries)} entries "
            f"({', '.join(map(str, entries))})"
        )
    for key, item in entries.items():
        _match(item, found[key], f"{place}.{key}" if isinstance(key, str) else f"{place}[{key}]", bound)


def _entries(value: Any) -> dict[Any, Any] | None:
    """A container's entries by key or position; None: it is no container."""
    if isinstance(value, Typed):
        named = all(value.fields) and value.kind != "tuple"
        return dict(zip(value.fields if named else range(len(value.values)), value.values, strict=True))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return None


def _has_leaf(tree: Any) -> bool:
    entries = _entries(tree)
    return isinstance(tree, Leaf) if entries is None else any(map(_has_leaf, entries.values()))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) != isinstance(b, bool) or isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else f"a {type_name(value)}"


def _called(item: Input) -> str:
    return item.keyword or item.name


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(inputs: tuple[Input, ...]) -> str:
    return ", ".join(f"{_called(i)}: {i.dtype}{_shape(i.shape)}" for i in inputs)


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return "(" + ", ".join(BATCH if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
