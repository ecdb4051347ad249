"""The smaller sections of a recipe, one class each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from quantflow.schema.base import BatchSize, PathText, Settings

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class ModeSettings(Settings):
    """How the model is captured. `method` is read by torchscript."""

    kind: Literal["export", "torchscript", "imperative"] = "export"
    method: Literal["trace", "script"] = "trace"


class RuntimeSettings(Settings):
    """What executes the int8 model; auto chooses and says why."""

    kind: Literal["auto", "native", "torch", "triton", "reference"] = "auto"


class DeviceSettings(Settings):
    """Where it runs. A device asked for by name and absent is an error, never a silent fall-back."""

    kind: Literal["auto", "cpu", "cuda", "xpu"] = "auto"


Precision = Literal["int8", "float"]
FloatPrecision = Literal["float32", "bfloat16", "float16", "auto"]


class PolicySettings(Settings):
    """Which ops beside convolutions and linears may run in int8 where codes are at hand; `layers` has precedence.

    An int8 add, mul or cat spares conversions and costs accuracy (`joins` in the results shows both). An int8 matmul is
    one of two activations, as in attention. `embedding: int8` is for all tables together, whatever `layers` says: each
    takes a quarter of the bytes, and its rows are dequantized as they are looked up; mode=imperative can't have it.

    `float` is how values between int8 layers are held where that is tolerated (norms, attention, residual sums, …), by
    runtime triton in mode=export: each such value then differs by at most 2^-8 (bfloat16) or 2^-11 (float16) of its
    magnitude, and a code behind it by one. auto is bfloat16 where warm-up finds that it costs less than 1 dB, else
    float32. Results are float32 whatever it says.
    """

    add: Precision = "int8"
    mul: Precision = "int8"
    cat: Precision = "int8"
    matmul: Precision = "float"
    embedding: Precision = "float"
    float: FloatPrecision = "float32"


class CalibrateSettings(Settings):
    """Whether an interrupted calibration is taken up again, and how often its state is saved."""

    resume: bool = True
    checkpoint_every_s: Annotated[float, Field(ge=0, le=86400)] = 5.0


class OutlierSettings(Settings):
    """Massive outliers in the inputs of linears: a channel or token of at least `ratio` times the median.

    They are looked for on the first `samples` calibration samples (0: not at all). With `fall_back` a layer stays float
    where int8 would leave less than `min_sqnr_db` of a typical token; a layer that `layers` names stays as asked.
    """

    ratio: Annotated[float, Field(ge=2, le=1e9)] = 100.0
    samples: Annotated[int, Field(ge=0, le=1_000_000)] = 16
    fall_back: bool = True
    min_sqnr_db: Annotated[float, Field(ge=-300, le=300)] = 10.0


class WarmupSettings(Settings):
    """Runs before anything is timed, and the SQNR against the reference below which the run stops."""

    iterations: Annotated[int, Field(ge=1, le=10_000)] = 3
    min_sqnr_db: Annotated[float, Field(ge=0, le=300)] = 40.0


class EvaluateSettings(Settings):
    """Float beside int8 on the evaluation samples; `per_layer` adds SQNR for every layer."""

    enabled: bool = True
    per_layer: bool = True


class BenchmarkSettings(Settings):
    """Float beside int8, interleaved. `threads`: None leaves torch's choice; `rounds` medians of >= `min_round_ms`.

    `per_layer` also times each layer, which takes about 2 s at most. `compiled`: on a GPU also bfloat16 under
    torch.compile, what int8 must beat there; compiling takes up to a minute per batch size.
    """

    enabled: bool = True
    batch_sizes: Annotated[tuple[BatchSize, ...], Field(strict=False, min_length=1, max_length=64)] = (1,)
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 7
    min_round_ms: Annotated[float, Field(gt=0, le=600_000)] = 200.0
    per_layer: bool = True
    compiled: bool = True

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
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
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


class SensitivitySettings(Settings):
    """How many calibration samples (the last ones: algorithms fit a model to the first) each layer is judged on."""

    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 32


class ConstraintSettings(Settings):
    """What a search has to keep, measured on the evaluation samples like the gates of these names; None: no limit."""

    max_accuracy_drop: Fraction | None = None
    min_agreement: Fraction | None = None
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    min_sqnr_db: Annotated[float, Field(ge=-300, le=300)] | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is a limit at all: without one there is nothing to search for."""
        return any(limit is not None for limit in self.model_dump().values())


class TuneSettings(Settings):
    """A search for the fastest int8 model that keeps `subject_to`; the main run searches when a limit is set.

    What costs little or no speed is tried first: activation codes as in `qconfigs`, where the recipe has no algorithms
    the presets in `algorithms`, and where none of these helps other `observers`, for activations and weights. Layers
    that this does not save get weights or inputs in two int8 terms, or are left float.
    `time_budget_s` covers the search up to the artifact, interruptions not counted.
    """

    objective: Literal["fastest"] = "fastest"
    subject_to: ConstraintSettings = ConstraintSettings()
    qconfigs: Annotated[
        tuple[Literal["sym_int8", "affine_uint8", "sym_uint8", "affine_int8"], ...], Field(strict=False)
    ] = ("affine_uint8",)
    algorithms: Annotated[tuple[Literal["fast", "accurate", "best"], ...], Field(strict=False)] = (
        "fast",
        "accurate",
    )
    observers: Annotated[tuple[Literal["minmax", "mse", "percentile"], ...], Field(strict=False)] = ("mse",)
    time_budget_s: Annotated[float, Field(gt=0, le=31_536_000)] = 600.0


class ExportSettings(Settings):
    """What `task=export` writes. `path`: None writes ARTIFACT.onnx beside the artifact's folder."""

    format: Literal["onnx"] = "onnx"
    path: PathText | None = None


class CompareSettings(Settings):
    """Limits on how a candidate may differ from its baseline; null: not judged. Each has a meaning in `compare.GATES`.

    `max_range_change` and `min_weight_sqnr_db` hold only where both recipes ask for the same numbers: there a range or
    a weight that moves has no reason to. `allow_different` compares artifacts of different models or data.
    """

    allow_different: bool = False
    max_sqnr_drop_db: NotNegative | None = 1.0
    max_accuracy_drop: Fraction | None = 0.005
    max_agreement_drop: Fraction | None = 0.02
    max_coverage_drop: Fraction | None = 0.0
    max_lost_layers: Annotated[int, Field(ge=0)] | None = 0
    max_layer_sqnr_drop_db: NotNegative | None = 3.0
    max_range_change: NotNegative | None = 0.1
    min_weight_sqnr_db: Annotated[float, Field(ge=-300, le=300)] | None = 20.0
    max_size_growth: Positive | None = 1.05
    max_slowdown: Positive | None = 1.25
    max_layer_slowdown: Positive | None = None


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
