"""Inputs stored as tensors: the user's .npz and .safetensors files, and seeded random numbers."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantflow.errors import DataError, found_at, nearest
from quantflow.ir.batch import Batch
from quantflow.sources.data.samples import Data, Samples, assemble, check_finite, hash_of, split, take
from quantflow.store.tensor_header import require_distinct_file


def load_tensors(
    path: Path,
    evaluation_path: Path | None,
    input_keys: Sequence[str] | None,
    label_key: str | None,
    calibration: int,
    evaluation: int,
    batch_size: int,
    seed: int,
) -> Data:
    """A seeded choice of the samples (rows) of the arrays in a file.

    With `input_keys` the arrays are positional inputs in that order. Without, every array but the label is an
    input: a single one is positional, several are keyword inputs named like their arrays. Floating-point arrays
    become float32. Calibration and evaluation are disjoint rows of one file, or come from a file each.

    Raises:
        DataError: file missing, of another format, truncated or holding Python objects; a key it does not hold;
            arrays of different lengths or without dimensions; no sample; NaN or Inf (names key and row).
    """
    stored = _Stored.read(path, "data.path", input_keys, label_key)
    if evaluation_path is None:
        chosen, notices = split(stored.count, calibration, evaluation, seed, f"data.path: {path}")
        parts = (stored.samples(chosen.calibration), stored.samples(chosen.evaluation))
    else:
        other = _Stored.read(evaluation_path, "data.evaluation_path", input_keys, label_key)
        first, notices = take(stored.count, calibration, seed, f"data.path: {path}")
        second, more = take(other.count, evaluation, seed, f"data.evaluation_path: {evaluation_path}")
        parts = (stored.samples(first), other.samples(second))
        notices += more
    return assemble("tensors", *parts, batch_size, metric="top1" if label_key else None, notices=notices)


def load_random(
    shapes: Sequence[Sequence[int]], dtype: str, calibration: int, evaluation: int, batch_size: int, seed: int
) -> Data:
    """Seeded random inputs, one positional input per shape: N(0, 1), or 0 and 1 for integers and booleans.

    Sample number i is the same whatever the counts and the batch size.
    """

    values = sum(math.prod(shape) for shape in shapes) * (calibration + evaluation)
    _require_memory(
        values * getattr(torch, dtype).itemsize, "data.shape: these samples", "ask for smaller or fewer ones"
    )

    def samples(name: str, offset: int, count: int) -> Samples:
        drawn = [_draw(shapes, getattr(torch, dtype), [seed, offset, i]) for i in range(count)]
        args = tuple(torch.stack(column) for column in zip(*drawn, strict=True))

        def collate(positions: range) -> Batch:
            return Batch(tuple(a[positions.start : positions.stop] for a in args))

        return Samples(tuple(f"random-{name}-{i}" for i in range(count)), collate, hash_of(args))

    return assemble(
        "random",
        samples("calibration", 0, calibration),
        samples("evaluation", 1, evaluation),
        batch_size,
        notices=("data=random: calibrated and evaluated on random numbers; the figures say nothing about real inputs",),
    )


def _require_memory(size_bytes: int, what: str, cure: str) -> None:
    """Refuses what would fill the machine's memory: reading it copies it once or twice."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if size_bytes > limit:
        raise DataError(
            f"{what} take {size_bytes / 1e9:.4g} GB, half of this machine's memory is {limit / 1e9:.4g} GB; {cure}"
        )


def _draw(shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: list[int]) -> list[torch.Tensor]:
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    if dtype.is_floating_point:
        return [torch.randn(tuple(shape), generator=generator).to(dtype) for shape in shapes]
    return [torch.randint(0, 2, tuple(shape), generator=generator).to(dtype) for shape in shapes]


class _Stored:
    """The inputs and labels of one file, checked."""

    def __init__(self, path: Path, inputs: dict[str, torch.Tensor], named: bool, labels: torch.Tensor | None) -> None:
        self.path = path
        self.inputs = inputs
        self.named = named
        self.labels = labels
        self.count = len(next(iter(inputs.values())))

    @classmethod
    def read(cls, path: Path, field: str, input_keys: Sequence[str] | None, label_key: str | None) -> _Stored:
        arrays = _read(path, field)
        keys = list(input_keys) if input_keys else [k for k in arrays if k != label_key]
        wanted = [*keys, label_key] if label_key else keys
        unknown = [k for k in wanted if k not in arrays]
        if unknown:
            raise DataError(
                f"{field}: {path} has no array {', '.join(repr(k) for k in unknown)} (asked for by data.input_keys or "
                f"data.label_key); it holds: {', '.join(arrays) or 'nothing'}; nearest: {nearest(unknown[0], arrays)}"
            )
        if not keys:
            raise DataError(f"{field}: {path} holds no input array")
        lengths = {k: len(arrays[k]) if arrays[k].dim() else None for k in wanted}
        if None in lengths.values() or len(set(lengths.values())) > 1:
            found = ", ".join(f"'{k}' {tuple(arrays[k].shape)}" for k in wanted)
            raise DataError(
                f"{field}: {path}: the first dimension counts the samples and must agree; found shapes {found}"
            )
        for key in keys:
            check_finite(f"{field}: {path}: array '{key}'", arrays[key], [str(i) for i in range(len(arrays[key]))])
        inputs = {k: arrays[k].float() if arrays[k].is_floating_point() else arrays[k] for k in keys}
        labels = None if label_key is None else _class_indices(arrays[label_key], f"{field}: {path}: '{label_key}'")
        return cls(path, inputs, named=input_keys is None and len(keys) > 1, labels=labels)

    def samples(self, positions: tuple[int, ...]) -> Samples:
        rows = list(positions)

        def collate(wanted: range) -> Batch:
            own = rows[wanted.start : wanted.stop]
            inputs = {k: v[own] for k, v in self.inputs.items()}
            labels = None if self.labels is None else self.labels[own]
            if self.named:
                return Batch((), inputs, labels)
            return Batch(tuple(inputs.values()), {}, labels)

        ids = tuple(f"{self.path.name}[{i}]" for i in rows)
        return Samples(ids, collate, hash_of(piece for k, v in self.inputs.items() for piece in (k.encode(), v[rows])))


def _class_indices(labels: torch.Tensor, where: str) -> torch.Tensor:
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = labels.long()
    if labels.dim() != 1 or not torch.equal(whole.to(labels.dtype), labels):
        raise DataError(f"{where}: labels are class indices of shape (N,); found {labels.dtype} {tuple(labels.shape)}")
    return whole


def _read(path: Path, field: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise DataError(f"{field}: {path} is {found_at(path)}, expected a file of tensors")
    if path.suffix == ".safetensors":
        try:
            require_distinct_file(path)
            return load_file(path)
        except (SafetensorError, OSError) as problem:
            raise DataError(f"{field}: {path} can't be read as safetensors ({problem})") from problem
    if path.suffix == ".npz":
        return _read_npz(path, field)
    raise DataError(f"{field}: {path}: '{path.suffix}' files are not read; use .npz or .safetensors")


def _read_npz(path: Path, field: str) -> dict[str, torch.Tensor]:
    arrays = {}
    try:
        with path.open("rb") as stream:
            if zipfile.is_zipfile(stream):
                unpacked = sum(member.file_size for member in zipfile.ZipFile(stream).infolist())
                _require_memory(unpacked, f"{field}: {path}: its arrays", "store fewer samples")
            stream.seek(0)
            stored = np.load(stream, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise DataError(f"{field}: {path} is not an .npz archive; write it with numpy.savez")
            for key in stored.files:
                arrays[key] = _as_tensor(stored, key, path, field)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as problem:
        raise DataError(f"{field}: {path} can't be read as .npz ({problem}); write it with numpy.savez") from problem
    return arrays


def _as_tensor(stored: np.lib.npyio.NpzFile, key: str, path: Path, field: str) -> torch.Tensor:
    try:
        array = stored[key]
        return torch.from_numpy(array)
    except (ValueError, TypeError, MemoryError, RecursionError) as problem:
        raise DataError(
            f"{field}: {path}: array '{key}' can't be used ({str(problem)[:200]}); arrays of Python objects and "
            "strings are never loaded, store numbers"
        ) from problem
