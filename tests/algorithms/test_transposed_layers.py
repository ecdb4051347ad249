"""Every algorithm on a net with transposed convolutions: the result is legal, and float keeps its function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantflow as qf
from quantflow.algorithms import GRAPH_ALGORITHMS, NUMBER_ALGORITHMS
from quantflow.capture import capture
from quantflow.ir.batch import Batch
from quantflow.numerics.measures import sqnr_db
from quantflow.schema import ModeSettings
from quantflow.stages.imperative import fixed_constants

EVERY = [{"name": name, "guard": False} for name in (*GRAPH_ALGORITHMS, *NUMBER_ALGORITHMS)]


class Decoder(nn.Module):
    """Channels of very different sizes, in front of, between and behind transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)
        self.more, self.head = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=4), nn.Conv2d(8, 4, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.mul_(torch.randn(8).exp().reshape(-1, 1, 1, 1))
            self.more.weight.mul_(torch.randn(8).exp().reshape(-1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.up(F.relu(self.b(F.relu(self.a(x)))))))
        return self.head(F.relu(self.more(x)))


def decoder() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(3)
    return Decoder().eval(), [torch.randn(4, 3, 7, 6) for _ in range(3)]


def quantized(mode: str, algorithms: Any) -> tuple[Any, float]:
    module, batches = decoder()
    runtime = "torch" if mode == "torchscript" else "reference"
    model = qf.quantize(module, batches, mode=mode, runtime=runtime, device="cpu", algorithms=algorithms)
    with torch.no_grad():
        return model, sqnr_db(module(batches[0]), model(batches[0]))


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_all_together(mode: str) -> None:
    plain, better = quantized(mode, "none"), quantized(mode, EVERY)
    assert better[0].results["int8_proof"]["int8_layers_run"] == 5
    assert better[1] > plain[1]


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda settings: settings["name"])
def test_each_alone_is_legal(algorithm: dict[str, Any]) -> None:
    model, db = quantized("export", [algorithm])
    assert db > 20
    assert model.results["int8_proof"]["int8_layers_run"] == 5


def test_channels_are_not_rescaled_across_phases() -> None:
    """A channel stands in several phases, each with numbers of its own; what ends behind them stays as it is."""
    model, _ = quantized("export", [{"name": "equalize", "guard": False}])
    (section,) = model.results["algorithms"]
    skipped = {row["layer"]: row["reason"] for row in section["skipped"]}
    assert skipped["up"] == "up.phases.0 does not keep channels apart"
    assert {row["layer"] for row in section["layers"]} & {"a", "b"}, "what ends in front of them is rescaled"


def test_an_imperative_module_is_not_given_phases() -> None:
    """A module holds its kernel as it is written; no algorithm may put another in its place."""
    module, batches = decoder()
    graph = capture(module, Batch((batches[0],)), ModeSettings.model_validate({"kind": "imperative"}))
    phases = {name for name in graph.constants if ".phases_" in name}
    assert len(phases) == 4
    assert phases <= fixed_constants(module, graph)
