"""A model as a function of its tensors alone: what capture sees where a call holds more, or less, than tensors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantflow.errors import DataError
from quantflow.ir.batch import Batch
from quantflow.ir.binding import by_parameter
from quantflow.ir.calls import Arguments
from quantflow.ir.structure import CONSTANTS, Leaf, Unknown, build, flatten, leaves_of, replaced, type_name

#: Where torch keeps autocast: its own frames are no place in the user's code.
_AMP = str(Path(torch.amp.__file__).parent)
#: Parameters of language models that change nothing when every entry is this number, which is tried before it is used.
_NEUTRAL = {"attention_mask": 1.0, "token_type_ids": 0.0}


@dataclass(frozen=True)
class Form:
    """How a model's calls and results hold tensors.

    Attributes:
        names: of the tensors of a call, in order: "x", "images[0]".
        arguments: where they lie among its arguments.
        is_flat: the arguments are these tensors and nothing else.
        output: the result as a tree.
        dtypes: of the tensors in it.
        dropped: caches in the result, which are no part of it any more.
    """

    names: tuple[str, ...]
    arguments: Arguments
    is_flat: bool
    output: Any
    dtypes: tuple[torch.dtype, ...]
    dropped: tuple[str, ...] = ()

    @property
    def returns_tensors(self) -> bool:
        """Whether the result is a tensor, or one tuple, list or dict of tensors, which every capture can express."""
        items = self.output.values() if isinstance(self.output, dict) else self.output
        items = items if isinstance(self.output, (dict, list, tuple)) else [self.output]
        return all(isinstance(leaf, Leaf) for leaf in items)


def positional(model: Any) -> tuple[tuple[str, ...], dict[str, Any], bool]:
    """(parameters that a position can give, defaults of those that have one, whether any keyword is taken)."""
    if isinstance(model, torch.export.ExportedProgram):
        return (), {}, False
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # what has no signature in Python
        return (), {}, False
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return tuple(p.name for p in named), defaults, any(p.kind is p.VAR_KEYWORD for p in parameters)


def tensor_names(model: Any, example: Batch) -> tuple[str, ...]:
    """The name of every tensor of a call: its parameter, and its place in that."""
    given = by_parameter(positional(model)[0], example.args, example.kwargs)
    names: list[str] = []
    for name, value in given.items():
        tree, leaves = flatten(value)
        names += [name] if isinstance(tree, Leaf) else [f"{name}[{i}]" for i in range(len(leaves))]
    return tuple(names)


def form_of(model: nn.Module, example: Batch, original: nn.Module | None = None) -> Form:
    """Run the model once on the example, and see.

    Args:
        original: the model in the dtype that it was given in, where that is not float32.

    Raises:
        DataError: an argument is given twice.
        Exception: whatever the model raises on the example.
    """
    names, defaults, catches = positional(model)
    given = by_parameter(names, example.args, example.kwargs)
    tree = flatten(given)[0]
    with torch.no_grad():
        result = (original or model)(*example.args, **example.kwargs)
    dropped: list[str] = []
    try:
        output, leaves = flatten(result, "", dropped)
    except Unknown as unknown:
        raise DataError(
            f"model: its output holds a {type_name(unknown.value)} ({unknown.path}), which no int8 model can return; "
            "let it return tensors, numbers, and containers of them"
        ) from None
    known = {name: value for name, value in defaults.items() if name not in given and isinstance(value, CONSTANTS)}
    neutral = _neutral(original or model, given, names, result)
    variadic = any(name.startswith("*") for name in given)
    is_flat = not catches and not variadic and not known and not neutral
    is_flat = is_flat and all(isinstance(leaf, Leaf) for leaf in tree.values())
    arguments = Arguments(tree, names, known, neutral, catches)
    return Form(
        tensor_names(model, example), arguments, is_flat, output, tuple(leaf.dtype for leaf in leaves), tuple(dropped)
    )


def _neutral(model: nn.Module, given: Mapping[str, Any], names: tuple[str, ...], result: Any) -> dict[str, float]:
    """Parameters that may be left out or be given as one number throughout: tried on the example."""
    first = next(iter(given.values()), None)
    if not isinstance(first, torch.Tensor) or first.is_floating_point() or first.dim() != 2:
        return {}
    found: dict[str, float] = {}
    for name, number in _NEUTRAL.items():
        if name not in names or isinstance(given.get(name), (int, float)) or given.get(name) is first:
            continue
        others = {key: value for key, value in given.items() if key != name and not key.startswith("*")}
        with contextlib.suppress(Exception), torch.no_grad():  # the model may need it, or not take it so
            left = model(**others) if name in given else result
            filled = model(**others, **{name: torch.full_like(first, int(number))})
            if _same(filled, left):
                found[name] = number
    return found


def _same(a: Any, b: Any) -> bool:
    x, y = flatten(a, "", [])[1], flatten(b, "", [])[1]
    return len(x) == len(y) and all(
        p.shape == q.shape and torch.allclose(p.double(), q.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        for p, q in zip(x, y, strict=True)
    )


class Flat(nn.Module):
    """The model as a function of tensors: forward(*tensors) → the tensors of its result.

    Half-precision tensors are computed with in float32, and come out in the dtype that the model itself gives.
    """

    def __init__(self, module: nn.Module, example: Batch, form: Form, *, upcast: bool = False) -> None:
        super().__init__()
        self.module = module
        self.form = form
        self.original_name = type(module).__name__
        self._tree = example.flat()[0]
        self._upcast = upcast
        self.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, as identifiers."""
        return tuple("".join(c if c.isalnum() else "_" for c in name).strip("_") for name in self.form.names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._upcast:
            tensors = tuple(_float32(x) for x in tensors)
        args, kwargs = build(self._tree, tensors)
        output, leaves = flatten(self.module(*args, **kwargs), "", [])
        kept = _like(self.form.output, output, leaves)
        if self._upcast:
            dtypes = iter(self.form.dtypes)
            kept = [_restored(x, next(dtypes)) if isinstance(x, torch.Tensor) and x.dim() else x for x in kept]
        return tuple(kept)

    def structure(self) -> Any:
        """The model's result as a tree over what `forward` returns."""
        return _numbered(self.form.output)


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.is_floating_point() and x.dtype is not torch.float32 else x


def _restored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype is not dtype else x


def _is_size(value: Any) -> bool:
    return type(value) is int


def _like(wanted: Any, found: Any, leaves: list[Any]) -> list[Any]:
    """What `found` holds where `wanted` holds a tensor or a whole number, in order: numbers may be symbols here."""
    pairs = list(leaves_of(wanted)), list(leaves_of(found))
    if len(pairs[0]) != len(pairs[1]):
        raise DataError("the model's output has another structure on other input; return the same one always")
    return [
        leaves[b.index] if isinstance(b, Leaf) else b
        for a, b in zip(*pairs, strict=True)
        if isinstance(a, Leaf) or _is_size(a)
    ]


def _numbered(output: Any) -> Any:
    count = iter(range(10**6))
    return replaced(output, lambda leaf: Leaf(next(count)) if isinstance(leaf, Leaf) or _is_size(leaf) else leaf)


@contextlib.contextmanager
def without_autocast() -> Iterator[list[str]]:
    """Lower precision that code asks for is left out while it is captured; gives the list of where that was."""
    places: list[str] = []
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__

    def entered(self: Any) -> Any:
        if self._enabled:
            frame = inspect.currentframe()
            caller = frame.f_back if frame is not None else None
            while caller is not None and caller.f_code.co_filename.startswith(_AMP):
                caller = caller.f_back
            if caller is not None:
                places.append(f"{caller.f_code.co_filename.rpartition('/')[2]}:{caller.f_lineno}")
        return self

    kind.__enter__, kind.__exit__ = entered, lambda *_: None  # type: ignore[method-assign]
    try:
        yield places
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
