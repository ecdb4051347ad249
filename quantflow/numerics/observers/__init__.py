"""Observers: what a value's range was during calibration, and which part of it deserves codes."""

from quantflow.numerics.observers.abstract import AbstractObserver, Sketch, extremes, flat, require_finite
from quantflow.numerics.observers.table import OBSERVERS, make_observer
from quantflow.numerics.observers.weight import WEIGHT_OBSERVERS, weight_max_abs

__all__ = [
    "OBSERVERS", "WEIGHT_OBSERVERS", "AbstractObserver", "Sketch", "extremes", "flat", "make_observer",
    "require_finite", "weight_max_abs",
]  # fmt: skip
