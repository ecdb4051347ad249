"""Which nodes one kernel could compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantflow.capture import capture_export
from quantflow.ir.activations import ACTIVATIONS, Epilogue
from quantflow.ir.batch import Batch
from quantflow.ir.units import ADD, CORE, FLOAT, MUL, SIZE, Unit, find_units


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 8)
        self.constant = nn.Parameter(torch.randn(8))
        self._forward = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


def units_of(forward: Callable[..., Any]) -> list[Unit]:
    graph = capture_export(Net(forward).eval(), Batch((torch.randn(2, 3, 8, 8),)))
    units = find_units(graph)
    computed = [node for node in graph.fx.nodes if node.op == "call_function"]
    assert sorted(node.name for unit in units for node in unit.nodes) == sorted(node.name for node in computed)
    return units


SPELLINGS: list[tuple[Callable[[torch.Tensor], torch.Tensor], Epilogue]] = [
    (F.relu, Epilogue("relu")),
    (F.relu6, Epilogue("hardtanh", (0.0, 6.0))),
    (lambda x: F.hardtanh(x, -2, 3), Epilogue("hardtanh", (-2.0, 3.0))),
    (lambda x: x.clamp(-1, 1), Epilogue("hardtanh", (-1.0, 1.0))),
    (lambda x: x.clamp(min=0), Epilogue("relu")),
    (lambda x: x.clamp_min(0), Epilogue("relu")),
    (lambda x: x.clamp_min(-1), Epilogue("hardtanh", (-1.0, math.inf))),
    (lambda x: x.clamp(max=2), Epilogue("hardtanh", (-math.inf, 2.0))),
    (F.gelu, Epilogue("gelu")),
    (lambda x: F.gelu(x, approximate="tanh"), Epilogue("gelu_tanh")),
    (lambda x: F.leaky_relu(x, 0.2), Epilogue("leaky_relu", (0.2,))),
    (F.hardswish, Epilogue("hardswish")),
    (F.hardsigmoid, Epilogue("hardsigmoid")),
    (F.silu, Epilogue("silu")),
    (torch.sigmoid, Epilogue("sigmoid")),
    (torch.tanh, Epilogue("tanh")),
]


@pytest.mark.parametrize(
    ("kind", "before"),
    [(CORE, lambda m, x: m.conv(x)), (ADD, lambda _, x: x + x.exp()), (MUL, lambda _, x: x * x.exp())],
    ids=[CORE, ADD, MUL],
)  # fmt: skip
def test_activations_fuse(kind: str, before: Callable[..., torch.Tensor]) -> None:
    assert {epilogue.kind for _, epilogue in SPELLINGS} == set(ACTIVATIONS)
    units = units_of(lambda m, x: [activation(before(m, x)) for activation, _ in SPELLINGS])
    assert [unit.epilogue for unit in units if unit.kind == kind] == [epilogue for _, epilogue in SPELLINGS]


WITHOUT_INT8_FORM: list[tuple[Callable[..., torch.Tensor], str]] = [
    (lambda m, x: x + m.constant, "add with a constant tensor has no int8 form"),
    (lambda _, x: x * 3, "mul with a plain number has no int8 form"),
    (lambda _, x: torch.add(x, x.exp(), alpha=2), "add with alpha != 1 has no int8 form"),
    (lambda _, x: x + (x > 0), "add of tensors that are not float32 has no int8 form"),
    (lambda _, x: torch.cat([x, (x > 0).long()]), "cat of tensors that are not float32 has no int8 form"),
    (lambda _, x: x.long() - 1, "computes in int64, not float32"),
    (lambda m, x: F.linear(x, m.fc(x)[0, 0]), "its weight is computed at run time, not a constant"),
    (lambda m, x: F.conv2d(x, m.conv.weight, m.fc(x)[0, 0, 0, :4]), "its bias is computed at run time, not a constant"),
    (lambda m, x: m.conv(x[0]), "its input has no batch dimension"),
    (lambda _, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "pad with a mode other than constant has no int8 form"),
    (lambda _, x: F.softmax(x, 1), "softmax has no int8 form"),
    (lambda _, x: x.topk(2).values, "topk has no int8 form"),
    (lambda m, x: x.clamp(max=m.constant), "clamp has no int8 form"),
]


def test_what_has_no_int8_form_says_why() -> None:
    units = units_of(lambda m, x: [forward(m, x) for forward, _ in WITHOUT_INT8_FORM])
    found = {unit.float_reason for unit in units}
    assert {reason for _, reason in WITHOUT_INT8_FORM} <= found


def test_sizes_are_no_units_of_work() -> None:
    kinds = [unit.kind for unit in units_of(lambda m, x: m.conv(x).reshape(x.shape[0] * 2, -1))]
    assert kinds.count(SIZE) >= 1
    assert FLOAT not in kinds
