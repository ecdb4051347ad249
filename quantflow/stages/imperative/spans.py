"""The nodes of a program that a layer is: its int8 units and the float ops of its own around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from quantflow.errors import QuantflowError
from quantflow.ir.binding import bind
from quantflow.ir.program import Program, Ref
from quantflow.runtimes.specification import run_node

if TYPE_CHECKING:
    from quantflow.stages.imperative.calls import UnitCall


#: What lies around int8 units: float ops, sizes, what moves codes, and what makes them.
_AROUND = ("aten", "size", "shape", "quantize", "dequantize")


@dataclass(frozen=True)
class Span:
    """Nodes [first, last) of a program.

    Attributes:
        reads: the one tensor that they read from outside, beside a mask.
        mask: which of its values attention may look at; empty: none.
        numbers: the sizes that they read.
        gives: what the last one computes.
    """

    first: int
    last: int
    reads: str
    mask: str
    numbers: tuple[str, ...]
    gives: str


@dataclass(frozen=True)
class Layer:
    """A layer as one call: `run` takes `reads`, the input first, and computes `units` with the float ops between."""

    units: tuple[UnitCall, ...]
    reads: tuple[str, ...]
    run: Callable[..., torch.Tensor | None]


def span(program: Program, indices: Sequence[int]) -> Span | None:
    """The nodes of the module in which these units' layers are, if they are one run with one input and one result."""
    nodes = program.nodes
    owner = _owner([nodes[index].name for index in indices])
    own = [index for index, node in enumerate(nodes) if owner and node.name.startswith(f"{owner}.")]
    if not own or not own[0] <= min(indices) <= max(indices) <= own[-1]:
        return None
    first, last = own[0], own[-1] + 1
    while nodes[last - 1].op == "quantize":  # of the layer behind it
        last -= 1
    if first and nodes[first - 1].op == "quantize" and nodes[first - 1].output in nodes[first].refs():
        first -= 1  # of its own input
    if {index for index in range(first, last) if nodes[index].op not in _AROUND} != set(indices):
        return None
    inside = {node.output for node in nodes[first:last]}
    outside = dict.fromkeys(name for node in nodes[first:last] for name in node.refs() if name not in inside)
    sizes = {node.output for node in nodes if node.op == "size"}
    numbers = tuple(name for name in outside if name in sizes)
    masks = [name for name in outside if _is_mask(program, name, first, last)]
    reads = [name for name in outside if name not in sizes and name not in masks]
    if len(reads) != 1 or len(masks) > 1:
        return None
    return Span(first, last, reads[0], masks[0] if masks else "", numbers, nodes[last - 1].output)


def _owner(names: Sequence[str]) -> str:
    """The innermost module that holds all of these layers."""
    paths = [name.split(".")[:-1] for name in names]
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _is_mask(program: Program, name: str, first: int, last: int) -> bool:
    """Whether only attention reads a value, as its mask."""
    readers = [node for node in program.nodes[first:last] if name in node.refs()]
    return all(
        node.target == "scaled_dot_product_attention.default"
        and node.args[3:4] == (Ref(name),)
        and list(node.refs()).count(name) == 1
        for node in readers
    )


def sizes_of(
    program: Program, found: Span, x: torch.Tensor, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[str, int], ...] | None:
    """The span's numbers in a call of the program's model on (args, kwargs), in which x is what it reads.

    None: they do not follow from that alone.
    """
    if not found.numbers:
        return ()
    held: dict[str, Any] = {found.reads: x}
    try:
        inputs = bind(program, args, kwargs or {})
        held |= {item.name: value for item, value in zip(program.inputs, inputs, strict=True)}
        for name in found.numbers:
            _compute(program, name, held)
    except QuantflowError:  # not a call of the program's; the module's own code may well take it
        return None
    sizes = [(name, held.get(name)) for name in found.numbers]
    return tuple(sizes) if all(type(size) is int for _, size in sizes) else None  # type: ignore[arg-type]


def _compute(program: Program, name: str, held: dict[str, Any]) -> None:
    """Put a size into `held`, if it follows from what is there."""
    node = next((node for node in program.nodes if node.output == name), None)
    if name in held or node is None or node.op != "size":
        return
    for each in node.refs():
        _compute(program, each, held)
    if all(each in held for each in node.refs()):
        held[name] = run_node(program, node, held)
