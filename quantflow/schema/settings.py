"""The smaller sections of a recipe, one class each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from quantflow.schema.base import BatchSize, PathText, Settings

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class ModeSettings(Settings):
    """How the model is captured. `method` is read by torchscript."""

    kind: Literal["export", "torchscript", "imperative"] = "export"
    method: Literal["trace", "script"] = "trace"


class RuntimeSettings(Settings):
    """What executes the int8 model; auto chooses and says why."""

    kind: Literal["auto", "native", "torch", "reference"] = "auto"


class DeviceSettings(Settings):
    """Where it runs. A device asked for by name and absent is an error, never a silent fall-back."""

    kind: Literal["auto", "cpu", "xpu"] = "auto"


class CalibrateSettings(Settings):
    """Whether an interrupted calibration is taken up again, and how often its state is saved."""

    resume: bool = True
    checkpoint_every_s: Annotated[float, Field(ge=0, le=86400)] = 5.0


class WarmupSettings(Settings):
    """Runs before anything is timed, and the SQNR against the reference below which the run stops."""

    iterations: Annotated[int, Field(ge=1, le=10_000)] = 5
    min_sqnr_db: Annotated[float, Field(ge=0, le=300)] = 40.0


class EvaluateSettings(Settings):
    """Float beside int8 on the evaluation samples; `per_layer` adds SQNR for every layer."""

    enabled: bool = True
    per_layer: bool = True


class BenchmarkSettings(Settings):
    """Float beside int8, interleaved. `threads`: None leaves torch's choice; `rounds` medians of >= `min_round_ms`.

    `per_layer` also times each layer, which takes about 2 s at most.
    """

    enabled: bool = True
    batch_sizes: Annotated[tuple[BatchSize, ...], Field(strict=False, min_length=1, max_length=64)] = (1,)
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 7
    min_round_ms: Annotated[float, Field(gt=0, le=600_000)] = 200.0
    per_layer: bool = True

    @field_validator("batch_sizes")
    @classmethod
    def _no_repeats(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(sizes)) != len(sizes):
            raise PydanticCustomError("repeated", "a batch size is listed twice; list each once")
        return sizes


class GatesSettings(Settings):
    """Limits the run is judged by; None: not judged. Fractions are 0..1, `min_speedup` is float time / int8 time."""

    min_sqnr_db: Annotated[float, Field(ge=-300, le=300)] | None = None
    max_accuracy_drop: Fraction | None = None
    min_agreement: Fraction | None = None
    min_speedup: Positive | None = None
    max_latency_ms: Positive | None = None
    min_int8_coverage: Fraction | None = None
    max_size_ratio: Positive | None = None


Objective = Literal[
    "sqnr_db", "metric", "metric_drop", "agreement", "latency_ms", "speedup", "size_ratio", "int8_coverage"
]
#: What a job of a sweep may return → whether more or less of it is better.
OBJECTIVES: dict[Objective, Literal["maximize", "minimize"]] = {
    "sqnr_db": "maximize",
    "metric": "maximize",
    "metric_drop": "minimize",
    "agreement": "maximize",
    "latency_ms": "minimize",
    "speedup": "maximize",
    "size_ratio": "minimize",
    "int8_coverage": "maximize",
}


class SweepSettings(Settings):
    """What a job returns to a sweeper that optimizes, as Optuna's. Latency and speedup: the first batch size's."""

    objectives: Annotated[tuple[Objective, ...], Field(strict=False, min_length=1, max_length=4)] = ("sqnr_db",)


class ReportSettings(Settings):
    """What the report holds and the terminal shows.

    `baseline`: an artifact folder whose figures stand beside this run's; `graph_dump` writes the fused graph to a file;
    `quiet` keeps the terminal to warnings and the verdict; `plain` gives a terminal what a pipe gets: a line per stage,
    no bars, no colours.
    """

    baseline: PathText | None = None
    graph_dump: bool = False
    quiet: bool = False
    plain: bool = False
