"""What executes an int8 program: one module per runtime and one line in `RUNTIMES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import get_num_threads

from quantflow.errors import UnavailableError
from quantflow.host.finding import Finding
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.program import Program
from quantflow.runtimes import native_devices, native_library, native_op, reference
from quantflow.runtimes import torch as on_torch
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.native import kernel_of as native_kernel_of
from quantflow.runtimes.runner import AbstractRunner
from quantflow.runtimes.triton import devices as triton_devices
from quantflow.runtimes.triton import script as triton_script


@dataclass(frozen=True)
class Runtime:
    """One line of the table.

    Attributes:
        build: (program, device) → runner; packs weights and builds kernels as far as shapes are not needed.
        kernel_of: the kernel that will run a planned unit, for the plan.
        missing: device → why the runtime can't use it on this machine, with the cure; None: it can.
        modes: how a model must be captured for it.
        halves: types of half precision in which it can hold what is no code → what builds a runner that does.
        notes: what its user should know about this machine, for the plan.
        script: torchscript mode: a runner's program as a ScriptModule that runs on any machine.
        backends: device → its own kernels, which a self-test there compares: name → what builds a runner on them.
        about: what its kernels are made for on this machine, for task=doctor.
        packages: distributions that it needs and the package does not → how to get them.
        findings: what else it has to say about this machine.
    """

    name: str
    build: Callable[[Program, str], AbstractRunner]
    kernel_of: Callable[[PlannedUnit], str]
    missing: Callable[[str], str | None]
    modes: tuple[str, ...]
    halves: Mapping[str, Callable[[Program, str], AbstractRunner]] = field(default_factory=dict)
    notes: Callable[[], tuple[str, ...]] = tuple
    script: Callable[[AbstractRunner], torch.jit.ScriptModule] | None = None
    backends: Callable[[str], Mapping[str, Callable[[Program], AbstractRunner]]] | None = None
    about: Callable[[], str] = str
    packages: Mapping[str, str] = field(default_factory=dict)
    findings: Callable[[], list[Finding]] = list


def _reference_kernel(planned: PlannedUnit) -> str:
    return f"reference.{planned.unit.kind if planned.unit.kind != 'core' else planned.unit.op}"


def _only_cpu(device: str) -> str | None:
    return None if device == "cpu" else "it runs on the CPU only"


#: In the order in which `runtime: auto` prefers them.
RUNTIMES: dict[str, Runtime] = {
    "native": Runtime(
        "native",
        lambda program, device: NativeRunner(program, native_devices.backend_of(device)),
        native_kernel_of,
        native_devices.missing,
        ("export", "torchscript", "imperative"),
        script=native_op.as_script,
        backends=lambda device: {
            backend: partial(NativeRunner, backend=backend) for backend in native_devices.backends_of(device)
        },
        about=lambda: f"kernels for {native_library.host_isa()}",
        packages=dict.fromkeys(native_devices.SYCL_DISTRIBUTIONS, native_library.INSTALL_SYCL),
        findings=native_devices.findings,
    ),
    "torch": Runtime(
        "torch",
        lambda program, _: on_torch.TorchRunner(program),
        on_torch.kernel_of,
        _only_cpu,
        ("export", "torchscript", "imperative"),
        notes=on_torch.notes,
        script=on_torch.as_script,
        about=lambda: "not accelerated" if on_torch.notes() else "",
    ),
    "triton": Runtime(
        "triton",
        triton_devices.build,
        triton_devices.kernel_of,
        triton_devices.missing,
        ("export", "torchscript", "imperative"),
        {name: partial(triton_devices.build, floats=name) for name in ("bfloat16", "float16")},
        script=triton_script.as_script,
        backends=lambda device: {f"triton.{device}": partial(triton_devices.build, device=device)},
        about=lambda: "interpreted, to check its kernels",
        findings=triton_devices.findings,
    ),
    "reference": Runtime(
        "reference",
        lambda program, _: reference.ReferenceRunner(program),
        _reference_kernel,
        _only_cpu,
        ("export", "imperative"),
    ),
}
#: The device that every machine has.
HOST = "cpu"
#: In the order in which `device: auto` looks for them → what it is called, and whether the machine shows one.
_GPUS: dict[str, tuple[str, Callable[[], bool]]] = {
    "xpu": ("an Intel GPU", lambda: native_devices.has_intel_gpu() or triton_devices.has_card("xpu")),
    "cuda": ("a CUDA GPU", lambda: triton_devices.has_card("cuda")),
}


def tested_by_itself() -> Runtime:
    """The first runtime with kernels of its own, which a self-test compares."""
    return next(runtime for runtime in RUNTIMES.values() if runtime.backends is not None)


def choose_tested(runtime: str = "auto", device: str = "auto") -> Choice:
    """The first runtime with kernels of its own on the device, or the one asked for by name.

    Raises:
        UnavailableError: as `choose_runtime`.
    """
    own = [name for name, entry in RUNTIMES.items() if entry.backends is not None]
    names = own if runtime == "auto" or runtime not in own else [runtime]
    if device == "auto":
        device = next((kind for kind, (_, is_there) in _GPUS.items() if is_there()), HOST)
    fitting = [name for name in names if RUNTIMES[name].missing(device) is None]
    return choose_runtime((fitting or names)[0], device)


@dataclass(frozen=True)
class Choice:
    """The runtime and device that will be used, and why.

    Attributes:
        floats: how what is no code is held: "float32", "bfloat16", "float16", or "auto" until warm-up has decided.
        floats_reason: why, where that was decided.
    """

    runtime: Runtime
    device: str
    requested: str
    reason: str
    floats: str = "float32"
    floats_reason: str = ""

    def build(self, program: Program) -> AbstractRunner:
        """The program's runner; one that holds floats in float32 until it is decided."""
        build = self.runtime.halves.get(self.floats, self.runtime.build)
        return build(program, self.device)


def choose_runtime(
    runtime: str = "auto", device: str = "auto", mode: str = "export", floats: str = "float32"
) -> Choice:
    """Resolve `auto`, or check that what was asked for by name exists here.

    `device: auto` is the first GPU (Intel's, then CUDA's) that the machine shows and a runtime of the mode can use,
    else the CPU.

    Args:
        floats: how what is no code shall be held, as in `policy.float`.

    Raises:
        UnavailableError: names what was asked for, what this machine has, and what to ask for instead.
    """
    names = [runtime] if runtime != "auto" else [name for name, entry in RUNTIMES.items() if mode in entry.modes]
    if mode not in RUNTIMES[names[0]].modes:
        fitting = ", ".join(name for name, entry in RUNTIMES.items() if mode in entry.modes)
        raise UnavailableError(f"runtime: '{runtime}' can't serve mode={mode}; legal there are {fitting}, auto")
    shown = [kind for kind, (_, is_there) in _GPUS.items() if is_there()] if device == "auto" else []
    wanted = [device] if device != "auto" else [*shown, HOST]
    refused: dict[tuple[str, str], str] = {}
    for place in wanted:
        for name in names:
            reason = RUNTIMES[name].missing(place) or _lacks(RUNTIMES[name], floats)
            if reason is None:
                return Choice(RUNTIMES[name], place, runtime, _why(runtime, device, place, refused), floats)
            refused[name, place] = reason
    if device in _GPUS:
        found = "; ".join(f"{name}: {reason}" for (name, _), reason in refused.items())
        raise UnavailableError(
            f"device: '{device}' is not available; devices found: {', '.join(devices())}; {found}; "
            "use device=cpu or device=auto; task=doctor says what is missing"
        )
    (_, reason), *_ = refused.items()
    raise UnavailableError(reason)


def _lacks(runtime: Runtime, floats: str) -> str | None:
    """Why the runtime can't hold floats so; None: it can."""
    if floats in ("float32", "auto") or floats in runtime.halves:
        return None
    having = ", ".join(name for name, entry in RUNTIMES.items() if floats in entry.halves)
    return (
        f"policy.float: '{floats}' is not possible on runtime '{runtime.name}', which computes floats in float32; use "
        f"runtime={having} on a GPU, or policy.float=auto"
    )


def _why(runtime: str, device: str, place: str, refused: dict[tuple[str, str], str]) -> str:
    """Why this runtime and device, in one line."""
    parts = ["asked for by name" if runtime != "auto" else "first that can run"]
    if device == "auto":
        parts.append(f"{_GPUS[place][0]} was found" if place in _GPUS else "no GPU that can be used was found")
    parts += [f"not {other} on {where}: {reason}" for (other, where), reason in refused.items()]
    return "; ".join(parts)


def card(device: str) -> dict[str, str]:
    """What is known of the card behind a device, for the results; nothing where PyTorch computes on none."""
    return triton_devices.described(device)


def devices() -> list[str]:
    """Devices found, for error messages: PyTorch's and those that SYCL lists."""
    found = [f"cpu ({get_num_threads()} threads)", *triton_devices.listed()]
    return found + [f"SYCL {device['type']} ({device['name']})" for device in native_devices.sycl_devices()]


__all__ = [
    "HOST",
    "RUNTIMES",
    "AbstractRunner",
    "Choice",
    "Runtime",
    "card",
    "choose_runtime",
    "choose_tested",
    "devices",
    "tested_by_itself",
]
