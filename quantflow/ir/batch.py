"""One batch of model inputs, and how a user's batches become it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantflow.errors import DataError


@dataclass(frozen=True)
class Batch:
    """What one call of the model takes: `model(*args, **kwargs)`.

    Attributes:
        args: positional inputs, each (B, ...).
        kwargs: keyword inputs, each (B, ...).
        labels: (B,) class indices, (B, N) human ratings of text pairs, or None.
        ids: B names of the samples, for records and error messages.
    """

    args: tuple[torch.Tensor, ...]
    kwargs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    ids: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """B: the first dimension of the first input (1 for an input without dimensions)."""
        first = self.tensors[0]
        return first.shape[0] if first.dim() else 1

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All inputs, positional ones first."""
        return (*self.args, *self.kwargs.values())

    def head(self, size: int) -> Batch:
        """The first `size` samples; the batch itself where its inputs do not share a first dimension."""
        return self._cut(slice(size))

    def tail(self, size: int) -> Batch:
        """The last `size` samples; the batch itself where its inputs do not share a first dimension."""
        return self._cut(slice(max(self.size - size, 0), None))

    def _cut(self, part: slice) -> Batch:
        is_whole = len(range(self.size)[part]) == self.size
        if is_whole or any(t.dim() == 0 or t.shape[0] != self.size for t in self.tensors):
            return self
        return Batch(
            args=tuple(t[part] for t in self.args),
            kwargs={name: t[part] for name, t in self.kwargs.items()},
            labels=None if self.labels is None else self.labels[part],
            ids=self.ids[part],
        )


def as_batches(iterable: Iterable[Any]) -> Iterator[Batch]:
    """Turns whatever an iterable yields into batches, lazily.

    A tensor is one positional input, a tuple or list of tensors several, a dict of tensors keyword inputs, and a
    `Batch` stays what it is. Samples without ids are numbered "0", "1", ... across the whole iterable.

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
            f"batch {index}: found {_describe(item)}, expected a tensor, a tuple or list of tensors, a dict of "
            "tensors or a quantflow Batch" + _cure(item)
        )
    if not batch.tensors:
        raise DataError(f"batch {index}: holds no tensor; a batch needs at least one input")
    names = (*(f"item {i}" for i in range(len(batch.args))), *(f"key '{name}'" for name in batch.kwargs))
    for name, value in zip(names, batch.tensors, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"batch {index}, {name}: found {_describe(value)}, expected a tensor" + _cure(value))
    if batch.size == 0:
        raise DataError(f"batch {index}: holds no sample (shape {tuple(batch.tensors[0].shape)})")
    return batch


def _describe(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _cure(value: object) -> str:
    if type(value).__module__ == "numpy":
        return "; convert arrays with torch.from_numpy"
    if isinstance(value, int | float):
        return "; labels belong in Batch(args=(x,), labels=y), not among the inputs"
    return ""
