"""Batches from the user's own code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantflow.errors import DataError
from quantflow.ir.batch import Batch, as_batches
from quantflow.sources.data.entry import call_entry, import_entry
from quantflow.sources.data.samples import Data, check_finite, hash_of, identity_of


def load_entry(entry: str, kwargs: dict[str, Any], calibration: int, evaluation: int) -> Data:
    """Calls `package.module:callable` and keeps as many of its samples as the recipe asks for.

    The callable returns a tuple (calibration batches, evaluation batches), or one iterable of batches whose first
    samples calibrate and whose following ones evaluate. Batches keep the size the callable gave them.

    Raises:
        DataError: the entry can't be imported or raises, returns something else, or yields no sample, NaN or Inf.
    """
    where = f"data.entry: '{entry}'"
    target = import_entry(entry, "data.entry", DataError)
    result = call_entry(target, kwargs, entry, "data.entry", DataError) if callable(target) else target
    notices = [f"data.entry ran the user's own code: {entry}"]
    if isinstance(result, tuple):
        if len(result) != 2:
            raise DataError(
                f"{where} returned a tuple of {len(result)}; return (calibration, evaluation), or a list of batches"
            )
        first = _draw(result[0], calibration, where, notices, "calibration")
        second = _draw(result[1], evaluation, where, notices, "evaluation")
    else:
        source = _batches(result, where)
        first = _draw(source, calibration, where, notices, "calibration")
        second = _draw(source, evaluation, where, notices, "evaluation", allow_none=True)
        if not second:
            second = first
            notices.append(f"{where} has no sample left for evaluation: the calibration samples are used again")
    identity = identity_of("entry", {"calibration": _record(first), "evaluation": _record(second)})
    labels = [batch.labels for batch in second]
    ranked = all(label is not None and label.dim() == 1 for label in labels)
    return Data(first, second, identity | {"entry": entry}, "top1" if ranked else None, tuple(notices))


def _batches(iterable: Iterable[Any], where: str) -> Iterable[Batch]:
    try:
        return as_batches(iterable)
    except DataError as problem:
        raise DataError(f"{where}: {problem}") from problem


def _draw(
    iterable: Iterable[Any], count: int, where: str, notices: list[str], part: str, *, allow_none: bool = False
) -> list[Batch]:
    drawn: list[Batch] = []
    missing = count
    source = iter(_batches(iterable, where))
    while missing > 0:
        try:
            batch = next(source, None)
        except DataError as problem:
            raise DataError(f"{where}: {problem}") from problem
        except Exception as problem:
            raise DataError(f"{where}: raised {type(problem).__name__} while yielding batches: {problem}") from problem
        if batch is None:
            break
        batch = batch.head(missing)
        for name, values in batch.named():
            if values.dim():
                ids = batch.ids if len(batch.ids) == len(values) else [str(i) for i in range(len(values))]
                check_finite(f"{where}: {part} batch {len(drawn)}, {name}", values, ids)
        drawn.append(batch)
        missing -= batch.images or batch.size
    if not drawn and not allow_none:
        raise DataError(f"{where} yielded no {part} batch; {count} samples were asked for")
    if missing > 0 and drawn:
        notices.append(f"{where} yielded {count - missing} {part} samples where {count} were asked for")
    return drawn


def _record(batches: list[Batch]) -> tuple[list[str], str]:
    return [i for batch in batches for i in batch.ids], hash_of(t for batch in batches for t in batch.tensors)
