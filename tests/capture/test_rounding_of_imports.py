"""The check of an imported graph: what the model's own rounding explains passes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quantflow.capture.torchscript import script
from quantflow.ir.batch import Batch
from quantflow.ir.graph import laid_out


class Cancels(nn.Module):
    """Small differences of large numbers: its float result depends on the order of its sums."""

    def __init__(self, head: str = "reals") -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(16, 8, 3), head

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x * 0.01 + 100)
        y = y - y.mean((2, 3), keepdim=True)
        return y if self.head == "reals" else y > 0


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 16, 12, 12)


@torch.no_grad()
def agree(found: Any, model: nn.Module, x: torch.Tensor) -> bool:
    return script._agree(found, model(x), model, Batch((x,)))


def test_a_model_that_amplifies_rounding_is_captured(x: torch.Tensor) -> None:
    model = Cancels().eval()
    with torch.no_grad():
        wanted, found = model(x), model(laid_out(x))
    assert not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), "too well behaved"
    assert script.capture_torchscript(model, Batch((x,))).batch_is_dynamic


@pytest.mark.parametrize("head", ["reals", "flags"])
def test_another_order_of_sums_agrees(head: str, x: torch.Tensor) -> None:
    model = Cancels(head).eval()
    with torch.no_grad():
        assert agree(model(laid_out(x)), model, x)


def test_flags_far_from_their_threshold_must_be_equal(x: torch.Tensor) -> None:
    model = Cancels("flags").eval()
    with torch.no_grad():
        wrong = model(x)
        wrong[0, 0, 0, 0] = ~wrong[0, 0, 0, 0]
    assert not agree(wrong, model, x)


@pytest.mark.parametrize("scale", [1.03, 0.9])
def test_a_result_that_is_wrong_by_more_than_rounding_is_refused(scale: float, x: torch.Tensor) -> None:
    model = Cancels().eval()
    with torch.no_grad():
        assert not agree(model(x) * scale, model, x)


def test_a_model_that_draws_random_numbers_is_refused_though_they_are_small(x: torch.Tensor) -> None:
    class Noisy(Cancels):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return y + 1e-3 * torch.randn_like(y)

    model = Noisy().eval()
    with torch.no_grad():
        assert not agree(model(x), model, x)
