"""Transposed convolutions in every runtime and mode: int8, counted, and equal to the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantflow as qf
from quantflow.ir.program import Program
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.runtimes.torch import TorchRunner
from quantflow.tasks.selftest import quantized_program

SIZES = {1: (9,), 2: (5, 7), 3: (3, 4, 5)}
SERVED = [
    ("export", "reference"), ("export", "torch"), ("export", "native"), ("torchscript", "torch"),
    ("torchscript", "native"), ("imperative", "reference"), ("imperative", "torch"),
]  # fmt: skip
IN_ALL_DIMENSIONS = [("export", "native"), ("torchscript", "torch"), ("imperative", "torch")]


class Decoder(nn.Module):
    """A BatchNorm to fold, groups, an activation that is no clamp, a residual, and a transposed convolution last."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.up, self.norm, self.same = up(4, 8, 4, 2, 1, groups=2), norm(8), up(8, 8, 3, 1, 1)
        self.more, self.last = up(8, 4, 3, 2, 1, output_padding=1, bias=False), up(4, 3, 3, 3, dilation=2)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.up(x)))
        return self.last(F.gelu(self.more(self.same(x) + x)))


def decoder(dims: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(dims)
    return Decoder(dims).eval(), torch.randn(4, 4, *SIZES[dims])


@pytest.mark.parametrize(
    ("dims", "mode", "runtime"),
    [(2, *served) for served in SERVED] + [(dims, *served) for dims in (1, 3) for served in IN_ALL_DIMENSIONS],
)
def test_every_layer_is_int8(dims: int, mode: str, runtime: str) -> None:
    module, x = decoder(dims)
    model = qf.quantize(module, [x], mode=mode, runtime=runtime, device="cpu")
    with torch.no_grad():
        wanted, found = module(x), model(x)
    assert found.shape == wanted.shape
    assert sqnr_db(wanted, found) > 28
    proof = model.results["int8_proof"]
    assert (proof["int8_layers_run"], proof["core_layers"]) == (4, 4)
    rows = {row["name"]: row for row in model.results["plan"]}
    assert {row["op"] for name, row in rows.items() if name in ("up", "same", "more", "last")} == {
        f"conv_transpose{dims}d"
    }
    assert rows["up"]["reason"] == f"transposed: {2**dims} phases, BatchNorm folded"
    assert rows["same"]["reason"].startswith("transposed: 1 phase")


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_a_saved_one_gives_the_same(mode: str, tmp_path: Path) -> None:
    module, x = decoder(2)
    model = qf.quantize(module, [x], mode=mode, device="cpu")
    model.save(tmp_path / "kept")
    loaded: Any = qf.load(tmp_path / "kept")
    assert torch.equal(loaded(x), model(x))
    assert loaded.int8_layers() == 4


@pytest.fixture(scope="module", params=[1, 2, 3])
def program(request: pytest.FixtureRequest) -> tuple[Program, torch.Tensor]:
    return (lambda pair: (quantized_program(*pair), pair[1]))(decoder(request.param))


def test_native_runs_all_of_it(program: tuple[Program, torch.Tensor]) -> None:
    """Nothing leaves for torch, whatever the batch and the memory format; codes at their ends included."""
    whole, x = program
    runner, reference = NativeRunner(whole), ReferenceRunner(whole)
    for given in (x, x[:1], 1e6 * x, torch.zeros_like(x), torch.cat([x] * 3)):
        assert sqnr_db(reference([given]), runner([given])) > 40
        assert torch.equal(runner([given]), runner([given.transpose(0, 1).contiguous().transpose(0, 1)]))
    empty = runner([x[:0]])
    assert empty.shape == reference([x[:0]]).shape
    assert runner.in_torch == {}


def test_torch_agrees(program: tuple[Program, torch.Tensor]) -> None:
    whole, x = program
    for given in (x, x[:1], 1e6 * x, torch.zeros_like(x)):
        assert sqnr_db(ReferenceRunner(whole)([given]), TorchRunner(whole)([given])) > 40


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 3, 2, 2, output_padding=1),
        nn.ConvTranspose2d(4, 3, 1, 3),
        nn.ConvTranspose2d(4, 3, 5, 1, 4),
        nn.ConvTranspose2d(4, 3, (1, 4), (1, 2), (0, 3)),
        nn.ConvTranspose2d(4, 4, 3, 2, groups=4),
    ],
    ids=["padding beyond the kernel", "phases of zeros", "more cropped than added", "one dimension", "depthwise"],
)
@pytest.mark.parametrize("size", [(1, 3), (4, 6)])
def test_odd_geometries(layer: nn.Module, size: tuple[int, int]) -> None:
    """In the middle of a program, where all of it moves codes."""
    torch.manual_seed(0)
    size = (max(size[0], 5), 5) if layer.kernel_size == (5, 5) else size
    outputs = int(layer.out_channels)  # type: ignore[arg-type]
    module = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), layer, nn.Conv2d(outputs, 5, 1)).eval()
    x = torch.randn(3, 2, *size)
    whole = quantized_program(module, x)
    expected = ReferenceRunner(whole)([x])
    with torch.no_grad():
        assert sqnr_db(module(x), expected) > 25
    runner = NativeRunner(whole)
    assert sqnr_db(expected, runner([x])) > 40
    assert sqnr_db(expected, TorchRunner(whole)([x])) > 40
    assert runner.in_torch == {}
    assert all(whole.values[node.output].qparams for node in whole.nodes if node.op == "shape")


class Sized(nn.Module):
    """Asks for the output's size, as U-Nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 3, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x), output_size=x.shape[2:])


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
@pytest.mark.parametrize("size", [(9, 6), (8, 8)])
def test_the_output_size_may_be_asked_for(mode: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module, x = Sized().eval(), torch.randn(4, 3, *size)
    model = qf.quantize(module, [x], mode=mode, device="cpu")
    with torch.no_grad():
        assert sqnr_db(module(x), model(x)) > 28
    assert model.int8_layers() == 2


def test_another_output_size_is_computed_in_float_and_said_so() -> None:
    torch.manual_seed(0)
    module = Sized().eval()
    model = qf.quantize(module, [torch.randn(4, 3, 9, 9)], mode="imperative", device="cpu")
    x = torch.randn(4, 3, 8, 8)
    with pytest.warns(RuntimeWarning, match="up computes in float32 in this call"):
        found = model(x)
    with torch.no_grad():
        assert sqnr_db(module(x), found) > 28
