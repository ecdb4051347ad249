"""A join that would lose a small operand stays float, where somebody gains from that; others stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf


class Joins(nn.Module):
    """A large and a small branch meet; `read`: what happens to the small one, or to the sum, after it."""

    def __init__(self, op: str, read: str, scale: float = 1e-3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op, self.read = op, read
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.last, self.small = nn.Conv2d(8 if op == "cat" else 4, 4, 1), nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.b.weight.mul_(scale)
            self.b.bias.mul_(scale)  # type: ignore[union-attr]
            self.small.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = self.a(x), self.b(x)
        joined = torch.cat([a, b], 1) if self.op == "cat" else a + b
        last = self.last(joined)
        match self.read:
            case "itself":
                return last, self.small(b)
            case "part":
                return last, self.small(joined[:, 4:])
            case "float":
                return last, joined.sigmoid()
            case _:
                return (last,)


def quantized(module: nn.Module, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return qf.quantize(module, [torch.randn(4, 3, 8, 8, generator=generator)], **options)


def row(model: Any, name: str) -> dict[str, Any]:
    return next(row for row in model.results["plan"] if row["name"] == name)


@pytest.mark.parametrize(("op", "read"), [("cat", "itself"), ("cat", "part"), ("cat", "float"), ("add", "float")])
def test_a_join_that_would_lose_an_operand_stays_float(op: str, read: str) -> None:
    model = quantized(Joins(op, read))
    assert row(model, op)["precision"] == "float"
    assert "dB of its operand b, which is small beside the others" in row(model, op)["reason"]
    assert any(f"layers: {{{op}: int8}} overrules that" in notice for notice in model.results["notices"])


def test_the_small_operand_arrives() -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = Joins("cat", "itself").eval()
    with torch.no_grad():
        wanted = module(x)[1]
        found = {
            name: (wanted - quantized(module, layers=layers)(x)[1]).square().sum()
            for name, layers in (("mended", {}), ("as asked", {"cat": "int8"}))
        }
    assert 10 * (wanted.square().sum() / found["mended"]).log10() > 30
    assert 10 * (wanted.square().sum() / found["as asked"]).log10() < 10


@pytest.mark.parametrize(
    ("op", "read", "scale"),
    [("cat", "whole", 1e-3), ("add", "whole", 1e-3), ("cat", "itself", 1.0), ("add", "float", 1.0)],
)
def test_where_nobody_gains_it_stays_int8(op: str, read: str, scale: float) -> None:
    model = quantized(Joins(op, read, scale))
    assert row(model, op)["precision"] == "int8" if op == "cat" else "float" not in row(model, "b")["precision"]
    assert not any("overrules" in notice for notice in model.results["notices"])


def test_a_search_leaves_it_float_too() -> None:
    """So that the recipe it finds makes the same model."""
    module, tune = Joins("cat", "itself"), {"subject_to": {"min_sqnr_db": 1.0}, "algorithms": [], "time_budget_s": 5}
    assert row(quantized(module, tune=tune), "cat")["precision"] == "float"
