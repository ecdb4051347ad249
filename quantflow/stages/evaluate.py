"""How far the int8 model is from the float model, and what that costs in the task's own metric."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantflow.errors import DataError, ModelError, VerificationError, first_line
from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.structure import Typed, plain
from quantflow.numerics import measures
from quantflow.numerics.affine import QParams, dequantize
from quantflow.runtimes.native_sums import error_sums

TOP1 = "top1"
SPEARMAN = "spearman"
EMBEDDING = "embedding"
#: Elements whose errors are added up at a time.
_PIECE = 1 << 15

#: Calls `on_value(name, tensor)` for every layer's output while it runs a batch.
LayerRun = Callable[[Batch, Callable[[str, torch.Tensor], None]], Any]
#: Calls `on_value(name, tensor, qparams)` so: codes of `qparams`, or reals where these are None.
CodedRun = Callable[[Batch, Callable[[str, torch.Tensor, QParams | None], None]], Any]


def evaluate(
    float_fn: Callable[..., Any],
    int8_fn: Callable[..., Any],
    batches: Iterable[Batch],
    *,
    metric: str | None = None,
    outputs: str = "other",
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Runs both models over the same batches: the `accuracy` section of the results, without `per_layer`.

    Where an output is a structure, its first floating-point tensor (depth first) is the one that counts; the
    others are listed under `others`.

    Args:
        float_fn, int8_fn: called as fn(*batch.args, **batch.kwargs).
        metric: "top1" (labels: class indices, shape (batch,)), "spearman" (labels: the samples' rows of a
            table of ratings between all samples, shape (batch, samples)), or None.
        outputs: "logits", "embedding" (cosine per sample is listed, no top-1) or "other".
        progress: called with (batches done, batches or None) after each batch.

    Returns:
        samples, batches;
        sqnr_db, max_error, float_max_abs: over all finite elements. A value that is finite in one model only,
            and any NaN, makes sqnr_db NaN and max_error infinite. Of classes or flags the first two are None;
        agreement: share of samples with the same largest class, or of equal elements where classes or flags are what
            comes out; None without classes;
        cosine_mean, cosine_min: per sample, None for outputs of one number per sample, of classes and flags;
        nonfinite: elements that are NaN or infinite, {"float", "int8"};
        identical: whether all outputs are equal to the last bit;
        metric: {"name", "float", "int8", "drop", "standard_error", "samples"}, or None for want of labels.

    Raises:
        DataError: no batches, or labels that don't fit the outputs.
        ModelError: an output without a tensor.
        VerificationError: int8 outputs of other shapes than float's.
    """
    return judge(tally(float_fn, int8_fn, batches, metric=metric, outputs=outputs, progress=progress))


def tally(
    float_fn: Callable[..., Any],
    int8_fn: Callable[..., Any],
    batches: Iterable[Batch],
    *,
    metric: str | None = None,
    outputs: str = "other",
    first: int = 0,
    places: tuple[torch.device, torch.device] = (CPU, CPU),
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Tally]:
    """Each batch's comparison by itself, as `evaluate`; the batches may be a part that begins with number `first`.

    `places`: where float_fn and int8_fn take their inputs; outputs are compared where float's are.
    """
    count, tallies = _length(batches), []
    with torch.inference_mode():
        for done, batch in enumerate(batches):
            tallies.append(Tally(metric, outputs))
            float_output = _float_output(float_fn, batch.at(places[0]), first + done)
            given = batch.at(places[1])
            tallies[-1].add(batch, float_output, int8_fn(*given.args, **given.kwargs), first + done)
            if progress is not None:
                progress(done + 1, count)
    return tallies


def judge(tallies: Iterable[Tally]) -> dict[str, Any]:
    """What `evaluate` returns, from every batch's tally in the batches' order: sums of floats depend on it."""
    whole = None
    for each in tallies:
        whole = each if whole is None else whole.merge(each)
    if whole is None:
        raise DataError("evaluation got no batches; set data.evaluation to at least 1, or evaluate.enabled=false")
    return whole.result()


def compare_layers(float_run: LayerRun, int8_run: CodedRun, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Error of each layer's output against float's, in the int8 model's order, errors of earlier layers included.

    Layers that only one side reports are left out. Holds one batch's float activations in memory, as they are: no op
    may write to one that was reported.

    Returns:
        [{"name", "sqnr_db", "max_error"}]
    """
    errors: dict[str, ErrorSum] = {}
    with torch.inference_mode():
        for batch in batches:
            expected: dict[str, torch.Tensor] = {}

            def keep(name: str, x: torch.Tensor, into: dict[str, torch.Tensor] = expected) -> None:
                into[name] = x.detach()

            def compare(
                name: str, x: torch.Tensor, qparams: QParams | None, source: dict[str, torch.Tensor] = expected
            ) -> None:
                reference = source.pop(name, None)
                if reference is not None and reference.shape == x.shape:
                    errors.setdefault(name, ErrorSum()).add(reference, x, qparams)

            float_run(batch, keep)
            int8_run(batch, compare)
    return [{"name": name, "sqnr_db": error.sqnr_db, "max_error": error.max_error} for name, error in errors.items()]


@dataclass
class ErrorSum:
    """Error of x' against x, added up in float64 over any number of tensors.

    sqnr_db = 10 log10(sum x^2 / sum (x - x')^2). Infinities that are equal in both (masked scores) are left out.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    largest_error: float = 0.0
    elements: int = 0
    nonfinite_float: int = 0
    nonfinite_int8: int = 0
    is_broken: bool = False

    def add(self, reference: torch.Tensor, actual: torch.Tensor, qparams: QParams | None = None) -> None:
        """Both of one shape, any dtype; with `qparams`, `actual` holds codes."""
        reference, actual = reference.detach(), actual.detach()
        sums = error_sums(reference, actual, qparams)
        if sums is not None:
            self._count(reference.numel(), *sums)
            return
        actual = (actual if qparams is None else dequantize(actual, qparams)).to(reference.device)
        if reference.dim() > 2 and reference.movedim(1, -1).is_contiguous():
            reference, actual = reference.movedim(1, -1), actual.movedim(1, -1)  # as they lie in memory
        for x, y in zip(_pieces(reference), _pieces(actual), strict=True):
            self._add(x.to(torch.float64), y.to(torch.float64))

    def _add(self, reference: torch.Tensor, actual: torch.Tensor) -> None:
        error = reference - actual
        noise = error.dot(error).item()
        if not math.isfinite(noise):  # one pass finds every NaN and infinity
            finite_float, finite_int8 = torch.isfinite(reference), torch.isfinite(actual)
            finite = finite_float & finite_int8
            self.nonfinite_float += int((~finite_float).sum())
            self.nonfinite_int8 += int((~finite_int8).sum())
            self.is_broken |= bool((~finite & (reference != actual)).any())
            reference, error = reference[finite], error[finite]
            noise = error.dot(error).item()
        if reference.numel() == 0:
            return
        self._count(reference.numel(), reference.dot(reference).item(), noise, _largest(reference), _largest(error))

    def _count(self, elements: int, signal: float, noise: float, largest: float, largest_error: float) -> None:
        self.elements += elements
        self.signal += signal
        self.noise += noise
        self.largest = max(self.largest, largest)
        self.largest_error = max(self.largest_error, largest_error)

    def merge(self, other: ErrorSum) -> None:
        """Adds what the other saw after this."""
        self.elements += other.elements
        self.signal += other.signal
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)
        self.largest_error = max(self.largest_error, other.largest_error)
        self.nonfinite_float += other.nonfinite_float
        self.nonfinite_int8 += other.nonfinite_int8
        self.is_broken |= other.is_broken

    @property
    def sqnr_db(self) -> float:
        if self.is_broken or self.elements == 0:
            return math.nan
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio else -math.inf

    @property
    def max_error(self) -> float:
        return math.inf if self.is_broken else self.largest_error

    @property
    def is_identical(self) -> bool:
        return not self.is_broken and self.noise == 0


def _pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in their order, as flat tensors: on a CPU so few that float64 copies stay in its cache."""
    if not x.is_cpu or x.numel() <= _PIECE:
        yield x.flatten()
        return
    rows = max(1, _PIECE * x.shape[0] // x.numel())
    for part in x.split(rows):
        yield from part.flatten().split(_PIECE)


def _largest(x: torch.Tensor) -> float:
    """max |x| of float64, not empty."""
    low, high = torch.aminmax(x)
    return max(-low.item(), high.item(), 0.0)


def tensors(output: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested output, depth first, with a readable path."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, Typed) or dataclasses.is_dataclass(output):
        yield from tensors(plain(output), path)
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors(value, f"{path}.{key}")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from tensors(value, f"{path}[{index}]")


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties sharing their mean rank.

    Both of shape (n,). NaN where one is constant or holds a NaN.
    """
    if a.numel() < 2 or torch.isnan(a).any() or torch.isnan(b).any():
        return math.nan
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


class Tally:
    """Adds up batches for `evaluate`."""

    def __init__(self, metric: str | None, outputs: str) -> None:
        self.metric = _METRICS[metric]() if metric is not None else None
        self.is_embedding = outputs == EMBEDDING
        self.headline: str | None = None
        self.errors: dict[str, ErrorSum] = {}
        self.batches = self.samples = 0
        self.agreeing = self.classified = 0
        self.is_discrete = False
        self.cosines: list[torch.Tensor] = []
        self.ids: list[str | None] = []

    def merge(self, other: Tally) -> Tally:
        """Adds the batches that the other saw after these, and returns itself."""
        for path, error in other.errors.items():
            self.errors.setdefault(path, ErrorSum()).merge(error)
        self.headline = self.headline or other.headline
        self.batches += other.batches
        self.samples += other.samples
        self.is_discrete |= other.is_discrete
        self.agreeing += other.agreeing
        self.classified += other.classified
        self.cosines += other.cosines
        self.ids += other.ids
        if self.metric is not None and other.metric is not None:
            self.metric.merge(other.metric)  # type: ignore[arg-type]
        return self

    def add(self, batch: Batch, float_output: Any, int8_output: Any, index: int = 0) -> None:
        expected, found = dict(tensors(float_output)), dict(tensors(int8_output))
        self.headline = self.headline or _headline(expected)
        for path, reference in expected.items():
            actual = found.get(path)
            if actual is None or actual.shape != reference.shape:
                if path == self.headline:
                    raise VerificationError(
                        f"batch {index}: float's {path} has shape {tuple(reference.shape)}, int8's "
                        f"{'is missing' if actual is None else f'has shape {tuple(actual.shape)}'}"
                    )
                continue
            self.errors.setdefault(path, ErrorSum()).add(reference, actual)
        reference = expected[self.headline]
        self._add_headline(batch, reference, found[self.headline].to(reference.device))
        self.batches += 1
        self.samples += batch.size
        self.ids += batch.ids or (None,) * batch.size

    def _add_headline(self, batch: Batch, reference: torch.Tensor, actual: torch.Tensor) -> None:
        if reference.numel() == 0:
            return
        if not reference.is_floating_point():
            self.is_discrete = True
            self.agreeing += int((reference == actual).sum())
            self.classified += reference.numel()
        elif reference.dim() > 1 and reference[0].numel() > 1:
            self.cosines.append(_cosine(reference, actual).cpu())
        if not self.is_embedding and (axis := _class_axis(reference)) is not None:
            same = _same_class(reference.argmax(axis), actual, axis)
            self.agreeing += int(same.sum())
            self.classified += same.numel()
        if self.metric is not None:
            self.metric.add(batch, reference, actual)

    def result(self) -> dict[str, Any]:
        assert self.headline is not None, "every batch has one"
        error = self.errors[self.headline]
        cosines = torch.cat(self.cosines).tolist() if self.cosines else []
        result: dict[str, Any] = {
            "samples": self.samples,
            "batches": self.batches,
            "sqnr_db": None if self.is_discrete else error.sqnr_db,
            "max_error": None if self.is_discrete else error.max_error,
            "float_max_abs": error.largest,
            "agreement": self.agreeing / self.classified if self.classified else None,
            "cosine_mean": sum(cosines) / len(cosines) if cosines else None,
            "cosine_min": min(cosines) if cosines else None,
            "nonfinite": {"float": error.nonfinite_float, "int8": error.nonfinite_int8},
            "identical": all(each.is_identical for each in self.errors.values()),
            "metric": self.metric.result() if self.metric is not None else None,
        }
        if self.is_embedding:
            result["cosine_per_sample"] = [
                {"id": name or str(position), "cosine": value}
                for position, (name, value) in enumerate(zip(self.ids, cosines, strict=False))
            ]
        others = {path: each for path, each in self.errors.items() if path != self.headline}
        if others:
            result["others"] = [
                {"output": path, "sqnr_db": each.sqnr_db, "max_error": each.max_error} for path, each in others.items()
            ]
        return result


@dataclass
class _Top1:
    """Share of samples whose largest class is the label, for both models."""

    float_correct: int = 0
    int8_correct: int = 0
    differing: int = 0
    samples: int = 0

    def add(self, batch: Batch, reference: torch.Tensor, actual: torch.Tensor) -> None:
        if batch.labels is None:
            return
        if not reference.is_floating_point() and reference.shape == batch.labels.shape:  # the classes themselves
            labels = batch.labels.to(reference.device)
            self._count(reference == labels, actual == labels)
            return
        if reference.dim() != 2 or batch.labels.shape != reference.shape[:1]:
            raise DataError(
                f"top-1 needs outputs (batch, classes) and labels (batch,); found {tuple(reference.shape)} and "
                f"{tuple(batch.labels.shape)}; set data.label_key, or leave the labels out"
            )
        labels = batch.labels.to(reference.device)
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < reference.shape[1]):
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has "
                f"{reference.shape[1]} classes, 0 to {reference.shape[1] - 1}"
            )
        self._count(_same_class(labels, reference, 1), _same_class(labels, actual, 1))

    def _count(self, in_float: torch.Tensor, in_int8: torch.Tensor) -> None:
        """Whether each sample is classified correctly, shape (batch,)."""
        self.float_correct += int(in_float.sum())
        self.int8_correct += int(in_int8.sum())
        self.differing += int((in_float != in_int8).sum())
        self.samples += in_float.numel()

    def merge(self, other: _Top1) -> None:
        self.float_correct += other.float_correct
        self.int8_correct += other.int8_correct
        self.differing += other.differing
        self.samples += other.samples

    def result(self) -> dict[str, Any] | None:
        """Standard error of the drop: of the mean of n paired differences, each -1, 0 or 1."""
        n = self.samples
        if n == 0:
            return None
        drop = (self.float_correct - self.int8_correct) / n
        return {
            "name": TOP1,
            "float": self.float_correct / n,
            "int8": self.int8_correct / n,
            "drop": drop,
            "standard_error": math.sqrt(max(0.0, self.differing / n - drop**2) / n),
            "samples": n,
        }


@dataclass
class _Spearman:
    """Rank correlation of the cosines between all pairs of embeddings with people's ratings."""

    float_rows: list[torch.Tensor] = field(default_factory=list)
    int8_rows: list[torch.Tensor] = field(default_factory=list)
    ratings: list[torch.Tensor] = field(default_factory=list)

    def add(self, batch: Batch, reference: torch.Tensor, actual: torch.Tensor) -> None:
        if batch.labels is None:
            return
        if reference.dim() != 2 or batch.labels.dim() != 2 or len(batch.labels) != len(reference):
            raise DataError(
                "spearman needs embeddings (batch, width) and a row of ratings per sample (batch, samples); found "
                f"{tuple(reference.shape)} and {tuple(batch.labels.shape)}"
            )
        self.float_rows.append(reference.cpu())
        self.int8_rows.append(actual.cpu())
        self.ratings.append(batch.labels)

    def merge(self, other: _Spearman) -> None:
        self.float_rows += other.float_rows
        self.int8_rows += other.int8_rows
        self.ratings += other.ratings

    def result(self) -> dict[str, Any] | None:
        count = sum(map(len, self.ratings))
        if count < 3:
            return None
        ratings = torch.cat(self.ratings).to(torch.float64)
        if ratings.shape[1] < count:
            raise DataError(f"{count} samples were rated against only {ratings.shape[1]}; ratings must be all with all")
        first, second = torch.triu_indices(count, count, offset=1).unbind()
        in_float, in_int8 = (
            spearman((rows @ rows.T)[first, second].cpu(), ratings[first, second].cpu())
            for rows in (_unit_rows(self.float_rows), _unit_rows(self.int8_rows))
        )
        return {
            "name": SPEARMAN,
            "float": in_float,
            "int8": in_int8,
            "drop": in_float - in_int8,
            "standard_error": None,
            "samples": count,
        }


_METRICS: dict[str, type[_Top1 | _Spearman]] = {TOP1: _Top1, SPEARMAN: _Spearman}


def _headline(expected: Mapping[str, torch.Tensor]) -> str:
    if not expected:
        raise ModelError("the model's output holds no tensor, so int8 can't be compared with float")
    return next((path for path, x in expected.items() if x.is_floating_point()), next(iter(expected)))


def _class_axis(x: torch.Tensor) -> int | None:
    """Where the classes are: last in (batch, classes) and (batch, tokens, classes), else second."""
    if x.dim() < 2 or not x.is_floating_point():
        return None
    axis = 1 if x.dim() > 3 else x.dim() - 1
    return axis if x.shape[axis] > 1 else None


def _same_class(expected: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Where x's largest class is the expected one; never where x holds a NaN, which argmax takes for the largest."""
    return (x.argmax(axis) == expected) & ~torch.isnan(x).any(axis)


def _cosine(reference: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """measures.cosine, with equal rows at 1 even where they are zero; shape (batch,)."""
    equal = (reference == actual).flatten(1).all(1)
    return torch.where(equal, 1.0, measures.cosine(reference, actual))


def _unit_rows(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.cat(rows).to(torch.float64), dim=1)


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """Mean rank of each entry among all, from 0, shape (n,), float64."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    ranks: torch.Tensor = (last - (counts - 1) / 2).to(torch.float64)[inverse]
    return ranks


def _float_output(float_fn: Callable[..., Any], batch: Batch, index: int) -> Any:
    try:
        return float_fn(*batch.args, **batch.kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code may raise anything
        reason = first_line(error)
        shapes = ", ".join(str(list(x.shape)) for x in batch.tensors)
        raise DataError(
            f"evaluation data: the float model fails on batch {index} of shape {shapes}: {reason}; "
            "evaluate on input of the kind it was calibrated on"
        ) from error


def _length(batches: Iterable[Batch]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
