"""Constant pads in front of convolutions, which pad with what stands for 0 themselves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from quantflow.ir.program import Node, Ref
from quantflow.runtimes.triton.layers import Geometry, Layer

if TYPE_CHECKING:
    from quantflow.runtimes.triton.lower import Lowering, Step, Values

_PADS = ("constant_pad_nd.default", "pad.default")
#: What is padded (in front of, behind) each spatial dimension.
Around = tuple[list[int], list[int]]


def surrounded(node: Node, around: Around | None) -> Geometry:
    """A convolution's geometry on what its padded operand is without that."""
    a = node.attrs
    if around is None:
        return Geometry(a["stride"], a["padding"], a["dilation"], a["groups"])
    front, behind = ([p + more for p, more in zip(a["padding"], side, strict=True)] for side in around)
    return Geometry(a["stride"], front, a["dilation"], a["groups"], behind)


def around_of(node: Node, dims: int, fill: float) -> Around | None:
    """What a node pads its operand with, if that is the fill around up to `dims` last dimensions, and nothing else."""
    if (
        node.target not in ("constant_pad_nd.default", "pad.default")
        or node.kwargs
        or not isinstance(node.args[0], Ref)
    ):
        return None
    _, pads, *rest = node.args
    if node.target == "pad.default":
        if rest and rest[0] != "constant":
            return None
        rest = rest[1:]
    value = rest[0] if rest and rest[0] is not None else 0
    known = isinstance(value, (int, float)) and all(type(p) is int and p >= 0 for p in pads)
    if not known or value != fill or len(pads) > 2 * dims:
        return None
    missing = [0] * (dims - len(pads) // 2)
    return [*missing, *pads[-2::-2]], [*missing, *pads[::-2]]


def join_pads(lowering: Lowering, made: list[Step | None]) -> None:
    """Convolutions take codes as they are before they are padded with their zero point."""
    from quantflow.runtimes.triton.lower import Step

    for index, node in enumerate(lowering.program.nodes):
        if node.op != "conv":
            continue
        x, residual = node.args
        padded = lowering.maker(x.name)
        if padded is None or lowering.only_reader(x.name) != index or lowering.layers[index].are_patches:
            continue
        pad = lowering.program.nodes[padded]
        around = around_of(pad, len(node.attrs["stride"]), lowering.qparams(x.name).zero_point)
        if pad.op != "shape" or around is None:
            continue
        source, added = pad.args[0].name, None if residual is None else residual.name
        layer = lowering.layer(node, around=around)
        run = partial(_convolved, layer, source, added, lowering.halves.of(node))
        made[padded] = None
        reads = (source,) if added is None else (source, added)
        made[index] = Step((padded, index), tuple(dict.fromkeys(reads)), (node.output,), run)


def _convolved(layer: Layer, x: str, residual: str | None, held: Any, values: Values) -> tuple[Any, ...]:
    return (layer(values[x], None if residual is None else values[residual], held),)
