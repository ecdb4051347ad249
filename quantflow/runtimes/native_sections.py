"""A run of a program's nodes, and what it is once the native library made it ready for one set of input shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantflow.runtimes import native_library as lib


@dataclass(frozen=True)
class Section:
    """Nodes [first, last) of a program, with the values that enter and leave.

    Attributes:
        is_step: codes leave, and may enter, as the kernels hold them.
    """

    first: int
    last: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_step: bool = False


@dataclass(frozen=True)
class RunVariant:
    """A way to run a batch: on how many threads, and in pieces of how many samples (0: all at once)."""

    threads: int
    chunk: int = 0


@dataclass(frozen=True)
class SectionPlan:
    """A section made ready for one set of input shapes."""

    handle: lib.Handle
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | int, ...]

    def run(self, values: Sequence[torch.Tensor | int]) -> list[torch.Tensor | int]:
        """The outputs, in the section's order."""
        outputs = [o if isinstance(o, int) else torch.empty_strided(o[0], o[1], dtype=o[2]) for o in self.outputs]
        lib.run_plan(self.handle, lib.pointers(values), lib.pointers(outputs))
        return outputs

    def made(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The one output of tensors, which is a tensor: `run` in less time."""
        ((shape, strides, dtype),) = self.outputs  # type: ignore[misc]
        output = torch.empty_strided(shape, strides, dtype=dtype)
        lib.run_plan(
            self.handle, lib.ADDRESSES[len(values)](*[x.data_ptr() for x in values]), lib.ONE(output.data_ptr())
        )
        return output
