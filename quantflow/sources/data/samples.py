"""Samples by number, batches made of them when asked for, and the record of which they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from quantflow.errors import DataError
from quantflow.ir.batch import Batch


@dataclass(frozen=True)
class Samples:
    """Samples that are made when asked for.

    Attributes:
        ids: one name per sample.
        collate: positions → the Batch of these samples, ids left out.
        content: sha256 of the bytes the samples are made from.
    """

    ids: tuple[str, ...]
    collate: Callable[[range], Batch]
    content: str


class Batches(Sequence[Batch]):
    """Samples in batches of `batch_size` (the last may be smaller); made anew at each access."""

    def __init__(self, samples: Samples, batch_size: int) -> None:
        self.samples = samples
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.samples.ids) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index * self.batch_size
        positions = range(first, min(first + self.batch_size, len(self.samples.ids)))
        batch = self.samples.collate(positions)
        return Batch(batch.args, batch.kwargs, batch.labels, tuple(self.samples.ids[i] for i in positions))


@dataclass(frozen=True)
class Data:
    """What a recipe's `data` comes to.

    Attributes:
        calibration, evaluation: re-iterable batches of known length.
        identity: JSON-ready record: kind, sample counts, sample ids, sha256 over ids and over content.
        metric: "top1" (labels are class indices), "spearman" (labels are rows of human ratings), or None.
        notices: what the user must be told.
        shapes: further batches, which show the sizes that vary and nothing else.
    """

    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]
    identity: dict[str, Any]
    metric: str | None = None
    notices: tuple[str, ...] = ()
    shapes: Sequence[Batch] = ()

    @property
    def of_own_shapes(self) -> Sequence[Batch]:
        """Batches whose sizes may differ: those that are cut from one array, or prepared alike, do not."""
        return () if isinstance(self.calibration, Batches) else (*self.calibration, *self.shapes)


def identity_of(kind: str, parts: dict[str, tuple[Sequence[str], str]]) -> dict[str, Any]:
    """The record of what was used. `parts`: "calibration" and "evaluation" → (ids, sha256 of the content)."""
    ids = hashlib.sha256()
    content = hashlib.sha256()
    record: dict[str, Any] = {"kind": kind}
    for name, (names, digest) in parts.items():
        record[f"{name}_samples"] = len(names)
        record[f"{name}_ids"] = list(names)
        ids.update(f"{name}\n".encode() + "".join(f"{n}\n" for n in names).encode())
        content.update(f"{name} {digest}\n".encode())
    return record | {"ids_sha256": ids.hexdigest(), "content_sha256": content.hexdigest()}


def hash_of(pieces: Iterable[bytes | torch.Tensor]) -> str:
    """sha256 over the pieces, each preceded by its size; tensors by dtype and shape too."""
    digest = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, torch.Tensor):
            digest.update(f"{piece.dtype} {tuple(piece.shape)}\n".encode())
            piece = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(f"{len(piece)}\n".encode())
        digest.update(piece)
    return digest.hexdigest()


def assemble(kind: str, calibration: Samples, evaluation: Samples, batch_size: int, **more: Any) -> Data:
    """Data from two sets of samples; `more` are Data's metric and notices."""
    identity = identity_of(
        kind,
        {"calibration": (calibration.ids, calibration.content), "evaluation": (evaluation.ids, evaluation.content)},
    )
    return Data(Batches(calibration, batch_size), Batches(evaluation, batch_size), identity, **more)


def split(available: int, calibration: int, evaluation: int, seed: int, what: str) -> tuple[Split, tuple[str, ...]]:
    """Seeded, disjoint positions for calibration and evaluation, and a notice when there are too few samples.

    Too few samples are shared in the proportion asked for; a single one serves both.

    Raises:
        DataError: there is no sample at all.
    """
    if available == 0:
        raise DataError(f"{what}: holds no sample; calibration asks for {calibration} and evaluation for {evaluation}")
    order = np.random.default_rng(seed).permutation(available).tolist()
    asked = calibration + evaluation
    if available >= asked:
        return Split(tuple(order[:calibration]), tuple(order[calibration:asked])), ()
    if available == 1:
        notice = f"{what}: its only sample is used for calibration and for evaluation"
        return Split((0,), (0,)), (notice,)
    count = min(max(1, round(available * calibration / asked)), available - 1)
    notice = (
        f"{what}: holds {available} samples where {calibration} + {evaluation} were asked for; "
        f"{count} are used for calibration and the other {available - count} for evaluation"
    )
    return Split(tuple(order[:count]), tuple(order[count:])), (notice,)


@dataclass(frozen=True)
class Split:
    """Positions of the samples used for calibration and for evaluation."""

    calibration: tuple[int, ...]
    evaluation: tuple[int, ...]


def take(available: int, count: int, seed: int, what: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`count` seeded positions out of `available`, or all of them and a notice."""
    if available == 0:
        raise DataError(f"{what}: holds no sample, {count} were asked for")
    order = np.random.default_rng(seed).permutation(available).tolist()
    if count <= available:
        return tuple(order[:count]), ()
    return tuple(order), (f"{what}: holds {available} samples where {count} were asked for; all are used",)


def check_finite(name: str, values: torch.Tensor, ids: Sequence[str]) -> None:
    """Raises DataError naming the input and the first sample that holds NaN or Inf. `values`: (N, ...)."""
    if not values.is_floating_point() or bool(torch.isfinite(values).all()):
        return
    per_sample = torch.isfinite(values).reshape(len(values), -1).all(1)
    index = int((~per_sample).nonzero()[0])
    bad = values[index]
    found = "NaN" if bool(torch.isnan(bad).any()) else "Inf"
    count = int((~per_sample).sum())
    raise DataError(
        f"{name}: sample {ids[index]} holds {found} ({count} of {len(values)} samples are not finite); "
        "remove them or repair the data"
    )
