"""Norms over groups of channels run in native kernels between int8 layers, their activation and codes in one pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from own_models import Own
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.runtimes.reference import ReferenceRunner

MODELS: dict[str, tuple[Callable[[], nn.Module], list[torch.Size]]] = {
    "group norm and silu": (
        lambda: Own(
            lambda s, x: s.b(F.silu(s.n(s.a(x)))),
            a=nn.Conv2d(3, 24, 3, padding=1), n=nn.GroupNorm(4, 24), b=nn.Conv2d(24, 5, 1),
        ),
        [torch.Size([2, 3, 9, 11]), torch.Size([1, 3, 12, 8])],
    ),
    "global layer norm of a separator": (
        lambda: Own(
            lambda s, x: s.b(s.n(s.p(s.a(x)))),
            a=nn.Conv1d(3, 16, 5, 2), p=nn.PReLU(), n=nn.GroupNorm(1, 16, eps=1e-8), b=nn.Conv1d(16, 4, 1),
        ),
        [torch.Size([2, 3, 40]), torch.Size([1, 3, 95])],
    ),
    "instance norm": (
        lambda: Own(
            lambda s, x: s.b(torch.relu(s.n(s.a(x)))),
            a=nn.Conv2d(3, 20, 3), n=nn.InstanceNorm2d(20, affine=True), b=nn.Conv2d(20, 4, 1),
        ),
        [torch.Size([2, 3, 9, 11]), torch.Size([1, 3, 12, 8])],
    ),
    "instance norm with statistics of its own": (
        lambda: Own(
            lambda s, x: s.b(s.n(s.a(x))),
            a=nn.Conv1d(3, 12, 3), n=nn.InstanceNorm1d(12, track_running_stats=True), b=nn.Conv1d(12, 4, 1),
        ),
        [torch.Size([2, 3, 30]), torch.Size([1, 3, 41])],
    ),
    "a norm of features": (
        lambda: Own(
            lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 32), n=nn.GroupNorm(4, 32), b=nn.Linear(32, 4)
        ),
        [torch.Size([3, 6])],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), [*((name, "export") for name in MODELS), ("instance norm", "torchscript")])
def test_norms_over_groups_of_channels_are_native(name: str, mode: str) -> None:
    make, shapes = MODELS[name]
    torch.manual_seed(0)
    model, batches = make().eval(), [torch.randn(shape) * 2 + 1 for shape in shapes]
    int8 = qf.quantize(model, batches, mode=mode, runtime="native", device="cpu")
    runner = int8.compiled.runner
    assert runner.in_torch == {}, "a norm of this kind has a native kernel"
    for x in batches:
        with torch.no_grad():
            wanted, found = model(x), int8(x)
        assert float((wanted - found).norm() / wanted.norm()) < 0.1
        as_specified = ReferenceRunner(int8.record.program)([x])
        # A code at most, where the codes before the last layer lie next to a tie.
        assert float((as_specified - found).norm() / found.norm()) < 0.01
