"""A sequence of launches recorded once per set of input shapes, and launched as one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantflow.ir.structure import replaced
from quantflow.runtimes.triton.cards import Card, own_scratch

#: Recorded sets of input shapes that a program keeps, each with memory of its own; the least recently used goes first.
GRAPHS = 16
#: One that was replayed in so many calls before this one stays: recording another in its place, and it again in turn,
#: would take far longer than running what is new as it comes.
PATIENCE = 8 * GRAPHS
Function = Callable[[Sequence[Tensor]], Any]


def on_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """An output's structure, containers of types of their own included, with each tensor replaced."""
    return replaced(output, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


class Recording:
    """One set of input shapes. Calls follow each other, whichever threads and streams they come from."""

    def __init__(self, card: Card, function: Function, inputs: Sequence[Tensor]) -> None:
        """
        Raises:
            RuntimeError: the function does what can't be recorded: it waits for a result, or copies from the host.
        """
        self._card = card
        with torch.inference_mode(False):
            self._recorded(card, function, inputs)

    def _recorded(self, card: Card, function: Function, inputs: Sequence[Tensor]) -> None:
        """Apart from inference mode, whose tensors later calls outside of it may not change."""
        self._inputs = [torch.empty_like(x).copy_(x) for x in inputs]
        self._lock = threading.Lock()
        self._done: Any = None
        interface = card.interface
        # PyTorch hands out few streams in turn: one of ordinary priority may be a caller's, which works meanwhile.
        stream = interface.Stream(priority=-1)
        stream.wait_stream(interface.current_stream())
        with own_scratch() as self._scratch, interface.stream(stream):
            # Once outside: kernels compile, and scratch and tables are made in memory that stays.
            function(self._inputs)
            interface.synchronize()
            with card.recording(stream) as self._graph:
                self._output = function(self._inputs)
        interface.current_stream().wait_stream(stream)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The output, in memory of its own."""
        with self._lock:
            stream = self._card.interface.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            for kept, x in zip(self._inputs, inputs, strict=True):
                kept.copy_(x)
            self._graph.replay()
            output = on_tensors(torch.clone, self._output)
            self._done = stream.record_event()
        return output

    def replay(self) -> None:
        """Run it again on the inputs it has, for timing."""
        self._graph.replay()


class Recordings:
    """The recordings of one function. Safe to call from several threads."""

    def __init__(self, card: Card, function: Function) -> None:
        self._card, self._function = card, function
        self._kept: OrderedDict[Any, Recording | None] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._calls = 0
        self._used: dict[Any, int] = {}
        self._lock = threading.Lock()
        #: Why the last set of shapes that can't be recorded can't be; empty where all can.
        self.refused = ""

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The function's output, from a recording where there is one; the second call of a set of shapes makes it."""
        if not self._card.has_graphs or any(not x.numel() for x in inputs):
            return self._function(inputs)
        key = tuple((x.shape, x.dtype, x.stride()) for x in inputs)
        with self._lock:
            self._calls += 1
            found = self._kept.get(key)
            if key in self._kept:
                self._kept.move_to_end(key)
                self._used[key] = self._calls
            elif key not in self._seen:
                self._seen[key] = None
                while len(self._seen) > 4 * GRAPHS:
                    self._seen.popitem(last=False)
            elif self._has_room():
                found = self._record(key, inputs)
        return self._function(inputs) if found is None else found(inputs)

    def _has_room(self) -> bool:
        if len(self._kept) < GRAPHS:
            return True
        return self._calls - self._used[next(iter(self._kept))] > PATIENCE

    def _record(self, key: Any, inputs: Sequence[Tensor]) -> Recording | None:
        """None, which is kept too: these shapes run as they come, for want of memory or as they can't be recorded."""
        made: Recording | None = None
        try:
            made = Recording(self._card, self._function, inputs)
        except RuntimeError as error:  # OutOfMemoryError is one
            self.refused = str(error).partition("\n")[0]
        self._kept[key], self._used[key] = made, self._calls
        while len(self._kept) > GRAPHS:
            dropped, _ = self._kept.popitem(last=False)
            del self._used[dropped]
        return made

    def forget(self) -> None:
        """Record anew, since the function now launches other kernels."""
        with self._lock:
            self._kept.clear()
            self._used.clear()
