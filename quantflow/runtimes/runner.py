"""What a runtime makes of a program. What only some can do is a method with a default: stages ask, they never look."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch

from quantflow.ir.program import Program

#: In a runner's choices: the kernel of rows about steps that may run together, "rows" lines at a time; all lines:
#: step by step.
STEPS_ON_LINES = "host.lines"


def lowered(raised: torch.Tensor) -> torch.Tensor:
    """q = raised - 128: int8 codes of uint8 ones that stand 128 higher."""
    return raised.bitwise_xor(128).view(torch.int8)


class AbstractRunner(ABC):
    """A compiled program. Safe to call from several threads.

    Attributes:
        name: the runtime's, for the table of times.
        script: the ScriptModule that it runs as; None: it runs as something else.
        takes: the devices on which inputs may lie.
        halves: values that it holds in half precision.
        held: the type of these; float32 where there are none.
        kernelless: ops that the runtime has no kernel for on any machine, which PyTorch computes.
    """

    name: ClassVar[str]
    kernelless: ClassVar[tuple[str, ...]] = ()
    program: Program
    script: torch.jit.ScriptModule | None = None
    takes: tuple[str, ...] = ("cpu",)
    halves: int = 0
    held: torch.dtype = torch.float32

    @abstractmethod
    def __call__(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The output for inputs in the order of `program.inputs`."""

    @abstractmethod
    def run_node(self, index: int, values: Mapping[str, Any]) -> Any:
        """One node's value from given values, codes as the program defines them."""

    def step(self, index: int) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
        """One node as a function of the values that it reads, each once, for a caller that goes through the program.

        What it gives may lie channels-last, or be held in half precision, and int8 codes may be given as uint8, 128
        higher (see `lowered`), as the runtime's kernels hold them; it takes all of these.
        """
        names = tuple(dict.fromkeys(self.program.nodes[index].refs()))

        def step(values: Sequence[torch.Tensor]) -> torch.Tensor:
            result: torch.Tensor = self.run_node(index, dict(zip(names, values, strict=True)))
            # Outside of inference mode nobody may change an inference tensor, or compute on with a gradient.
            return result.clone() if result.is_inference() and not torch.is_inference_mode_enabled() else result

        return step

    def steps(
        self,
        first: int,  # noqa: ARG002
        last: int,  # noqa: ARG002
        reads: tuple[str, ...],  # noqa: ARG002
        gives: str,  # noqa: ARG002
        numbers: tuple[tuple[str, int], ...] = (),  # noqa: ARG002
    ) -> Callable[..., torch.Tensor | None] | None:
        """Nodes [first, last), of which `reads` is all that they read and `gives` all that is asked, as one function.

        The sizes among what they read, `numbers`, are the same in every call. It takes and gives values as `step` does,
        and None where it has no kernel. None: this runtime has no such call.
        """
        return None

    def between(self) -> AbstractContextManager[Any]:
        """Where a caller that goes through the program by `step` computes what lies between, with floats held so."""
        return nullcontext()

    @abstractmethod
    def int8_layers(self) -> int:
        """Layers that multiply by int8 weights, counted in what really runs."""

    def tune(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, Any]]:  # noqa: ARG002 what it is tuned for
        """Find the fastest way to run this batch and keep it; rows for the report, none where there is one way."""
        return []

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 nothing to do is a good default
        """Run as `tune` found fastest for another program of the same model, or in an earlier process."""

    def choices(self) -> dict[str, Any]:
        """By what `tune` chose kernels and their cuts, and what it tried, for the results; empty: nothing to tell."""
        return {}

    def left_to_torch(self) -> dict[int, str]:
        """Node index → why PyTorch computes it instead of a kernel of the runtime."""
        return {}

    def trace(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[int, Any]]:
        """Run the program node by node and yield every node's index and value."""
        program = self.program
        values: dict[str, Any] = {i.name: x for i, x in zip(program.inputs, inputs, strict=True)}
        frees = program.last_uses()
        for index, node in enumerate(program.nodes):
            values[node.output] = value = self.run_node(index, values)
            yield index, value
            for dead in frees.get(index, ()):
                del values[dead]

    def profile(self, inputs: Sequence[torch.Tensor], runs: int = 10) -> list[dict[str, Any]]:
        """Where the time goes: one {"name", "op", "kernel", "ms"} per kernel, or here per node, in execution order.

        Each node runs by itself (median): that includes the call's overhead, so the sum exceeds the model's latency.
        """
        taken: dict[int, list[float]] = {}
        for _ in range(runs):
            steps = self.trace(inputs)
            while True:
                start = time.perf_counter()
                step = next(steps, None)
                if step is None:
                    break
                taken.setdefault(step[0], []).append((time.perf_counter() - start) * 1e3)
        return [
            {
                "name": node.name,
                "op": node.target or node.op,
                "kernel": f"{self.name}.{node.fused_name}",
                "ms": statistics.median(taken[index]),
            }
            for index, node in enumerate(self.program.nodes)
        ]
