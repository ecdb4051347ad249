"""What quantization returns: callables that take and return torch tensors, and that can be saved and loaded.

QuantizedModel     mode=export, and every loaded artifact: an nn.Module around a compiled program
QuantizedScript    mode=torchscript: a real torch.jit.ScriptModule
QuantizedModule    mode=imperative: an nn.Module around the user's own code with int8 layers swapped in
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantflow.host.environment import environment
from quantflow.ir.binding import bind
from quantflow.report import views
from quantflow.runtimes import choose_runtime
from quantflow.schema import Recipe
from quantflow.stages.compile import Compiled, compile_program
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


class QuantizedModel(nn.Module):
    """An int8 model: call it like the float one."""

    def __init__(self, compiled: Compiled, record: Record) -> None:
        super().__init__()
        self.compiled = compiled
        self.record = record
        self.eval()

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        return self.compiled(*args, **kwargs)

    def save(self, directory: str | Path) -> Path:
        """Write the artifact: `quantflow.load(directory)` gives the same model in another process."""
        return save_record(self.record, directory)

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured, as in results.json."""
        return self.record.results

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8."""
        return self.compiled.runner.int8_layers()

    def extra_repr(self) -> str:
        choice = self.compiled.choice
        return f"int8_layers={self.int8_layers()}, runtime={choice.runtime.name}, device={choice.device}"


class QuantizedModule(QuantizedModel):
    """Imperative mode: `module` is the user's own code with int8 layers swapped in."""

    def __init__(self, module: nn.Module, compiled: Compiled, record: Record) -> None:
        super().__init__(compiled, record)
        self.module = module

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        return self.module(*args, **kwargs)

    def int8_layers(self) -> int:
        from quantflow.stages.imperative import int8_layers

        return int8_layers(self.module)


def as_script(compiled: Compiled) -> torch.jit.ScriptModule:
    """The compiled program as a ScriptModule, which runs on any machine."""
    script_of = compiled.choice.runtime.script
    assert script_of is not None, "a runtime that serves torchscript makes scripts"
    return script_of(compiled.runner)


class QuantizedScript(torch.jit.RecursiveScriptModule):  # type: ignore[misc]
    """TorchScript mode: a ScriptModule that also carries its record.

    `torch.jit.save(model, file)` and `model.save("file.pt")` write plain TorchScript, which loads after
    `import quantflow`; `model.save(directory)` writes an artifact.
    """

    record: Record
    compiled: Compiled

    @classmethod
    def adopt(cls, compiled: Compiled, record: Record) -> QuantizedScript:
        """The compiled program as a ScriptModule of this class."""
        script = as_script(compiled)
        script.__class__ = cls
        script.__dict__["compiled"] = compiled
        script.__dict__["record"] = record
        return script  # type: ignore[no-any-return]

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        # A call on a deserialized or plain ScriptModule skips this check; the result is the same.
        with torch.inference_mode():
            output = super().__call__(*bind(self.compiled.program, args, kwargs))
            return self.compiled.returned(output)

    def save(self, path: str | Path, **options: Any) -> Any:
        if str(path).endswith(_SCRIPT_FILES):
            return super().save(str(path), **options)
        return save_record(self.record, path)

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured, as in results.json."""
        return self.record.results

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
