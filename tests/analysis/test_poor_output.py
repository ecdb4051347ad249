"""A poor output is told, with the layers behind it and what to try; a good one is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.analysis.poor_output import poor_output_notices


def rows(**own: float | None) -> list[dict[str, Any]]:
    return [{"name": name, "sqnr_db": 3.0, "own_sqnr_db": db} for name, db in own.items()]


def test_the_worst_layers_and_the_next_step_are_named() -> None:
    (notice,) = poor_output_notices({"sqnr_db": -16.0, "per_layer": rows(a=40.0, b=2.5, c=None)})
    assert notice.startswith("the int8 output keeps -16.0 dB of float's, less than 10 dB")
    assert "by themselves: b 2.5 dB; try layers: {b: float}; try algorithms: accurate" in notice
    (notice,) = poor_output_notices({"sqnr_db": 5.0, "per_layer": rows(a=40.0, b=35.0)})
    assert "no layer loses much by itself (the largest errors: b 35.0 dB, a 40.0 dB): they add up" in notice
    (notice,) = poor_output_notices({"sqnr_db": 9.9})
    assert "task=sensitivity" in notice


@pytest.mark.parametrize("accuracy", [None, {}, {"sqnr_db": None}, {"sqnr_db": math.nan}, {"sqnr_db": 10.0}])
def test_what_is_good_or_not_measured_is_not_told(accuracy: dict[str, Any] | None) -> None:
    assert poor_output_notices(accuracy) == ()


def model(spread: float) -> Any:
    """A net whose first channels are so large that int8 leaves nothing of the others, which alone matter after it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight[0] *= spread
        net[1].weight[:, 0] = 0
    return qf.quantize(net, [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))])


def test_quantize_is_not_silent() -> None:
    found = model(1e4)
    assert found.results["accuracy"]["sqnr_db"] < 10
    (notice,) = [each for each in found.results["notices"] if "the int8 output keeps" in each]
    assert "layers: {" in notice
    assert not [each for each in model(1.0).results["notices"] if "the int8 output keeps" in each]
