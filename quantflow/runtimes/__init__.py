"""What executes an int8 program: one module per runtime and one line in `RUNTIMES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, get_num_threads, xpu

from quantflow.errors import UnavailableError
from quantflow.plan import PlannedUnit
from quantflow.program import Node, Program
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.runtimes.torch import TorchRunner
from quantflow.runtimes.torch import kernel_of as torch_kernel_of


class Runner(Protocol):
    """A compiled program. Safe to call from several threads."""

    program: Program

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The output for inputs in the order of `program.inputs`."""

    def run_node(self, index: int, values: Mapping[str, Any]) -> Any:
        """One node's value from given values, codes as the program defines them."""

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8, counted in what really runs."""


@dataclass(frozen=True)
class Runtime:
    """One line of the table.

    Attributes:
        build: program → runner; packs weights and builds kernels as far as shapes are not needed.
        kernel_of: the kernel that will run a planned unit, for the plan.
        devices: device kinds it can use on this machine.
    """

    name: str
    build: Callable[[Program], Runner]
    kernel_of: Callable[[PlannedUnit], str]
    devices: tuple[str, ...] = ("cpu",)


def _reference_kernel(planned: PlannedUnit) -> str:
    return f"reference.{planned.unit.kind if planned.unit.kind != 'core' else planned.unit.op}"


#: In the order in which `runtime: auto` prefers them. None: a name that recipes may use, not built into this version.
RUNTIMES: dict[str, Runtime | None] = {
    "native": None,
    "torch": Runtime("torch", TorchRunner, torch_kernel_of),
    "reference": Runtime("reference", ReferenceRunner, _reference_kernel),
}


@dataclass(frozen=True)
class Choice:
    """The runtime and device that will be used, and why."""

    runtime: Runtime
    device: str
    requested: str
    reason: str


def choose_runtime(runtime: str = "auto", device: str = "auto", mode: str = "export") -> Choice:
    """Resolve `auto`, or check that what was asked for by name exists here.

    Raises:
        UnavailableError: names what was asked for, what this machine has, and what to ask for instead.
    """
    available = {name: entry for name, entry in RUNTIMES.items() if entry is not None}
    if device == "xpu":
        raise UnavailableError(
            f"device: 'xpu' is not available; devices found: {', '.join(devices())}; "
            "the runtimes of this version run on the CPU: use device=cpu or device=auto"
        )
    if runtime != "auto":
        chosen = available.get(runtime)
        if chosen is None:
            raise UnavailableError(
                f"runtime: '{runtime}' is not part of this version; available: {', '.join(available)}, auto"
            )
        if mode == "torchscript" and runtime != "torch":
            raise UnavailableError(
                f"runtime: '{runtime}' can't be written as TorchScript; mode=torchscript runs on runtime=torch"
            )
        return Choice(chosen, "cpu", runtime, "asked for by name")
    chosen = next(iter(available.values()))
    missing = [name for name in RUNTIMES if name not in available]
    why = f"first of {', '.join(available)}" + (
        f"; {', '.join(missing)} is not part of this version" if missing else ""
    )
    return Choice(chosen, "cpu", runtime, why)


def devices() -> list[str]:
    """Devices that PyTorch sees, for error messages."""
    found = [f"cpu ({get_num_threads()} threads)"]
    if xpu.is_available():
        found += [f"xpu:{i} ({xpu.get_device_name(i)})" for i in range(xpu.device_count())]
    return found


__all__ = ["RUNTIMES", "Choice", "Node", "Runner", "Runtime", "choose_runtime", "devices"]
