"""A card: its device, what is known about it, and its tuner. The one file that knows vendors apart."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from quantflow.errors import UnavailableError, cause_line
from quantflow.host.environment import cache_folder
from quantflow.runtimes.triton.tuner import Tuner

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for other cards, or an older one
    gdc_launch_dependents = gdc_wait = None
#: CUDA cards from this capability on start a kernel before the one in front of it has finished.
_CHAINING = 9


@triton.jit
def await_earlier(CHAINED: tl.constexpr):
    """Comes before whatever a kernel reads and writes: here it waits for the kernels in front of it.

    CHAINED: it may have been started while they ran, and so may the next one be from now on.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """What every launch of a kernel that calls `await_earlier` is given."""
    if torch.version.cuda is None or device.type != "cuda" or gdc_wait is None:
        return {"CHAINED": False}
    if torch.cuda.get_device_capability(device)[0] < _CHAINING:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


@dataclass(frozen=True)
class Card:
    """
    Attributes:
        multiprocessors: how many programs run side by side at least; 0: kernels are interpreted, on the CPU.
    """

    device: torch.device
    name: str
    multiprocessors: int
    tuner: Tuner

    @property
    def interface(self) -> Any:
        """torch.cuda, torch.xpu."""
        return getattr(torch, self.device.type)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Kernels started inside run on this card.

        Raises:
            UnavailableError: Triton can't build one of them for it.
        """
        try:
            with nullcontext() if self.device.type == "cpu" else self.interface.device(self.device):
                yield
        except TritonError as error:
            raise UnavailableError(
                f"runtime triton: a kernel can't be built for {self.name} ({type(error).__name__}: {cause_line(error)})"
                "; run the model with another runtime (runtime=torch device=cpu), and report this with what "
                "task=doctor prints"
            ) from error

    @property
    def has_graphs(self) -> bool:
        """Whether a sequence of launches can be recorded and launched as one."""
        return _graph_class(self.interface) is not None if self.device.type != "cpu" else False

    @contextmanager
    def recording(self, stream: Any) -> Iterator[Any]:
        """What is launched inside is recorded into the graph that this gives."""
        with recording(self.interface, stream) as graph:
            yield graph


def _graph_class(interface: Any) -> Any:
    """PyTorch's recorded graphs; None where this PyTorch has none for the device."""
    return getattr(interface, "CUDAGraph", None) or getattr(interface, "XPUGraph", None)


@contextmanager
def recording(interface: Any, stream: Any = None) -> Iterator[Any]:
    """A graph of what is launched inside, on a stream of its own."""
    graph = _graph_class(interface)()
    # Other threads may allocate meanwhile; XPU's graphs have no such setting.
    mode = {"capture_error_mode": "thread_local"} if hasattr(interface, "CUDAGraph") else {}
    with interface.graph(graph, stream=stream, **mode):
        yield graph


def card_of(device: str) -> Card:
    """A card by its place ("cuda:1"), or the current one of a kind; the CPU for kernels that are interpreted."""
    place = torch.device(device)
    if place.type != "cpu" and place.index is None:
        place = torch.device(place.type, getattr(torch, place.type).current_device())
    return _card(place)


@cache
def _card(place: torch.device) -> Card:
    if place.type == "cpu":
        return Card(place, "interpreter", 0, Tuner(None, lambda _call, _runs: 0.0))
    interface = getattr(torch, place.type)
    properties = interface.get_device_properties(place)
    name = str(properties.name)
    count = getattr(properties, "multi_processor_count", None) or getattr(properties, "gpu_subslice_count", 64)
    file = cache_folder() / f"triton-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{triton.__version__}.json"
    return Card(place, name, int(count), Tuner(file, partial(timed_ms, interface), partial(interface.device, place)))


def timed_ms(interface: Any, call: Callable[[], None], repeats: int = 10) -> float:
    """The time of one call on the current card, in ms: several of them recorded and launched as one.

    Launched one by one, small kernels would show what the host takes to launch them.
    """
    with own_scratch():
        call()
        interface.synchronize()
        try:
            with recording(interface) as graph:
                for _ in range(repeats):
                    call()
            launch: Callable[[], None] = graph.replay
        except (RuntimeError, AttributeError, TypeError):

            def launch() -> None:
                for _ in range(repeats):
                    call()

        marks = [interface.Event(enable_timing=True) for _ in range(4)]
        launch()
        marks[0].record()
        for mark in marks[1:]:
            launch()
            mark.record()
        interface.synchronize()
    return min(a.elapsed_time(b) for a, b in pairwise(marks)) / repeats


_kept = threading.local()


@contextmanager
def own_scratch() -> Iterator[dict[Any, tuple[Tensor, Tensor]]]:
    """Launches of this thread that follow each other on one stream share their scratch memory."""
    before, _kept.memory = getattr(_kept, "memory", None), {}
    try:
        yield _kept.memory
    finally:
        _kept.memory = before


def scratch(card: Card, tiles: int, size: int) -> tuple[Tensor, Tensor]:
    """(partial sums of every tile, programs that arrived at it): zeros, and left as zeros by who uses them."""
    memory: dict[Any, tuple[Tensor, Tensor]] | None = getattr(_kept, "memory", None)
    if memory is not None:
        found = memory.get("scratch")
        if found is not None and found[0].numel() >= tiles * size and found[1].numel() >= tiles:
            return found
    sums = torch.zeros(tiles * size, dtype=torch.int32, device=card.device)
    counts = torch.zeros(tiles, dtype=torch.int32, device=card.device)
    if memory is not None:
        # The former stays alive: a recorded graph may hold launches that use it.
        memory[len(memory)] = memory["scratch"] = (sums, counts)
    return sums, counts
