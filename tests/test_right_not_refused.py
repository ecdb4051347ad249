"""Models whose outputs or inputs are unusual, and that int8 computes correctly all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import Own
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.errors import DataError, NothingQuantizedError

Forward = Callable[..., Any]


def quantized(model: nn.Module, batch: Any, **settings: Any) -> qf.QuantizedModel:
    return qf.quantize(model.eval(), [batch], device="cpu", **settings)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(16, 8)


@pytest.mark.parametrize("settings", [{}, {"mode": "torchscript"}, {"mode": "imperative"}, {"algorithms": "best"}])
@pytest.mark.parametrize("head", [lambda y: y.argmax(1), lambda y: y > 0], ids=["classes", "flags"])
def test_classes_and_flags_are_judged_by_how_many_agree(
    head: Forward, settings: dict[str, Any], x: torch.Tensor, tmp_path: Path
) -> None:
    model = Own(lambda s, x: head(s.b(s.a(x).relu())))
    int8 = quantized(model, x, gates={"min_agreement": 0.9}, **settings)
    accuracy = int8.results["accuracy"]
    assert (accuracy["sqnr_db"], accuracy["max_error"], int8.results["verdict"]) == (None, None, "passed")
    assert accuracy["agreement"] == float((int8(x) == model(x)).float().mean())
    int8.save(tmp_path / "a")
    assert "same classes or flags" in (tmp_path / "a" / "report.md").read_text()


def test_a_gate_on_the_signal_of_classes_says_what_to_gate(x: torch.Tensor) -> None:
    int8 = quantized(Own(lambda s, x: s.b(s.a(x)).argmax(1)), x, gates={"min_sqnr_db": 20})
    (gate,) = int8.results["gates"]
    assert "classes or flags, which have no signal and noise; gate min_agreement" in gate["text"]


def test_sensitivity_ranks_layers_by_the_classes_they_change(x: torch.Tensor) -> None:
    ranked = qf.sensitivity(Own(lambda s, x: s.b(s.a(x).relu()).argmax(1)).eval(), [x], device="cpu")
    assert {row["layer"] for row in ranked["layers"]} == {"a", "b"}


def zeroed(bias: float) -> nn.Linear:
    head = nn.Linear(8, 3)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, bias)
    return head


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_a_head_that_starts_at_zero(bias: float, x: torch.Tensor) -> None:
    int8 = quantized(Own(lambda s, x: s.head(s.b(s.a(x)).relu()), head=zeroed(bias)), x)
    assert int8.results["int8_proof"]["output_differs"] is False
    assert int8.results["int8_proof"]["int8_layers_run"] == 3


def test_a_model_of_zeros_alone(x: torch.Tensor) -> None:
    assert quantized(zeroed(0.0), x).results["int8_proof"]["coverage"] == 1.0


def test_layers_that_compute_what_float_does_are_no_proof() -> None:
    """Weights and input are codes themselves, so that nothing tells int8 from float."""
    torch.manual_seed(0)
    x = torch.randint(-127, 128, (16, 8)).float()
    x[0, 0] = 127.0
    layer = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-126, 127, (4, 8)))
        layer.weight[:, 0] = 127.0
    with pytest.raises(NothingQuantizedError, match="and every int8 layer's own, equals the float model's"):
        quantized(layer, x)


@pytest.mark.parametrize("settings", [{}, {"mode": "torchscript"}, {"runtime": "torch"}, {"algorithms": "best"}])
def test_a_mask_of_minus_infinity_comes_in(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    z, mask = torch.randn(4, 6, 8), nn.Transformer.generate_square_subsequent_mask(6)
    model = Own(lambda s, x, m: F.scaled_dot_product_attention(s.a(x), s.b(x), x, attn_mask=m))
    assert quantized(model, (z, mask), **settings).results["accuracy"]["sqnr_db"] > 30


def test_masked_scores_come_out() -> None:
    torch.manual_seed(0)
    z, mask = torch.randn(4, 6, 8), nn.Transformer.generate_square_subsequent_mask(6)
    int8 = quantized(Own(lambda s, x, m: s.a(x) @ s.b(x).transpose(1, 2) + m), (z, mask))
    assert int8.results["accuracy"]["sqnr_db"] > 30
    assert int8.results["accuracy"]["nonfinite"] == {"float": 60, "int8": 60}


def test_infinity_in_an_input_that_becomes_codes_is_refused(x: torch.Tensor) -> None:
    x[3, 0] = float("inf")
    with pytest.raises(DataError, match=r"input 0 holds Inf in batch 0 \(sample 3\)"):
        quantized(Own(lambda s, x: s.b(s.a(x))), x)


def test_a_mask_with_nan_is_refused() -> None:
    z, mask = torch.randn(4, 6, 8), torch.zeros(6, 6)
    mask[0, 0] = float("nan")
    with pytest.raises(DataError, match="input 1 holds NaN"):
        quantized(Own(lambda s, x, m: F.scaled_dot_product_attention(s.a(x), s.b(x), x, attn_mask=m)), (z, mask))
