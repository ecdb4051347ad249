"""What the plan says of the torch runtime, on CPUs with and without VNNI."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.executor.run import Run
from quantflow.executor.source import Source
from quantflow.executor.steps import graph_of, plan_for
from quantflow.ir.batch import Batch
from quantflow.ir.plan import Plan
from quantflow.report import Progress, make_console
from quantflow.runtimes import choose_runtime, kernels
from quantflow.schema import Recipe
from quantflow.sources.data import Data
from quantflow.sources.models import LoadedModel

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = nn.functional.silu(self.point(torch.relu(self.conv(x) + x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def planned(module: nn.Module, runtime: str = "torch", **settings: Any) -> Plan:
    given = {"model": {"kind": "given", "name": "residual"}, "data": {"kind": "given"}}
    recipe = Recipe.from_dict({"name": "residual", **given, **settings}, "residual")
    example = Batch((X,))
    source = Source(LoadedModel(module, "residual"), Data([example], [example], {}))
    run = Run(recipe, source, choose_runtime(runtime), Progress(make_console(), quiet=True))
    return plan_for(run, graph_of(run, example), example)


def about_the_cpu(notices: Any) -> list[str]:
    return [notice for notice in notices if "not accelerated on this CPU" in notice]


def test_int8_kernels_are_named_where_they_are_exact(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_INT8_KERNELS", True)
    plan = planned(module)
    assert {row.name: row.kernel for row in plan.rows if row.op in ("conv2d", "linear")} == {
        "stem": "onednn.qconv2d_pointwise + relu",
        "conv": "onednn.qconv2d_pointwise + sum + relu",
        "point": "onednn.qlinear_pointwise + silu",
        "fc": "onednn.qlinear_pointwise",
    }
    assert not about_the_cpu(plan.notes)


def test_float_kernels_are_named_where_int8_is_not_exact(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_INT8_KERNELS", False)
    plan = planned(module)
    exact = "over int8 codes (exact; this CPU has no VNNI)"
    assert {row.name: row.kernel for row in plan.rows if row.op in ("conv2d", "linear")} == {
        "stem": f"float convolution {exact}, then float relu",
        "conv": f"float convolution {exact}, then float sum, then float relu",
        "point": f"float GEMM {exact}, then float silu",
        "fc": f"float GEMM {exact}",
    }
    (note,) = about_the_cpu(plan.notes)
    assert "runtime=native is exact and fast here" in note
    assert not about_the_cpu(planned(module, "reference").notes)


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_the_result_says_once_that_it_is_not_accelerated(
    mode: str, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "HAS_INT8_KERNELS", False)
    model = qf.quantize(module, [X], mode=mode, runtime="torch")
    assert len(about_the_cpu(model.results["notices"])) == 1
    assert model.results["warmup"]["one_code_differences"] == 0


@pytest.mark.parametrize("has_int8_kernels", [True, False])
@pytest.mark.parametrize("runtime", ["torch", "reference"])
@pytest.mark.parametrize(("asked", "reduced"), [("auto", False), (False, False), (True, True)])
def test_codes_keep_their_bits_unless_asked(
    asked: Any, reduced: bool, runtime: str, has_int8_kernels: bool, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "HAS_INT8_KERNELS", has_int8_kernels)
    plan = planned(module, runtime, qconfig={"reduce_range": asked})
    assert plan.reduce_range is reduced
    assert not [note for note in plan.notes if "reduce_range" in note]
