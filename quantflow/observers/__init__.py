"""Observers: what a value's range was during calibration, and which part of it deserves codes."""

from quantflow.observers.abstract import AbstractObserver, extremes, flat
from quantflow.observers.table import OBSERVERS, make_observer
from quantflow.observers.weight import WEIGHT_OBSERVERS, weight_max_abs

__all__ = ["OBSERVERS", "WEIGHT_OBSERVERS", "AbstractObserver", "extremes", "flat", "make_observer", "weight_max_abs"]
