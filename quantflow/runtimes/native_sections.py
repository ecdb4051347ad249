"""A run of a program's nodes, and what it is once the native library made it ready for one set of input shapes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantflow.ir.program import Program, Ref
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


def parsed(program: Program, tensors: Mapping[str, torch.Tensor]) -> lib.Handle:
    """The program inside the library, over the tensors' own memory."""
    rows = []
    for name, tensor in tensors.items():
        dims = (ctypes.c_int64 * max(1, tensor.dim()))(*tensor.shape)
        code = lib.DTYPES.get(tensor.dtype, -1)
        rows.append(lib.Tensor(name.encode(), code, tensor.dim(), dims, tensor.data_ptr()))
    text = json.dumps(_plain(program).to_json()).encode()
    return lib.make(
        "qf_program_parse", "qf_program_free", text, ctypes.c_size_t(len(text)), (lib.Tensor * len(rows))(*rows),
        ctypes.c_size_t(len(rows)),
    )  # fmt: skip


def _plain(program: Program) -> Program:
    """The program as the library reads it: it plans each set of shapes by itself, and returns values."""
    sizes = (tuple(None if isinstance(size, str) else size for size in item.shape) for item in program.inputs)
    inputs = tuple(replace(item, shape=shape) for item, shape in zip(program.inputs, sizes, strict=True))
    output = [Ref(name) for name in program.output_names()]
    return replace(program, inputs=inputs, output=output, arguments=None, limits=())
