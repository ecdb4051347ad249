"""Compute programs of the fuzzer by the reference, and each of their nodes natively, on the values that it found.

fuzz --write FOLDER 1000 && python -m native.fuzz.compare FOLDER
"""

from __future__ import annotations

import json
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from quantflow.errors import QuantflowError
from quantflow.ir.activations import tie_tolerance
from quantflow.ir.program import Node, Program
from quantflow.numerics.agreement import disagreement
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.specification import Specification, handed_on, unrounded

#: What PyTorch itself refuses as it runs.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError)


def read(file: Path) -> Program:
    """A program of the corpus.

    Raises:
        ArtifactError: it is none.
    """
    data = file.read_bytes()
    (length,) = struct.unpack_from("<I", data)
    tensors = load(data[4 + length :])
    return Program.from_json(json.loads(data[4 : 4 + length]), tensors)


def inputs_of(program: Program) -> list[torch.Tensor]:
    """As fuzz_calls.cpp fills them, without infinities."""
    made = []
    for number, item in enumerate(program.inputs):
        sizes = [size if isinstance(size, int) else 2 for size in item.shape]
        k = torch.arange(torch.Size(sizes).numel()) * 29 + number
        values = {"float32": (k % 17 - 8) / 4, "int64": k % 7 - (k % 5 == 0) * 4, "bool": k % 3 != 0}
        found = values.get(item.dtype, k % 100)
        made.append(found.to(getattr(torch, item.dtype)).reshape(sizes))
    return made


def compare(program: Program) -> list[str]:
    """What a node gives natively that the reference doesn't.

    Raises:
        QuantflowError, RuntimeError, …: the reference refuses the program as it runs.
    """
    runner, wrong = NativeRunner(program), []

    def look(node: Node, values: Mapping[str, Any]) -> None:
        expected = values[node.output]
        actual = runner.run_node(program.nodes.index(node), values)
        if not isinstance(expected, torch.Tensor):
            return
        if node.op == "recurrence":
            expected = handed_on(program, node, values, actual)
        if not _agree(program, node, values, expected, actual):
            shown = (f"{x.dtype} {tuple(x.shape)}" for x in (expected, actual))
            wrong.append(f"{node.fused_name}: {' and '.join(shown)} differ")

    Specification(program)(inputs_of(program), look)
    return wrong


def _agree(
    program: Program, node: Node, values: Mapping[str, Any], expected: torch.Tensor, actual: torch.Tensor
) -> bool:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if node.output in program.values:
        return disagreement(expected, actual, unrounded(program, node, values), tie_tolerance(node.epilogue))[0] == 0
    if not expected.is_floating_point():
        return torch.equal(expected, actual)
    # Sums are taken in another order: their error is one of the largest number in them.
    largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    return torch.allclose(expected, actual, rtol=1e-4, atol=1e-5 * max(largest, 1.0), equal_nan=True)


def main(folder: Path) -> int:
    """Prints what became of the programs; 1 where one differs."""
    warnings.simplefilter("ignore")
    became: Counter[str] = Counter()
    for file in sorted(folder.iterdir()):
        try:
            wrong = compare(read(file))
        except QuantflowError:
            became["refused"] += 1
            continue
        except _REFUSALS:
            became["refused by PyTorch"] += 1
            continue
        became["differ" if wrong else "agree"] += 1
        for what in wrong:
            print(f"{file}: {what}")
    print(", ".join(f"{count} {what}" for what, count in became.items()))
    return 1 if became["differ"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
