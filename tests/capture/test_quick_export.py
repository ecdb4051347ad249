from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_impls import get_fast_op_impls

from quantflow.capture.quick_export import quick_export


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
    with quick_export():
        assert described(export()) == described(plain)


def test_a_join_of_unlike_sizes_is_refused_as_torch_refuses_it() -> None:
    class Unlike(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x[:, :, :3]], 1)

    shapes = {"x": {0: torch.export.Dim.AUTO}}
    with quick_export(), pytest.raises(Exception, match="Sizes of tensors"):
        torch.export.export(Unlike(), (torch.randn(2, 4, 6),), dynamic_shapes=shapes)


def test_torch_and_the_collector_are_as_before_after_an_error() -> None:
    before = dict(get_fast_op_impls())
    with pytest.raises(ZeroDivisionError), quick_export():
        gc.isenabled() or 1 / 0
    assert gc.isenabled()
    assert get_fast_op_impls() == before
