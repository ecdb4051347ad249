"""A failed capture says so once, in its error, and sends nobody to a mode that fails alike."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import CaptureError, DataError


class Branch(nn.Module):
    """What torch.export can't capture and a trace can; with `draws` the trace differs from the model."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.fc, self.draws = nn.Linear(8, 8), draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 100:
            x = x * 2
        y = self.fc(x)
        return y + torch.rand_like(y) if self.draws else y


def test_export_keeps_its_chatter_to_itself(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(CaptureError, match=r"try mode=torchscript .* or mode=imper"):
        qf.quantize(Branch(), [torch.randn(4, 8)])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_the_modes_that_are_named_take_the_model() -> None:
    with pytest.raises(CaptureError) as found:
        qf.quantize(Branch(draws=True), [torch.randn(4, 8)])
    assert "try mode=" not in str(found.value).partition("fails as well")[0]
    assert "a trace, which mode=torchscript and mode=imperative take, fails as well" in str(found.value)
    assert "parts=[" in str(found.value)
    assert qf.quantize(Branch(), [torch.randn(4, 8)], mode="torchscript").results["int8_proof"]["coverage"] == 1.0


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_coverage_is_never_above_its_total(mode: str) -> None:
    """A layer that is called five times is five; one that computes the same twice is one, as the graph has it."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = self.a(x).relu()
            return self.b(x) + self.b(x)

    proof = qf.quantize(Repeated(), [torch.randn(4, 8)], mode=mode).results["int8_proof"]
    assert proof["int8_layers_run"] == proof["int8_layers"] == proof["core_layers"]


def test_a_flag_in_a_batch_is_no_label_and_another_length_names_calibration() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(9, 8), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor, return_dict: bool = True) -> dict[str, torch.Tensor] | torch.Tensor:
            y = self.fc(self.table(ids)).mean(1)
            return {"logits": y} if return_dict else y

    ids = torch.arange(8).reshape(2, 4)
    model = qf.quantize(Tokens(), [{"ids": ids, "return_dict": False}])
    assert isinstance(model(ids=ids, return_dict=False), torch.Tensor)
    with pytest.raises(DataError, match=r"calibrate on batches whose sizes differ there .*, or name it in `dyn"):
        model(ids=ids[:, :3], return_dict=False)
