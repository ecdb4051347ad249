"""Recurrent layers split: the same results, for any arrangement, and named reasons for what stays whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from quantflow.capture import capture
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, is_aten
from quantflow.ir.recurrence import cell_of
from quantflow.ir.units import find_units
from quantflow.schema import ModeSettings


class Around(nn.Module):
    """A recurrent module and all that it returns."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any] = lambda rnn, *x: rnn(*x)) -> None:
        super().__init__()
        self.rnn, self._forward = module, forward

    def forward(self, *args: torch.Tensor) -> Any:
        return self._forward(self.rnn, *args)


def from_states(rnn: nn.Module, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
    return rnn(x, (h, c) if isinstance(rnn, nn.LSTM) else h)


def split(model: nn.Module, *x: torch.Tensor, mode: Any = None) -> Graph:
    torch.manual_seed(0)
    return capture(model.eval(), Batch(x), mode or ModeSettings())


def require_same(graph: Graph, model: nn.Module, *x: torch.Tensor) -> None:
    with torch.no_grad():
        found, wanted = (torch.utils._pytree.tree_leaves(y) for y in (interpret(graph, x), model(*x)))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def is_split(graph: Graph) -> bool:
    return not any(is_aten(node, "lstm", "gru", "rnn_tanh", "rnn_relu") for node in graph.fx.nodes)


def reasons(graph: Graph) -> dict[str, str]:
    return {unit.name: unit.float_reason for unit in find_units(graph) if unit.op in ("lstm", "gru")}


@pytest.mark.parametrize("mode", [ModeSettings(), ModeSettings(kind="torchscript")], ids=lambda mode: mode.kind)
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "arrangement",
    [
        {},
        {"batch_first": True},
        {"bidirectional": True},
        {"num_layers": 2, "dropout": 0.4},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    ],
    ids=lambda arrangement: "-".join(arrangement) or "plain",
)
def test_splitting_changes_no_output(make: type[nn.RNNBase], arrangement: dict[str, Any], mode: Any) -> None:
    model = Around(make(5, 7, **arrangement))
    x = torch.randn(4, 3, 5)
    graph = split(model, x, mode=mode)
    assert is_split(graph)
    require_same(graph, model, x)
    require_same(graph, model, torch.randn(6, 3, 5) if arrangement.get("batch_first") else x * 2)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("shape", [(1, 3), (6, 1), (1, 1)], ids=["one step", "one sample", "both"])
def test_first_states_are_taken(make: type[nn.RNNBase], shape: tuple[int, int]) -> None:
    model, states = Around(make(5, 7, num_layers=2), from_states), (2, shape[1], 7)
    x = torch.randn(*shape, 5), torch.randn(states), torch.randn(states)
    if make is nn.GRU:
        model._forward, x = (lambda rnn, x, h: rnn(x, h)), x[:2]
    graph = split(model, *x)
    assert is_split(graph)
    require_same(graph, model, *x)


def test_parts_are_named_after_their_weights() -> None:
    graph = split(Around(nn.LSTM(5, 7, bidirectional=True)), torch.randn(4, 3, 5))
    units = {unit.name: unit for unit in find_units(graph)}
    for direction in ("l0", "l0_reverse"):
        assert units[f"rnn.ih_{direction}"].op == "linear"
        assert units[f"rnn.hh_{direction}"].op == "quantflow::lstm_steps"
        assert units[f"rnn.hh_{direction}"].anchor.meta["owner"] == "rnn"


def test_every_value_is_described() -> None:
    graph = split(Around(nn.GRU(5, 7, 2, bidirectional=True)), torch.randn(4, 3, 5))
    shapes: dict[Any, tuple[int, ...]] = {}
    interpret(graph, [torch.randn(4, 3, 5)], lambda node, value: shapes.update({node: tuple(value.shape)}))
    for node, shape in shapes.items():
        assert node.meta["shape"] == shape
        assert node.meta["layer"]


def test_a_module_called_twice_is_split_twice() -> None:
    model = Around(nn.LSTM(5, 5), lambda rnn, x: rnn(rnn(x)[0])[0])
    graph = split(model, torch.randn(4, 3, 5))
    require_same(graph, model, torch.randn(4, 3, 5))
    assert sum(cell_of(node) is not None for node in graph.fx.nodes) == 2
    assert len({unit.name for unit in find_units(graph)}) == len(find_units(graph))


def test_a_projection_stays_float() -> None:
    model = Around(nn.LSTM(5, 7, proj_size=3))
    graph = split(model, torch.randn(4, 3, 5))
    assert reasons(graph) == {"rnn": "lstm with a projection of its state (proj_size) has no int8 form"}
    require_same(graph, model, torch.randn(4, 3, 5))


def test_weights_that_are_computed_from_constants_are_constants() -> None:
    model = Around(nn.utils.parametrizations.weight_norm(nn.GRU(5, 7), "weight_hh_l0"))
    graph = split(model, torch.randn(4, 3, 5))
    assert is_split(graph)
    require_same(graph, model, torch.randn(4, 3, 5))


def test_imperative_mode_leaves_the_users_module() -> None:
    graph = split(Around(nn.LSTM(5, 7)), torch.randn(4, 3, 5), mode=ModeSettings(kind="imperative"))
    assert "the user's own float modules" in reasons(graph)["rnn"]


def test_packed_sequences_stay_float_or_are_refused() -> None:
    def forward(rnn: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return pad_packed_sequence(rnn(pack_padded_sequence(x, [4, 3, 2]))[0])[0]

    model, x = Around(nn.LSTM(5, 7), forward), torch.randn(4, 3, 5)
    graph = split(model, x, mode=ModeSettings(kind="torchscript"))
    assert "packed sequences, whose lengths differ" in reasons(graph)["rnn"]
    with pytest.raises(CaptureError, match="mode=torchscript"):
        split(model, x)
