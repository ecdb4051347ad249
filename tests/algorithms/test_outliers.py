"""A tiny language model with massive channels and tokens planted: found, named, smoothed or left float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantflow as qf
from quantflow.algorithms import Material, Outliers, find_outliers
from quantflow.algorithms.outliers import Outlier
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph
from quantflow.ir.plan import Plan
from quantflow.schema import OutlierSettings, QConfig
from quantflow.stages.plan import make_plan

WIDTH, VOCABULARY, LOUD = 32, 50, 7
#: Token number 0 stands at the front of every text, as a language model's start does.
START = 0


class TinyLM(nn.Module):
    """Embedding → RMSNorm → SwiGLU with a residual → RMSNorm → head.

    channel: the hidden channel LOUD is that many times larger, in every token.
    token: the gated product of START is that many times larger, in three channels.
    """

    def __init__(self, channel: float = 1.0, token: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.last = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            self.embed.weight[:, LOUD] = channel * (1 + 0.01 * torch.randn(VOCABULARY))
            for norm in (self.first, self.last):
                # What a trained model does about it: the others are brought back to size.
                norm.weight.mul_(channel / WIDTH**0.5 if channel > 1 else 1.0)
                norm.weight[LOUD] = 1.0 if channel == 1 else channel / WIDTH**0.5
            for reader in (self.gate, self.up, self.head):
                reader.weight[:, LOUD] *= 1.0 if channel == 1 else WIDTH**0.5 / channel
            self.down.weight.mul_(0.1)
        self.token = token
        self.register_buffer("boost", torch.cat([torch.full((3,), token), torch.ones(45)]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        x = self.first(h)
        inner = F.silu(self.gate(x)) * self.up(x)
        if self.token > 1:
            inner = inner * torch.where((ids == START)[..., None], self.boost, 1.0)
        return self.head(self.last(h + self.down(inner)))


def texts(count: int = 4) -> list[torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (count, 8, 12), generator=torch.Generator().manual_seed(1))
    ids[:, :, 0] = START
    return list(ids)


def search(model: nn.Module, **settings: Any) -> Outliers:
    batches = [Batch((x,)) for x in texts()]
    graph = capture_export(model.eval(), batches[0])
    return find_outliers(OutlierSettings(**settings), graph, make_plan(graph, QConfig()), Material(batches))


def test_an_ordinary_model_has_none() -> None:
    assert not search(TinyLM()).found
    assert not search(TinyLM()).notices


def test_a_massive_channel_is_named() -> None:
    found = {each.layer: each for each in search(TinyLM(channel=3000)).found}
    assert {"gate", "up"} <= found.keys()
    assert found["gate"].channels == (LOUD,)
    assert found["gate"].channel_ratio > 500
    assert not found["gate"].positions
    assert found["gate"].kept_db < 10
    assert found["gate"].is_float


def test_a_massive_token_is_named() -> None:
    (found,) = search(TinyLM(token=3000)).found
    assert found.layer == "down"
    assert found.positions == (0,)
    assert found.token_ratio > 500
    assert found.is_float


@pytest.mark.parametrize("mode", ["export", "torchscript"])
def test_without_algorithms_the_layers_stay_float_with_the_reason(mode: str) -> None:
    model = qf.quantize(TinyLM(token=3000), texts(), mode=mode)
    (row,) = (row for row in model.results["plan"] if row["name"] == "down")
    assert row["precision"] == "float"
    assert "token 0" in row["reason"]
    assert "dB of a typical token" in row["reason"]
    (notice,) = (n for n in model.results["notices"] if n.startswith("massive outliers"))
    assert notice.startswith("massive outliers: 1 linears stay float (down: its input has ")
    assert model.results["outliers"][0]["layer"] == "down"
    assert model.results["int8_proof"]["int8_layers"] == 3


def test_smoothing_brings_massive_channels_into_int8() -> None:
    plain = qf.quantize(TinyLM(channel=3000), texts()).results
    smooth = qf.quantize(TinyLM(channel=3000), texts(), algorithms=["smooth"]).results
    assert {layer["op"] for layer in plain["int8_proof"]["float_layers"]} == {"embedding", "linear"}
    assert [layer["op"] for layer in smooth["int8_proof"]["float_layers"]] == ["embedding"]
    assert not smooth["outliers"]
    assert smooth["accuracy"]["sqnr_db"] > 25


def test_an_input_in_two_terms_holds_massive_tokens() -> None:
    model = qf.quantize(TinyLM(token=3000), texts(), qconfig={"input_terms": 2}).results
    assert [layer["op"] for layer in model["int8_proof"]["float_layers"]] == ["embedding"]
    forced = qf.quantize(TinyLM(token=3000), texts(), layers={"down": "int8"}).results
    assert model["accuracy"]["sqnr_db"] > forced["accuracy"]["sqnr_db"] + 6


def test_falling_back_beats_int8_at_any_price() -> None:
    kept = {
        asked: qf.quantize(TinyLM(token=3000), texts(), layers=layers).results["accuracy"]["sqnr_db"]
        for asked, layers in (("decided", None), ("int8", {"down": "int8"}))
    }
    assert kept["decided"] > kept["int8"] + 3


def test_each_setting_changes_the_result() -> None:
    model = TinyLM(token=3000)
    assert not search(model, ratio=1e6).found
    assert not search(model, samples=0).found
    for settings in ({"fall_back": False}, {"min_sqnr_db": -100}):
        (found,) = search(model, **settings).found
        assert not found.is_float
    assert "run in int8 all the same" in search(model, fall_back=False).notices[0]
    late = [Batch((x.clone(),)) for x in texts(2)]
    late[0].args[0][:, 0] = 1  # the massive token is in the second batch only
    graph = capture_export(model.eval(), late[0])
    few, more = (
        find_outliers(OutlierSettings(samples=samples), graph, make_plan(graph, QConfig()), Material(late)).found
        for samples in (8, 16)
    )
    assert len(few) < len(more)


def test_images_have_no_tokens() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    x = torch.ones(4, 3, 2, 2)
    x[:, 0] = 1e6
    graph = capture_export(model, Batch((x,)))
    assert not find_outliers(OutlierSettings(), graph, make_plan(graph, QConfig()), Material([Batch((x,))])).found


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_left_out(bad: float) -> None:
    model, good = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), torch.ones(2, 3, 8)
    good[:, :, 2] = 1e4
    broken = good.clone()
    broken[1, 2, 5] = bad
    graph = capture_export(model, Batch((good,)))
    plan = make_plan(graph, QConfig())
    batches = [Batch((good,)), Batch((broken,))]
    found = find_outliers(OutlierSettings(), graph, plan, Material(batches)).found
    assert [each.channels for each in found] == [each.channels for each in only(graph, plan, good)]
    assert found[0].channels == (2,)
    assert not only(graph, plan, broken)


def only(graph: Graph, plan: Plan, x: torch.Tensor) -> tuple[Outlier, ...]:
    """What is found on one batch."""
    return find_outliers(OutlierSettings(), graph, plan, Material([Batch((x,))])).found
