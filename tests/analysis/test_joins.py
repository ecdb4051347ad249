"""Int8 additions, products and concatenations: policy decides, and the cost of each is shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantflow as qf
from quantflow.analysis.joins import Join, join_notices
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.schema import LayerOverride, QConfig
from quantflow.stages.plan import NO_POLICY, make_plan


class Joined(nn.Module):
    """Two branches that meet in an add, a mul or a cat, and a convolution that reads the result."""

    def __init__(self, op: str, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(8 if op == "cat" else 4, 4, 1)
        with torch.no_grad():
            self.b.weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        joined = {"add": lambda: a + b, "mul": lambda: a * b, "cat": lambda: torch.cat([a, b], 1)}[self.op]()
        return self.last(joined)


def batches() -> list[torch.Tensor]:
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("op", ["add", "mul", "cat"])
def test_each_int8_join_shows_its_cost(op: str) -> None:
    (join,) = qf.quantize(Joined(op), batches()).results["joins"]
    assert (join["layer"], join["op"], join["fused"]) == (op, op, False)
    assert join["saved_conversions"] == 3
    assert 25 < join["sqnr_db"] < 60


def test_a_fused_residual_is_one_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Residual(), nn.Conv2d(3, 4, 1))
    (join,) = qf.quantize(model, batches()).results["joins"]
    assert join["op"] == "add"
    assert join["fused"] is True
    assert 25 < join["sqnr_db"] < 60


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.conv(F.relu(x)))


def plan_rows(op: str, policy: dict[str, str], layers: Any = None) -> dict[str, tuple[str, str]]:
    graph = capture_export(Joined(op).eval(), Batch((batches()[0],)))
    plan = make_plan(graph, QConfig(), layers, policy=NO_POLICY.model_copy(update=policy))
    return {row.name: (row.precision, row.reason) for row in plan.rows}


@pytest.mark.parametrize("op", ["add", "mul", "cat"])
def test_policy_leaves_them_float_and_layers_has_precedence(op: str) -> None:
    assert plan_rows(op, {})[op][0] == "int8"
    assert plan_rows(op, {op: "float"})[op] == ("float", f"the recipe says so: policy.{op}")
    assert plan_rows(op, {op: "float"}, {op: "int8"})[op][0] == "int8"
    assert plan_rows(op, {}, {op: "float"})[op] == ("float", f"the recipe says so: layers.{op}")
    assert plan_rows(op, {op: "float"}, {op: LayerOverride()})[op][0] == "int8"


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) @ self.k(x).transpose(1, 2)


def test_attention_matmuls_are_policy() -> None:
    graph = capture_export(Products().eval(), Batch((torch.randn(2, 4, 8),)))
    found = {
        choice: {row.name: row for row in make_plan(graph, QConfig(), policy=policy).rows}["matmul"]
        for choice, policy in (("default", NO_POLICY), ("int8", NO_POLICY.model_copy(update={"matmul": "int8"})))
    }
    assert found["default"].precision == "float"
    assert "unless asked for (policy.matmul" in found["default"].reason
    assert found["int8"].precision == "int8"


def test_a_costly_join_is_named() -> None:
    cheap, costly = Join("a", "cat", False, 40.0, 3), Join("b", "cat", False, 9.4, 3)
    assert join_notices([cheap]) == ()
    (notice,) = join_notices([cheap, costly])
    assert "b 9.4 dB" in notice
    assert "policy: {cat: float}" in notice
