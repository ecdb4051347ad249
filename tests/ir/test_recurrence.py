"""The steps of recurrent cells: PyTorch's own results, one tensor per op, and what a program may say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from quantflow.errors import ArtifactError
from quantflow.ir.graph import Input
from quantflow.ir.program import Node, Program, Ref
from quantflow.ir.program_rules import check
from quantflow.ir.recurrence import CELLS, reach, state_codes, steps

MODULES: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args: nn.RNN(*args, nonlinearity="relu"),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_operators_compute_what_the_modules_do(cell: str, reverse: bool) -> None:
    torch.manual_seed(0)
    module, x, hidden = MODULES[cell](4, 6), torch.randn(5, 3, 4), 6
    h0, c0 = torch.randn(3, hidden), torch.randn(3, hidden)
    with torch.no_grad():
        given = (h0[None], c0[None]) if cell == "lstm" else h0[None]
        wanted, last = module(x.flip(0) if reverse else x, given)
        bias, inner = module.bias_ih_l0 + module.bias_hh_l0, None
        if cell == "gru":
            inner = module.bias_hh_l0[2 * hidden :]
            bias = torch.cat([bias[: 2 * hidden], module.bias_ih_l0[2 * hidden :]])
        gates = nn.functional.linear(x, module.weight_ih_l0, bias)
        found = getattr(torch.ops.quantflow, f"{cell}_steps")(gates, module.weight_hh_l0, inner, h0, c0, reverse)
    states = found[:5]
    torch.testing.assert_close(states.flip(0) if reverse else states, wanted, rtol=1e-5, atol=1e-6)
    if cell == "lstm":
        torch.testing.assert_close(found[5], last[1][0], rtol=1e-5, atol=1e-6)
    else:
        assert found.shape[0] == 5


def test_a_state_beyond_one_widens_the_codes_of_its_own_sample() -> None:
    h = torch.tensor([[0.5, -1.0], [4.0, 1.0], [0.0, float("nan")]])
    r = reach(h)
    assert r[:2].tolist() == [[1.0], [4.0]]
    assert state_codes(h, r)[:2].tolist() == [[64.0, -127.0], [127.0, 32.0]]
    assert state_codes(h, torch.ones(3, 1))[2].tolist() == [0.0, 127.0]


def test_each_step_can_start_from_what_another_kernel_found() -> None:
    """One state rounded the other way changes all later ones; from that state on the formula agrees again."""
    gates, weight, zeros = torch.randn(6, 2, 12), torch.randn(3, 12), torch.zeros(2, 3)

    def product(h: torch.Tensor) -> torch.Tensor:
        return state_codes(h, torch.ones(2, 1)) / 127 @ weight

    own = steps("lstm", product, gates, None, zeros, zeros, False)
    other = steps("lstm", lambda h: product(h + 1 / 127), gates, None, zeros, zeros, False)
    assert not torch.equal(own, other)
    assert torch.equal(steps("lstm", product, gates, None, zeros, zeros, False, own), own)
    assert torch.equal(steps("lstm", lambda h: product(h + 1 / 127), gates, None, zeros, zeros, False, other), other)


ATTRS = {"cell": "lstm", "reverse": False, "weight": "w", "weight_scale": "s", "bias": None}


def program(attrs: dict[str, Any] | None = None, **changes: Any) -> Program:
    tensors = {
        "w": torch.ones(8, 2, dtype=torch.int8), "s": torch.ones(8), "f": torch.ones(8, 2), "b": torch.ones(2),
    }  # fmt: skip
    node = Node("rnn", "recurrence", "y", (Ref("x"), None, None), attrs=ATTRS | (attrs or {}))
    inputs = (Input("x", None, "float32", (4, None, 8)), Input("h", None, "float32", (None, 2)))
    return Program(inputs, (replace(node, **changes),), {}, tensors, Ref("y"))


def test_legal_recurrences_survive_json() -> None:
    for legal in (program(), program({"weight": "f", "weight_scale": None}), program(args=(Ref("x"), Ref("h"), None))):
        check(legal)
        assert Program.from_json(legal.to_json(), legal.tensors) == legal


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (program({"cell": "tree"}), "cell 'tree'"),
        (program({"reverse": 1}), "reverse 1"),
        (program({"weight": "none"}), "'none' is not in weights"),
        (program({"weight": "f"}), "int8 codes have a weight_scale"),
        (program({"weight_scale": None}), "float32 has none"),
        (program({"cell": "gru"}), r"must be \(3 \* hidden, hidden\)"),
        (program({"bias": "b"}), "of a gru"),
        (program({"weight": "s"}), "must be"),
        (program({"weight_scale": "b"}), "weight_scale must be 1 or 8"),
        (program(args=(Ref("x"),)), "takes 3 arguments"),
        (program(args=(None, None, None)), "takes gates"),
    ],
)
def test_illegal_recurrences_are_refused_by_name(bad: Program, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        check(bad)
