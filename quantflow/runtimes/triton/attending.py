"""Attention in half precision as one step of a whole run: from rows that linears write to codes that a linear reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from quantflow.ir.program import Node, Ref, TensorRef, referenced_values
from quantflow.numerics.affine import QParams
from quantflow.runtimes.triton.attention import attention
from quantflow.runtimes.triton.cards import Card, launch_options
from quantflow.runtimes.triton.devices import is_interpreting
from quantflow.runtimes.triton.layouts import Move, dims_of, moved, placed, sizes_of, strides_of
from quantflow.runtimes.triton.operators import coding
from quantflow.runtimes.triton.tuner import Way

if TYPE_CHECKING:
    from quantflow.runtimes.triton.lower import Lowering, Step, Values

#: Queries and keys of a block, warps, stages.
SAFE: Way = (32, 32, 4, 1)
_WAYS: list[Way] = [
    (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 3), (128, 64, 4, 2), (128, 32, 4, 3), (128, 64, 8, 3),
    (64, 128, 4, 2), (16, 64, 4, 2), (16, 128, 4, 2),
]  # fmt: skip
#: The widest head that one program holds.
_WIDEST = 256


@dataclass(frozen=True)
class Operand:
    """A value and the moves behind it."""

    source: str
    moves: tuple[Node, ...]

    def view(self, lowering: Lowering, values: Values) -> Tensor:
        """The moved value, without a copy where strides can say it, its last dimension dense."""
        x: Tensor = lowering.value(Ref(self.source), values)
        behind = moved(dims_of(x.shape, x.stride()), moves_of(lowering, self.moves, values))
        strides = None if behind is None else strides_of(behind[0])
        if behind is not None and strides is not None:
            x = x.as_strided(sizes_of(behind[0]), strides, x.storage_offset() + behind[1])
        else:
            for node in self.moves:
                x = lowering.call_aten(node, {**values, node.args[0].name: x})
        return x if x.stride(-1) == 1 else x.contiguous()


def moves_of(lowering: Lowering, chain: Sequence[Node], values: Values) -> list[Move]:
    """What a chain of moves does for the sizes at hand."""
    return [(node.target, lowering.value(node.args[1:], values)) for node in chain]


def join_attention(lowering: Lowering, made: list[Step | None], index: int, source: str, after: Sequence[int]) -> bool:
    """Let attention write the codes that node `index` quantizes, behind the moves `after` of the value `source`."""
    from quantflow.runtimes.triton.joins import chain_before
    from quantflow.runtimes.triton.lower import Step

    program, at = lowering.program, lowering.maker(source)
    if at is None or made[at] is not lowering.whole[at] or lowering.only_reader(source) is None:
        return False
    node = program.nodes[at]
    settings = _settings(node)
    if settings is None or not lowering.halves.computes(node):
        return False
    operands, dead = [], []
    for argument in settings["operands"]:
        if not isinstance(argument, Ref):
            return False
        name, chain = chain_before(lowering, argument.name)
        operands.append(Operand(name, tuple(program.nodes[i] for i in chain)))
        dead += chain
    mask = settings["mask"]
    quantized = program.nodes[index]
    q = lowering.qparams(quantized.output)
    behind = [program.nodes[i] for i in after]
    layer = Attention(q, settings["scale"], settings["is_causal"], lowering.halves.held, lowering.card)

    def run(values: Values) -> tuple[Any, ...]:
        given = [operand.view(lowering, values) for operand in operands]
        looked = None if mask is None else lowering.value(mask, values)
        moves = moves_of(lowering, behind, values)
        codes = layer(*given, looked, moves)
        if codes is None:
            x = lowering.call_half(node, dict(zip((r.name for r in node.args[:3]), given, strict=True)) | dict(values))
            for move in behind:
                x = lowering.call_aten(move, {**values, move.args[0].name: x})
            codes = layer.quantized(x)
        return (codes,)

    read = [operand.source for operand in operands]
    read += referenced_values((mask, [n.args[1:] for operand in operands for n in operand.moves]))
    read += referenced_values([n.args[1:] for n in behind])
    for i in (*dead, at, *after):
        made[i] = None
    made[index] = Step((*dead, at, *after, index), tuple(dict.fromkeys(read)), (quantized.output,), run)
    return True


def _settings(node: Node) -> Mapping[str, Any] | None:
    """{"operands", "mask", "scale", "is_causal"} of an attention that the kernel computes; None: it does not."""
    if node.op != "aten" or node.target != "scaled_dot_product_attention.default":
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("dropout_p", 0.0) or given.get("enable_gqa", False) or not isinstance(scale, (float, int, type(None))):
        return None
    if not isinstance(mask, (Ref, TensorRef, type(None))):
        return None
    return {
        "operands": [given[name] for name in names[:3]], "mask": mask, "scale": scale,
        "is_causal": bool(given.get("is_causal", False)),
    }  # fmt: skip


class Attention:
    """softmax(q k^T * scale + mask) v, coded. Safe to call from several threads."""

    def __init__(self, out: QParams, scale: float | None, is_causal: bool, held: torch.dtype, card: Card) -> None:
        self.out, self.scale, self.is_causal, self.held, self.card = out, scale, is_causal, held, card

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, moves: Sequence[Move]) -> Tensor | None:
        """
        Args:
            q, k, v: (*, length, width), of the held type or float32.
            mask: broadcasts to (*, queries, keys); bytes or floats.
            moves: what happens to the result before it is read.

        Returns:
            Codes behind the moves, dense; None: the kernel can't compute that.
        """
        if not 3 <= q.dim() <= 4 or not q.dim() == k.dim() == v.dim() or not q.numel() or not k.numel():
            return None
        width, v_width = q.shape[-1], v.shape[-1]
        if max(width, v_width) > _WIDEST or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1]:
            return None
        shape = (*q.shape[:-1], v_width)
        where = placed(shape, moves)
        if where is None or (v_width > 1 and where[1][-1] != 1):
            return None
        q, k, v = (x if x.dtype is self.held else x.to(self.held) for x in (q, k, v))
        kind = 0 if mask is None else 1 if mask.dtype is torch.bool else 2
        looked = q if mask is None else mask.expand(*q.shape[:-1], k.shape[-2])
        strides = [_strides(x) for x in (q, k, v)]
        looked_at = [0, 0, 0, 0] if mask is None else [*_strides(looked), looked.stride(-1)]
        if kind == 1:
            looked = looked.view(torch.uint8)
        codes = torch.empty(where[0], dtype=self.out.torch_dtype, device=q.device)
        written = where[1] if len(where[1]) == 4 else [0, *where[1]]
        heads = q.shape[1] if q.dim() == 4 else q.shape[0]
        count, queries, keys = math.prod(q.shape[:-2]), q.shape[-2], k.shape[-2]
        scale = width**-0.5 if self.scale is None else self.scale

        def run(way: Way) -> None:
            bm, bn, warps, stages = way
            attention[triton.cdiv(queries, bm), count](
                q, k, v, looked, codes, queries, keys, heads, *strides[0], *strides[1], *strides[2], *looked_at,
                *written[:3], scale * math.log2(math.e), *coding(self.out), MASK=kind, HAS_ROWS=looked_at[2] != 0,
                IS_CAUSAL=self.is_causal,
                IN_FLOAT32=is_interpreting(), WIDTH=width, V_WIDTH=v_width,
                BD=max(16, triton.next_power_of_2(width)), BV=max(16, triton.next_power_of_2(v_width)),
                BM=bm, BN=bn, num_warps=warps, num_stages=stages,
                **launch_options(q.device),
            )  # fmt: skip

        if self.card.multiprocessors == 0:
            run(SAFE)
        else:
            key = f"attention {count}x{queries}x{keys}x{width} {kind}{self.is_causal:d} {self.held}"
            run(self.card.tuner.way(key, partial(_ways, queries), run))
        return codes

    def quantized(self, x: Tensor) -> Tensor:
        """Codes of a result that the kernel did not compute."""
        from quantflow.runtimes.triton.operators import quantize

        return quantize(x, self.out, False)


def _ways(queries: int) -> list[Way]:
    return [way for way in _WAYS if way[0] <= max(16, triton.next_power_of_2(queries))]


def _strides(x: Tensor) -> list[int]:
    """Of (batch, head, row)."""
    return list(x.stride()[:-1]) if x.dim() == 4 else [0, *x.stride()[:-1]]
