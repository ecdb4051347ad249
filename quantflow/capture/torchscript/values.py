"""What the TorchScript import computes with: tensors and sizes of several runs at once, and the builtins on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(eq=False)
class TracedTensor:
    """A tensor in every run. Constant while `node` is None: it then does not depend on the input.

    Attributes:
        values: one per run; a constant's are one and the same object.
        node: what computes it. An in-place op puts another one here, so that every alias sees the change.
        name: a constant's name in the model, "" if it has none.
        is_attribute: a parameter or buffer itself, not computed from one.
        view: (tensor, op that writes back, its further arguments) for a slice or select of another tensor.
    """

    values: tuple[torch.Tensor, ...]
    node: fx.Node | None = None
    name: str = ""
    is_attribute: bool = False
    view: tuple[TracedTensor, Any, tuple[Any, ...]] | None = None


@dataclass(eq=False)
class TracedSize:
    """A number that follows sizes of the input; without a node it can decide branches but not be computed with.

    Attributes:
        text: the number over the names of the inputs' sizes, "" where it is not known.
    """

    values: tuple[Any, ...]
    node: fx.Node | None
    text: str = ""


@dataclass(frozen=True)
class Module:
    """A module of the ScriptModule that is walked through, and its name in it."""

    script: Any
    path: str

    @property
    def is_leaf(self) -> bool:
        return ".torch.nn.modules." in self.script._type().qualified_name()


#: Comparisons and logic on numbers that may follow the batch size.
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "__not__": operator.not_, "__and__": lambda a, b: a and b, "__or__": lambda a, b: a or b, "Bool": bool,
}  # fmt: skip


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


def wrapped(value: Any, runs: int, name: str = "", is_attribute: bool = False) -> Any:
    """A plain value as the interpreter holds it."""
    if isinstance(value, torch.Tensor):
        return TracedTensor((value.detach(),) * runs, None, name, is_attribute)
    if isinstance(value, dict):
        return {key: wrapped(item, runs, f"{name}.{key}", is_attribute) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(wrapped(v, runs, name and f"{name}.{i}", is_attribute) for i, v in enumerate(value))
    return value


def concrete(value: Any, run: int) -> Any:
    """The value in one run."""
    if isinstance(value, (TracedTensor, TracedSize)):
        return value.values[run]
    if isinstance(value, dict):
        return {key: concrete(item, run) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(concrete(item, run) for item in value)
    return value


def compare(function: Callable[..., Any], args: Sequence[Any], runs: int) -> Any:
    """A comparison of numbers, or of lists of numbers, that may follow the batch size."""
    if len(args) == 2 and function in (operator.eq, operator.ne) and _identical(*args):
        return function is operator.eq
    values = tuple(function(*(in_run(a, run) for a in args)) for run in range(runs))
    return TracedSize(values, None, _compared(function, args))


_SIGNS = {
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip


def _compared(function: Callable[..., Any], args: Sequence[Any]) -> str:
    texts = [size_text(a) for a in args]
    if not all(texts):
        return ""
    if function is bool:
        return texts[0]
    if function is operator.not_:
        return f"not ({texts[0]})"
    return f"{texts[0]} {_SIGNS[function]} {texts[1]}" if function in _SIGNS else ""


def size_text(value: Any) -> str:
    """A number over the names of sizes; "" where it can't be written down."""
    if isinstance(value, TracedSize):
        return f"({value.text})" if value.text else ""
    return repr(value) if type(value) in (int, float) else ""


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_identical, a, b))
    if isinstance(a, TracedSize) and isinstance(b, TracedSize):
        return a.node is not None and a.node is b.node
    return not isinstance(a, TracedSize) and not isinstance(b, TracedSize) and bool(a == b)


def in_run(value: Any, run: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [in_run(item, run) for item in value]
    return value.values[run] if isinstance(value, TracedSize) else value


def _on_lists(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_lists(a: Any, b: Any) -> Any:
        runs = {len(x.values) for x in (*flat(a), *flat(b)) if isinstance(x, TracedSize)}
        return compare(function, (a, b), runs.pop()) if runs else function(a, b)

    return on_lists


def _contains(container: Any, wanted: Any) -> bool:
    return any(_identical(item, wanted) for item in container)


def _insert(items: list[Any], index: int, item: Any) -> None:
    items.insert(index, item)


def _extend(items: list[Any], more: Sequence[Any]) -> None:
    items.extend(more)


def _append(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


#: TorchScript's builtins on lists, tuples, dicts and strings, whatever these hold.
ON_STRUCTURES: dict[str, Callable[..., Any]] = {
    "len": len,
    "__getitem__": operator.getitem,
    "_set_item": _set_item,
    "__contains__": _contains,
    "append": _append,
    "extend": _extend,
    "insert": _insert,
    "pop": lambda items, *index: items.pop(*index),
    "clear": lambda items: items.clear(),
    "reverse": lambda items: items.reverse(),
    "index": lambda items, wanted: items.index(wanted),
    "list": list,
    "copy": lambda items: items.copy(),
    "add": operator.add,
    "add_": operator.iadd,
    "mul": operator.mul,
    "slice": lambda items, start=None, end=None, step=None: items[slice(start, end, step)],
    "eq": _on_lists(operator.eq),
    "ne": _on_lists(operator.ne),
    "keys": lambda items: list(items.keys()),
    "values": lambda items: list(items.values()),
    "items": lambda items: list(items.items()),
    "get": lambda items, *args: items.get(*args),
    "update": lambda items, more: items.update(more),
    "format": lambda text, *args: text.format(*in_run(args, 0)),
    "percentFormat": lambda text, *args: text % tuple(in_run(args, 0)),
}
