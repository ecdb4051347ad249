"""Int8 coverage counts every layer that multiplies by weights or looks them up, and names those that stay float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf


class Own(nn.Module):
    """A linear that runs in int8, and one other layer."""

    def __init__(self, forward: Callable[..., Any], part: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.first, self.part, self.f = nn.Linear(8, 8), part, forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.f(self, x)


#: name → (forward, the other layer, its op, what the plan names it by); all take (4, 6, 8).
FLOAT: dict[str, tuple[Callable[..., Any], Callable[[], Any], str]] = {
    "lstm": (lambda s, x: s.part(s.first(x))[0], lambda: nn.LSTM(8, 8, batch_first=True, proj_size=4), "lstm"),
    "embedding": (
        lambda s, x: s.first(x) + s.part((x[..., 0] > 0).long()), lambda: nn.Embedding(2, 8), "embedding",
    ),
    "table read by rows": (
        lambda s, x: s.first(x) + s.part.index_select(0, (x[0, :, 0] > 0).long()),
        lambda: nn.Parameter(torch.randn(2, 8)), "index_select",
    ),
    "matmul with a parameter": (lambda s, x: s.part @ s.first(x), lambda: nn.Parameter(torch.randn(3, 6)), "matmul"),
    "convolution with a computed weight": (
        lambda s, x: F.conv1d(s.first(x), s.part.tanh() * x.mean()), lambda: nn.Parameter(torch.randn(5, 6, 3)),
        "conv1d",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("mode", ["export", "torchscript"])
@pytest.mark.parametrize("case", FLOAT)
def test_a_float_layer_with_weights_is_counted_and_named(case: str, mode: str) -> None:
    torch.manual_seed(0)
    forward, part, op = FLOAT[case]
    proof = qf.quantize(Own(forward, part()).eval(), [torch.randn(4, 6, 8)], device="cpu", mode=mode).results[
        "int8_proof"
    ]
    assert (proof["int8_layers"], proof["core_layers"], proof["coverage"]) == (1, 2, 0.5)
    (left,) = proof["float_layers"]
    assert left["op"] == op
    assert left["reason"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_of_a_recurrent_layer_count_beside_its_input_product(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Own(lambda s, x: s.part(s.first(x))[0], kind(8, 8, batch_first=True)).eval()
    proof = qf.quantize(model, [torch.randn(4, 6, 8)], device="cpu").results["int8_proof"]
    assert (proof["int8_layers"], proof["core_layers"]) == (2, 3)
    assert [left["name"] for left in proof["float_layers"]] == ["part.hh_l0"]


@pytest.mark.parametrize("mode", ["export", "torchscript"])
def test_an_einsum_with_a_parameter_counts(mode: str) -> None:
    torch.manual_seed(0)
    model = Own(lambda s, x: torch.einsum("bld,hde->bhle", s.first(x), s.part), nn.Parameter(torch.randn(2, 8, 4)))
    proof = qf.quantize(model.eval(), [torch.randn(4, 6, 8)], device="cpu", mode=mode).results["int8_proof"]
    assert proof["core_layers"] == 2


def test_weights_per_element_do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 8)).eval()
    proof = qf.quantize(model, [torch.randn(16, 8)], device="cpu").results["int8_proof"]
    assert (proof["core_layers"], proof["coverage"], proof["float_layers"]) == (2, 1.0, [])


def test_a_table_in_int8_counts_as_int8() -> None:
    torch.manual_seed(0)
    model = Own(lambda s, x: s.first(s.part(x)), nn.Embedding(50, 8)).eval()
    ids = torch.randint(0, 50, (16, 6))
    plain = qf.quantize(model, [ids], device="cpu").results["int8_proof"]
    assert (plain["int8_layers"], plain["core_layers"]) == (1, 2)
    model = qf.quantize(model, [ids], device="cpu", policy={"embedding": "int8"})
    proof = model.results["int8_proof"]
    assert (proof["int8_layers"], proof["int8_layers_run"], proof["core_layers"], proof["coverage"]) == (2, 2, 2, 1.0)
    (row,) = (row for row in model.record.plan["rows"] if row["op"] == "embedding" and row["precision"] == "int8")
    assert row["reason"] == "its table is int8, one scale per row"


@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_same_of_a_trace_is_numbers(kernel: int) -> None:
    """An even kernel pads by one more at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, kernel, padding="same"), nn.Conv2d(8, 8, 3)).eval()
    image = torch.randn(4, 3, 16, 16)
    int8 = qf.quantize(model, [image], device="cpu", mode="torchscript")
    assert int8.results["int8_proof"]["int8_layers_run"] == 2
    assert int8.results["accuracy"]["sqnr_db"] > 30


@pytest.mark.parametrize("settings", [{}, {"runtime": "torch"}, {"mode": "torchscript"}])
def test_an_int8_matmul_with_a_constant_stays_float_for_that_reason(settings: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = Own(lambda s, x: torch.eye(6) @ s.first(x), nn.Identity()).eval()
    int8 = qf.quantize(model, [torch.randn(4, 6, 8)], device="cpu", policy={"matmul": "int8"}, **settings)
    (row,) = (row for row in int8.record.plan["rows"] if row["op"] == "matmul")
    assert row["reason"] == "matmul with a constant tensor has no int8 form"
    assert int8.results["accuracy"]["sqnr_db"] > 30


def test_the_report_names_what_stays_float(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Own(lambda s, x: s.first(s.part(x)), nn.Embedding(50, 8)).eval()
    qf.quantize(model, [torch.randint(0, 50, (16, 6))], device="cpu").save(tmp_path / "a")
    text = (tmp_path / "a" / "report.md").read_text()
    assert "of 2 layers with weights" in text
    assert "part (embedding)" in text
