"""The Python interface: from a float module to an int8 model in one call, or in two around a loop of one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantflow.errors import Problem, RecipeError, UsageError, nearest
from quantflow.executor.own_loop import Observation, ObservedModule
from quantflow.executor.run import Run
from quantflow.executor.source import given
from quantflow.host.place import CPU
from quantflow.quantized import Quantized, QuantizedModule, QuantizedParts
from quantflow.report import Progress, make_console
from quantflow.runtimes import choose_runtime
from quantflow.schema import PRESETS, Recipe
from quantflow.sources.data import Batch, as_batches
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
            Refused where the model is quantized in parts.
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
    recipe = _recipe(
        module,
        qconfig=qconfig, layers=layers, algorithms=algorithms, policy=policy, mode=mode, dynamic=dynamic, parts=parts,
        runtime=runtime, device=device, benchmark=benchmark, gates=gates, tune=tune, seed=seed,
    )  # fmt: skip
    source = given(_model(module), calibration, compared)
    _require_inplace_possible(inplace, recipe, source.model, module)
    with _in_eval_mode(module), Progress(make_console(), quiet=not progress, waits=False) as shown:
        model = quantized(Run.of(recipe, source, shown))
    return _taken_over(model, module) if inplace else model


def prepare(
    module: Module,
    example: Any = None,
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
    benchmark: bool = False,
    gates: Mapping[str, float] | None = None,
    seed: int = 0,
    keep: int | None = None,
) -> ObservedModule:
    """The float module with its calls observed, for calibration by a loop of your own.

        p = quantflow.prepare(module, example)
        for image in images:
            p(my_preprocessing(image))
        model = quantflow.convert(p)

    On the same calls this gives the program that `quantize` gives. Each call runs the model twice: as it is, for the
    result, and observed.

    Args:
        example: one call's input, as an item of `quantize`'s `batches`, which the model is captured with and which is
            not observed; None: the first call.
        keep: how many samples of the calls are kept, at most, for algorithms and for the comparison with float; None:
            all, as `quantize` does. Algorithms that rewrite the float model, and models in parts, need all of them.
        module, qconfig, …: as for `quantize`.

    Returns:
        A module that takes and returns what the float one does and has its methods, in eval mode. `p.calibration` is
        the table of ranges so far: `p.calibration.save(file)`, and
        `p.calibration = quantflow.CalibrationTable.load(file).merge(p.calibration)`.

    Raises:
        QuantflowError: as `quantize`; a call raises DataError or CalibrationError on input that can't be observed.
    """
    recipe = _recipe(
        module,
        qconfig=qconfig, layers=layers, algorithms=algorithms, policy=policy, mode=mode, dynamic=dynamic, parts=parts,
        runtime=runtime, device=device, benchmark=benchmark, gates=gates, seed=seed,
    )  # fmt: skip
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 0):
        raise UsageError(f"keep: is {keep!r}; give a number of samples, or None for all")
    choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind, recipe.policy.float)
    observation = Observation(recipe, _model(module), keep)
    prepared = ObservedModule(module, observation)
    if example is not None:
        observation.begin(_batches([example], "example", module)[0])
    return prepared


def convert(
    prepared: ObservedModule,
    *,
    evaluation: Iterable[Any] | None = None,
    inplace: bool = False,
    progress: bool = False,
) -> Quantized | QuantizedParts:
    """The int8 model of what `prepare`'s module has seen: compiled, warmed up and verified.

    The module may be called on and converted again: each time it is all calls so far that count.

    Args:
        evaluation: input to compare int8 with float on; None compares on the calls that were kept.
        inplace, progress: as for `quantize`.

    Returns:
        What `quantize` returns.

    Raises:
        QuantflowError: as `quantize`.
    """
    if not isinstance(prepared, ObservedModule):
        raise UsageError(f"convert: takes what quantflow.prepare returned; found a {type(prepared).__name__}")
    module, observation = prepared.module, prepared.observation
    compared = None if evaluation is None else _batches(evaluation, "evaluation", module)
    _require_inplace_possible(inplace, observation.recipe, observation.float_model, module)
    with _in_eval_mode(module), Progress(make_console(), quiet=not progress, waits=False) as shown:
        model = observation.model(compared, shown)
    return _taken_over(model, module) if inplace else model


def _recipe(module: Module, **asked: Any) -> Recipe:
    """What the arguments of a call ask for.

    Raises:
        RecipeError: some of it is illegal.
    """
    mode, dynamic, parts = asked["mode"], asked["dynamic"], asked["parts"]
    return Recipe.from_dict(
        {
            "name": "quantize",
            "model": {"kind": "given", "name": type(module).__name__},
            "data": {"kind": "given"},
            "qconfig": _qconfig(asked["qconfig"]),
            "layers": dict(asked["layers"] or {}),
            "algorithms": asked["algorithms"],
            "policy": dict(asked["policy"] or {}),
            "mode": {"kind": mode} if isinstance(mode, str) else dict(mode),
            "dynamic": dynamic if isinstance(dynamic, str) else {k: dict(v) for k, v in dynamic.items()},
            "parts": parts if isinstance(parts, str) else list(parts),
            "runtime": {"kind": asked["runtime"]},
            "device": {"kind": asked["device"]},
            "benchmark": {"enabled": asked["benchmark"]},
            "gates": dict(asked["gates"] or {}),
            "tune": dict(asked.get("tune") or {}),
            "seed": asked["seed"],
        },
        "quantize",
    )


def _require_inplace_possible(inplace: bool, recipe: Recipe, model: LoadedModel, module: Module) -> None:
    if inplace and (recipe.mode.kind != "imperative" or model.module is not module):
        raise UsageError(
            "inplace=True exchanges the layers of the module that is given, which takes mode='imperative', float32 "
            "weights, and no wrapper around it"
        )


def _taken_over(model: Quantized | QuantizedParts, module: Module) -> Quantized | QuantizedParts:
    """
    Raises:
        UsageError: the model was quantized in parts, which lie in a copy of it.
    """
    if isinstance(model, QuantizedModule) and isinstance(module, nn.Module):
        model.take_over(module)
        return model
    raise UsageError(
        f"inplace=True: {type(module).__name__} is quantized in parts, which are put into a copy of it; leave inplace "
        "out, or quantize its submodules in place yourself"
    )


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
    source = given(_model(module), calibration, calibration)
    with _in_eval_mode(module), Progress(make_console(), quiet=not progress, waits=False) as shown:
        # Only here: the search is much code, and few ask for it.
        from quantflow.search.bench import analyse

        return analyse(Run.of(recipe, source, shown))


def _model(module: Module) -> LoadedModel:
    """The user's module as what a recipe's model comes to."""
    if not isinstance(module, (nn.Module, torch.export.ExportedProgram)):
        raise UsageError(
            f"module: is a {type(module).__name__}; pass an nn.Module, a ScriptModule or an ExportedProgram"
        )
    return usable(LoadedModel(module, type(module).__name__, weights_used="as given"))


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
