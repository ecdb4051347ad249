"""The Python interface: one call from a float module to an int8 model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantflow.errors import Problem, RecipeError, UsageError, nearest
from quantflow.executor.run import Run
from quantflow.executor.source import Source
from quantflow.host.place import CPU
from quantflow.quantized import Quantized, QuantizedModule, QuantizedParts
from quantflow.report import Progress, make_console
from quantflow.schema import PRESETS, Recipe
from quantflow.search.bench import analyse
from quantflow.sources.data import Batch, Data, as_batches
from quantflow.sources.data.samples import hash_of, identity_of
from quantflow.sources.models import LoadedModel, usable
from quantflow.tasks.run import quantized

Module = nn.Module | torch.jit.ScriptModule | torch.export.ExportedProgram


def quantize(
    module: Module,
    batches: Iterable[Any],
    *,
    qconfig: str | Mapping[str, Any] = "sym_int8",
    layers: Mapping[str, Any] | None = None,
    algorithms: str | Sequence[Any] = "none",
    policy: Mapping[str, str] | None = None,
    mode: str | Mapping[str, Any] = "export",
    dynamic: str | Mapping[str, Mapping[int, str]] = "auto",
    parts: str | Sequence[str] = "auto",
    runtime: str = "auto",
    device: str = "auto",
    inplace: bool = False,
    evaluation: Iterable[Any] | None = None,
    benchmark: bool = False,
    gates: Mapping[str, float] | None = None,
    tune: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Quantized | QuantizedParts:
    """Quantize a float module to int8 and verify it.

    Args:
        module: any nn.Module (used as it is, not modified), a ScriptModule, or an ExportedProgram.
        batches: calibration input: tensors, tuples (positional), dicts (keywords), or Batch objects; dimension 0 is
            the batch. An input is a tensor, None, a flag, a number, a string, or a list, tuple or dict of them; what is
            no tensor becomes a constant of the model. 64 to 512 samples that look like real input are enough.
        qconfig: a preset ("sym_int8", "affine_uint8", "sym_uint8", "affine_int8") or a dict as in a recipe, such as
            {"activation": {"qscheme": "affine", "dtype": "uint8"}, "weight": {"granularity": "per_channel"}}.
        layers: overrides by exact name, glob or op type: {"layer4.*": {"activation": {...}}, "fc": "float"}.
        algorithms: a preset ("none", "fast", "accurate", "best"), or an ordered list as in a recipe, such as
            ["equalize", {"name": "bias_correction", "method": "full"}].
        policy: which ops beside convolutions and linears may be int8, and how a GPU holds floats, such as
            {"matmul": "int8", "embedding": "int8", "float": "bfloat16"}.
        mode: "export", "torchscript" or "imperative"; {"kind": "torchscript", "method": "script"} to script.
        dynamic: which sizes vary beside the number of samples: "auto" (those in which the batches differ), "none", or
            {input: {dimension: name}}, such as {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}.
        parts: which submodules are quantized one by one, in the model's own code: "auto" (the largest that can be, if
            the whole can't as its sizes depend on the data, as in detectors), "none", or their names.
        runtime: "auto", "native", "triton", "torch" or "reference".
        device: "auto", "cpu", "cuda" or "xpu".
        inplace: mode="imperative": the layers of `module` itself become int8, once all is verified; else of a copy.
        evaluation: input to compare int8 with float on; None compares on the calibration batches.
        benchmark: also time float and int8, interleaved.
        gates: limits as in a recipe; the verdict is in `model.results`, nothing is raised.
        tune: search for the fastest model that keeps limits on `evaluation`, as in a recipe:
            {"subject_to": {"min_agreement": 0.97}, "time_budget_s": 600}.
        progress: show progress on the terminal.

    Returns:
        A callable that takes what the module takes, as tensors in the sizes that `dynamic` leaves open (all others are
        the first batch's) and with the same values for what is no tensor, and returns what it returns in the same
        structure, without a cache: a QuantizedModel, a real ScriptModule (torchscript), a module with int8 layers
        swapped in (imperative), or one with int8 parts put in (detectors).
        `model.save(folder)` writes an artifact and `model.results` holds every figure.

    Raises:
        QuantflowError: RecipeError for illegal settings, DataError, CaptureError, CalibrationError, … with the cure.
    """
    calibration = _batches(batches, "batches", module)
    compared = calibration if evaluation is None else _batches(evaluation, "evaluation", module)
    recipe = Recipe.from_dict(
        {
            "name": "quantize",
            "model": {"kind": "given", "name": type(module).__name__},
            "data": {"kind": "given"},
            "qconfig": _qconfig(qconfig),
            "layers": dict(layers or {}),
            "algorithms": algorithms,
            "policy": dict(policy or {}),
            "mode": {"kind": mode} if isinstance(mode, str) else dict(mode),
            "dynamic": dynamic if isinstance(dynamic, str) else {k: dict(v) for k, v in dynamic.items()},
            "parts": parts if isinstance(parts, str) else list(parts),
            "runtime": {"kind": runtime},
            "device": {"kind": device},
            "benchmark": {"enabled": benchmark},
            "gates": dict(gates or {}),
            "tune": dict(tune or {}),
            "seed": seed,
        },
        "quantize",
    )
    source = _source(module, calibration, compared)
    if inplace and (recipe.mode.kind != "imperative" or source.model.module is not module):
        raise UsageError(
            "inplace=True exchanges the layers of the module that is given, which takes mode='imperative', float32 "
            "weights, and no wrapper around it"
        )
    with _in_eval_mode(module), Progress(make_console(), quiet=not progress, waits=False) as shown:
        model = quantized(Run.of(recipe, source, shown))
    if inplace and isinstance(model, QuantizedModule) and isinstance(module, nn.Module):
        model.take_over(module)
    return model


def sensitivity(
    module: Module,
    batches: Iterable[Any],
    *,
    samples: int = 32,
    qconfig: str | Mapping[str, Any] = "sym_int8",
    layers: Mapping[str, Any] | None = None,
    algorithms: str | Sequence[Any] = "none",
    mode: str | Mapping[str, Any] = "export",
    runtime: str = "auto",
    device: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """What int8 in each layer alone costs, and what float in it alone gives back.

    What was measured once on the same model, data and machine is read from $XDG_CACHE_HOME/quantflow.

    Args:
        samples: how many of the batches' samples each layer is judged on.
        module, batches, …: as for `quantize`.

    Returns:
        {"samples", "all_int8": figures, "layers": [{"rank", "layer", "op", "int8_alone": figures, "float_alone":
        figures}], …}, most harmful first; see `quantflow.search.sensitivity.measure_sensitivity`.

    Raises:
        QuantflowError: as `quantize`.
    """
    calibration = _batches(batches, "batches")
    recipe = Recipe.from_dict(
        {
            "name": "sensitivity",
            "task": "sensitivity",
            "model": {"kind": "given", "name": type(module).__name__},
            "data": {"kind": "given"},
            "qconfig": _qconfig(qconfig),
            "layers": dict(layers or {}),
            "algorithms": algorithms,
            "mode": {"kind": mode} if isinstance(mode, str) else dict(mode),
            "runtime": {"kind": runtime},
            "device": {"kind": device},
            "sensitivity": {"samples": samples},
            "seed": seed,
        },
        "sensitivity",
    )
    source = _source(module, calibration, calibration)
    with _in_eval_mode(module), Progress(make_console(), quiet=not progress, waits=False) as shown:
        return analyse(Run.of(recipe, source, shown))


def _source(module: Module, calibration: list[Batch], compared: list[Batch]) -> Source:
    """The user's own objects as what a recipe's model and data come to."""
    if not isinstance(module, (nn.Module, torch.export.ExportedProgram)):
        raise UsageError(
            f"module: is a {type(module).__name__}; pass an nn.Module, a ScriptModule or an ExportedProgram"
        )
    identity = identity_of("given", {"calibration": _identity(calibration), "evaluation": _identity(compared)})
    model = usable(LoadedModel(module, type(module).__name__, weights_used="as given"))
    return Source(model, Data(calibration, compared, identity))


@contextlib.contextmanager
def _in_eval_mode(module: Module) -> Iterator[None]:
    """Eval mode inside, every training flag as it was afterwards; a frozen ScriptModule has none."""
    children = list(module.modules()) if isinstance(module, nn.Module) else []
    flags = [(child, child.training) for child in children if hasattr(child, "training")]
    try:
        for child, _ in flags:
            child.training = False
        yield
    finally:
        for child, training in flags:
            child.training = training


def _qconfig(qconfig: str | Mapping[str, Any]) -> Any:
    if not isinstance(qconfig, str):
        return dict(qconfig) if isinstance(qconfig, Mapping) else qconfig
    if qconfig not in PRESETS:
        known = nearest(qconfig, PRESETS)
        raise RecipeError("quantize", [Problem("qconfig", f"'{qconfig}' is not a preset; use {known}, or a dict")])
    return PRESETS[qconfig].model_dump()


def _batches(batches: Iterable[Any], name: str, module: Module | None = None) -> list[Batch]:
    if isinstance(batches, torch.Tensor):
        raise UsageError(f"{name}: is one tensor; pass an iterable of batches, such as [x] or x.split(16)")
    if isinstance(batches, Iterable) and isinstance(module, nn.Module):
        batches = _with_lists_as_one(batches, module)
    return [batch.at(CPU) for batch in as_batches(batches)]


def _with_lists_as_one(batches: Iterable[Any], module: nn.Module) -> Iterable[Any]:
    """The batches, lists among them as one argument where the model takes its first list so and in no other way."""
    if isinstance(batches, (str, Mapping, Batch)):
        return batches
    batches = list(batches)
    first = next((batch for batch in batches if isinstance(batch, list)), None)
    if first is None or not all(isinstance(x, (torch.Tensor, dict)) for x in first):
        return batches
    with _in_eval_mode(module), torch.no_grad():
        if _runs(module, *first) or not _runs(module, first):
            return batches
    return [(batch,) if isinstance(batch, list) else batch for batch in batches]


def _runs(module: nn.Module, *args: Any) -> bool:
    try:
        module(*args)
    except Exception:  # noqa: BLE001 the user's code may raise anything
        return False
    return True


def _identity(batches: list[Batch]) -> tuple[list[str], str]:
    ids = [
        name
        for index, b in enumerate(batches)
        for name in (b.ids or tuple(f"batch {index}.{row}" for row in range(b.size)))
    ]
    return ids, hash_of(tensor for b in batches for tensor in b.tensors)
