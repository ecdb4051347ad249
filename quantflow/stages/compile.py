"""compile_program(program, choice) → Compiled: kernels chosen, weights ready, callable with the user's arguments."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.ir.program import Node, Program
from quantflow.numerics.affine import dequantize
from quantflow.runtimes import Choice, Runner
from quantflow.runtimes.native import NativeRunner
from quantflow.stages.prepare import bind


@dataclass(frozen=True)
class Compiled:
    """A program on a runtime."""

    program: Program
    choice: Choice
    runner: Runner
    seconds: float

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The model's output.

        Raises:
            DataError: the arguments do not fit the model's inputs.
        """
        return self.runner(bind(self.program.inputs, args, kwargs))

    def trace(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[str, Any]]:
        """Run the program node by node and yield every value's name and value, codes as the reals they stand for."""
        program = self.program
        values: dict[str, Any] = {i.name: x for i, x in zip(program.inputs, inputs, strict=True)}
        frees = program.last_uses()
        for index, node in enumerate(program.nodes):
            values[node.output] = value = self.runner.run_node(index, values)
            yield node.output, self.value(node, value)
            for dead in frees.get(index, ()):
                del values[dead]

    def value(self, node: Node, value: Any) -> Any:
        """What a node's result stands for: codes as reals, anything else as it is."""
        coded = self.program.values.get(node.output)
        if coded is not None and coded.qparams is not None and isinstance(value, torch.Tensor):
            return dequantize(value, coded.qparams)
        return value

    def tune(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
        """Let the runtime find the fastest way to run this batch; rows for the report, none where it has one way."""
        return self.runner.tune(inputs) if isinstance(self.runner, NativeRunner) else []

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run as `tune` found fastest for another program of the same model."""
        if isinstance(self.runner, NativeRunner):
            self.runner.adopt(rows)

    def left_to_torch(self) -> dict[str, str]:
        """Layers the native runtime has no kernel for, each with the reason."""
        if not isinstance(self.runner, NativeRunner):
            return {}
        return {self.program.nodes[index].name: reason for index, reason in sorted(self.runner.in_torch.items())}

    def layer_times(self, inputs: Sequence[torch.Tensor], repeats: int = 10) -> list[dict[str, Any]]:
        """Where the time goes: one {"name", "op", "kernel", "ms"} per kernel, or per node.

        The native runtime times its kernels inside one run (least of the repeats). Other runtimes run each node by
        itself (median): that includes the call's overhead, so the sum exceeds the model's latency.
        """
        if isinstance(self.runner, NativeRunner):
            return self.runner.profile(inputs, repeats)
        taken: dict[str, list[float]] = {}
        for _ in range(repeats):
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
                "kernel": f"{self.choice.runtime.name}.{node.fused_name}",
                "ms": statistics.median(taken[node.output]),
            }
            for node in self.program.nodes
        ]


def compile_program(program: Program, choice: Choice) -> Compiled:
    """Build the runtime's runner for the program."""
    start = time.perf_counter()
    return Compiled(program, choice, choice.runtime.build(program, choice.device), time.perf_counter() - start)
