"""compile_program(program, choice) → Compiled: kernels chosen, weights ready, callable with the user's arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quantflow.errors import ArtifactError, QuantflowError, UsageError, first_line
from quantflow.ir.binding import bind
from quantflow.ir.program import Node, Program
from quantflow.ir.program_shapes import Fits
from quantflow.ir.returned import rebuilt
from quantflow.ir.structure import holds_types, made
from quantflow.numerics.affine import QParams, dequantize
from quantflow.runtimes import AbstractRunner, Choice
from quantflow.runtimes.ordinary import as_function, ordinary, reachable, unrecorded


@dataclass(frozen=True)
class Compiled:
    """A program on a runtime."""

    program: Program
    choice: Choice
    runner: AbstractRunner
    seconds: float
    #: Of a program from a file: whether it can be computed on the sizes at hand. None: it was made here.
    fits: Fits | None = None

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The model's output.

        Raises:
            DataError: the arguments do not fit the model's inputs.
            ArtifactError: a program from a file can't be computed on them.
        """
        inputs = self.bound(args, kwargs)
        output = self.ordinary(self.computed(self.runner, inputs), inputs)
        return made(output) if self.has_types else output

    def computed(self, run: Callable[[Sequence[torch.Tensor]], Any], inputs: Sequence[torch.Tensor]) -> Any:
        """What `run` makes of the inputs; what a file's program does on them is the file's fault, not ours."""
        if self.fits is None:
            return run(inputs)
        self.fits(inputs)
        try:
            return run(inputs)
        except QuantflowError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            reason = first_line(error)
            raise ArtifactError(f"program.json: it can't be computed on this input ({reason})") from error

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The call's tensors in the order of the program's inputs.

        Raises:
            DataError: the arguments do not fit the model's inputs.
        """
        return bind(self.program, args, kwargs, self.runner.takes, self._taken)

    def returned(self, output: Any, inputs: Sequence[torch.Tensor]) -> Any:
        """The model's output for these inputs, from what the ScriptModule of its program returns."""
        return made(rebuilt(self.program, self.ordinary(output, inputs)))

    @cached_property
    def _taken(self) -> set[Any]:
        return set()

    @cached_property
    def has_types(self) -> bool:
        """Whether the output holds containers of types of their own."""
        return holds_types(self.program.output)

    def ordinary(self, output: Any, inputs: Sequence[torch.Tensor]) -> Any:
        """The runner's output for these inputs as a float model would give it."""
        return ordinary(output, inputs, self._kept)

    def traced(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The model's output, recorded by the torch.jit.trace that is running as one call for any inputs.

        Raises:
            UsageError: the runtime makes no scripts.
        """
        with unrecorded():
            inputs, function = self.bound(args, kwargs), self._function
        return function(*inputs)

    @cached_property
    def _function(self) -> Callable[..., Any]:
        name, script_of = self.choice.runtime.name, self.choice.runtime.script
        if script_of is None:
            raise UsageError(
                f"torch.jit.trace can't record an int8 model on runtime '{name}', which makes no scripts; "
                "load it with another one, as in quantflow.load(folder, runtime='auto')"
            )
        return as_function(script_of(self.runner))

    @cached_property
    def _kept(self) -> frozenset[int]:
        return reachable(self.program)

    def trace(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[str, Any]]:
        """Run the program node by node and yield every value's name and value, codes as the reals they stand for."""
        for index, value in self.runner.trace(inputs):
            node = self.program.nodes[index]
            yield node.output, self.value(node, value)

    def coding(self, value: str) -> QParams | None:
        """How a value of the program is coded; None if it is not."""
        held = self.program.values.get(value)
        return None if held is None else held.qparams

    def value(self, node: Node, value: Any) -> Any:
        """What a node's result stands for: codes as reals, anything else as it is."""
        qparams = self.coding(node.output)
        return dequantize(value, qparams) if qparams is not None and isinstance(value, torch.Tensor) else value

    def left_to_torch(self) -> dict[str, str]:
        """Layers that the runtime has no kernel for and PyTorch computes, each with the reason."""
        return {self.program.nodes[index].name: reason for index, reason in self.runner.left_to_torch().items()}


def compile_program(program: Program, choice: Choice, *, is_from_file: bool = False) -> Compiled:
    """Build the runtime's runner for the program.

    Args:
        is_from_file: nobody vouches for it: each set of input sizes is checked before it is computed.
    """
    start = time.perf_counter()
    runner = choice.build(program)
    fits = Fits(program) if is_from_file else None
    return Compiled(program, choice, runner, time.perf_counter() - start, fits)
