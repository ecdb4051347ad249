"""The model that int8 parts make together: verified as a whole, measured, and what the results say of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantflow.errors import VerificationError, cause_line
from quantflow.executor.results import judged, of_run
from quantflow.executor.run import Run
from quantflow.ir.batch import Batch
from quantflow.ir.structure import plain
from quantflow.quantized import Quantized, QuantizedParts, hooks_of, put_in
from quantflow.stages import benchmark as timing
from quantflow.stages.evaluate import ErrorSum, tensors

#: On the model's own data a part may be so much worse than on the calls that were recorded before it is reported.
MARGIN_DB = 6.0

#: What a layer that is a whole part is called in that part's own plan.
ONLY_LAYER = "weight"


@dataclass(frozen=True)
class Part:
    """A submodule in int8.

    Attributes:
        name: its place in the model.
        model: what became of it.
        hooks: its own forward hooks, which stay the model's.
        matched: the patterns of `layers` that match one of its layers.
    """

    name: str
    model: Quantized
    hooks: Mapping[str, Any]
    matched: frozenset[str]


@contextlib.contextmanager
def without_hooks(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The module without its own forward hooks, which what takes its place will have; gives them."""
    kept = hooks_of(module)
    try:
        for name, hooks in kept.items():
            module.__dict__[name] = type(hooks)()
        yield kept
    finally:
        module.__dict__.update(kept)


def verified(module: nn.Module, composed: nn.Module, parts: Mapping[str, Part], batch: Batch) -> dict[str, Any]:
    """That the model with its parts put in is the user's own but for their numbers.

    With the float parts in the places of the int8 ones it gives what the float model gives, to the last bit; and every
    part is called, and what it gives there is as near to float as it was on the calls that were recorded.

    Raises:
        VerificationError: one of it does not hold; names the part.
    """
    floats = {name: module.get_submodule(name) for name in parts}
    with torch.no_grad():
        wanted = plain(module(*batch.args, **batch.kwargs))
        try:
            found = plain(put_in(module, floats, {})(*batch.args, **batch.kwargs))
        except Exception as error:  # the user's code may raise anything
            raise VerificationError(
                f"parts: the model does not run with {', '.join(parts)} taken out and put back: {cause_line(error)}; "
                "its code uses more of a part than a call: name other ones with parts=[…]"
            ) from error
    if not _equal(found, wanted):
        raise VerificationError(
            f"parts: with {', '.join(parts)} taken out and put back the float model gives another result; its code "
            "draws random numbers, or uses more of a part than a call: name other ones with parts=[…]"
        )
    errors: dict[str, ErrorSum] = {name: ErrorSum() for name in parts}
    notices: list[str] = []

    def compare(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with without_hooks(floats[name]):
                expected = plain(floats[name](*args, **kwargs))
            pairs = list(zip(_tensors(expected), _tensors(plain(output)), strict=True))
            for a, b in pairs:
                if a.shape != b.shape or a.dtype != b.dtype:
                    raise VerificationError(
                        f"parts: {name} gives {b.dtype} {list(b.shape)} where float gives {a.dtype} {list(a.shape)}"
                    )
            # As in the figures that it is held to: the first tensor of numbers.
            for a, b in [pair for pair in pairs if pair[0].is_floating_point()][:1]:
                errors[name].add(a, b)

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in parts:
            # Before the user's own hooks, which may change what the part gives.
            hook = composed.get_submodule(name).register_forward_hook(compare(name), prepend=True, with_kwargs=True)
            stack.callback(hook.remove)
        result = plain(composed(*batch.args, **batch.kwargs))
    sqnr: dict[str, float | None] = {}
    for name, part in parts.items():
        promised = (part.model.results.get("accuracy") or {}).get("sqnr_db")
        sqnr[name] = errors[name].sqnr_db if errors[name].elements else None
        now = sqnr[name]
        if now is not None and promised is not None and not now >= promised - MARGIN_DB:
            notices.append(
                f"{name}: {now:.1f} dB of SQNR inside the model, where its recorded calls had {promised:.1f} dB"
            )
    return {
        "sqnr_db": sqnr,
        "outputs": {"float": _shapes(wanted), "int8": _shapes(result)},
        "notices": notices,
    }


def _equal(found: Any, wanted: Any) -> bool:
    a, b = _tensors(found), _tensors(wanted)
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x.double(), y.double(), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _shapes(output: Any) -> list[list[int]]:
    return [list(x.shape) for x in _tensors(output)]


def _tensors(output: Any) -> list[torch.Tensor]:
    return [x for _, x in tensors(output)]


# -- what the results say


def results_of(
    run: Run,
    why: str,
    module: nn.Module,
    parts: Mapping[str, Part],
    reasons: Mapping[str, str],
    together: Mapping[str, Any],
    notices: Sequence[str],
    model: QuantizedParts,
) -> dict[str, Any]:
    own = {name: part.model.results for name, part in parts.items()}
    outside = _outside(module, parts, reasons)
    floats = [
        *(_named(name, row) for name, r in own.items() for row in r["int8_proof"]["float_layers"]),
        *(row for row in outside if row["weights"]),
    ]
    proofs = [r["int8_proof"] for r in own.values()]
    int8, core = (sum(proof[key] for proof in proofs) for key in ("int8_layers", "core_layers"))
    core += sum(row["weights"] for row in outside)
    recipe = run.recipe
    results: dict[str, Any] = {
        **of_run(run),
        "plan": [
            *(row for part in parts.values() for row in plan_rows(part)),
            *(_plan_row(row) for row in outside),
        ],
        "parts": [
            {
                "name": name,
                "module": type(module.get_submodule(name)).__name__,
                "inputs": [item.name for item in part.model.record.program.inputs],
                "shapes": [list(item.shape) for item in part.model.record.program.inputs],
                "int8_layers": own[name]["int8_proof"]["int8_layers"],
                "core_layers": own[name]["int8_proof"]["core_layers"],
                "accuracy": _figures(own[name].get("accuracy") or {}),
                "sqnr_in_model_db": together["sqnr_db"][name],
                "calibration": own[name]["calibration"],
                "warmup": own[name]["warmup"],
            }
            for name, part in parts.items()
        ],
        "outside": outside,
        "together": {"outputs": together["outputs"]},
        "calibration": {
            "batches": len(run.source.data.calibration),
            "samples": sum(batch.images or batch.size for batch in run.source.data.calibration),
            "seconds": sum(r["calibration"]["seconds"] or 0.0 for r in own.values()),
            "resumed": False,
            "workers": 1,
        },
        "int8_proof": {
            "int8_layers": int8,
            "int8_layers_run": sum(proof["int8_layers_run"] for proof in proofs),
            "core_layers": core,
            "coverage": int8 / core if core else 0.0,
            "float_layers": [{"name": row["name"], "op": row["op"], "reason": row["reason"]} for row in floats],
            "output_differs": any(proof["output_differs"] for proof in proofs),
        },
    }
    if recipe.evaluate.enabled:
        results["accuracy"] = _worst({name: r["accuracy"] for name, r in own.items()})
    if recipe.benchmark.enabled:
        results["benchmark"] = _benchmark(run, module, model)
    named = ", ".join(parts)
    left = ", ".join(row["name"] for row in outside)
    results["notices"] = [
        *run.source.notices,
        f"{type(module).__name__} is quantized in parts, as {why}: {named}; float outside them: {left}",
        *notices,
        *together["notices"],
        *timing.unsteady((results.get("benchmark") or {}).get("configs", ())),
    ]
    results |= judged(recipe, results)
    results["stages"] = run.progress.stages
    return results


def plan_rows(part: Part) -> list[dict[str, Any]]:
    """Of its plan, under the names of the whole model."""
    return [_named(part.name, row) for row in part.model.results["plan"]]


def _named(part: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "name": part if row["name"] == ONLY_LAYER else f"{part}.{row['name']}"}


def _outside(module: nn.Module, parts: Mapping[str, Part], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """What stays float by name: submodules without a part in them, and the code of those that hold parts."""
    rows = []

    def visit(name: str) -> None:
        if name in parts:
            return
        here, prefix = module.get_submodule(name), f"{name}." if name else ""
        holds = any(part.startswith(prefix) for part in parts)
        weights = 0 if holds else sum(any(p.dim() > 1 for p in m.parameters(recurse=False)) for m in here.modules())
        if holds:
            if not isinstance(here, (nn.ModuleList, nn.ModuleDict)):
                reason = reasons.get(name, "") or "the model is quantized in parts"
                rows.append(_row(f"{name or type(here).__name__} (its own code)", here, 0, reason))
            weights = sum(p.dim() > 1 for p in here.parameters(recurse=False))
            if weights:
                rows.append(
                    _row(f"{name or type(here).__name__} (its own weights)", here, weights, "no part holds them")
                )
            for child, _ in here.named_children():
                visit(f"{prefix}{child}")
        else:
            rows.append(_row(name, here, weights, reasons.get(name, "it is in no part")))

    visit("")
    return rows


def _row(name: str, module: nn.Module, weights: int, reason: str) -> dict[str, Any]:
    return {"name": name, "op": type(module).__name__, "weights": weights, "reason": reason}


def _plan_row(row: Mapping[str, Any]) -> dict[str, Any]:
    given = {"name": row["name"], "op": row["op"], "reason": row["reason"]}
    return {**given, "precision": "float", "group": [], "kernel": "", "qparams": ""}


def _figures(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in accuracy.items() if key not in ("per_layer", "histograms")}


def _worst(accuracy: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the part that is furthest from float, under its name, with every part's layers."""
    with_figure = [name for name, each in accuracy.items() if each.get("sqnr_db") is not None] or list(accuracy)
    worst = min(with_figure, key=lambda name: accuracy[name].get("sqnr_db") or 0.0)
    layers = [_named(name, row) for name, each in accuracy.items() for row in each.get("per_layer", ())]
    return {**_figures(accuracy[worst]), "part": worst, "per_layer": layers}


def _benchmark(run: Run, module: nn.Module, model: QuantizedParts) -> dict[str, Any]:
    """The whole model on the first batch, float and int8 in turn."""
    settings, batch = run.recipe.benchmark, run.source.first_batch
    with (
        run.progress.stage("benchmark", alone=True),
        timing.threads(settings.threads) as threads,
        torch.inference_mode(),
    ):
        timings = timing.interleaved(
            {
                "float": lambda: module(*batch.args, **batch.kwargs),
                "int8": lambda: model(*batch.args, **batch.kwargs),
            },
            rounds=settings.rounds,
            min_round_ms=settings.min_round_ms,
        )
    int8_bytes, float_bytes = model.weights_bytes(), run.source.float_bytes()
    return {
        "threads": threads,
        "rounds": settings.rounds,
        "float": "torch float32, eager",
        "configs": [timing.comparison(batch.images or batch.size, timings)],
        "size": {"float_bytes": float_bytes, "int8_bytes": int8_bytes, "ratio": int8_bytes / float_bytes},
        "peak_memory_bytes": timing.peak_memory_bytes(),
    }
