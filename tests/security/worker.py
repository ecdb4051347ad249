"""Computes programs that may end the process: `python -m tests.security.worker FILE`, one in JSON per line of it.

For each it prints a line: "N refused MESSAGE" or "N computed", or "N differs …" where native gives something else than
the reference. A line "N begins" comes first, so that whoever reads knows which one a signal ended.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from quantflow.errors import QuantflowError
from quantflow.ir import program_json
from quantflow.ir.program import Node, Program
from quantflow.runtimes import native
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.reference import ReferenceRunner
from tests.security.running import MARK

#: Beyond what the process has when it starts.
MEMORY_BYTES = 6 << 30
#: Ops that give other numbers each time.
RANDOM = (
    "rand", "normal", "bernoulli", "dropout", "native_dropout", "feature_dropout", "alpha_dropout", "rrelu", "lstm",
    "feature_alpha_dropout", "gru", "rnn_", "scaled_dot_product_attention",
)  # fmt: skip
#: PyTorch's own refusals.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, NotImplementedError)


def stored() -> dict[str, torch.Tensor]:
    """The tensors that a program may name."""
    generator = torch.Generator().manual_seed(0)

    def floats(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator)

    return {
        "w4": floats(4), "w44": floats(4, 4), "conv": floats(4, 4, 3, 3), "conv1": floats(4, 4, 3),
        "conv3": floats(4, 4, 3, 3, 3), "one": floats(1), "zero": torch.tensor(0.5), "table": floats(10, 4),
        "mask": torch.ones(6, dtype=torch.bool), "ids": torch.arange(6), "small": torch.arange(6, dtype=torch.int32),
        "positive": floats(4).abs() + 1, "w66": floats(6, 6), "none": floats(0, 4), "empty": floats(0),
        "codes": torch.ones(4, 4, dtype=torch.int8), "conv_codes": torch.ones(4, 4, 3, 3, dtype=torch.int8),
        "codes4": torch.ones(4, 4, 3, 3, dtype=torch.int8), "scale": torch.ones(1),
        "bytes": torch.ones(6, dtype=torch.uint8),
        "grid": floats(2, 3, 3, 2), "cube": floats(2, 3, 6), "turned": floats(2, 6, 3), "block": floats(3, 4, 4),
        "state": floats(1, 4, 4), "w16_4": floats(16, 4), "w16": floats(16), "w12_4": floats(12, 4), "w12": floats(12),
        "ids4": torch.arange(4), "ends": torch.tensor([-(2**63), 2**63 - 1]),
    }  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(2, 4, 6, 6, generator=generator)}


def compute(data: dict[str, Any]) -> str:
    """What becomes of a program in the reference and natively."""
    tensors, given = stored(), inputs()
    try:
        program = Program.from_json(data, tensors)
    except QuantflowError as error:
        return f"refused {str(error)[:200]!r}"
    values = [
        given.get(item.name, torch.zeros([s if isinstance(s, int) else 2 for s in item.shape]))
        for item in program.inputs
    ]
    results = []
    for make in (ReferenceRunner, NativeRunner):
        try:
            results.append(tree_map(without_numbers, make(program)([x.clone() for x in values])))
        except (QuantflowError, *_REFUSALS) as error:
            results.append(error)
    wanted, found = results
    if isinstance(wanted, Exception) or isinstance(found, Exception):
        if not isinstance(wanted, Exception):
            return f"differs: native refuses what the reference computes: {str(found)[:200]!r}"
        if not isinstance(found, Exception):
            return f"differs: native computes what the reference refuses: {str(wanted)[:200]!r}"
    elif not any(node.target.startswith(RANDOM) for node in program.nodes) and not agree(wanted, found):
        return f"differs: native gives {shown(found)}, the reference {shown(wanted)}"
    return f"failed {str(wanted)[:120]!r}" if isinstance(wanted, Exception) else "computed"


def at_the_border(data: dict[str, Any]) -> str:
    """What the native library makes of a program that Python has not checked, with nothing left to PyTorch."""
    try:
        program = Program.from_json(data, stored())
        NativeRunner(program)(list(inputs().values())[: len(program.inputs)])
    except (QuantflowError, AssertionError, *_REFUSALS) as error:
        return f"refused {str(error)[:200]!r}"
    return "computed"


def leave_all_to_native() -> None:
    def refuse(_program: Program, node: Node, _values: Any) -> Any:
        raise NotImplementedError(f"left to PyTorch: {node.target or node.op}")

    program_json.check = lambda *_: None  # type: ignore[assignment]
    native.run_in_torch = refuse


def without_numbers(value: Any) -> Any:
    """A result too large to be held beside another one, as its form."""
    is_large = isinstance(value, torch.Tensor) and value.numel() > 1 << 26
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if is_large else value


def agree(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and a.is_meta:
        return isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(agree, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype in (torch.int8, torch.uint8):
            return bool(((a.int() - b.int()).abs() <= 1).all())
        return (
            torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
        )
    return bool(a == b)


def shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def main(file: Path, is_border: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compute({"format": 1, "batch_is_dynamic": True, "inputs": [], "values": {}, "nodes": [], "output": []})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in file.read_text().splitlines():
        number, _, data = line.partition(" ")
        print(f"\n{MARK}{number} begins", flush=True)
        outcome = " ".join((at_the_border if is_border else compute)(json.loads(data)).split())
        print(f"\n{MARK}{number} {outcome}", flush=True)


if __name__ == "__main__":
    if is_border := "--border" in sys.argv:
        leave_all_to_native()
    main(Path(sys.argv[1]), is_border)
