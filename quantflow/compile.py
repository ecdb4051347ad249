"""compile_program(program, choice) → Compiled: kernels chosen, weights ready, callable with the user's arguments."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.numerics.affine import dequantize
from quantflow.prepare import bind
from quantflow.program import Program
from quantflow.runtimes import Choice, Runner


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
            coded = program.values.get(node.output)
            if coded is not None and coded.qparams is not None and isinstance(value, torch.Tensor):
                value = dequantize(value, coded.qparams)
            yield node.output, value
            for dead in frees.get(index, ()):
                del values[dead]


def compile_program(program: Program, choice: Choice) -> Compiled:
    """Build the runtime's runner for the program."""
    start = time.perf_counter()
    return Compiled(program, choice, choice.runtime.build(program), time.perf_counter() - start)
