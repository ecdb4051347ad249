"""A model as TorchScript, and the graph imported from it, checked against what the model computes."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quantflow.capture.export import at_least_two, plain_attention
from quantflow.capture.flat import Flat
from quantflow.capture.place import class_name, writes_into
from quantflow.capture.sizes import FIXED, Sizes
from quantflow.capture.torchscript.failure import CURE, DependsOnBatch, first_line
from quantflow.capture.torchscript.walk import Names, Walk
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, laid_out
from quantflow.ir.passes.normalize import simplify
from quantflow.ir.structure import plain
from quantflow.sources.models.loaded import eval_mode

#: An imported graph may differ from its model by this many times what rounding alone changes in the model,
NOISE_FACTOR = 8
#: and by no more than this part of the result (root mean square): beyond that nothing can be told from noise.
LARGEST_NOISE = 0.02
#: What a note on a trace begins with that may hold for the sizes in the data only.
FIXED_BY_TRACING = "tracing took a number or a condition for a constant"


def capture_torchscript(
    model: nn.Module | torch.jit.ScriptModule,
    example: Batch,
    method: Literal["trace", "script"] = "trace",
    sizes: Sizes = FIXED,
    names: Sequence[str] | None = None,
) -> Graph:
    """Capture a module by tracing or scripting it, or take over a ScriptModule as it is.

    Where the code (or an earlier trace) depends on the batch size, the graph holds for the example's only, and a note
    says so.

    Args:
        example: one calibration batch.
        method: how an nn.Module becomes TorchScript; a ScriptModule already is.
        sizes: what varies beside the number of samples.
        names: of the inputs, where the module takes tensors by position and has no better names for them.

    Raises:
        CaptureError: the model can't be traced or scripted, holds an op with no functional form, or the imported
            graph does not compute what the model does; the message carries the cure.
    """
    model = eval_mode(model)
    small, others = at_least_two(example.head(2)), [batch.head(2) for batch in sizes.others]
    attempts = [[small, _repeated(small), *others]]
    if example.size > 2:
        attempts.append([example, _repeated(example), *sizes.others])
    attempts.append([example, *sizes.others])
    reason: BaseException | None = None
    with torch.no_grad(), plain_attention(), _quiet() as fixed:
        try:
            script = _as_script(model, at_least_two(example), method)
        except CaptureError:
            if example.size != 1:
                raise
            script = _as_script(model, example, method)  # code for one sample at a time
        for batches in attempts:
            is_last = batches is attempts[-1]
            if is_last and example.size == 1:
                script = _as_script(model, example, method)
            try:
                graph = _import(script, model, batches, Names(sizes, names, follows_batch=not is_last))
            except DependsOnBatch as error:
                reason = error
                continue
            if is_last:
                return replace(graph, batch_is_dynamic=False).with_notes(
                    f"the graph holds for batches of {example.size} only: {reason}; for other batch sizes {CURE} or "
                    "mode.method=script, and read sizes from x.shape in its code"
                )
            return graph.with_notes(*_fixed_by_tracing(fixed)) if sizes else graph
    varies = " for all sizes in the data (dynamic=none fixes them)" if sizes else ""
    raise CaptureError(
        f"mode: the TorchScript of {class_name(model)} can't be imported{varies}: {reason}; {CURE}"
    ) from reason


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings about tracing and scripting are kept, not shown: every graph is checked against its model instead."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _fixed_by_tracing(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Notes on lines of the user's code where a trace took a size or a condition for a constant."""
    lines = [
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if issubclass(w.category, torch.jit.TracerWarning) and "Converting a tensor to a Python" in str(w.message)
    ]
    return [
        f"{FIXED_BY_TRACING} at {line}; the graph was held against the model on all "
        "sizes in the data, and may be wrong on others"
        for line in dict.fromkeys(lines)
    ]


def _as_script(model: nn.Module | torch.jit.ScriptModule, example: Batch, method: str) -> torch.jit.ScriptModule:
    if isinstance(model, torch.jit.ScriptModule):
        return model
    try:
        if method == "script":
            return torch.jit.script(model)
        options: dict[str, Any] = {"example_inputs": example.args}
        if example.kwargs and not isinstance(model, Flat):
            bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs)
            options = {"example_kwarg_inputs": dict(bound.arguments)}
        return torch.jit.trace(model, check_trace=False, strict=False, **options)
    except Exception as error:  # torch.jit raises many unrelated types, and the model's own
        other = "mode.method=trace" if method == "script" else "mode.method=script"
        raise CaptureError(
            f"mode: torch.jit.{method} can't capture {class_name(model)}: {first_line(error)}; "
            f"try {other} or mode=export"
        ) from error


def _repeated(batch: Batch) -> Batch:
    """Every sample twice."""

    return batch.mapped(lambda x: torch.cat([x, x]) if x.dim() and x.shape[0] == batch.size else x)


def _import(
    script: torch.jit.ScriptModule,
    model: nn.Module | torch.jit.ScriptModule,
    batches: Sequence[Batch],
    names: Names,
) -> Graph:
    expected = []
    before = _versions(batches)
    for batch in batches:
        try:
            expected.append(plain(model(*batch.args, **batch.kwargs)))
        except Exception as error:  # the model's own code
            if len(batches) > 1:
                raise DependsOnBatch(f"the model fails on a batch of {batch.size}: {first_line(error)}") from error
            raise CaptureError(
                f"mode: {class_name(model)} fails on the example batch: {first_line(error)}; "
                "check the data's input names and shapes"
            ) from error
    try:
        imported = Walk(script, batches, names).run(None if isinstance(model, torch.jit.ScriptModule) else expected[0])
    except (CaptureError, DependsOnBatch):
        raise
    except Exception as error:  # a builtin of TorchScript that Python does not run in the same way
        raise CaptureError(
            f"mode: the TorchScript of {class_name(model)} can't be imported: {type(error).__name__}: "
            f"{first_line(error)}; {CURE}"
        ) from error
    graph = simplify(imported)
    after = _versions(batches)
    written = dict.fromkeys(now[0] for was, now in zip(before, after, strict=True) if was != now)
    batches, expected = list(batches), list(expected)
    if len(batches) > 1:
        # Both runs hold several samples; code may well treat one sample in another way.
        with contextlib.suppress(Exception):
            single = batches[0].head(1)
            expected.append(plain(model(*single.args, **single.kwargs)))
            batches.append(single)
    for batch, wanted in zip(batches, expected, strict=True):
        try:
            found = interpret(graph, batch.tensors)
        except Exception as error:  # any op may raise anything
            raise DependsOnBatch(f"the imported graph fails on a batch of {batch.size}: {first_line(error)}") from error
        if not _agree(found, wanted, model, batch):
            if written:
                raise writes_into(written)
            raise DependsOnBatch(
                f"the imported graph differs from the model on a batch of {batch.size} (tracing fixed a branch or a "
                "size, or the model draws random numbers or writes into a view of another tensor)"
            )
    return graph


def _versions(batches: Sequence[Batch]) -> list[tuple[str, int]]:
    """Every input's name and how often it was written to; PyTorch does not count that of inference tensors."""
    return [(name, 0 if x.is_inference() else x._version) for batch in batches for name, x in batch.named()]


def _agree(found: Any, wanted: Any, model: nn.Module | torch.jit.ScriptModule, batch: Batch) -> bool:
    """Same tensors up to rounding: |a - b| <= 1e-5 * max|b| + 1e-4 * |b|, or what the model's own rounding explains."""
    a, b = _tensors(found), _tensors(wanted)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    unlike = [
        index
        for index, (x, y) in enumerate(zip(a, b, strict=True))
        if not torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5 * _largest(y), equal_nan=True)
    ]
    if not unlike:
        return True
    others = _computed_otherwise(model, batch, b, ulps=1)
    further = _computed_otherwise(model, batch, b, ulps=NOISE_FACTOR) if others else []
    return bool(others) and all(
        _is_rounding(a[i], b[i], [other[i] for other in others])
        if b[i].is_floating_point()
        else _is_undecided(a[i], b[i], [other[i] for other in (*others, *further)])
        for i in unlike
    )


def _computed_otherwise(
    model: nn.Module | torch.jit.ScriptModule, batch: Batch, wanted: list[torch.Tensor], ulps: int
) -> list[list[torch.Tensor]]:
    """The model's outputs where only rounding is another: in another layout, split in two, with inputs moved by ulps.

    None at all where the model gives another result for the same input, which no rounding does.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        steps = torch.randint(-ulps, ulps + 1, x.shape, generator=generator).to(x.device)
        return torch.where(x.isfinite(), x * (1 + steps * torch.finfo(x.dtype).eps), x)

    def run(part: Batch, change: Callable[[Any], Any] = lambda x: x) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_map(change, (part.args, dict(part.kwargs)))
        return _tensors(plain(model(*args, **kwargs)))

    if not all(torch.equal(x, y) for x, y in zip(run(batch), wanted, strict=True)):
        return []
    others = [
        run(batch, lambda x: laid_out(x) if isinstance(x, torch.Tensor) else x),
        *(run(batch, moved) for _ in range(2)),
    ]
    if batch.size > 1:
        with contextlib.suppress(Exception):  # code for this size of batch only
            half = batch.size // 2
            others.append([torch.cat(pair) for pair in zip(*map(run, _halves(batch, half)), strict=True)])
    return [other for other in others if [x.shape for x in other] == [y.shape for y in wanted]]


def _halves(batch: Batch, first: int) -> tuple[Batch, Batch]:
    return batch.head(first), batch.tail(batch.size - first)


def _is_rounding(found: torch.Tensor, wanted: torch.Tensor, others: list[torch.Tensor]) -> bool:
    """Whether a difference is of the size of the model's own rounding, and no larger part of the result."""
    finite = wanted.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False

    def error(x: torch.Tensor) -> tuple[float, float]:
        apart = torch.where(finite, x.double() - wanted.double(), 0.0)
        return float(apart.abs().max()), float(apart.square().mean().sqrt())

    noise = [error(other) for other in others if torch.equal(other.isfinite(), finite)]
    largest, typical = (max((each[k] for each in noise), default=0.0) for k in (0, 1))
    most = LARGEST_NOISE * float(torch.where(finite, wanted.double(), 0.0).square().mean().sqrt())
    found_largest, found_typical = error(found)
    return found_largest <= NOISE_FACTOR * largest and found_typical <= min(NOISE_FACTOR * typical, most)


def _is_undecided(found: torch.Tensor, wanted: torch.Tensor, others: list[torch.Tensor]) -> bool:
    """Whether classes or flags differ only where rounding changes the model's own."""
    return bool(((found == wanted) | torch.stack([other != wanted for other in others]).any(0)).all())


def _largest(x: torch.Tensor) -> float:
    finite = x.double()[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
