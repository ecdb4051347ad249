"""Moves as what they make of sizes and strides, against PyTorch's."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from quantflow.runtimes.triton.layouts import dims_of, moved, placed, sizes_of, strides_of


def moves_of(seed: int) -> tuple[torch.Tensor, list[tuple[str, list[Any]]], torch.Tensor]:
    """(a tensor, moves, what PyTorch makes of them)."""
    pick = random.Random(seed)
    shape = [pick.choice((1, 2, 3, 4, 6)) for _ in range(pick.randint(1, 4))]
    x = torch.arange(math.prod(shape)).reshape(shape)
    y, moves = x, []
    for _ in range(pick.randint(1, 5)):
        op = pick.choice(("transpose.int", "permute.default", "reshape.default", "select.int", "squeeze.dim",
                          "unsqueeze.default", "flatten.using_ints", "contiguous.default"))  # fmt: skip
        dims = y.dim()
        if op in ("transpose.int", "select.int", "squeeze.dim", "permute.default") and not dims:
            continue
        args: list[Any] = []
        if op == "transpose.int":
            args = [pick.randrange(-dims, dims), pick.randrange(dims)]
        elif op == "permute.default":
            args = [pick.sample(range(dims), dims)]
        elif op == "reshape.default":
            sizes, rest = [], y.numel()
            while rest > 1 and len(sizes) < 4:
                size = pick.choice([n for n in range(1, rest + 1) if rest % n == 0])
                sizes.append(size)
                rest //= size
            args = [[*sizes, pick.choice((rest, -1))]]
        elif op == "select.int":
            d = pick.randrange(dims)
            args = [d, pick.randrange(-y.shape[d], y.shape[d])]
        elif op == "squeeze.dim":
            args = [pick.randrange(dims)]
        elif op == "unsqueeze.default":
            args = [pick.randrange(-1, dims + 1)]
        elif op == "flatten.using_ints":
            args = pick.choice(([], [0], [0, -1]))
        name, _, overload = op.partition(".")
        y = getattr(getattr(torch.ops.aten, name), overload)(y, *args)
        moves.append((op, args))
    return x, moves, y


def test_strides_say_what_moves_do() -> None:
    said = 0
    for seed in range(600):
        x, moves, expected = moves_of(seed)
        behind = moved(dims_of(x.shape, x.stride()), moves)
        if behind is None:
            continue
        assert sizes_of(behind[0]) == list(expected.shape), moves
        strides = strides_of(behind[0])
        if strides is not None:
            said += 1
            assert torch.equal(x.as_strided(expected.shape, strides, behind[1]), expected), (x.shape, moves)
    assert said > 300


def test_a_tensor_is_written_where_the_moves_would_put_it() -> None:
    placed_ones = 0
    for seed in range(600):
        x, moves, expected = moves_of(seed)
        where = placed(x.shape, moves)
        if where is None:
            continue
        placed_ones += 1
        sizes, strides = where
        written = torch.full(sizes, -1)
        written.as_strided(x.shape, strides).copy_(x)
        assert torch.equal(written, expected), (x.shape, moves)
    assert placed_ones > 150


@pytest.mark.parametrize("moves", [[("slice.Tensor", [0, 1, 2])], [("roll.default", [[1], [0]])]])
def test_what_strides_can_not_say_is_left_alone(moves: list[tuple[str, list[Any]]]) -> None:
    assert moved(dims_of((4, 3), (3, 1)), moves) is None
    assert placed((4, 3), moves) is None


def test_the_heads_of_an_attention_with_tokens_first() -> None:
    """Batch and heads become one dimension on the way, which no view of a packed row can be."""
    length, batch, heads, width = 5, 3, 4, 8
    x = torch.arange(length * batch * 3 * heads * width).reshape(length, batch, 3, heads * width)
    moves = [("select.int", [2, 1]), ("reshape.default", [[length, batch * heads, width]]), ("transpose.int", [0, 1]),
             ("reshape.default", [[batch, heads, length, width]])]  # fmt: skip
    behind = moved(dims_of(x.shape, x.stride()), moves)
    assert behind is not None
    strides = strides_of(behind[0])
    assert strides is not None
    expected = x.select(2, 1).reshape(length, batch * heads, width).transpose(0, 1).reshape(batch, heads, length, width)
    assert torch.equal(x.as_strided(expected.shape, strides, behind[1]), expected)
