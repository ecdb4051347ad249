"""Accuracy algorithms: an ordered list, or a preset's name. What each does is in `quantflow/algorithms/NAME.py`.

`acts_on` says when one runs: "graph" before calibration, on the float model; "numbers" after it, on the integers that
the program will hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from quantflow.schema.base import Settings

#: Calibration samples that an algorithm looks at; it takes the first ones.
Samples = Annotated[int, Field(ge=1, le=1_000_000)]
Iterations = Annotated[int, Field(ge=1, le=1_000_000)]
#: An algorithm stops there, keeps what it has and says so.
Seconds = Annotated[float, Field(gt=0, le=86400)]
ActsOn = Literal["graph", "numbers"]
AlgorithmName = Literal[
    "equalize",
    "smooth",
    "unsigned",
    "activation_scale",
    "clip_weights",
    "bias_correction",
    "gptq",
    "adaround",
    "batchnorm",
]


class _Guarded(Settings):
    """guard: whether it is rolled back where it makes the whole model worse on held-out calibration samples."""

    guard: bool = True


class EqualizeAlgorithm(_Guarded):
    """Cross-layer equalization: channels are rescaled between linear ops, so that all of them use the codes.

    Channels behind a ReLU6 stay as they are, because a rescaled bound is another function. `clip_margin` rescales those
    whose largest value on the samples is this many times below the bound, and trusts that they never reach it.
    """

    acts_on: ClassVar[ActsOn] = "graph"
    name: Literal["equalize"] = "equalize"
    samples: Samples = 128
    iterations: Annotated[int, Field(ge=1, le=1000)] = 20
    clip_margin: Annotated[float, Field(ge=1, le=1000)] | None = None


class SmoothAlgorithm(_Guarded):
    """SmoothQuant: outlier channels of a linear's input move into its weight.

    Factors are searched per group of linears on a grid that is refined `refinements` times around the best, by what
    they do to at most `rows` rows (tokens) of the input; a number for alpha takes that wherever it helps. `insert`:
    whether an input may be multiplied at run time where nothing in front of it can take up the factors, and
    `min_gain_db` what that must gain.
    """

    acts_on: ClassVar[ActsOn] = "graph"
    name: Literal["smooth"] = "smooth"
    samples: Samples = 64
    rows: Annotated[int, Field(ge=1, le=2**20)] = 2048
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    refinements: Annotated[int, Field(ge=0, le=10)] = 2
    insert: bool = True
    min_gain_db: Annotated[float, Field(ge=0, le=100)] = 1.0


class UnsignedAlgorithm(_Guarded):
    """Symmetric int8 activations that are never negative, as after ReLU, use 256 codes: uint8 with zero point 0."""

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["unsigned"] = "unsigned"


class BiasCorrectionAlgorithm(_Guarded):
    """The bias takes up the mean of what rounding does to a layer's output.

    fast: from the float model's mean inputs, all layers at once; full: layer after layer, on quantized inputs.
    """

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["bias_correction"] = "bias_correction"
    method: Literal["fast", "full"] = "fast"
    samples: Samples = 32


class GptqAlgorithm(_Guarded):
    """Weights rounded to codes that give the layer's output back, rather than each weight.

    `damping`: what is added to the diagonal, as a share of its mean; more trusts the samples less. `sweeps`: passes
    over all codes that set each to its best one, the others given. `refit`: codes that are better on held-out samples
    are found again on all of them, which takes twice the time.
    """

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["gptq"] = "gptq"
    samples: Samples = 64
    damping: Annotated[float, Field(gt=0, le=10)] = 0.01
    sweeps: Annotated[int, Field(ge=0, le=1000)] = 3
    refit: bool = False
    max_seconds: Seconds = 300.0


class AdaroundAlgorithm(_Guarded):
    """Whether each weight is rounded up or down is learned, for what the layer computes. Settings of the optimizer.

    `refit`: codes that are better on held-out samples are learned again on all of them, which takes twice the time.
    """

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["adaround"] = "adaround"
    samples: Samples = 64
    iterations: Iterations = 300
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.05
    regularization: Annotated[float, Field(ge=0, le=1000)] = 0.5
    damping: Annotated[float, Field(gt=0, le=10)] = 0.01
    refit: bool = False
    max_seconds: Seconds = 300.0


class ActivationScaleAlgorithm(_Guarded):
    """Each activation's range is cut where the layers that read it then compute a smaller squared error.

    `smallest`: the shortest range that is tried, as a share of the measured one; `steps`: how many on the way there.
    """

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["activation_scale"] = "activation_scale"
    samples: Samples = 32
    smallest: Annotated[float, Field(gt=0, lt=1)] = 0.6
    steps: Annotated[int, Field(ge=1, le=100)] = 8


class ClipWeightsAlgorithm(_Guarded):
    """Weight scales that minimise the squared error of the weights, whatever `qconfig.weight.observer` says."""

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["clip_weights"] = "clip_weights"


class BatchNormAlgorithm(_Guarded):
    """BatchNorm statistics re-estimated behind the int8 layers they were folded into."""

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["batchnorm"] = "batchnorm"
    samples: Samples = 64


#: One class and one entry here per algorithm.
Algorithm = Annotated[
    EqualizeAlgorithm
    | SmoothAlgorithm
    | UnsignedAlgorithm
    | ActivationScaleAlgorithm
    | ClipWeightsAlgorithm
    | BiasCorrectionAlgorithm
    | GptqAlgorithm
    | AdaroundAlgorithm
    | BatchNormAlgorithm,
    Field(discriminator="name"),
]

#: The names that `algorithms: NAME` and `quantize(algorithms="NAME")` accept, each with what it stands for.
ALGORITHM_PRESETS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "none": (),
    "fast": (
        {"name": "equalize", "samples": 32},
        {"name": "smooth", "samples": 32, "rows": 256, "refinements": 1},
        {"name": "unsigned"},
        {"name": "bias_correction"},
    ),
    "accurate": ({"name": "equalize"}, {"name": "smooth"}, {"name": "unsigned"}, {"name": "gptq"}),
    "best": ({"name": "equalize"}, {"name": "smooth"}, {"name": "unsigned"}, {"name": "gptq", "samples": 128}),
}


def _written_out(value: object) -> object:
    """A preset's name as its list, and a bare name in a list as that algorithm with its defaults."""
    if isinstance(value, str):
        if value not in ALGORITHM_PRESETS:
            legal = ", ".join(ALGORITHM_PRESETS)
            raise PydanticCustomError("preset", "must be one of {legal}, or a list of algorithms", {"legal": legal})
        return [dict(entry) for entry in ALGORITHM_PRESETS[value]]
    if isinstance(value, (list, tuple)):
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value]
    return value


Algorithms = Annotated[tuple[Algorithm, ...], Field(strict=False, max_length=64), BeforeValidator(_written_out)]
