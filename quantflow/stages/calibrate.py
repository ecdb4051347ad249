"""Calibration: run the float model over sample batches and record every observed value's range.

    calibrate(prepared, batches) → CalibrationTable

A table of one half of the data merged with a table of the other half is the table of all of it, and a run
that was killed goes on from its checkpoint to the same table as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from quantflow.errors import ArtifactError, CalibrationError, DataError, cause_line
from quantflow.host.place import CPU, current, interface_of
from quantflow.numerics.observers import AbstractObserver, Sketch, extremes, flat, make_observer, require_finite
from quantflow.schema import ActivationSpec
from quantflow.store.tensor_header import require_distinct
from quantflow.store.whole_file import read_regular, write_whole

if TYPE_CHECKING:
    from quantflow.ir.batch import Batch

FORMAT = 1
#: How many names an error message lists.
LISTED = 5
#: The sum of no digests.
NO_DATA = "0" * 64
#: Batches that are hashed at a time: on a card one thread would be slower than the model is.
HASHERS = 4

OnValue = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int | None], None]


class ObservedModel(Protocol):
    """What calibration needs of a prepared model."""

    @property
    def observed(self) -> Mapping[str, ActivationSpec]:
        """Value name → how it will be coded."""

    @property
    def layers(self) -> Mapping[str, str]:
        """Value name → the layer it comes from, for messages."""

    def run(self, batch: Batch, on_value: OnValue) -> Any:
        """One float forward pass that hands each observed value to `on_value`."""


@dataclass(frozen=True)
class CalibrationTable:
    """What was measured.

    Attributes:
        observers: value name → its observer.
        batches, samples: how many went through the model.
        data_sha256: the batches' sha256 digests, added up modulo 2^256: independent of their order, and the
            digest of merged tables is the digest of the whole.
        resumed_batches: how many of `batches` came from a checkpoint; not saved.
        notices: what the user should hear about this run; not saved.
    """

    observers: Mapping[str, AbstractObserver]
    batches: int
    samples: int
    data_sha256: str
    resumed_batches: int = field(default=0, compare=False)
    notices: tuple[str, ...] = field(default=(), compare=False)

    def merge(self, other: CalibrationTable) -> CalibrationTable:
        """The table of this data followed by the other's.

        Raises:
            CalibrationError: if the two observed different values, or the same ones in different ways.
        """
        if differing := sorted(self.observers.keys() ^ other.observers.keys()):
            raise CalibrationError(
                f"two calibration tables can't be merged: only one of them observed {_listed(differing)}; "
                "calibrate both halves with one recipe"
            )
        try:
            observers = {name: observer.merge(other.observers[name]) for name, observer in self.observers.items()}
        except ValueError as error:
            raise CalibrationError(f"two calibration tables can't be merged: {error}") from error
        return CalibrationTable(
            observers,
            self.batches + other.batches,
            self.samples + other.samples,
            _added(self.data_sha256, other.data_sha256),
        )

    def to_bytes(self) -> bytes:
        """The table as a .safetensors file; the same table gives the same bytes."""
        return _encode(self, key="")

    @staticmethod
    def from_bytes(data: bytes, where: str) -> CalibrationTable:
        """The table in a .safetensors file's bytes; `where` names it in errors.

        Raises:
            ArtifactError: if the bytes are truncated, changed, or from a newer format.
        """
        return _decode(data, where)[0]

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file; at any moment the path holds the old file or the new one."""
        write_whole(Path(path), self.to_bytes())

    @staticmethod
    def load(path: str | Path) -> CalibrationTable:
        """Read what `save` wrote.

        Raises:
            ArtifactError: if the file is missing, truncated, changed, or from a newer format.
        """
        return _read(Path(path))[0]


def calibrate(
    prepared: ObservedModel,
    batches: Iterable[Batch],
    *,
    key: str = "",
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 5.0,
    resume: bool = True,
    first: int | None = None,
    ahead: torch.device = CPU,
    progress: Progress | None = None,
) -> CalibrationTable:
    """Observe every value of `prepared.observed` over all batches, in inference mode.

    Args:
        key: what the measurement depends on besides the data, e.g. `Recipe.calibration_key()`.
        checkpoint: where to save the table so far, at most every `checkpoint_every_s` seconds and at the end.
            Removing it is the caller's business.
        resume: go on from `checkpoint` when its key, values and data are these; otherwise start clean and say
            so in `notices`.
        first: given, the batches are a part of the data that begins with this one: errors count from it, and the part
            may be empty or leave values unobserved. `require_complete` the merged table.
        ahead: a card that the model runs on and takes batches from: each is copied there while the one before it runs.
        progress: called with (batches done, batches in all or None) after each batch.

    Raises:
        CalibrationError: no data; NaN or Inf inside the model; a value that was never observed.
        DataError: NaN in the data, or Inf that reaches an observed value; a batch whose shape the model refuses.
    """
    total = len(batches) if isinstance(batches, Sized) else None
    table, remaining, first_shapes = empty_table(prepared), iter(batches), ""
    if checkpoint is not None and resume and checkpoint.exists():
        table, remaining, first_shapes = _resume(checkpoint, key, table, batches, remaining)
    if progress is not None and table.batches:
        progress(table.batches, total)
    last_save = time.monotonic()
    with ThreadPoolExecutor(HASHERS + 1) as beside:
        digests: deque[Future[str]] = deque()
        for batch, brought in _brought(ahead, remaining, beside):
            digests.append(beside.submit(_digest, batch))
            table = observe(prepared, batch, table, first or 0, first_shapes, digest=NO_DATA, brought=brought)
            while len(digests) > HASHERS:
                table = _hashed(table, digests.popleft().result())
            first_shapes = first_shapes or shapes_of(batch)
            if progress is not None:
                progress(table.batches, total)
            if checkpoint is not None and time.monotonic() - last_save >= checkpoint_every_s:
                while digests:
                    table = _hashed(table, digests.popleft().result())
                write_whole(checkpoint, _encode(table, key))
                last_save = time.monotonic()
        for digest in digests:
            table = _hashed(table, digest.result())
    if first is None:
        require_complete(table, prepared.layers)
    if checkpoint is not None:
        write_whole(checkpoint, _encode(table, key))
    return table


def empty_table(prepared: ObservedModel) -> CalibrationTable:
    """The table before anything was observed."""
    return CalibrationTable({name: make_observer(spec) for name, spec in prepared.observed.items()}, 0, 0, NO_DATA)


def observe(
    prepared: ObservedModel,
    batch: Batch,
    table: CalibrationTable,
    first: int = 0,
    first_shapes: str = "",
    digest: str | None = None,
    brought: Batch | None = None,
) -> CalibrationTable:
    """The table after one more batch, whose observers are the given table's.

    Args:
        first: what errors count batches from.
        first_shapes: `shapes_of` the first batch, for errors.
        digest: the batch's; None: it is hashed here.
        brought: the batch where the model computes; None: it is brought there.

    Raises:
        CalibrationError, DataError: as `calibrate`.
    """
    index = first + table.batches
    _require_finite(batch, index, is_inf_legal=True)
    _observe(prepared, batch, index, table, first_shapes, batch if brought is None else brought)
    return _counted(table, batch, _digest(batch) if digest is None else digest)


def _counted(table: CalibrationTable, batch: Batch, digest: str) -> CalibrationTable:
    table = replace(table, batches=table.batches + 1, samples=table.samples + batch.size)
    return _hashed(table, digest)


def _hashed(table: CalibrationTable, digest: str) -> CalibrationTable:
    return replace(table, data_sha256=_added(table.data_sha256, digest))


# --- resuming ---


def _resume(
    checkpoint: Path, key: str, start: CalibrationTable, batches: Iterable[Batch], iterator: Iterator[Batch]
) -> tuple[CalibrationTable, Iterator[Batch], str]:
    """The checkpoint's table, the batches after it, and the shapes of the first one.

    A checkpoint that does not fit gives the start, all batches, "" and a notice that says why; one that fits gives a
    notice, too.
    """
    reason = "it was taken over other data"
    try:
        table, found_key = _read(checkpoint)
    except ArtifactError as error:
        reason = str(error)
    else:
        if found_key != key:
            reason = "it belongs to another recipe"
        elif specs_of(table) != specs_of(start):
            reason = "it observed other values"
        else:
            seen, shapes = replace(start, observers=table.observers), ""
            while seen.batches < table.batches and (batch := next(iterator, None)) is not None:
                seen, shapes = _counted(seen, batch, _digest(batch)), shapes or shapes_of(batch)
            if seen == table:
                notice = f"calibration resumed: {table.batches} batches were taken from the checkpoint {checkpoint}"
                return replace(table, resumed_batches=table.batches, notices=(notice,)), iterator, shapes
            if iterator is batches:
                raise DataError(
                    f"calibration data: these batches are not those of the checkpoint {checkpoint}, and an iterator "
                    "can't be read twice; pass a list, or calibrate with resume=False"
                )
            iterator = iter(batches)
    notice = f"calibration started clean: the checkpoint {checkpoint} does not fit, {reason}"
    return replace(start, notices=(notice,)), iterator, ""


def specs_of(table: CalibrationTable) -> dict[str, ActivationSpec]:
    """Value name → how it is observed."""
    return {name: observer.spec for name, observer in table.observers.items()}


# --- one batch ---


def _brought(
    place: torch.device, batches: Iterable[Batch], beside: ThreadPoolExecutor
) -> Iterator[tuple[Batch, Batch | None]]:
    """Each batch and the same on a card, where one is copied while the model runs on the one before it."""
    if not hasattr(getattr(torch, place.type, None), "Stream") or place.type == CPU.type:
        yield from ((batch, None) for batch in batches)
        return
    waiting: deque[tuple[Batch, Future[Batch]]] = deque()
    for batch in batches:
        waiting.append((batch, beside.submit(_copied, place, batch)))
        if len(waiting) > 1:
            earlier, copy = waiting.popleft()
            yield earlier, copy.result()
    for last, copy in waiting:
        yield last, copy.result()


def _copied(place: torch.device, batch: Batch) -> Batch:
    """The batch on a card, in memory of a stream's own: whoever lets go of it has waited for the card."""
    with current(place):
        stream = interface_of(place).Stream()
        with interface_of(place).stream(stream):
            copy = batch.at(place)
        stream.synchronize()
    return copy


def _observe(
    prepared: ObservedModel, batch: Batch, index: int, table: CalibrationTable, first_shapes: str, brought: Batch
) -> None:
    sketches: list[tuple[str, Sketch]] = []

    def on_value(name: str, x: torch.Tensor) -> None:
        if not x.is_cpu:  # what a card has found is fetched once for all values
            if x.numel():
                sketches.append((name, table.observers[name].sketch(x)))
            return
        observe(name, x)

    def observe(name: str, x: torch.Tensor) -> None:
        try:
            table.observers[name].observe(x)
        except ValueError as error:
            layer, place = prepared.layers.get(name, name), _place(batch, index, x)
            raise CalibrationError(
                f"calibration: {layer} gives {error} in {place}, though the data are finite; "
                "check the model's weights and that its preprocessing belongs to them, or leave those samples out"
            ) from error

    try:
        with torch.inference_mode():
            prepared.run(brought, on_value)
            if sketches and not _taken(sketches, table):
                prepared.run(brought, observe)  # value by value, to say which one it is
    except CalibrationError:
        _require_finite(batch, index, is_inf_legal=False)
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        place, found = _place(batch, index), shapes_of(batch)
        if found == first_shapes:
            raise CalibrationError(
                f"calibration: the model failed on {place}, though batches of these shapes passed: {cause_line(error)}"
            ) from error
        expected = f"the first batch had {first_shapes}" if first_shapes else "it is the first batch"
        raise DataError(
            f"calibration data: the model refuses {place}: {cause_line(error)}; found {found} per sample, {expected}; "
            "give every sample a shape that the model takes"
        ) from error


def _taken(sketches: Sequence[tuple[str, Sketch]], table: CalibrationTable) -> bool:
    """Hand the observers what was found; False, and nothing is handed over, where a value holds NaN or Inf."""
    extremes = torch.stack([sketch.extremes for _, sketch in sketches]).tolist()
    try:
        for low, high in extremes:
            require_finite(low, high)
    except ValueError:
        return False
    counted = [sketch.counts for _, sketch in sketches if sketch.counts is not None]
    counts = iter(torch.stack(counted).cpu() if counted else ())
    for (name, sketch), (low, high) in zip(sketches, extremes, strict=True):
        table.observers[name].take(low, high, None if sketch.counts is None else next(counts))
    return True


def _require_finite(batch: Batch, index: int, *, is_inf_legal: bool) -> None:
    """Refuses NaN, and Inf where it is not legal: a mask may hold -Inf as long as no observed value does."""
    for name, x in batch.named():
        if not x.is_floating_point() or not x.numel():
            continue
        # NaN and Inf reach the sum, which all cores make at once.
        if bool(x.detach().sum(dtype=torch.float32).isfinite()):
            continue
        try:
            extremes(flat(x))
        except ValueError as error:
            if is_inf_legal and not bool(x.isnan().any()):
                continue
            raise DataError(
                f"calibration data: {name} holds {error} in {_place(batch, index, x)}; remove or repair those samples"
            ) from error


def require_complete(table: CalibrationTable, layers: Mapping[str, str]) -> None:
    """Raises CalibrationError if there was no sample, or a value that never held a number."""
    if table.samples == 0:
        raise CalibrationError(
            "calibration data: there are no samples; calibrate on some that look like the real input, 64 or more"
        )
    if missing := [layers.get(name, name) for name, observer in table.observers.items() if observer.is_empty]:
        raise CalibrationError(
            f"calibration: {_listed(missing)} never held a number, so there is no range to choose; "
            "use data that reaches every layer, or keep these layers float with layers: {NAME: float}"
        )


def shapes_of(batch: Batch) -> str:
    """Every input's shape without the batch dimension."""
    return ", ".join(f"{name} {list(x.shape[1:])}" for name, x in batch.named())


def _place(batch: Batch, index: int, x: torch.Tensor | None = None) -> str:
    """'batch 3 (samples a, b)': those whose row in x is not finite where x has a row per sample, else all."""
    rows = list(range(batch.size))
    if x is not None and x.dim() and x.shape[0] == batch.size:
        rows = (~torch.isfinite(x)).reshape(batch.size, -1).any(1).nonzero().flatten().tolist() or rows
    return f"batch {index} ({named_samples(batch, rows)})"


def named_samples(batch: Batch, rows: Sequence[int] | None = None) -> str:
    """'samples a, b': those of the batch, or of these rows of it."""
    rows = range(batch.size) if rows is None else rows
    names = [batch.ids[row] if row < len(batch.ids) else f"#{row}" for row in rows]
    return f"{'sample' if len(names) == 1 else 'samples'} {_listed(names)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


# --- digests and the file ---


def _digest(batch: Batch) -> str:
    """sha256 of the inputs' names, dtypes, shapes and bytes."""
    return _sha256(batch.named())


def _sha256(tensors: Iterable[tuple[str, torch.Tensor]], prefix: str = "") -> str:
    digest = hashlib.sha256(prefix.encode())
    for name, x in tensors:
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _added(a: str, b: str) -> str:
    return f"{(int(a, 16) + int(b, 16)) % 2**256:064x}"


def _encode(table: CalibrationTable, key: str) -> bytes:
    """All metadata sits in one JSON text, because safetensors writes several entries in random order."""
    tensors = {
        f"{name}/{part}": x for name, observer in table.observers.items() for part, x in observer.state().items()
    }
    content = {
        "key": key,
        "batches": table.batches,
        "samples": table.samples,
        "data_sha256": table.data_sha256,
        "specs": {name: observer.spec.model_dump(mode="json") for name, observer in table.observers.items()},
    }
    header = {"format": FORMAT, "content": content, "sha256": _checksum(content, tensors)}
    return save_tensors(tensors, {"quantflow": json.dumps(header)})


def _decode(data: bytes, where: str) -> tuple[CalibrationTable, str]:
    """The table and its key."""
    cure = "calibrate again"
    try:
        require_distinct(data)
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["quantflow"])
        if header["format"] > FORMAT:
            raise ArtifactError(
                f"{where}: calibration format {header['format']} is newer than this quantflow's {FORMAT}; upgrade it"
            )
        if header["format"] != FORMAT:
            raise ValueError(f"unknown format {header['format']}")
        content = header["content"]
        if header["sha256"] != _checksum(content, tensors):
            raise ArtifactError(f"{where}: the calibration table was changed or damaged after it was written; {cure}")
        states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in content["specs"]}
        for path, x in tensors.items():
            name, _, part = path.rpartition("/")
            states[name][part] = x
        observers = {}
        for name, spec in content["specs"].items():
            observers[name] = make_observer(ActivationSpec.model_validate(spec))
            observers[name].load_state(states[name])
        table = CalibrationTable(observers, content["batches"], content["samples"], content["data_sha256"])
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{where}: not a calibration table, or a damaged one ({cause_line(error)}); {cure}"
        ) from error
    return table, content["key"]


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    return _sha256(sorted(tensors.items()), json.dumps(content, sort_keys=True))


def _read(path: Path) -> tuple[CalibrationTable, str]:
    try:
        data = read_regular(path)
    except OSError as error:
        raise ArtifactError(
            f"{path}: the calibration table can't be read ({error.strerror}); calibrate again"
        ) from error
    return _decode(data, str(path))
