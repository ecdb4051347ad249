"""A model that can't be quantized as a whole, such as a detector: its largest parts that can, each by the same stages.

survey → record what each part is called with → execute each part → put them into a copy of the model → verify
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from quantflow.analysis.baseline import beside
from quantflow.capture import capture
from quantflow.capture.parts import (
    LOOKED_AT,
    Seen,
    all_of_images,
    has_weights,
    holds_lists,
    is_ragged,
    largest_first,
    record,
    sizes_from_data,
    survey,
    why_not,
    with_other_sizes,
)
from quantflow.capture.torchscript import FIXED_BY_TRACING
from quantflow.errors import (
    CalibrationError,
    CaptureError,
    DataError,
    ModelError,
    NothingQuantizedError,
    Problem,
    RecipeError,
    UsageError,
    cause_line,
    first_line,
    nearest,
)
from quantflow.executor.composed import ONLY_LAYER, Part, plan_rows, results_of, verified, without_hooks
from quantflow.executor.run import Run
from quantflow.executor.source import Source
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.quantized import Quantized, QuantizedParts, put_in
from quantflow.schema import Recipe
from quantflow.schema.settings import BenchmarkSettings, GatesSettings
from quantflow.sources.data import Data
from quantflow.sources.models import LoadedModel

Execute = Callable[[Run], Quantized]


def why_in_parts(run: Run) -> str:
    """Why the model has to be quantized in parts, where that is clear before it is captured; "" where it is not."""
    recipe, module = run.recipe, run.source.model.module
    if recipe.parts != "auto":
        return "" if recipe.parts == "none" else "parts: says so"
    if not _may_be_parted(run):
        return ""
    example = run.source.first_batch
    if is_ragged(run.source.data.of_own_shapes):
        return "batches hold different numbers of tensors"
    if holds_lists(example) and isinstance(module, nn.Module):
        return _from_data(sizes_from_data(module, example))
    return ""


def why_after_all(run: Run) -> str:
    """Why a model that could not be captured is quantized in parts; "" where that is no cure."""
    module = run.source.model.module
    if run.recipe.parts != "auto" or not _may_be_parted(run) or not isinstance(module, nn.Module):
        return ""
    return _from_data(sizes_from_data(module, run.source.first_batch))


def _from_data(ops: frozenset[str]) -> str:
    return f"sizes in it depend on the data ({', '.join(sorted(ops))})" if ops else ""


def _may_be_parted(run: Run) -> bool:
    module = run.source.model.module
    is_module = isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule)
    return is_module and run.recipe.mode.method != "script"


def execute_in_parts(run: Run, why: str, execute: Execute, baseline: Mapping[str, Any] | None = None) -> QuantizedParts:
    """Every part through `execute`, and the model that they make together.

    Args:
        why: why it is not quantized as a whole.
        execute: all stages on one source.
        baseline: another artifact's figures, for the report.

    Raises:
        QuantflowError: a part's own error where parts were named; CaptureError where no part was found.
    """
    module, data = _checked(run), run.source.data
    looked_at = list(data.calibration[:LOOKED_AT])
    with run.progress.stage("find parts"):
        seen = _surveyed(module, looked_at)
    parts: dict[str, Part] = {}
    reasons: dict[str, str] = {}
    notices: list[str] = []
    float_patterns: set[str] = set()
    asked = () if isinstance(run.recipe.parts, str) else _known(run, module)
    waiting = list(asked or [name for name, _ in module.named_children()])
    while waiting:
        name = waiting.pop(0)
        reason = why_not(module, name, seen)
        if not reason and (kept := _kept_float(run.recipe, module, name)):
            reason = f"layers: {', '.join(sorted(kept))} keeps it float"
            float_patterns |= kept
        if not reason:
            try:
                with run.progress.stage(f"part {name}"):
                    parts[name], told = _quantized(run, module, name, looked_at, execute)
                notices += told
                continue
            except (CaptureError, DataError, CalibrationError, NothingQuantizedError) as error:
                if asked:
                    raise
                reason = f"it can't be captured: {first_line(error)}"
        elif asked:
            raise UsageError(f"parts: '{name}' can't be quantized on its own: {reason}; name submodules of it")
        reasons[name] = reason
        if has_weights(module.get_submodule(name)):
            children = [f"{name}.{child}" for child, _ in module.get_submodule(name).named_children()]
            waiting = [*children, *waiting]
    if not parts:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise CaptureError(
            f"mode: {type(module).__name__} can't be quantized as a whole ({why}), nor any of its submodules ({found})"
        )
    _require_matched(run.recipe, parts, float_patterns)
    ordered = {name: parts[name] for name, _ in module.named_modules() if name in parts}
    with run.progress.stage("put together"):
        composed = put_in(module, {name: part.model for name, part in ordered.items()}, _hooks(ordered))
        together = verified(module, composed, ordered, looked_at[0])
    model = QuantizedParts(composed, {name: part.model for name, part in ordered.items()}, {})
    model.results = results_of(run, why, module, ordered, reasons, together, notices, model)
    if baseline is not None:
        model.results = {**model.results, "baseline": beside(baseline, model.results)}
    return model


def _hooks(parts: Mapping[str, Part]) -> dict[str, Mapping[str, Any]]:
    return {name: part.hooks for name, part in parts.items()}


def _checked(run: Run) -> nn.Module:
    """
    Raises:
        UsageError: what parts can't be made with; names the setting.
    """
    recipe, model = run.recipe, run.source.model
    if not isinstance(model.module, nn.Module) or isinstance(model.module, torch.jit.ScriptModule):
        raise UsageError(
            f"parts: the model is a {type(model.module).__name__}, whose submodules can't be taken out; give the "
            "nn.Module"
        )
    if model.original is not None:
        raise UsageError(
            "model: its weights are not float32, and it is quantized in parts; call model.float() and give it float32"
        )
    if not isinstance(recipe.dynamic, str):
        raise UsageError(
            "dynamic: names inputs of the whole model, which is quantized in parts; use auto, with batches that differ"
        )
    if recipe.tune.subject_to.is_set:
        raise UsageError("tune: a search needs a model that is one program, and this one is quantized in parts")
    if run.workers.count > 1:
        raise UsageError("parts: a model is quantized in parts by one process; start it without torchrun")
    if any(not module.weight.is_meta and module.weight.dtype != torch.float32 for module in _weighted(model.module)):
        raise ModelError("model: its weights are not float32; call model.float()")
    return model.module


def _weighted(module: nn.Module) -> Iterator[Any]:
    return (child for child in module.modules() if isinstance(getattr(child, "weight", None), nn.Parameter))


def _surveyed(module: nn.Module, batches: Sequence[Batch]) -> dict[str, Seen]:
    try:
        return survey(module, batches)
    except Exception as error:  # the user's code may raise anything
        found = [f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in batches[0].named()]
        raise DataError(
            f"calibration data: the model fails on the first batches: {cause_line(error)}; "
            f"found {', '.join(found[:4])}; give it the inputs that it takes"
        ) from error


def _known(run: Run, module: nn.Module) -> list[str]:
    """The parts that were asked for.

    Raises:
        RecipeError: one is no submodule, or lies in another.
    """
    names, known = list(run.recipe.parts), {name for name, _ in module.named_modules() if name}
    problems = [
        Problem("parts", f"the model has no submodule '{name}'; nearest names: {nearest(name, known)}")
        for name in names
        if name not in known
    ] + [
        Problem("parts", f"'{name}' lies in '{other}'; name one of them")
        for name in names
        for other in names
        if name.startswith(f"{other}.")
    ]
    if problems:
        raise RecipeError(run.recipe.name, problems)
    return names


# -- one part


def _quantized(
    run: Run, module: nn.Module, name: str, looked_at: Sequence[Batch], execute: Execute
) -> tuple[Part, list[str]]:
    """A part, and what the user must be told of it."""
    data, part = run.source.data, module.get_submodule(name)
    recorded = record(module, name, data.calibration)
    if not recorded.batches:
        raise CalibrationError(f"{name}: all of its calls are empty")
    if run.recipe.dynamic == "auto":
        recorded = with_other_sizes(module, name, recorded, looked_at[0])
    calibration = largest_first(recorded.batches)
    evaluation = calibration
    if data.evaluation is not data.calibration:
        evaluation = list(record(module, name, data.evaluation).batches) or calibration
    own = Data(calibration, evaluation, {**data.identity, "part": name}, shapes=recorded.shapes)
    recipe, matched = _own_layers(run.recipe, name, part)
    recipe = recipe.model_copy(
        update={"parts": "none", "gates": GatesSettings(), "benchmark": BenchmarkSettings(enabled=False)}
    )
    notices = list(recorded.notices)
    with without_hooks(part) as hooks:
        source = Source(LoadedModel(part, name, weights_used=run.source.model.weights_used), own)
        settings, told = _captures_best(recipe, source)
        model, used = _executed(run, recipe.model_copy(update=settings), source, execute)
    notices += [f"{name}: {notice}" for notice in (*told, *model.results.get("notices", ()))]
    return Part(name, model, hooks, frozenset(matched[key] for key in used)), notices


def _captures_best(recipe: Recipe, source: Source) -> tuple[dict[str, Any], list[str]]:
    """The recipe's `mode` and `dynamic` with which a part takes all of its calls and as many others as it can.

    Tried are both captures, with all sides of images free and with those that differ; the first without a condition on
    sizes is taken, else the first that takes all calls.

    Raises:
        QuantflowError: the first one's error, where none does.
    """
    modes = [recipe.mode]
    if recipe.mode.kind != "imperative":
        other = "torchscript" if recipe.mode.kind == "export" else "export"
        modes.append(recipe.mode.model_copy(update={"kind": other}))
    calls, part = source.data.of_own_shapes, source.model.module
    assert isinstance(part, nn.Module), "a submodule"
    free = all_of_images(part, calls) if recipe.dynamic == "auto" else {}
    legal: list[tuple[dict[str, Any], list[str]]] = []
    first_error: UsageError | None = None
    for dynamic in ([free] if free else []) + [recipe.dynamic]:
        for mode in modes:
            told = [f"captured with mode={mode.kind}"] if mode is not recipe.mode else []
            try:
                graph = capture(part, source.first_batch, mode, dynamic=dynamic, batches=calls)
                for call in calls:
                    bind(graph, call.args, call.kwargs)
            except (CaptureError, DataError) as error:
                first_error = first_error or error
                continue
            if told and first_error is not None:
                told = [f"{told[0]}, because {first_line(first_error)}"]
            settings = {"mode": mode, "dynamic": dynamic}
            if not graph.limits and not any(FIXED_BY_TRACING in note for note in graph.notes):
                return settings, told
            legal.append((settings, told))
    if not legal:
        assert first_error is not None, "nothing was captured"
        raise first_error
    return legal[0]


def _executed(run: Run, recipe: Recipe, source: Source, execute: Execute) -> tuple[Quantized, frozenset[str]]:
    """The part, and the patterns of `layers` that it knows: one that matches nothing here may well do so elsewhere."""
    layers = dict(recipe.layers)
    while True:
        own = recipe.model_copy(update={"layers": layers})
        try:
            with run.progress.silent() as progress:
                return execute(Run.of(own, source, progress)), frozenset(layers)
        except RecipeError as error:
            unknown = {p.where.removeprefix("layers.") for p in error.problems if "matches nothing" in p.message}
            if not unknown or len(unknown) < len(error.problems):
                raise
            layers = {key: value for key, value in layers.items() if key not in unknown}


def _own_layers(recipe: Recipe, name: str, part: nn.Module) -> tuple[Recipe, dict[str, str]]:
    """The recipe with `layers` as the part names them, and which pattern of the user's each of them comes from."""
    layers: dict[str, Any] = {}
    origin: dict[str, str] = {}
    # A part that is a single layer has no name for it but that of its weight.
    inner = {
        f"{name}.{child}" if child else name: child or ONLY_LAYER
        for child, module in part.named_modules()
        if not list(module.children())
    }
    for pattern, value in recipe.layers.items():
        if pattern.startswith(f"{name}."):
            keys = [pattern.removeprefix(f"{name}.")]
        elif pattern == name or any(mark in pattern for mark in "*?["):
            keys = [own for full, own in inner.items() if fnmatchcase(full, pattern)]
        else:
            keys = [pattern]
        for key in keys:
            layers[key], origin[key] = value, pattern
    return recipe.model_copy(update={"layers": layers}), origin


def _kept_float(recipe: Recipe, module: nn.Module, name: str) -> set[str]:
    """The patterns of `layers` that keep everything with weights in a submodule float; none where they do not."""
    patterns = [pattern for pattern, value in recipe.layers.items() if value == "float"]
    used: set[str] = set()
    for child, inner in module.get_submodule(name).named_modules(prefix=name):
        if any(parameter.dim() > 1 for parameter in inner.parameters(recurse=False)):
            matching = {pattern for pattern in patterns if fnmatchcase(child, pattern)}
            if not matching:
                return set()
            used |= matching
    return used


def _require_matched(recipe: Recipe, parts: Mapping[str, Part], others: set[str]) -> None:
    """
    Args:
        others: patterns that keep a whole submodule out of the parts.

    Raises:
        RecipeError: a pattern of `layers` matches nothing.
    """
    used = {pattern for part in parts.values() for pattern in part.matched} | others
    known = [row["name"] for part in parts.values() for row in plan_rows(part)]
    problems = [
        Problem(
            f"layers.{pattern}", f"'{pattern}' matches nothing in any part; nearest names: {nearest(pattern, known)}"
        )
        for pattern in recipe.layers
        if pattern not in used
    ]
    if problems:
        raise RecipeError(recipe.name, problems)
