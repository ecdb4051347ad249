"""The ops that a trace would change are written anew without one: the graph is the one that a trace gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from quantflow.capture import export
from quantflow.capture.functional import functional_graph, is_plain
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph


class Of(nn.Module):
    """A function as a module, with a layer for it to call and a buffer that is in no state dict."""

    def __init__(self, body: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.body, self.linear, self.drop = body, nn.Linear(8, 8), nn.Dropout(0.5)
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def attention(model: Any, x: torch.Tensor) -> Any:
    """Views of sizes that vary, of copies, of parts; a buffer, a mask of numbers, a product of sizes."""
    b, n, c = x.shape
    y = model.drop(model.linear(x)) + model.shift.to(torch.float32)
    q, k, v = y.reshape(b, n, 2, -1).transpose(1, 2).chunk(2, dim=-1)[0], y.unflatten(2, (2, -1)), y
    mask = torch.ones(n, n).tril() >= torch.tensor(0.5)
    joined = torch.cat([torch.zeros(b, 0), v.flatten(1)], 1)
    rows = y.transpose(1, 2).contiguous().reshape(b * c, -1)
    return q, k.flatten(1).to(torch.float64), joined, rows, mask.expand(b, n, n).to(torch.int64), y.permute(0, 2, 1)


def in_place(model: Any, x: torch.Tensor) -> Any:
    y = model.linear(x)
    z = y.softmax(-1)
    z += y
    z.masked_fill_(y > 0, 0.0).clamp_(min=-1.0)
    part = torch.tensor_split(z, 3, dim=2)[1].narrow(1, 0, 2).type_as(x)
    return z.reshape(-1, 8).sin(), z.flatten(1).cos(), part.exp()


def written(graph: Graph) -> Any:
    """All that a graph says, its nodes by number."""
    number: dict[fx.Node, Any] = {}
    lines = []
    for node in graph.fx.nodes:
        number[node] = len(number)
        operands = fx.map_arg((node.args, node.kwargs), lambda x: f"%{number[x]}")
        lines.append((node.op, str(node.target), str(operands), sorted(node.meta.items(), key=str)))
    return lines, list(graph.constants), graph.inputs, graph.batch_is_dynamic, graph.notes, graph.limits


def exported(body: Callable[[Any, torch.Tensor], Any]) -> torch.export.ExportedProgram:
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    with torch.no_grad():
        return torch.export.export(Of(body).eval(), (torch.randn(3, 4, 8),), dynamic_shapes=shapes)


@pytest.mark.parametrize("body", [attention, in_place])
def test_the_graph_is_the_one_that_a_trace_gives(body: Callable[[Any, torch.Tensor], Any]) -> None:
    program = exported(body)
    before = [node.format_node() for node in program.graph.nodes]
    assert not is_plain(program)
    assert functional_graph(program) is not None
    assert [node.format_node() for node in program.graph.nodes] == before

    module, example = Of(body).eval(), Batch((torch.randn(3, 4, 8),))
    quick = export.capture_export(module, example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "functional_graph", lambda _: None)
        traced = export.capture_export(module, example)
    assert written(quick) == written(traced)


def into_a_view(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.linear(x)
    y[:, 0].fill_(1.0)
    return y.flatten(1)


def after_a_view(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.linear(x)
    seen = y.reshape(-1)
    y.mul_(2)
    return seen


def after_a_part(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.linear(x)
    seen = y.unbind(1)[0]
    y.mul_(2)
    return seen.flatten()


def of_a_sum_of_sizes(_: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x[:1]]).flatten()


def in_training(_: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5, training=True).reshape(-1)


@pytest.mark.parametrize("body", [into_a_view, after_a_view, after_a_part, of_a_sum_of_sizes, in_training])
def test_what_only_a_trace_can_tell_is_left_to_it(body: Callable[[Any, torch.Tensor], Any]) -> None:
    assert functional_graph(exported(body)) is None


def test_without_what_torch_keeps_for_itself_programs_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(attention)
    monkeypatch.setattr("quantflow.capture.functional._is_cia_op", None)
    assert functional_graph(program) is None
