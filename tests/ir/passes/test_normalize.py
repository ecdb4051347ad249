"""One vocabulary for every capture, without a change of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, op_name


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.kernel = nn.Parameter(torch.randn(5, 3, 4, 2))
        self.bias = nn.Parameter(torch.randn(4))
        self._forward = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


def captured(forward: Callable[..., Any], x: torch.Tensor) -> Graph:
    """The simplified graph, checked against the model on the example's batch size and on another one."""
    model = Net(forward).eval()
    graph = capture_export(model, Batch((x,)))
    with torch.no_grad():
        for batch in (x, torch.cat([x, x])):
            assert torch.allclose(interpret(graph, [batch]), model(batch), rtol=1e-5, atol=1e-5)
    return graph


def ops(graph: Graph) -> list[str]:
    return [op_name(node) for node in graph.fx.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x @ m.weight.t(),
        lambda m, x: torch.mm(x, m.weight.t()),
        lambda m, x: torch.addmm(m.bias, x, m.weight.t()),
        lambda m, x: F.linear(x, torch.cat([m.weight[2:], m.weight[:2]]), m.bias),
        lambda m, x: F.linear(x, m.weight.split(2)[1]),
    ],
    ids=["matmul", "mm", "addmm", "a computed weight", "a part of a weight"],
)
def test_a_product_with_a_constant_is_linear(forward: Callable[..., Any]) -> None:
    assert ops(captured(forward, torch.randn(3, 6))) == ["linear"]


def test_a_scaled_addmm_is_left_alone() -> None:
    assert "addmm" in ops(captured(lambda m, x: torch.addmm(m.bias, x, m.weight.t(), alpha=2), torch.randn(3, 6)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dilation", [1, 2, (1, 2), (3, 1)], ids=str)
def test_padding_same_becomes_numbers(dilation: Any) -> None:
    """The kernel is (4, 2): where the padding is uneven, the extra element goes behind."""
    x = torch.randn(3, 3, 9, 8)
    graph = captured(lambda m, x: F.conv2d(x, m.kernel, padding="same", dilation=dilation), x)
    assert ops(graph) in (["pad", "conv2d"], ["constant_pad_nd", "conv2d"], ["conv2d"])
    (conv,) = (node for node in graph.fx.nodes if op_name(node) == "conv2d")
    assert all(isinstance(size, int) for size in conv.args[4])


def test_padding_valid_is_zero() -> None:
    graph = captured(lambda m, x: F.conv2d(x, m.kernel, padding="valid"), torch.randn(3, 3, 9, 8))
    assert ops(graph) == ["conv2d"]
    assert next(node for node in graph.fx.nodes if op_name(node) == "conv2d").args[4] == [0, 0]


@pytest.mark.parametrize(
    "forward",
    [
        lambda _, x: F.dropout(x, 0.5, training=False).clone().contiguous().detach() * 2,
        lambda m, x: x.to(torch.float32).float().type_as(m.weight) * 2,
        lambda _, x: x[:] * 2,
    ],
    ids=["copies", "casts", "a full slice"],
)
def test_what_changes_nothing_is_removed(forward: Callable[..., Any]) -> None:
    assert ops(captured(forward, torch.randn(3, 6))) == ["mul"]


def test_constants_are_computed_once() -> None:
    graph = captured(lambda m, x: x + (torch.arange(6.0) * 2 + m.weight.sum(0).sqrt().nan_to_num()), torch.randn(3, 6))
    assert ops(graph) == ["add"]
    assert [tuple(value.shape) for value in graph.constants.values()] == [(6,)]


def test_a_view_accepts_every_layout() -> None:
    graph = captured(lambda _, x: x.view(x.shape[0], -1), torch.randn(3, 4, 2, 5))
    assert "reshape" in ops(graph)
    x = torch.randn(3, 4, 2, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(interpret(graph, [x]), x.flatten(1))


def test_random_numbers_are_not_constants() -> None:
    model = Net(lambda _, x: x + torch.rand(6))
    graph = capture_export(model, Batch((torch.randn(3, 6),)))
    assert "rand" in ops(graph)
    x = torch.zeros(2, 6)
    assert not torch.equal(interpret(graph, [x]), interpret(graph, [x]))


def test_indexing_by_all_coordinates_is_a_view() -> None:
    """As attention masks are read: rows counted at run time, columns a constant."""

    def mask(_m: Net, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[0])[:, None, None, None]
        return x[rows, torch.arange(x.shape[1])[None, None, None, :]] * 2

    assert "index" not in ops(captured(mask, torch.randn(3, 6)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda _m, x: x[torch.arange(x.shape[0])[:, None], torch.tensor([0, 2, 1, 3, 4, 5])],
        lambda _m, x: x[torch.arange(x.shape[0])[:, None], torch.arange(5)],
        lambda _m, x: x[torch.arange(x.shape[0])[None, :], torch.arange(6)[:, None]],
    ],
    ids=["another order", "a part", "transposed"],
)
def test_other_indexing_is_left_alone(forward: Callable[..., Any]) -> None:
    assert "index" in ops(captured(forward, torch.randn(3, 6)))
