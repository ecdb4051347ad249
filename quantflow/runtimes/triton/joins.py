"""Steps of a whole run that compute several nodes: a framed stem, codes before moves, a layer norm with codes, linears
of the same codes; attention is `attending`'s, and pads are those of `pads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from quantflow.ir.program import Node, Ref, TensorRef, referenced_values
from quantflow.numerics.affine import QParams
from quantflow.runtimes.triton import operators, rows
from quantflow.runtimes.triton.attending import join_attention, moves_of
from quantflow.runtimes.triton.cards import launch_options
from quantflow.runtimes.triton.layers import Layer, Stem
from quantflow.runtimes.triton.layouts import MOVES, Move, placed
from quantflow.runtimes.triton.pads import around_of, join_pads, surrounded

if TYPE_CHECKING:
    from quantflow.runtimes.triton.lower import Lowering, Step, Values

#: The longest row that one program of the layer norm holds.
_LONGEST_ROW = 8192


@dataclass(frozen=True)
class Placed:
    """Codes that lie where the moves behind them would put them."""

    codes: Tensor


@dataclass(frozen=True)
class Framed:
    """Codes of images in a frame of zero points, for a `Stem`."""

    codes: Tensor
    height: int
    width: int


def joined(lowering: Lowering) -> list[Step]:
    """The steps of a whole run, in order."""
    made: list[Step | None] = list(lowering.whole)
    _join_siblings(lowering, made)
    join_pads(lowering, made)
    for index, node in enumerate(lowering.program.nodes):
        if node.op == "quantize" and node.output not in lowering.outputs and isinstance(node.args[0], Ref):
            _join_stem(lowering, made, index) or _join_moves(lowering, made, index)
    return [step for step in made if step is not None]


def chain_before(lowering: Lowering, name: str) -> tuple[str, list[int]]:
    """(what a value is before it is only moved, the moves); nobody else reads what lies between."""
    moves: list[int] = []
    while (maker := lowering.maker(name)) is not None:
        node = lowering.program.nodes[maker]
        moved = node.op == "aten" and node.target in MOVES and not node.kwargs and isinstance(node.args[0], Ref)
        if not moved or lowering.only_reader(name) is None:
            break
        moves.insert(0, maker)
        name = node.args[0].name
    return name, moves


# -- linears of the same codes


def _join_siblings(lowering: Lowering, made: list[Step | None]) -> None:
    """One product for linears that read the same codes and write floats, such as those of queries, keys and values."""
    from quantflow.runtimes.triton.lower import Step

    program = lowering.program
    groups: dict[Any, list[int]] = {}
    for index, node in enumerate(program.nodes):
        if (
            node.op == "linear"
            and node.args[1] is None
            and node.epilogue is None
            and node.output not in lowering.outputs
        ):
            value = program.values.get(node.output)
            if value is None or value.qparams is None:
                groups.setdefault((node.args[0].name, lowering.halves.of(node)), []).append(index)
    for (name, held), group in groups.items():
        if len(group) < 2:
            continue
        layers = [lowering.layers[i] for i in group]
        layer = layers[0].beside(layers[1:])
        run = partial(_split, layer, name, held, [each.out_channels for each in layers])
        made[group[0]] = Step(tuple(group), (name,), tuple(program.nodes[i].output for i in group), run)
        for i in group[1:]:
            made[i] = None


def _split(layer: Layer, name: str, held: torch.dtype, sizes: list[int], values: Values) -> tuple[Tensor, ...]:
    return layer(values[name], None, held).split(sizes, -1)


# -- a stem


def _join_stem(lowering: Lowering, made: list[Step | None], index: int) -> bool:
    """Frame an image's codes as they are made, where a stem alone reads them."""
    from quantflow.runtimes.triton.lower import Step

    quantized = lowering.program.nodes[index]
    reader = lowering.only_reader(quantized.output)
    if reader is None:
        return False
    node = lowering.program.nodes[reader]
    if node.op != "conv" or node.args[1] is not None or node.args[0].name != quantized.output:
        return False
    (x,), nodes, around = quantized.args, (index,), None
    padded = lowering.maker(x.name)
    if padded is not None and lowering.only_reader(x.name) == index and made[padded] is lowering.whole[padded]:
        around = around_of(lowering.program.nodes[padded], len(node.attrs["stride"]), 0)
    geometry = surrounded(node, around)
    if not Stem.fits(lowering.program.tensors[node.attrs["weight"]], geometry) or lowering.layers[reader].are_patches:
        return False
    layer = lowering.layer(node, Stem, around)
    assert isinstance(layer, Stem)
    q = layer.finish.x
    if padded is not None and around is not None:
        x, nodes, made[padded] = lowering.program.nodes[padded].args[0], (padded, index), None

    def framed(values: Values) -> tuple[Any, ...]:
        image = lowering.value(x, values)
        if image.dim() != 4 or not image.numel():
            return (operators.quantize(image, q, True),)
        height, width = image.shape[2:]
        padding = (layer.padding[1], layer.padding[2])
        return (Framed(operators.quantize_framed(image, q, layer.frame(height, width), padding), height, width),)

    def convolved(values: Values) -> tuple[Any, ...]:
        codes = values[quantized.output]
        if isinstance(codes, Framed):
            return (layer.on_framed(codes.codes, codes.height, codes.width),)
        return (layer(codes),)

    made[index] = Step(nodes, (x.name,), (quantized.output,), framed)
    made[reader] = Step((reader,), (quantized.output,), (node.output,), convolved)
    return True


# -- codes before they are moved


def _join_moves(lowering: Lowering, made: list[Step | None], index: int) -> bool:
    """Quantize before what only moves numbers, a quarter of the bytes; behind a layer norm, in the same kernel."""
    from quantflow.runtimes.triton.lower import Step

    program = lowering.program
    quantized = program.nodes[index]
    q = lowering.qparams(quantized.output)
    source, moves = chain_before(lowering, quantized.args[0].name)
    if join_attention(lowering, made, index, source, moves):
        return True
    norm = lowering.maker(source)
    raw = f"{quantized.output}.before"
    chain = [program.nodes[i] for i in moves]
    channels_last = lowering.wants_channels_last(quantized.output)
    fused = norm is not None and _join_norm(lowering, made, norm, raw, q, () if channels_last else chain)
    if not moves and not fused:
        return False

    def run(values: Values) -> tuple[Any, ...]:
        x = values[raw] if fused else operators.quantize(values[source], q)
        if isinstance(x, Placed):
            return (x.codes,)
        for node in chain:
            x = lowering.call_aten(node, {**_sizes(node, values), node.args[0].name: x})
        return (x if channels_last else x.contiguous(),)

    reads = [name for node in chain for name in referenced_values((node.args[1:], tuple(node.kwargs.values())))]
    for i in moves:
        made[i] = None
    first = raw if fused else source
    made[index] = Step((*moves, index), tuple(dict.fromkeys([first, *reads])), (quantized.output,), run)
    return True


def _sizes(node: Node, values: Values) -> Mapping[str, Any]:
    return {name: values[name] for name in referenced_values((node.args[1:], tuple(node.kwargs.values())))}


# -- a layer norm


def _join_norm(
    lowering: Lowering, made: list[Step | None], index: int, raw: str, q: QParams, chain: Sequence[Node]
) -> bool:
    """Let the layer norm write codes, and add what an addition in front of it would.

    Args:
        chain: moves behind it; where strides can say what they do, codes are written as they would lie.
    """
    from quantflow.runtimes.triton.lower import Step

    program = lowering.program
    node = program.nodes[index]
    if (
        node.op != "aten"
        or node.target != "layer_norm.default"
        or node.kwargs
        or made[index] is not lowering.whole[index]
    ):
        return False
    x, shape, weight, bias, *rest = (*node.args, *([None] * (4 - len(node.args))))
    plain = isinstance(x, Ref) and isinstance(weight, TensorRef) and isinstance(bias, TensorRef) and len(shape) == 1
    if not plain or lowering.tensors[weight.name].dtype is not torch.float32:
        return False
    epsilon = float(rest[0]) if rest else 1e-5
    operands: Sequence[Any] = (x,)
    addition = lowering.maker(x.name)
    if addition is not None and _is_sum(program.nodes[addition]) and made[addition] is lowering.whole[addition]:
        operands = program.nodes[addition].args
        # Who reads the sum between the addition and here would not find it.
        if any(reader < index for reader in lowering.readers(x.name)):
            operands = (x,)
    adds = len(operands) == 2
    keeps_total = adds and lowering.only_reader(x.name) is None
    keeps_normal = lowering.only_reader(node.output) is None
    gain, shift = lowering.tensors[weight.name], lowering.tensors[bias.name]
    held = lowering.halves.of(node)

    def run(values: Values) -> tuple[Any, ...]:
        given = [lowering.value(operand, values) for operand in operands]
        moves = moves_of(lowering, chain, values)
        total, normal, codes = normalized(given, gain, shift, epsilon, q, keeps_total, keeps_normal, held, moves)
        return (*([total] if keeps_total else []), *([normal] if keeps_normal else []), codes)

    writes = (*([x.name] if keeps_total else []), *([node.output] if keeps_normal else []), raw)
    nodes: tuple[int, ...] = (index,)
    if adds and addition is not None:
        made[addition] = None
        nodes = (addition, index)
    reads = [*referenced_values(operands), *referenced_values([node.args[1:] for node in chain])]
    made[index] = Step(nodes, tuple(dict.fromkeys(reads)), writes, run)
    return True


def _is_sum(node: Node) -> bool:
    return (
        node.op == "aten" and node.target == "add.Tensor" and not node.kwargs and len(node.args) == 2
        and all(isinstance(a, (Ref, TensorRef)) for a in node.args)
    )  # fmt: skip


def normalized(
    given: Sequence[Tensor], weight: Tensor, bias: Tensor, epsilon: float, q: QParams, keeps_total: bool,
    keeps_normal: bool, held: torch.dtype = torch.float32, moves: Sequence[Move] = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | Placed]:  # fmt: skip
    """(the sum, its layer norm, codes of that); None for what is not kept.

    Args:
        given: one tensor, or two that are added.
        held: the type of the sum and the norm.
        moves: what happens to the codes; `Placed` codes lie as they would behind that.
    """
    legal = all(t.dtype in (torch.float32, held) for t in given)
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    x, added = given[0].expand(shape), given[-1].expand(shape)
    if not legal or not _fits(x):
        total = (x if len(given) == 1 else x + added).to(torch.float32)
        normal = torch.layer_norm(total, weight.shape, weight, bias, epsilon)
        return total.to(held), normal.to(held), operators.quantize(normal, q, False)
    width = x.shape[-1]
    (first, inner, *strides), (second, _, *others) = (_rows(t) for t in (x, added))
    total = torch.empty(x.shape, dtype=held, device=x.device) if keeps_total else x
    normal = torch.empty(x.shape, dtype=held, device=x.device) if keeps_normal else x
    where = placed(x.shape, moves) if moves and x.dim() == 3 else None
    if where is not None and where[1][-1] != 1:
        where = None
    codes = torch.empty(x.shape if where is None else where[0], dtype=q.torch_dtype, device=x.device)
    written = [inner * width, width] if where is None else where[1][:2]
    if codes.numel():
        rows.layer_norm[(codes.numel() // width,)](
            first, second, weight, bias, total, normal, codes, inner, width, *strides, *others, *written, epsilon,
            *operators.coding(q), ADDS=len(given) == 2, WRITES_TOTAL=keeps_total, WRITES_NORMAL=keeps_normal,
            BLOCK=triton.next_power_of_2(width), **launch_options(x.device),
        )  # fmt: skip
    return total, normal, codes if where is None else Placed(codes)


def _fits(x: Tensor) -> bool:
    return x.dim() > 0 and 0 < x.shape[-1] <= _LONGEST_ROW


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x or a copy, inner rows, stride of an outer row, of an inner one), the numbers of a row side by side."""
    if x.stride(-1) != 1 or x.dim() > 3:
        x = x.contiguous()
    if x.dim() == 3:
        return x, x.shape[1], x.stride(0), x.stride(1)
    return x, x.numel() // x.shape[-1] or 1, 0, x.shape[-1] if x.dim() != 2 else x.stride(0)
