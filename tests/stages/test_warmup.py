"""What is said of a model that differs from the reference, and that single steps are blamed only where they do it."""

from __future__ import annotations

import torch
from torch import nn

import quantflow as qf
from quantflow.ir.batch import Batch
from quantflow.runtimes.specification import Specification
from quantflow.stages import warmup


def why(bound_db: float) -> str:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    model = qf.quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), [x], runtime="reference")
    compiled = model.compiled
    return warmup._why(compiled, Batch((x,)), Specification(compiled.program)([x]), bound_db, 12)


def test_single_steps_are_blamed_only_where_they_do_it() -> None:
    assert why(300.0).startswith(": this model amplifies single rounding steps (one step in every 97th code of ")
    text = why(10.0)
    assert "amplifies" not in text
    assert text.startswith(": 12 codes differ over all layers, and add up (one step in every 97th code of ")
    assert "runtime=reference" in text
