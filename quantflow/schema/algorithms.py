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
AlgorithmName = Literal["equalize", "bias_correction"]


class EqualizeAlgorithm(Settings):
    """Cross-layer equalization: channels are rescaled between linear ops, so that all of them use the codes.

    `clip_margin`: behind a ReLU6, only channels whose largest value on the calibration data is this many times below
    the bound are rescaled, because a rescaled bound would be another function.
    """

    acts_on: ClassVar[ActsOn] = "graph"
    name: Literal["equalize"] = "equalize"
    samples: Samples = 32
    iterations: Annotated[int, Field(ge=1, le=1000)] = 20
    clip_margin: Annotated[float, Field(ge=1, le=1000)] = 1.5


class BiasCorrectionAlgorithm(Settings):
    """The bias takes up the mean of what rounding does to a layer's output.

    fast: from the float model's mean inputs, all layers at once; full: layer after layer, on quantized inputs.
    """

    acts_on: ClassVar[ActsOn] = "numbers"
    name: Literal["bias_correction"] = "bias_correction"
    method: Literal["fast", "full"] = "fast"
    samples: Samples = 32


#: One class and one entry here per algorithm.
Algorithm = Annotated[EqualizeAlgorithm | BiasCorrectionAlgorithm, Field(discriminator="name")]

#: The names that `algorithms: NAME` and `quantize(algorithms="NAME")` accept, each with what it stands for.
ALGORITHM_PRESETS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "none": (),
    "fast": ({"name": "equalize"}, {"name": "bias_correction"}),
    "accurate": ({"name": "equalize"}, {"name": "bias_correction", "method": "full"}),
    "best": ({"name": "equalize"}, {"name": "bias_correction", "method": "full"}),
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
