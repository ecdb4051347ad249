"""The observers by the names a recipe uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantflow.numerics.observers.abstract import AbstractObserver
from quantflow.numerics.observers.entropy import EntropyObserver
from quantflow.numerics.observers.histogram import HistogramObserver
from quantflow.numerics.observers.minmax import MinMaxObserver
from quantflow.numerics.observers.moving_average import MovingAverageObserver
from quantflow.numerics.observers.mse import MSEObserver
from quantflow.numerics.observers.percentile import PercentileObserver

if TYPE_CHECKING:
    from quantflow.schema import ActivationSpec

#: Name in ActivationSpec.observer → class.
OBSERVERS: dict[str, type[AbstractObserver]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}


def make_observer(spec: ActivationSpec) -> AbstractObserver:
    """An empty observer of the kind that the spec names."""
    return OBSERVERS[spec.observer](spec)
