"""Numbers that an op brings itself, outside the range of what it reads: a pad's fill, a clamp's bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf

WAYS = [{}, {"runtime": "torch"}, {"runtime": "reference"}, {"mode": "torchscript"}, {"qconfig": "affine_uint8"}]


class Between(nn.Module):
    """Two linears with an op on codes between them."""

    def __init__(self, op: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.op = nn.Linear(8, 8), nn.Linear(8, 8), op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.op(self.a(x)))


OPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fill above": lambda y: F.pad(y, (0, 0, 1, 1), value=5.0),
    "fill below, of what is never negative": lambda y: F.pad(y.relu(), (0, 0, 1, 0), value=-4.0),
    "fill of a rectified value": lambda y: F.pad(y.relu(), (0, 0, 1, 0), value=4.0),
    "clamp above zero": lambda y: y.transpose(1, 2).clamp(2.0, 6.0).transpose(1, 2),
    "clamp below zero": lambda y: y.transpose(1, 2).clamp(-6.0, -2.0).transpose(1, 2),
    "clamp that gives one value": lambda y: y.transpose(1, 2).clamp_min(9.0).transpose(1, 2),
}


@pytest.mark.parametrize("settings", WAYS, ids=lambda way: "-".join(way.values()) or "native")
@pytest.mark.parametrize("case", OPS)
def test_the_op_runs_on_codes_that_hold_its_numbers(case: str, settings: dict[str, str]) -> None:
    torch.manual_seed(0)
    z, model = torch.randn(4, 6, 8), Between(OPS[case]).eval()
    int8 = qf.quantize(model, [z], device="cpu", **settings)
    assert any(node.op in ("shape", "clamp") for node in int8.compiled.program.nodes)
    assert int8.results["accuracy"]["sqnr_db"] > 30


def test_what_makes_no_numbers_is_not_observed() -> None:
    torch.manual_seed(0)
    op = lambda y: F.pad(y.clamp(-1.0, 1.0), (0, 0, 1, 1)).transpose(1, 2).transpose(1, 2)  # noqa: E731
    int8 = qf.quantize(Between(op).eval(), [torch.randn(4, 6, 8)], device="cpu", runtime="reference")
    assert not [name for name in int8.record.table.observers if "pad" in name or "transpose" in name]


@pytest.mark.parametrize("fill", [float("-inf"), float("inf")])
def test_a_fill_without_a_code_stays_float(fill: float) -> None:
    torch.manual_seed(0)
    model = Between(lambda y: F.pad(y, (0, 0, 1, 1), value=fill).amax(1, keepdim=True).clamp(-9, 9)).eval()
    int8 = qf.quantize(model, [torch.randn(4, 6, 8)], device="cpu")
    (row,) = (row for row in int8.record.plan["rows"] if "pad" in row["op"])
    assert row["reason"] == f"pad with {fill}, which no code stands for, has no int8 form"
