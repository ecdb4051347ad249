from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_impls import get_fast_op_impls
from torch.fx.experimental import proxy_tensor

from quantflow.capture import capture_export
from quantflow.capture.quick_export import quick_export
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch


class Dense(nn.Module):
    """Batch norms and joins of many kinds: of channels-last values, of a cut, of sizes that vary, of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.flat = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.conv(x))
        joined = torch.cat([x, y, y], 1)
        last = self.norm(y.contiguous(memory_format=torch.channels_last))
        rows = torch.cat([x.mean((2, 3)), y.mean((2, 3))], dim=-1)
        return (
            joined.flatten(1),
            torch.cat([last, y.contiguous(memory_format=torch.channels_last)], 1),
            torch.cat([joined[:, 2:6], y], -3),
            torch.cat([x, y], 0),
            torch.cat([rows, rows.long()], 1),
            torch.cat([rows.flatten(), x.flatten()]),
            self.flat(y.flatten(2)),
        )


def described(program: torch.export.ExportedProgram) -> list[Any]:
    """Nodes, forms and limits, to the stride."""
    values = [(n, n.meta.get("val")) for n in program.graph.nodes]
    return [
        *((n.format_node(), v.stride(), v.dtype) for n, v in values if isinstance(v, torch.Tensor)),
        str(program.range_constraints),
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_graph_is_the_one_that_torch_makes_by_itself(layout: torch.memory_format) -> None:
    module, x = Dense().eval(), torch.randn(2, 4, 6, 8).contiguous(memory_format=layout)
    auto = torch.export.Dim.AUTO

    def export() -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(module, (x,), dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}})

    plain = export()
    with quick_export(places=False):
        assert described(export()) == described(plain)


def test_a_join_of_unlike_sizes_is_refused_as_torch_refuses_it() -> None:
    class Unlike(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x[:, :, :3]], 1)

    shapes = {"x": {0: torch.export.Dim.AUTO}}
    with quick_export(places=False), pytest.raises(Exception, match="Sizes of tensors"):
        torch.export.export(Unlike(), (torch.randn(2, 4, 6),), dynamic_shapes=shapes)


@pytest.mark.parametrize("places", [False, True])
def test_nodes_know_their_line_where_it_is_asked_for(places: bool) -> None:
    with quick_export(places=places):
        program = torch.export.export(nn.Linear(4, 2).eval(), (torch.randn(2, 4),))
    lines = [node.meta.get("stack_trace") for node in program.graph.nodes if node.op == "call_function"]
    assert [line is not None for line in lines] == [places]


def test_torch_is_as_before_after_an_error() -> None:
    def state() -> list[Any]:
        changed = proxy_tensor._extract_tensor_metadata, proxy_tensor.track_tensor_tree
        return [dict(get_fast_op_impls()), fx.config.do_not_emit_stack_traces, *changed]

    before = state()
    with pytest.raises(ZeroDivisionError), quick_export(places=False):
        1 / 0  # noqa: B018
    assert state() == before


def test_a_graph_that_cannot_be_taken_names_its_line() -> None:
    class Choice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    with pytest.raises(CaptureError, match=r"runs true_graph_0 \(at .*test_quick_export\.py:\d+"):
        capture_export(Choice(), Batch((torch.randn(2, 4),)))
