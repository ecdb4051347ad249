"""compile_program(program, choice) → Compiled: kernels chosen, weights ready, callable with the user's arguments."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

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

    def kernel_names(self) -> Mapping[str, str]:
        """Node name → what is fused in it."""
        return {node.name: node.fused_name for node in self.program.nodes}


def compile_program(program: Program, choice: Choice) -> Compiled:
    """Build the runtime's runner for the program."""
    start = time.perf_counter()
    return Compiled(program, choice, choice.runtime.build(program), time.perf_counter() - start)
