"""unsigned: what is never negative holds 256 codes, in every mode and runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.algorithms.activation_scale import activation_scale
from quantflow.algorithms.unsigned import unsigned
from quantflow.ir.batch import Batch
from quantflow.ir.plan import nonnegative_values
from quantflow.runtimes import RUNTIMES
from quantflow.schema import ActivationScaleAlgorithm, LayerOverride, UnsignedAlgorithm

Prepare = Callable[..., Any]
SETTINGS = UnsignedAlgorithm()


class Sums(nn.Module):
    """Unsigned on signed and signed on unsigned, through fused residuals and an addition of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive = torch.relu(self.a(x))
        signed = self.b(positive) + positive
        positive = torch.relu(self.c(signed) + signed)
        return self.head(torch.relu(positive + self.d(positive) * 2 + signed).mean((2, 3)))


def sums() -> nn.Module:
    torch.manual_seed(0)
    return Sums().eval()


def changed(start: Any) -> tuple[Any, Any]:
    return unsigned(SETTINGS, start.prepared, start.refined, start.material)


def test_outputs_of_relus_alone_get_finer_codes(ready: Prepare, images: list[Batch]) -> None:
    start = ready(sums(), images)
    refined, outcome = changed(start)
    assert len(outcome.changes) >= 3
    for root, before in start.refined.qparams.items():
        after = refined.qparams[root]
        if root in nonnegative_values(start.plan):
            assert (after.dtype, after.zero_point) == ("uint8", 0)
            assert after.scale == pytest.approx(before.scale * 127 / 255)
        else:
            assert after == before
    assert any(q.dtype == "int8" for q in refined.qparams.values()), "the image and what projections write are signed"
    assert all(c.after == pytest.approx(c.before * 127 / 255) for c in outcome.changes)
    assert start.db(refined) > start.db(start.refined) + 0.5


def test_what_shares_its_codes_with_a_signed_value_stays(ready: Prepare, images: list[Batch]) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([torch.relu(self.a(x)), self.b(x)], 1))

    torch.manual_seed(0)
    start = ready(Joined().eval(), images)
    refined, outcome = changed(start)
    assert not outcome.changes
    assert refined is start.refined


@pytest.mark.parametrize("qconfig", ["affine_uint8", "sym_uint8", "affine_int8"])
def test_other_codes_are_left_alone(ready: Prepare, depthwise: nn.Module, images: list[Batch], qconfig: str) -> None:
    start = ready(depthwise, images, qconfig)
    assert changed(start)[0] is start.refined


def test_layers_can_keep_out(ready: Prepare, depthwise: nn.Module, images: list[Batch]) -> None:
    start = ready(depthwise, images, layers={"stem": LayerOverride(without=("unsigned",))})
    refined, outcome = changed(start)
    assert [reason for _, reason in outcome.skipped] == ["the recipe says so"]
    stem = next(p.unit.output.name for p in start.plan.units if p.unit.name == "stem")
    assert refined.qparams[stem].dtype == "int8"
    assert any(q.dtype == "uint8" for q in refined.qparams.values())


def test_ranges_are_searched_in_the_codes_that_it_left(
    ready: Prepare, depthwise: nn.Module, images: list[Batch]
) -> None:
    start = ready(depthwise, images)
    refined, _ = changed(start)
    found, _ = activation_scale(ActivationScaleAlgorithm(), start.prepared, refined, start.material)
    assert {root: (q.dtype, q.zero_point) for root, q in found.qparams.items()} == {
        root: (q.dtype, q.zero_point) for root, q in refined.qparams.items()
    }


@pytest.mark.parametrize(
    ("mode", "runtime"),
    [(mode, name) for name, e in RUNTIMES.items() if e.missing("cpu") is None for mode in e.modes],
)
def test_runs_everywhere(images: list[Batch], mode: str, runtime: str) -> None:
    """Sums of signed and unsigned codes included; warm-up compares with the reference, layer by layer."""
    algorithms = {"signed": [], "unsigned": [{"name": "unsigned", "guard": False}]}
    model = sums()
    found = {
        name: qf.quantize(model, [b.args for b in images], algorithms=each, mode=mode, runtime=runtime)
        for name, each in algorithms.items()
    }
    sqnr = {name: model.results["accuracy"]["sqnr_db"] for name, model in found.items()}
    assert sqnr["unsigned"] > sqnr["signed"], sqnr
    (entry,) = found["unsigned"].results["algorithms"]
    assert entry["layers"]
