"""Ops with several results, other dtypes than float32, and sizes that are no whole numbers: right in every runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import Own
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import quantflow as qf
from quantflow.runtimes.reference import ReferenceRunner

Forward = Callable[..., Any]
#: Every way to run: name → settings.
WAYS: dict[str, dict[str, str]] = {
    "native": {},
    "torch": {"runtime": "torch"},
    "reference": {"runtime": "reference"},
    "script": {"mode": "torchscript"},
    "script on torch": {"mode": "torchscript", "runtime": "torch"},
}


def require_right(model: nn.Module, x: torch.Tensor, folder: Path, way: str) -> Any:
    """Quantized, close to float, and the same after save and load."""
    int8 = qf.quantize(model.eval(), [x], device="cpu", **WAYS[way])
    with torch.no_grad():
        wanted, found = model(x), int8(x)
    wanted, found = pytree.tree_leaves(wanted), pytree.tree_leaves(found)
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in wanted]
    reals = [(w.double(), f.double()) for w, f in zip(wanted, found, strict=True) if w.is_floating_point()]
    assert all(float((w - f).norm() / w.norm()) < 0.1 for w, f in reals)
    int8.save(folder / "a")
    again = pytree.tree_leaves(qf.load(folder / "a")(x))
    assert all(torch.equal(a, f) for a, f in zip(again, found, strict=True))
    return int8


SEVERAL: dict[str, tuple[Forward, dict[str, Callable[[], nn.Module]]]] = {
    "lstm": (lambda s, x: s.b(s.rnn(s.a(x))[0]), {"rnn": lambda: nn.LSTM(8, 8, batch_first=True)}),
    "gru": (lambda s, x: s.b(s.rnn(s.a(x))[1][0]), {"rnn": lambda: nn.GRU(8, 8, batch_first=True)}),
    "lstm cell": (lambda s, x: s.b(s.rnn(s.a(x[:, 0]))[0]), {"rnn": lambda: nn.LSTMCell(8, 8)}),
    "topk": (lambda s, x: s.b(s.a(x)).topk(3, -1)[0], {}),
    "max of a dimension": (lambda s, x: s.b(s.a(x).max(1)[0]), {}),
    "sort": (lambda s, x: s.b(s.a(x).sort(-1)[0]), {}),
    "var_mean": (lambda s, x: (lambda v: s.b((x - v[1]) / (v[0] + 1)))(torch.var_mean(s.a(x), -1, keepdim=True)), {}),
    "pooling with indices": (
        lambda s, x: (lambda v: F.max_unpool1d(s.b(v[0]), v[1], 2))(F.max_pool1d(s.a(x), 2, return_indices=True)),
        {"b": lambda: nn.Linear(4, 4)},
    ),
    "layer norm with its moments": (lambda s, x: s.b(torch.native_layer_norm(s.a(x), [8], None, None, 1e-5)[0]), {}),
    "a list and its parts": (
        lambda s, x: (lambda p: s.b(p[0]).sum(1) + p[1].sum(1) + p[2].median(1)[0])(torch.split(s.a(x), [1, 2, 3], 1)),
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SEVERAL)
def test_ops_with_several_results(case: str, way: str, tmp_path: Path) -> None:
    if case == "pooling with indices" and way.startswith("script"):
        pytest.skip("torch.jit.trace refuses max_unpool by itself")
    torch.manual_seed(0)
    forward, parts = SEVERAL[case]
    require_right(Own(forward, **{name: make() for name, make in parts.items()}), torch.randn(4, 6, 8), tmp_path, way)


DTYPES: dict[str, Forward] = {
    "float64 comes out": lambda s, x: s.a(x).double().flatten(1),
    "float64 inside": lambda s, x: s.b((s.a(x).double() * 2 + 1).flatten(1).view(-1, 6, 8).float()),
    "float16": lambda s, x: s.b((s.a(x).half() * 2).relu().float()),
    "bfloat16": lambda s, x: s.b((s.a(x).bfloat16() * 2).transpose(1, 2).transpose(1, 2).float()),
    "int16": lambda s, x: s.b((s.a(x) * 10).to(torch.int16).abs().float()),
    "complex": lambda s, x: s.b(torch.fft.fft(s.a(x)).abs()),
    "softmax in float64": lambda s, x: s.b(s.a(x).softmax(-1, dtype=torch.float64).float()),
    "sum in float64": lambda s, x: s.b((x - s.a(x).sum(-1, keepdim=True, dtype=torch.float64)).float()),
    "zeros in float64": lambda s, x: s.b((s.a(x) + torch.zeros_like(x, dtype=torch.float64)).float()),
    "float16 beside float32": lambda s, x: s.b(torch.cat([s.a(x)[..., :4], x[..., :4].half()], -1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", DTYPES)
def test_other_dtypes(case: str, way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    require_right(Own(DTYPES[case]), torch.randn(4, 6, 8), tmp_path, way)


def test_what_reads_another_dtype_runs_in_torch_for_that_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    int8 = require_right(Own(DTYPES["float64 inside"]), torch.randn(4, 6, 8), tmp_path, "native")
    reasons = int8.compiled.left_to_torch()
    assert reasons["mul"] == "reads a tensor of float64, for which there is no native kernel"
    assert "a" not in reasons
    assert "b" not in reasons


SIZES: dict[str, Callable[[int], Any]] = {
    "a root": lambda n: n**0.5,
    "a quotient": lambda n: n / 3,
    "a rounded quotient": lambda n: math.ceil(n / 3),
    "a maximum": lambda n: max(n, 3),
    "a difference": lambda n: abs(n - 9),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SIZES)
def test_numbers_made_of_sizes(case: str, way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    number = SIZES[case]
    model = Own(lambda s, x: s.b(s.a(x) * number(x.shape[0]) + number(x.shape[0])))
    int8 = require_right(model, torch.randn(4, 6, 8), tmp_path, way)
    more = torch.randn(7 if int8.compiled.program.batch_is_dynamic else 4, 6, 8)  # a trace may fix the branch taken
    specified = ReferenceRunner(int8.compiled.program)([more])
    assert torch.allclose(int8(more), specified, atol=0.05)


def test_a_scalar_among_the_outputs_leaves_the_batch_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    require_right(Own(lambda s, x: (s.b(s.a(x)), s.a(x).mean())), torch.randn(4, 6, 8), tmp_path, "native")
