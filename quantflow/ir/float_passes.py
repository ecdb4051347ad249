"""What the float graph computes of a batch, held for the stages after the one that computed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantflow.errors import DataError
from quantflow.host.memory import memory_bytes
from quantflow.host.place import CPU
from quantflow.ir.batch import Batch
from quantflow.ir.binding import HOST, bind
from quantflow.ir.graph import Graph, interpret

#: Batches of more samples than any stage looks at one by one are computed anew.
MOST_SAMPLES = 16
#: What a pass may hold: a share of the machine's memory, and no more than so many bytes.
MEMORY_SHARE, MOST_BYTES = 16, 3 << 29

OnValue = Callable[[fx.Node, Any], None]


@dataclass(frozen=True)
class _Pass:
    graph: Graph
    inputs: list[torch.Tensor]
    values: list[tuple[fx.Node, Any]]
    output: Any

    def is_of(self, graph: Graph, inputs: list[torch.Tensor]) -> bool:
        return self.graph is graph and all(
            x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(self.inputs, inputs, strict=True)
        )


class FloatPasses:
    """Runs the float graph, and has the values of the last batch where they are asked for again.

    A graph's ops are functional, so that nobody writes to a value; who is given one may not either.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        """`most_bytes`: what one pass may hold; None: what the machine's memory allows."""
        self._most_bytes = min(memory_bytes() // MEMORY_SHARE, MOST_BYTES) if most_bytes is None else most_bytes
        self._last: _Pass | None = None

    def run(self, graph: Graph, batch: Batch, on_value: OnValue | None = None) -> Any:
        """`interpret` of a batch where the graph lies, under inference mode; held if that is the CPU."""
        inputs = bind(graph, batch.args, batch.kwargs, (*HOST, graph.place.type))
        last = self._last
        if last is not None and last.is_of(graph, inputs):
            if on_value is not None:
                for node, value in last.values:
                    on_value(node, value)
            return last.output
        self.forget()
        if graph.place != CPU or batch.size > MOST_SAMPLES or not self._most_bytes:
            return interpret(graph, inputs, on_value)
        inputs = [x.clone() for x in inputs]  # a loader may use the memory of a batch for the next one
        values: list[tuple[fx.Node, Any]] = []
        held: dict[int, int] = {}
        size = 0

        def keep(node: fx.Node, value: Any) -> None:
            nonlocal size
            if size <= self._most_bytes:
                values.append((node, value))
                new = _storages(value) if node.op == "call_function" else {}
                size += sum(each for address, each in new.items() if address not in held)
                held.update(new)
                if size > self._most_bytes:
                    values.clear()
            if on_value is not None:
                on_value(node, value)

        output = interpret(graph, inputs, keep)
        if size <= self._most_bytes:
            self._last = _Pass(graph, inputs, values, output)
        return output

    def held(self, graph: Graph, batch: Batch) -> Mapping[str, Any] | None:
        """Node name → value of a batch that was just run; None where it is not held."""
        last = self._last_of(graph, batch)
        return None if last is None else {node.name: value for node, value in last.values}

    def output(self, graph: Graph, batch: Batch) -> Any:
        """The graph's output for a batch that was just run; None where it is not held."""
        last = self._last_of(graph, batch)
        return None if last is None else last.output

    def _last_of(self, graph: Graph, batch: Batch) -> _Pass | None:
        last = self._last
        if last is None:
            return None
        with suppress(DataError):  # a batch of another form
            return last if last.is_of(graph, bind(graph, batch.args, batch.kwargs)) else None
        return None

    def forget(self) -> None:
        """Let go of the values."""
        self._last = None


#: Runs the graph each time.
NOTHING_HELD = FloatPasses(0)


def _storages(value: Any) -> dict[int, int]:
    """Address → bytes of the memory behind a value."""
    storages = [x.untyped_storage() for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
