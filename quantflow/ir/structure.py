"""What goes into a model and what comes out, as data: plain containers, constants and tensors, and names of types.

`flatten` takes a value apart into a tree and its tensors, `build` puts it together again. A tree holds no code: a type
is a name, looked up among those that this process has seen in a model's own output, or in the allow-list of libraries
whose output types are plain holders of values.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MAPPING, TUPLE, ATTRIBUTES, SIZE = "mapping", "tuple", "attributes", "size"
KINDS = (MAPPING, TUPLE, ATTRIBUTES, SIZE)
#: Values that a tree holds as they are.
CONSTANTS = (bool, int, float, str, type(None), torch.dtype)

#: Modules whose output types may be looked up by the name that an artifact gives. Importing them runs the installed
#: library's own code only, and what is found must be such a holder of values.
_KNOWN_MODULES = re.compile(
    r"transformers\.modeling_outputs|transformers\.models\.\w+\.modeling_\w+|collections|torch\.return_types"
    r"|torchvision\.models\.\w+|timm\.models\.\w+"
)
#: Caches of a language model's past: state of a generation, not a result.
_CACHES = ("Cache", "DynamicCache", "StaticCache", "EncoderDecoderCache", "HybridCache", "SlidingWindowCache")
#: Of types that models of this process returned: how they hold their values, and under which names.
_seen: dict[tuple[str, str, tuple[str, ...]], type] = {}


@dataclass(frozen=True)
class Leaf:
    """The tensor (or the size) of that number."""

    index: int


@dataclass(frozen=True)
class Typed:
    """A container of a type of its own.

    Attributes:
        type: "module:qualified name".
        kind: how it holds its values: as a mapping, as a tuple, as attributes, or as a torch.Size.
        fields: a name per value; "" in a tuple without names.
        values: trees.
    """

    type: str
    kind: str
    fields: tuple[str, ...]
    values: tuple[Any, ...]

    def replaced(self, values: Sequence[Any]) -> Typed:
        return dataclasses.replace(self, values=tuple(values))


class Unknown(Exception):
    """A value that no tree can hold: where it is, and what it is."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(f"{path} is a {type_name(value)}")
        self.path, self.value = path, value


def is_cache(value: Any) -> bool:
    """Whether it is a cache of a language model's past."""
    return any(base.__name__ in _CACHES for base in type(value).__mro__)


def type_name(value: Any) -> str:
    """For messages: "numpy.ndarray", "list"."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def flatten(value: Any, path: str = "", dropped: list[str] | None = None) -> tuple[Any, list[Any]]:
    """A value's tree, and the tensors and symbolic sizes in it, in order.

    Args:
        dropped: where caches of a language model's past are named; None: they are no legal value.

    Raises:
        Unknown: it holds something that is no container, constant or tensor.
    """
    leaves: list[Any] = []

    def walk(item: Any, place: str) -> Any:
        if isinstance(item, (torch.Tensor, torch.SymInt, torch.fx.Node)):
            leaves.append(item)
            return Leaf(len(leaves) - 1)
        if isinstance(item, CONSTANTS):
            return item
        if type(item) in (list, tuple):
            return type(item)(walk(x, f"{place}[{i}]") for i, x in enumerate(item))
        if type(item) is dict and all(isinstance(key, str) for key in item):
            return {key: walk(x, _joined(place, key)) for key, x in item.items()}
        if dropped is not None and is_cache(item):
            dropped.append(place)
            return None
        return _typed(item, place, walk)

    return walk(value, path), leaves


def _typed(item: Any, place: str, walk: Callable[[Any, str], Any]) -> Typed:
    kind, fields, values = "", (), ()  # type: tuple[str, tuple[str, ...], tuple[Any, ...]]
    if isinstance(item, torch.Size):
        kind, fields, values = SIZE, ("",) * len(item), tuple(item)
    elif isinstance(item, tuple):
        kind, values = TUPLE, tuple(item)
        fields = tuple(getattr(item, "_fields", ())) or _sequence_fields(item)
    elif isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        kind, fields, values = MAPPING, tuple(item), tuple(item.values())
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        fields = tuple(field.name for field in dataclasses.fields(item))
        kind, values = ATTRIBUTES, tuple(getattr(item, field) for field in fields)
    else:
        raise Unknown(place or "it", item)
    name = f"{type(item).__module__}:{type(item).__qualname__}"
    _seen[name, kind, fields] = type(item)
    marks = [f"[{i}]" if not field else f".{field}" for i, field in enumerate(fields)]
    return Typed(name, kind, fields, tuple(walk(x, place + mark) for x, mark in zip(values, marks, strict=True)))


def _sequence_fields(item: Any) -> tuple[str, ...]:
    """The names of a torch.return_types result, "" for each entry of another tuple."""
    count = len(item)
    if getattr(type(item), "__module__", "") != "torch.return_types":
        return ("",) * count
    members = [name for name, kind in vars(type(item)).items() if type(kind).__name__ == "member_descriptor"]
    return tuple(members) if len(members) == count else ("",) * count


def _joined(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def build(tree: Any, leaves: Sequence[Any]) -> Any:
    """The value that a tree and its leaves stand for."""
    return made(replaced(tree, lambda leaf: leaves[leaf.index] if isinstance(leaf, Leaf) else leaf))


def replaced(tree: Any, of: Callable[[Any], Any]) -> Any:
    """The same tree with every leaf and constant replaced."""
    if isinstance(tree, Typed):
        return tree.replaced([replaced(value, of) for value in tree.values])
    if isinstance(tree, dict):
        return {key: replaced(value, of) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replaced(value, of) for value in tree)
    return of(tree)


def leaves_of(tree: Any) -> Iterator[Any]:
    """What the tree holds, constants included, depth first."""
    if isinstance(tree, Typed):
        tree = tree.values
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves_of(value)
    else:
        yield tree


def made(value: Any) -> Any:
    """Every `Typed` in it as an object of its type, or of a plain one that has the same entries and attributes."""
    if isinstance(value, Typed):
        return _object(value, [made(item) for item in value.values])
    if type(value) is dict:
        return {key: made(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(made(item) for item in value)
    return value


def holds_types(tree: Any) -> bool:
    """Whether `made` has anything to do."""
    if isinstance(tree, Typed):
        return True
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return any(holds_types(item) for item in items)


def unknown_types(tree: Any) -> list[str]:
    """The types in it that can't be had in this process, so that plain ones stand in."""
    found = [tree.type] if isinstance(tree, Typed) and tree.kind != SIZE and _class(tree) is None else []
    items: Any = tree.values if isinstance(tree, Typed) else tree
    items = items.values() if isinstance(items, Mapping) else items if isinstance(items, (list, tuple)) else ()
    return [*found, *(name for item in items for name in unknown_types(item))]


def _object(typed: Typed, values: list[Any]) -> Any:
    if typed.kind == SIZE:
        return torch.Size(values)
    kind, named = _class(typed), dict(zip(typed.fields, values, strict=True))
    if typed.kind == TUPLE:
        if kind is None:
            return _named_tuple(typed.type.rpartition(":")[2], typed.fields)(*values)
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    if kind is None:
        return Attributes(named)
    if typed.kind == MAPPING:
        if dataclasses.is_dataclass(kind):
            return kind(**named)
        return kind(named)
    made = object.__new__(kind)  # a dataclass's own __init__ may ask for other arguments
    for field, value in named.items():
        object.__setattr__(made, field, value)
    return made


class Attributes(dict[str, Any]):
    """Stands in for a type that this process does not have: entries that can be read as attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's output has no '{name}', but {', '.join(self)}") from None


def _named_tuple(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    simple = name.rpartition(".")[2]
    legal = [n.isidentifier() and not n.startswith("_") for n in (simple, *fields)]
    if not all(legal) or len(set(fields)) != len(fields):
        return lambda *values: values
    return collections.namedtuple(simple, fields, rename=True)


def _class(typed: Typed) -> type | None:
    """The type of that name: one that a model of this process returned, or one of the allow-list."""
    if (seen := _seen.get((typed.type, typed.kind, typed.fields))) is not None:
        return seen
    module, _, name = typed.type.partition(":")
    if not _KNOWN_MODULES.fullmatch(module) or not name.isidentifier():
        return None
    try:
        found = getattr(sys.modules.get(module) or importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and _holds_values(found, typed) else None


def _holds_values(kind: type, typed: Typed) -> bool:
    """Whether making one from these fields does nothing but hold them."""
    if typed.kind == TUPLE:
        return issubclass(kind, tuple) and tuple(getattr(kind, "_fields", typed.fields)) == typed.fields
    if typed.kind == MAPPING:
        if kind is collections.OrderedDict:
            return True
        names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        bases = {base.__name__ for base in kind.__mro__}
        return "ModelOutput" in bases and names.issuperset(typed.fields)
    return False


def plain(output: Any) -> Any:
    """Nested in plain tuples, lists and dicts; empty entries of model-output classes dropped."""
    if isinstance(output, Typed):
        if output.kind in (MAPPING, ATTRIBUTES):
            pairs = zip(output.fields, output.values, strict=True)
            return {key: plain(value) for key, value in pairs if value is not None}
        return tuple(map(plain, output.values))
    if isinstance(output, Mapping) or hasattr(output, "keys"):
        return {str(k): plain(output[k]) for k in output.keys() if output[k] is not None}  # noqa: SIM118
    if isinstance(output, (tuple, list)):
        return type(output)(plain(x) for x in output) if type(output) in (tuple, list) else tuple(map(plain, output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        named = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return {name: plain(value) for name, value in named.items() if value is not None}
    return output
