"""Operators that a model's author registered: known by their full name, in every mode and runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import own_models
import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import ArtifactError
from quantflow.ir.aten_policy import aten_op, require_allowed


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """`qftest::gelu` triples; `qftest::slice` takes a tensor apart into three results of its own kind."""
    library = torch.library.Library("qftest", "DEF")
    library.define("gelu(Tensor x) -> Tensor")
    library.define("slice(Tensor x, int count) -> (Tensor, Tensor)")
    library.define("scale_(Tensor(a!) x) -> Tensor(a!)")
    library.impl("gelu", lambda x: x * 3, "CompositeExplicitAutograd")
    library.impl("slice", lambda x, count: (x * count, x - count), "CompositeExplicitAutograd")
    library.impl("scale_", lambda x: x.mul_(2), "CompositeExplicitAutograd")
    yield
    library._destroy()


class Tripled(nn.Module):
    """Two linears with `qftest::gelu` between them, which a kernel for aten's would fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.ops.qftest.gelu(self.first(x)))


class Parts(Tripled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more, less = torch.ops.qftest.slice(self.first(x), 2)
        return self.second(more + less)


def quantized(make: Callable[[], nn.Module], x: torch.Tensor, **settings: str) -> tuple[nn.Module, qf.QuantizedModel]:
    torch.manual_seed(0)
    model = make().eval()
    return model, qf.quantize(model, [x], device="cpu", **settings)


def sqnr_db(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.pow(2).mean() / (wanted - found).pow(2).mean()))


@pytest.mark.parametrize("make", [Tripled, Parts])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"runtime": "torch"},
        {"runtime": "reference"},
        {"mode": "torchscript"},
        {"mode": "torchscript", "runtime": "torch"},
        {"mode": "imperative"},
    ],
    ids=lambda settings: "-".join(settings.values()) or "default",
)
def test_an_operator_with_a_name_of_atens_is_the_authors(
    make: Callable[[], nn.Module], settings: dict[str, str]
) -> None:
    x = torch.randn(16, 8)
    model, int8 = quantized(make, x, **settings)
    with torch.no_grad():
        assert sqnr_db(model(x), int8(x)) > 25


def test_it_stays_float_under_its_full_name() -> None:
    _, int8 = quantized(Tripled, torch.randn(16, 8))
    row = next(row for row in int8.record.plan["rows"] if "gelu" in row["op"])
    assert (row["op"], row["kernel"], row["precision"]) == ("qftest::gelu", "qftest::gelu", "float")


def test_a_saved_model_calls_only_operators_that_its_reader_names(tmp_path: Path) -> None:
    x = torch.randn(16, 8)
    _, int8 = quantized(Tripled, x)
    int8.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r'qftest::gelu, .*quantflow.load\(directory, operators=\["qftest::gelu"\]'):
        qf.load(tmp_path / "a")
    assert torch.equal(qf.load(tmp_path / "a", operators=["qftest::*"])(x), int8(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_saved_script_runs_natively_with_its_own_operator(tmp_path: Path) -> None:
    x = torch.randn(16, 8)
    _, int8 = quantized(Tripled, x, mode="torchscript")
    int8.save(str(tmp_path / "a.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "a.pt"))(x), int8(x))


def test_an_operator_that_no_module_registered_is_refused_by_name() -> None:
    with pytest.raises(
        ArtifactError, match=r"no operator qfgone::f\.default; import the module that registers qfgone's"
    ):
        aten_op("qfgone::f.default")


def test_an_operator_that_writes_to_its_arguments_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"qftest::scale_\.default writes to its arguments"):
        aten_op("qftest::scale_.default")


@pytest.mark.parametrize("target", ["torchvision::nms.default", "softmax.int"])
def test_known_operators_need_no_permission(target: str) -> None:
    require_allowed(target, ())


@pytest.mark.parametrize("target", ["a::b::c.default", "os.path::join.default", "::f.default"])
def test_what_is_no_name_of_an_operator_is_refused(target: str) -> None:
    with pytest.raises(ArtifactError, match="is not an operator that a program may use"):
        aten_op(target)


OWN_OPERATOR = """
import torch

@torch.library.custom_op("qfmine::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3

@triple.register_fake
def _(x):
    return torch.empty_like(x)

class Tripled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.b(triple(self.a(x)))
"""


SMALL = ["data.calibration=4", "data.evaluation=4", "benchmark=disabled", "gates=none"]


def test_an_artifact_calls_the_operators_that_the_named_code_registers(tmp_path: Path) -> None:
    shutil.copy(own_models.__file__, tmp_path / "mine.py")
    (tmp_path / "tripled.py").write_text(OWN_OPERATOR)
    own = ["model=entry", "model.entry=tripled:Tripled"]

    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quantflow", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    made = ran(*own, "data=random", "data.shape=[[8]]", "data.batch_size=4", *SMALL, "output=art")
    assert made.returncode == 0, made.stderr
    for task in (["task=inspect"], ["task=report"], ["task=evaluate", *own]):
        read = ran(*task, "artifact=art", "report.plain=true")
        assert read.returncode == 0, read.stderr
    refused = ran("task=evaluate", "artifact=art", "model=entry", "model.entry=mine:net")
    assert refused.returncode == 2
    assert "calls the operator qfmine::triple" in " ".join(refused.stderr.split())
