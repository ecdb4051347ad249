"""Recurrent layers step by step: the cells' formulas, and the `quantflow::` operators that a captured graph holds.

    gates[t]  what a step adds to the products of the state; the input's product and the biases are in it
    p = product(h)                                   h @ W_hh.T, (batch, gates * hidden)
    lstm      i, f, g, o = gates[t] + p;  c = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c)
    gru       r = sigmoid(x_r + p_r);  z = sigmoid(x_z + p_z);  n = tanh(x_n + r * (p_n + bias));  h = n + z * (h - n)
    rnn_tanh  h = tanh(gates[t] + p)
    rnn_relu  h = relu(gates[t] + p)

Each operator gives one tensor, (steps, batch, hidden): every step's state at its place in time; behind those of an LSTM
follows one more row, its last c. The order of the gates in a weight is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

#: Cell → gates per hidden unit.
CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
#: The cells whose state never leaves [-1, 1] if it starts there, so that one scale of codes fits it.
BOUNDED = ("lstm", "gru", "rnn_tanh")
#: What the name of a cell's operator ends in.
SUFFIX = "_steps"
#: Steps of a state's codes: h = q / 127 for |h| <= 1.
STATE_STEPS = 127

Tensor = torch.Tensor
Product = Callable[[Tensor], Tensor]

_SCHEMA = "(Tensor gates, Tensor weight, Tensor? bias, Tensor? h0, Tensor? c0, bool reverse) -> Tensor"
# A fragment: the runtimes define operators in the same namespace.
_library = torch.library.Library("quantflow", "FRAGMENT")


def steps(
    cell: str, product: Product, gates: Tensor, bias: Tensor | None, h0: Tensor, c0: Tensor | None, reverse: bool,
    states: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All steps of a cell.

    Args:
        product: of a state (batch, hidden) with the weight, (batch, gates * hidden).
        gates: (steps, batch, gates * hidden), float32.
        bias: (hidden,), of a GRU's n, inside the product with r; None: there is none.
        h0, c0: (batch, hidden); c0 for an LSTM.
        states: the states that a kernel found, as this function's result; each step then starts from the one that the
            kernel itself handed on. None: from its own.

    Returns:
        (steps, batch, hidden); of an LSTM (steps + 1, batch, hidden), with the last c behind.
    """
    found: list[Tensor] = [h0] * gates.shape[0]
    h, c = h0, c0
    for t in range(gates.shape[0] - 1, -1, -1) if reverse else range(gates.shape[0]):
        x, p = gates[t], product(h)
        if cell == "lstm":
            i, f, g, o = (x + p).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "gru":
            (x_r, x_z, x_n), (p_r, p_z, p_n) = x.chunk(3, -1), p.chunk(3, -1)
            n = (x_n + (x_r + p_r).sigmoid() * (p_n if bias is None else p_n + bias)).tanh()
            h = n + (x_z + p_z).sigmoid() * (h - n)
        else:
            h = (x + p).tanh() if cell == "rnn_tanh" else (x + p).relu()
        found[t] = h
        if states is not None:
            h = states[t]
    rows = [*found, c] if c is not None and cell == "lstm" else found
    return torch.stack(rows) if rows else gates.new_zeros(0, gates.shape[1], gates.shape[2] // CELLS[cell])


def initial(gates: Tensor, cell: str, state: Tensor | None) -> Tensor:
    """(batch, hidden): the state a call starts from, zeros where none is given."""
    return gates.new_zeros(gates.shape[1], gates.shape[2] // CELLS[cell]) if state is None else state


def reach(h0: Tensor) -> Tensor:
    """r = max(1, max |h0|) of every sample, (batch, 1): what its states do not exceed. Their codes are of h / r."""
    return h0.abs().amax(1, keepdim=True).clamp(min=1.0) if h0.shape[1] else h0.new_ones(h0.shape[0], 1)


def state_codes(h: Tensor, r: Tensor) -> Tensor:
    """q = clamp(round_half_even(h * (127 / r)), -127, 127), in float32; NaN becomes 127."""
    return (h * (STATE_STEPS / r)).round().nan_to_num(nan=STATE_STEPS).clamp(-STATE_STEPS, STATE_STEPS)


def cell_of(node: fx.Node) -> str | None:
    """The cell whose operator the node calls; None: it calls another."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "quantflow":
        return None
    name = str(node.target._schema.name).split("::")[-1]
    cell = name.removesuffix(SUFFIX)
    return cell if name.endswith(SUFFIX) and cell in CELLS else None


def _operator(cell: str) -> Callable[..., Tensor]:
    def run(
        gates: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None, c0: Tensor | None, reverse: bool
    ) -> Tensor:
        h = initial(gates, cell, h0)
        c = initial(gates, cell, c0) if cell == "lstm" else None
        transposed = weight.t()
        return steps(cell, lambda state: state @ transposed, gates, bias, h, c, reverse)

    return run


for _cell in CELLS:
    _library.define(f"{_cell}{SUFFIX}{_SCHEMA}")
    _library.impl(f"{_cell}{SUFFIX}", _operator(_cell), "CompositeExplicitAutograd")
