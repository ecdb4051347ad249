"""The shapes of a whole program, as far as they are known: what can't be computed is refused before it is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.errors import ArtifactError
from quantflow.host.memory import memory_bytes
from quantflow.ir.graph import SIZE_FUNCTIONS
from quantflow.ir.op_shapes import ANY, COMPUTED, Dims, Shape, broadcast, check_size, convolved, matmul, result
from quantflow.ir.op_table import MAX_ITEMS, bound, row_of
from quantflow.ir.ops import LINEAR_OPS
from quantflow.ir.program import Node, Program, Ref, TensorRef
from quantflow.ir.recurrence import CELLS

#: Rules whose result lies in its operand's memory.
_VIEWS = (
    "reshape", "flatten", "unflatten", "permute", "transpose", "t", "mt", "slice", "narrow", "select", "squeeze",
    "unsqueeze", "expand", "split", "chunk", "unbind", "unfold", "broadcast_all", "meshgrid", "as_other", "same",
)  # fmt: skip
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Need:
    """The memory that a program's values take at once, at least: `bytes`, while `place` is computed."""

    bytes: int
    place: str


def check_shapes(program: Program, inputs: Sequence[Dims] | None = None) -> Need:
    """Walk the program with the shapes of its inputs.

    Args:
        inputs: their sizes, of a program that was walked without before: the nodes' arguments are not looked at again.
            None: those of the program, where names and the batch vary.

    Raises:
        ArtifactError: names the node and what about its arguments is not legal.
    """
    given = [tuple(s if isinstance(s, int) else None for s in i.shape) for i in program.inputs]
    dims = given if inputs is None else inputs
    values: dict[str, Any] = {i.name: Shape(sizes) for i, sizes in zip(program.inputs, dims, strict=True)}
    for item in program.inputs:
        try:
            check_size(values[item.name])
        except ValueError as error:
            raise ArtifactError(f"program.json: input {item.name!r}: its shape {error}") from error
    frees, alive, most = program.last_uses(), {}, Need(0, "")
    for index, node in enumerate(program.nodes):
        where = f"program.json: node {index}, layer {node.name} ({node.target or node.op})"
        try:
            values[node.output] = found = _of_node(program, node, values, where if inputs is None else None)
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}") from error
        size = 1 if node.output in program.values else _FLOAT_BYTES
        alive[node.output] = 0 if _is_view(node) else size * _elements(found)
        if (total := sum(alive.values())) > most.bytes:
            most = Need(total, where)
        for name in frees.get(index, ()):
            alive.pop(name, None)
            values.pop(name, None)
    return most


def _elements(found: Any) -> int:
    if isinstance(found, list):
        return sum(map(_elements, found))
    return found.elements if isinstance(found, Shape) and found != ANY else 0


def _is_view(node: Node) -> bool:
    row = row_of(node.target) if node.target else None
    return node.op in ("dequantize", "size") or (row is not None and row.shape in _VIEWS and row.shape != "same")


def _of_node(program: Program, node: Node, values: Mapping[str, Any], where: str | None) -> Any:
    """`where`: the place to name when an argument is not legal; None: all of them are."""
    args = [_known(program, arg, values) for arg in node.args]
    if node.op in ("quantize", "dequantize", "clamp"):
        return args[0] if isinstance(args[0], Shape) else ANY
    if node.op in LINEAR_OPS:
        return _of_linear(program, node, args)
    if node.op in ("matmul", "add", "mul"):
        a, b = (arg.dims if isinstance(arg, Shape) else None for arg in args)
        if a is None or b is None:
            return ANY
        found = Shape(matmul(a, b) if node.op == "matmul" else broadcast([a, b]))
        check_size(found)
        return found
    if node.op == "recurrence":
        return _of_recurrence(program, node, args)
    if node.target == "getitem":
        return _item(args)
    if node.target in SIZE_FUNCTIONS:
        return None
    row = row_of(node.target)
    if row is None:
        return None  # an operator that the caller named
    if where is not None:
        bound(row, node.args, node.kwargs, where)
    names = [argument.name for argument in row.arguments if not argument.is_keyword]
    given = dict(zip(names, args, strict=False))
    given |= {name: _known(program, arg, values) for name, arg in node.kwargs.items()}
    return result(row, given)


def _known(program: Program, argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        found = values[argument.name]
        return COMPUTED if found is None else found
    if isinstance(argument, TensorRef):
        return Shape(tuple(program.tensors[argument.name].shape))
    if isinstance(argument, (list, tuple)):
        return [_known(program, item, values) for item in argument]
    return argument


def _item(args: Sequence[Any]) -> Any:
    if len(args) != 2:
        raise ValueError(f"takes a list and an index, has {len(args)} arguments")
    items, index = args
    if not isinstance(items, list) or not isinstance(index, int):
        return None
    if not -len(items) <= index < len(items):
        raise ValueError(f"takes number {index} of {len(items)}")
    return items[index]


def _of_linear(program: Program, node: Node, args: Sequence[Any]) -> Any:
    dims = args[0].dims if isinstance(args[0], Shape) else None
    weight = tuple(program.tensors[node.attrs["weight"]].shape)
    if dims is None:
        return ANY
    if node.op == "conv":
        if len(dims) != len(weight):
            raise ValueError(f"takes {len(weight)} dimensions, gets {len(dims)}")
        out = convolved(dims, weight, node.attrs)
    else:
        if not dims or dims[-1] not in (None, weight[1]):
            raise ValueError(f"takes {weight[1]} features, gets {dims[-1] if dims else 'none'}")
        out = (*dims[:-1], weight[0])
    residual = args[1].dims if isinstance(args[1], Shape) else None
    found = Shape(out if residual is None else broadcast([out, residual]))
    check_size(found)
    return found


def _of_recurrence(program: Program, node: Node, args: Sequence[Any]) -> Any:
    weight = program.tensors[node.attrs["weight"]]
    rows, hidden = weight.shape
    gates = args[0].dims if isinstance(args[0], Shape) else None
    if gates is None:
        return ANY
    if len(gates) != 3 or gates[2] not in (None, rows):
        raise ValueError(f"takes gates (steps, batch, {rows}), gets {gates}")
    for state in args[1:]:
        if isinstance(state, Shape) and state.dims is not None:
            wanted = (gates[1], hidden)
            if len(state.dims) != 2 or any(
                None not in (a, b) and a != b for a, b in zip(state.dims, wanted, strict=True)
            ):
                raise ValueError(f"takes a first state {wanted}, gets {state.dims}")
    assert node.attrs["cell"] in CELLS
    steps = gates[0]
    if steps is not None and steps > MAX_ITEMS:
        raise ValueError(f"takes {steps} steps; {MAX_ITEMS} are possible")
    return Shape((None if steps is None else steps + (node.attrs["cell"] == "lstm"), gates[1], hidden))


class Fits:
    """Whether a program can be computed on inputs of certain sizes, asked once for each set of them."""

    #: Sets of sizes that are remembered.
    KEPT = 1024

    def __init__(self, program: Program) -> None:
        self._program = program
        self._seen: set[tuple[torch.Size, ...]] = set()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raises:
        ArtifactError: it can't be, or its values need more memory than there is.
        """
        sizes = tuple(x.shape for x in inputs)
        if sizes in self._seen:
            return
        require_memory(check_shapes(self._program, sizes))
        if len(self._seen) >= self.KEPT:
            self._seen.clear()
        self._seen.add(sizes)


def require_memory(need: Need) -> None:
    """Raises:
    ArtifactError: a program's values need more memory than there is.
    """
    if need.bytes > memory_bytes():
        found, there = (f"{count / (1 << 30):.1f} GiB" for count in (need.bytes, memory_bytes()))
        raise ArtifactError(f"{need.place}: the program's values need {found} there; this machine has {there}")
