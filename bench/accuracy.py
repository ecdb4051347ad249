"""What the accuracy benchmarks share: one model quantized in every combination of what they were asked to compare."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import product

from torch import nn

import quantflow
from quantflow.quantized import Quantized
from quantflow.sources.data import Data


def variants(
    module: nn.Module, data: Data, options: argparse.Namespace
) -> Iterator[tuple[str, str, str, Quantized, float]]:
    """(qconfig preset, observer, algorithms, model, seconds that it took) for each of `options`, in `options.mode`."""
    probe = data.evaluation[0].head(1)
    for preset, observer, algorithms in product(options.qconfig, options.observer, options.algorithms):
        qconfig = quantflow.PRESETS[preset].model_dump()
        qconfig["activation"]["observer"] = observer
        started = time.perf_counter()
        model = quantflow.quantize(
            module, data.calibration, qconfig=qconfig, mode=options.mode, algorithms=algorithms, evaluation=[probe]
        )
        yield preset, observer, algorithms, model, time.perf_counter() - started
