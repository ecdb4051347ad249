"""One batch of model inputs, and how a user's batches become it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantflow.errors import DataError
from quantflow.ir.structure import Leaf, Unknown, build, flatten, is_cache, leaves_of, type_name


@dataclass(frozen=True)
class Batch:
    """What one call of the model takes: `model(*args, **kwargs)`.

    Attributes:
        args: positional inputs: tensors, each (B, ...), constants, and lists, tuples and dicts of them.
        kwargs: keyword inputs of the same kinds.
        labels: (B,) class indices, (B, N) human ratings of text pairs, or None.
        ids: B names of the samples, for records and error messages.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    ids: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """B: the first dimension of the first tensor that has one."""
        return next((x.shape[0] for x in self.tensors if x.dim()), 1)

    @property
    def images(self) -> int | None:
        """How many images lie in its first list, as detectors take them: each (1, 3 or 4 channels, height, width).

        None where it holds no such list.
        """
        lists = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, list) and value]
        return len(lists[0]) if lists and all(map(_is_image, lists[0])) else None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors in it, positional ones first."""
        return tuple(self.flat()[1])

    def flat(self) -> tuple[Any, list[torch.Tensor]]:
        """((args, kwargs) as a tree, its tensors).

        Raises:
            Unknown: an input is neither a tensor, a constant nor a container of them.
        """
        return flatten((self.args, dict(self.kwargs)))

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor with the name that messages give it: "input 0", "input_ids", "images[2]"."""
        return [
            (f"{name}{path}", x)
            for name, value in (*((f"input {i}", x) for i, x in enumerate(self.args)), *self.kwargs.items())
            for path, x in _places(flatten(value))
        ]

    def replaced(self, tensors: Iterable[torch.Tensor]) -> Batch:
        """The same call with other tensors."""
        args, kwargs = build(self.flat()[0], list(tensors))
        return replace(self, args=args, kwargs=kwargs)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same call with every tensor changed."""
        return self.replaced(map(function, self.tensors))

    def at(self, place: torch.device) -> Batch:
        """The same call with its tensors on a device; labels stay."""
        return self if all(x.device == place for x in self.tensors) else self.mapped(lambda x: x.to(place))

    def head(self, size: int) -> Batch:
        """The first `size` samples; the batch itself where its inputs do not share a first dimension."""
        return self._cut(slice(size))

    def tail(self, size: int) -> Batch:
        """The last `size` samples; the batch itself where its inputs do not share a first dimension."""
        return self._cut(slice(max(self.size - size, 0), None))

    def _cut(self, part: slice) -> Batch:
        is_whole = len(range(self.size)[part]) == self.size
        if is_whole or self.images is not None or any(t.dim() == 0 or t.shape[0] != self.size for t in self.tensors):
            return self
        labels = None if self.labels is None else self.labels[part]
        return replace(self.mapped(lambda t: t[part]), labels=labels, ids=self.ids[part])


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[0] in (1, 3, 4)


def _places(flat: tuple[Any, list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    tree, leaves = flat
    if isinstance(tree, Leaf):
        yield "", leaves[0]
        return
    numbered = [leaf for leaf in leaves_of(tree) if isinstance(leaf, Leaf)]
    for leaf in numbered:
        yield f"[{leaf.index}]", leaves[leaf.index]


def as_batches(iterable: Iterable[Any]) -> Iterator[Batch]:
    """Turns whatever an iterable yields into batches, lazily.

    A tensor is one positional input, a tuple or list several, a dict keyword inputs, and a `Batch` stays what it is.
    An input is a tensor, a constant (None, a flag, a number, a string), or a list, tuple or dict of them. Samples
    without ids are numbered "0", "1", ... across the whole iterable.

    Raises:
        DataError: the iterable is a single tensor or no iterable at all, or an item is of another kind or empty
            (names its index and type).
    """
    if isinstance(iterable, torch.Tensor):
        raise DataError(
            f"batches: found one tensor of shape {tuple(iterable.shape)}, expected an iterable of batches; "
            "pass [tensor], or tensor.split(16) to make batches of 16"
        )
    if isinstance(iterable, str | Mapping | Batch) or not isinstance(iterable, Iterable):
        raise DataError(
            f"batches: found {type(iterable).__name__}, expected an iterable of tensors, tuples of tensors, "
            "dicts of tensors or quantflow Batch; a single batch goes in a list"
        )
    return _convert(iterable)


def _convert(iterable: Iterable[Any]) -> Iterator[Batch]:
    first = 0
    for index, item in enumerate(iterable):
        batch = _as_batch(item, index)
        if not batch.ids:
            batch = replace(batch, ids=tuple(str(first + i) for i in range(batch.size)))
        first += batch.size
        yield batch


def _as_batch(item: Any, index: int) -> Batch:
    if isinstance(item, Batch):
        batch = item
    elif isinstance(item, torch.Tensor):
        batch = Batch((item,))
    elif isinstance(item, tuple | list):
        batch = Batch(tuple(item))
    elif isinstance(item, Mapping):
        batch = Batch((), dict(item))
    else:
        raise DataError(
            f"batch {index}: found {type_name(item)}, expected a tensor, a tuple or list of tensors, a dict of "
            "tensors or a quantflow Batch" + _cure(item)
        )
    names = (*(f"item {i}" for i in range(len(batch.args))), *(f"key '{name}'" for name in batch.kwargs))
    for name, value in zip(names, (*batch.args, *batch.kwargs.values()), strict=True):
        try:
            flatten(value, name)
        except Unknown as unknown:
            raise DataError(
                f"batch {index}, {unknown.path}: found {type_name(unknown.value)}, expected a tensor, a constant, or "
                "a list, tuple or dict of them" + _cure(unknown.value)
            ) from None
    if not batch.tensors:
        given = [type_name(value) for value in (*batch.args, *batch.kwargs.values())]
        cure = _cure(next(iter(batch.args), None))
        raise DataError(
            f"batch {index}: holds no tensor; a batch needs at least one input"
            + (f" (found {', '.join(given)})" if given else "")
            + cure
        )
    if any(x.dim() and x.shape[0] == 0 for x in batch.tensors[:1]):
        raise DataError(f"batch {index}: holds no sample (shape {tuple(batch.tensors[0].shape)})")
    return batch


def _cure(value: object) -> str:
    if type(value).__module__ == "numpy":
        return "; convert arrays with torch.from_numpy"
    if is_cache(value):
        return (
            "; it is a cache of a language model's past, which an int8 model has no use for: call with use_cache=False"
        )
    return ""
