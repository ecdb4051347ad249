"""What quantization returns: callables that take and return torch tensors, and that can be saved and loaded.

QuantizedModel     mode=export, and every loaded artifact: an nn.Module around a compiled program
QuantizedScript    mode=torchscript: a real torch.jit.ScriptModule
QuantizedModule    mode=imperative: an nn.Module around the user's own code with int8 layers swapped in
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quantflow.errors import UsageError
from quantflow.host.environment import environment
from quantflow.ir.binding import bind
from quantflow.report import views
from quantflow.runtimes import choose_runtime
from quantflow.runtimes.ordinary import (
    Fixed,
    addresses,
    below_autograd,
    ordinary,
    outside_compilers,
    refuse_export,
    unrecorded,
    untracked,
)
from quantflow.schema import Recipe
from quantflow.stages.compile import Compiled, compile_program
from quantflow.stages.imperative import int8_layers, put_in_place, run_module, with_tensors
from quantflow.stages.record import Record
from quantflow.store import artifact

#: File name endings that mean torch.jit.save rather than an artifact folder.
_SCRIPT_FILES = (".pt", ".pth", ".ts", ".jit")


def save_record(record: Record, directory: str | Path) -> Path:
    """Write the artifact, atomically: the record's files and the views of its results.

    Raises:
        ArtifactError: the folder holds something else, or can't be written.
    """
    files = {**record.files(), **views(record.results)}
    return artifact.write_artifact(Path(directory), files, notices=record.results.get("notices", ()))


class _Quantized(Fixed):
    """What the classes have in common."""

    compiled: Compiled
    record: Record
    _immutable = ("compiled", "record")

    def train(self, mode: bool = True) -> Self:
        """Nothing but a notice: an int8 model stays as it was calibrated, and has no weights to train."""
        if mode:
            warnings.warn(
                "quantflow: train() changes nothing on an int8 model, which stays in eval mode; train the float model "
                "and quantize it again",
                stacklevel=2,
            )
        return super().train(False)  # type: ignore[misc,no-any-return]

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured, as in results.json."""
        return self.record.results

    def _devices(self, host: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys((host, self.compiled.choice.device)))


class QuantizedModel(_Quantized, nn.Module):
    """An int8 model: call it like the float one."""

    def __init__(self, compiled: Compiled, record: Record) -> None:
        super().__init__()
        self.compiled = compiled
        self.record = record
        self.eval()

    @outside_compilers
    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        refuse_export()
        return self.compiled.traced(*args, **kwargs) if torch.jit.is_tracing() else self.compiled(*args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks a module for what it shall compile in its place, inside another module too.
        raise UsageError(
            f"torch.jit.script can't compile a {type(self).__name__}, which is compiled already; quantize with "
            "mode=torchscript for a ScriptModule, which may be part of another, or use torch.jit.trace"
        )

    def save(self, directory: str | Path) -> Path:
        """Write the artifact: `quantflow.load(directory)` gives the same model in another process."""
        return save_record(self.record, directory)

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8."""
        return self.compiled.runner.int8_layers()

    def extra_repr(self) -> str:
        choice = self.compiled.choice
        return f"int8_layers={self.int8_layers()}, runtime={choice.runtime.name}, device={choice.device}"


class QuantizedModule(QuantizedModel):
    """Imperative mode: `module` is the user's own code, whose layers compute in int8."""

    def __init__(self, module: nn.Module, compiled: Compiled, record: Record) -> None:
        super().__init__(compiled, record)
        self.module = module
        self._kept = addresses((*module.parameters(), *module.buffers()))

    @outside_compilers
    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        refuse_export()
        if torch.jit.is_tracing():
            return self.compiled.traced(*args, **kwargs)
        inputs = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, torch.Tensor)]
        given = args, kwargs
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            given = with_tensors((args, kwargs), torch.Tensor.detach)
        return ordinary(run_module(self.module, *given), inputs, self._kept)

    def take_over(self, module: nn.Module) -> None:
        """Let the module that the copy was made of be the int8 one: its own objects get the copy's layers."""
        put_in_place(module, self.module)
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = super().__deepcopy__(memo)
        copied._kept = addresses((*copied.module.parameters(), *copied.module.buffers()))
        return copied

    def int8_layers(self) -> int:
        return int8_layers(self.module)


def as_script(compiled: Compiled) -> torch.jit.ScriptModule:
    """The compiled program as a ScriptModule, which runs on any machine.

    Raises:
        UsageError: the runtime makes no scripts.
    """
    script_of = compiled.choice.runtime.script
    if script_of is None:
        raise UsageError(f"runtime '{compiled.choice.runtime.name}' makes no scripts; use runtime='auto'")
    return script_of(compiled.runner)


class QuantizedScript(_Quantized, torch.jit.RecursiveScriptModule):  # type: ignore[misc]
    """TorchScript mode: a ScriptModule that also carries its record.

    `torch.jit.save(model, file)` and `model.save("file.pt")` write plain TorchScript, which loads after
    `import quantflow`; `model.save(directory)` writes an artifact.
    """

    @classmethod
    def adopt(cls, compiled: Compiled, record: Record) -> Self:
        """The compiled program as a ScriptModule of this class."""
        script = cls._around(as_script(compiled))
        script.__dict__.update(compiled=compiled, record=record)
        return script

    @classmethod
    def _around(cls, script: torch.jit.ScriptModule) -> Self:
        """A module of this class over the same TorchScript, which nothing changes."""
        made = torch.jit._recursive.wrap_cpp_module(script._c)
        made.__class__ = cls
        return made  # type: ignore[no-any-return]

    def _in_python(self, copied: Self) -> dict[str, Any]:
        """The attributes that a copy over the same TorchScript lacks: ours and the user's."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in copied.__dict__ and not isinstance(value, torch._C.ScriptMethod)  # found in C++, kept here
        }

    def __copy__(self) -> Self:
        copied = self._around(self)
        copied.__dict__.update(self._in_python(copied))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo.update((id(part), part) for part in (self.compiled, self.record))
        copied = memo[id(self)] = self._around(self)
        copied.__dict__.update(copy.deepcopy(self._in_python(copied), memo))
        return copied

    @outside_compilers
    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        # A call on a deserialized or plain ScriptModule skips what is done here; the result is the same.
        refuse_export()
        if torch.jit.is_tracing():
            with unrecorded():
                inputs = bind(self.compiled.program, args, kwargs)
            return super().__call__(*inputs)
        inputs = bind(self.compiled.program, args, kwargs)
        with below_autograd():
            output = super().__call__(*untracked(inputs))
        return self.compiled.returned(output, inputs)

    def save(self, path: str | Path, **options: Any) -> Any:
        if str(path).endswith(_SCRIPT_FILES):
            return super().save(str(path), **options)
        return save_record(self.record, path)

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8, counted in the TorchScript graph."""
        return self.compiled.runner.int8_layers()


Quantized = QuantizedModel | QuantizedScript


def load(
    directory: str | Path, *, runtime: str = "auto", device: str = "auto", operators: Sequence[str] = ()
) -> Quantized:
    """The int8 model of an artifact, with outputs identical to those of the model that was saved.

    Neither the float model nor any code the recipe names is needed or touched.

    Args:
        runtime: "auto" takes the runtime the artifact was made with, where this machine has it.
        operators: full names or patterns ("my::*") of registered operators that the model may call besides ATen's and
            torchvision's pure ones. A program made in this process may call any; one from a file only what you name.

    Raises:
        ArtifactError: missing, truncated, changed, from a newer format, or one that calls an operator not named.
        UnavailableError: the runtime or device is not on this machine.
    """
    record = Record.load(directory, operators)
    recipe = Recipe.from_dict(record.recipe)
    wanted = recipe.runtime.kind if runtime == "auto" else runtime
    mode = recipe.mode.kind
    choice = choose_runtime(wanted, device, "export" if runtime != "auto" else mode)
    compiled = compile_program(record.program, choice)
    if _same_machine(record.results.get("environment")):
        compiled.runner.adopt(record.results.get("warmup", {}).get("variants", ()))
    if mode == "torchscript" and choice.runtime.script is not None:
        return QuantizedScript.adopt(compiled, record)
    return QuantizedModel(compiled, record)


def _same_machine(recorded: Any) -> bool:
    """Whether an artifact was tuned on a machine like this one."""
    found = environment()
    return isinstance(recorded, Mapping) and all(
        recorded.get(k) == found[k] for k in ("quantflow", "cpu", "isa", "cores")
    )
