"""The time that the float model and the int8 model take, in turn on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from quantflow.errors import first_line
from quantflow.executor.run import Run
from quantflow.executor.source import Update, takes
from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.stages import benchmark as timing
from quantflow.stages.compile import Compiled
from quantflow.stages.record import weights_bytes

#: Each layer is timed this often, or as often as fits in about this time.
MOST_REPEATS = 10
PER_LAYER_MS = 2000.0
#: What is timed on a card beside int8 and eager float32, and what the results call it.
COMPILED = "bfloat16"

Call = Callable[..., Any]


def benchmark(run: Run, compiled: Compiled, call: Call, update: Update) -> dict[str, Any]:
    """The `benchmark` section. `call` takes its inputs where `run.int8_place` says."""
    settings, program, place = run.recipe.benchmark, compiled.program, run.place
    first = next(iter(run.source.data.evaluation))
    sizes = [size for size in settings.batch_sizes if program.batch_is_dynamic and takes(program, first, size)]
    sizes = sizes or [first.size]
    total, configs = len(sizes) * settings.rounds, []
    float_model, int8_place = run.source.float_model(place), run.int8_place(compiled.runner)
    half, notices = _Half.of(run)
    with timing.threads(settings.threads) as threads, torch.inference_mode():
        for done, size in enumerate(sizes):
            batch = timing.resized(first, size)
            contestants = {
                "float": _called(float_model, batch.at(place)),
                "int8": _called(call, batch.at(int8_place)),
            }
            if half is not None:
                try:
                    contestants[COMPILED] = half.compiled_for(batch)
                except Exception as error:  # noqa: BLE001 the compiler meets code that it can't compile
                    half, notices = None, [f"benchmark: torch.compile fails in bfloat16: {first_line(error)}"]
            timings = timing.interleaved(
                contestants,
                rounds=settings.rounds,
                min_round_ms=settings.min_round_ms,
                clock=timing.clock_of(place if int8_place == place else CPU),
                progress=lambda r, _, done=done: update(done * settings.rounds + r, total),  # type: ignore[misc]
            )
            configs.append(timing.comparison(size, timings))
        per_layer = None
        if settings.per_layer:
            batch = timing.resized(first, sizes[0]).at(int8_place)
            repeats = int(PER_LAYER_MS / max(configs[0]["int8"]["median_ms"], 1e-3))
            inputs = compiled.bound(batch.args, batch.kwargs)
            per_layer = compiled.runner.profile(inputs, max(1, min(MOST_REPEATS, repeats)))
    int8_bytes, float_bytes = len(weights_bytes(program)), run.source.float_bytes()
    section = {
        "threads": threads,
        "rounds": settings.rounds,
        "float": "torch float32, eager",
        "configs": configs,
        "size": {
            "float_bytes": float_bytes,
            "int8_bytes": int8_bytes,
            "ratio": int8_bytes / float_bytes if float_bytes else None,
        },
        "peak_memory_bytes": timing.peak_memory_bytes(),
    }
    if place != CPU:
        section |= {"on": str(place), "card_memory_bytes": timing.card_memory_bytes(place), "notices": notices}
        if half is not None:
            section |= {COMPILED: "torch.compile, bfloat16, channels last, frozen, with graphs"}
    return section | ({"per_layer": per_layer} if per_layer is not None else {})


def _called(function: Call, batch: Batch) -> Callable[[], Any]:
    return partial(function, *batch.args, **batch.kwargs)


class _Half:
    """The float model as it is fastest on a card without int8."""

    def __init__(self, module: Any, place: torch.device) -> None:
        self._module, self._place = module, place

    @classmethod
    def of(cls, run: Run) -> tuple[_Half | None, list[str]]:
        """On a card, where the recipe asks for it and the model can be had in bfloat16; else None, and why."""
        if run.place == CPU or not run.recipe.benchmark.compiled:
            return None, []
        try:
            module = copy.deepcopy(run.source.float_module(run.place)).to(torch.bfloat16)
            for parameter in module.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        except Exception as error:  # noqa: BLE001 the user's module may refuse in its own way
            return None, [f"benchmark: the model can't be had in bfloat16: {first_line(error)}"]
        return cls(module, run.place), []

    def compiled_for(self, batch: Batch) -> Callable[[], Any]:
        """A call on this batch; compiled and recorded."""
        import torch._inductor.config as inductor

        given = batch.at(self._place).mapped(_half)
        torch._dynamo.reset()
        with inductor.patch(freezing=True):  # type: ignore[attr-defined]
            call = _called(torch.compile(self._module, mode="reduce-overhead", dynamic=False), given)
            for _ in range(3):  # eager, recorded, replayed
                call()
        return call


def _half(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point():
        return x
    x = x.to(torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def notices_of(section: Mapping[str, Any]) -> list[str]:
    """What a benchmark has to say beside its figures."""
    return [*section.get("notices", ()), *timing.not_worth_it(section.get("configs", ()))]
