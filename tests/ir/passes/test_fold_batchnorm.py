"""BatchNorm folding: exact, and only where it may."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantflow.capture import capture_export, capture_torchscript
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, is_aten
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms


class Pair(nn.Module):
    def __init__(self, linear: nn.Module, norm: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm
        self._forward = forward
        for name, buffer in norm.named_buffers():
            if name != "num_batches_tracked":
                torch.nn.init.uniform_(buffer, 0.5, 2)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self.linear, self.norm, x)


def direct(linear: nn.Module, norm: nn.Module, x: torch.Tensor) -> Any:
    return F.relu(norm(linear(x)))


def captured(model: nn.Module, x: torch.Tensor) -> Graph:
    return capture_export(model.eval(), Batch((x,)))


def norms(graph: Graph) -> int:
    return sum(is_aten(node, "batch_norm") for node in graph.fx.nodes)


@pytest.mark.parametrize(
    ("linear", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=0.1), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (2, 4)),
        (nn.ConvTranspose1d(4, 6, 4, 2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.ConvTranspose3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    ],
    ids=[
        "conv1d",
        "conv2d",
        "grouped",
        "no weights",
        "conv3d",
        "linear",
        "transposed 1d",
        "transposed, grouped",
        "transposed 3d",
    ],
)
def test_folding_changes_no_output(linear: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = Pair(linear, norm, direct), torch.randn(shape)
    graph = captured(model, x)
    folded = fold_batch_norms(graph)
    assert (norms(graph), norms(folded)) == (1, 0)
    assert torch.allclose(interpret(folded, [x]), model(x), rtol=1e-5, atol=1e-5)
    assert sorted(folded.constants) == ["linear.folded_bias", "linear.folded_weight"]
    assert norms(graph) == 1, "the graph that was given is left as it was"
    node = next(node for node in folded.fx.nodes if "batch_norm" in node.meta)
    assert (node.meta["layer"], node.meta["batch_norm"]) == ("linear", "norm")


@pytest.mark.parametrize(
    "forward",
    [
        lambda linear, norm, x: norm(F.relu(linear(x))),
        lambda linear, norm, x: (lambda y: norm(y) + y)(linear(x)),
        lambda linear, norm, x: (lambda y: (norm(y), y))(linear(x)),
        lambda linear, norm, x: norm(F.max_pool2d(linear(x), 2)),
        lambda linear, norm, x: norm(x) + linear(x),
    ],
    ids=["after ReLU", "two readers", "an output too", "after a pool", "before the convolution"],
)
def test_what_is_not_directly_behind_a_linear_op_is_not_folded(forward: Callable[..., Any]) -> None:
    model, x = Pair(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), forward), torch.randn(2, 4, 8, 8)
    assert norms(fold_batch_norms(captured(model, x))) == 1


def test_features_of_a_sequence_are_not_dimension_1() -> None:
    """BatchNorm1d over (batch, 6, 6) normalises the steps, not the linear's features."""
    model = Pair(nn.Linear(4, 6), nn.BatchNorm1d(6), direct)
    assert norms(fold_batch_norms(captured(model, torch.randn(2, 6, 4)))) == 1


def test_batch_statistics_are_not_folded() -> None:
    model = Pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), direct)
    x = torch.randn(2, 4, 8, 8)
    folded = fold_batch_norms(captured(model, x))
    assert not any("batch_norm" in node.meta for node in folded.fx.nodes)
    assert torch.allclose(interpret(folded, [x]), model(x), atol=1e-5)


def test_one_convolution_with_two_norms_is_folded_twice() -> None:
    model = Pair(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), lambda c, n, x: n(c(n(c(x)))))
    x = torch.randn(2, 4, 8, 8)
    folded = fold_batch_norms(captured(model, x))
    assert norms(folded) == 0
    assert torch.allclose(interpret(folded, [x]), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)], ids=["", "no weights"])
def test_the_caller_may_refuse(norm: nn.Module) -> None:
    graph = captured(Pair(nn.Conv2d(4, 6, 3), norm, direct), torch.randn(2, 4, 8, 8))
    asked = []

    def refuse(linear: str, norm: str) -> bool:
        asked.append((linear, norm))
        return False

    assert norms(fold_batch_norms(graph, refuse)) == 1
    assert asked == [("linear", "norm")]


class Frozen(nn.Module):
    """Statistics and weights as buffers, as detectors hold them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (self.running_var + 1e-5).rsqrt()  # type: ignore[operator]
        return x * scale.reshape(shape) + (self.bias - self.running_mean * scale).reshape(shape)  # type: ignore[operator]


@pytest.mark.parametrize(
    "linear", [nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)]
)
@pytest.mark.parametrize("capture", [capture_export, partial(capture_torchscript, method="trace")])
def test_a_frozen_batch_norm_is_folded_as_any(linear: nn.Module, capture: Callable[..., Graph]) -> None:
    x = torch.randn(2, 4, 9, 9)
    model = Pair(linear, Frozen(6), direct).eval()
    folded = fold_batch_norms(capture(model, Batch((x,))))
    assert not any(is_aten(node, "mul", "add") for node in folded.fx.nodes)
    assert [n.meta["batch_norm"] for n in folded.fx.nodes if "batch_norm" in n.meta] == ["norm"]
    assert torch.allclose(interpret(folded, (x,)), model(x), atol=1e-5)


@pytest.mark.parametrize(
    "forward",
    [
        lambda linear, norm, x: linear(x) * norm.weight.reshape(1, -1, 1, 1),
        lambda linear, norm, x: linear(x) * norm.weight.reshape(1, -1, 1, 1) + norm.bias,  # per column
        lambda linear, norm, x: (lambda y: norm(y) + y)(linear(x)),
        lambda linear, norm, x: linear(x) * norm.weight.reshape(1, -1, 1, 1) + x[:, :1, :6, :6],
    ],
    ids=["scale alone", "another dimension", "read twice", "no constant"],
)
def test_a_scale_and_shift_that_is_no_frozen_batch_norm_stays(forward: Callable[..., Any]) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = Pair(nn.Conv2d(4, 6, 3), Frozen(6), forward).eval()
    folded = fold_batch_norms(captured(model, x))
    assert any(is_aten(node, "mul") for node in folded.fx.nodes)
    assert torch.allclose(interpret(folded, (x,)), model(x), atol=1e-5)
