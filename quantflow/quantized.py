"""What quantization returns: callables that take and return torch tensors, and that can be saved and loaded.

QuantizedModel     mode=export, and every loaded artifact: an nn.Module around a compiled program
QuantizedScript    mode=torchscript: a real torch.jit.ScriptModule
QuantizedModule    mode=imperative: an nn.Module around the user's own code with int8 layers swapped in
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from quantflow.errors import ArtifactError
from quantflow.host.environment import environment
from quantflow.ir.program import Program
from quantflow.report import from_json, html, junit, markdown, summary, to_json
from quantflow.runtimes import choose_runtime
from quantflow.schema import Recipe
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.compile import Compiled, compile_program
from quantflow.stages.prepare import bind
from quantflow.store import artifact

#: File name endings that mean torch.jit.save rather than an artifact folder.
_SCRIPT_FILES = (".pt", ".pth", ".ts", ".jit")
REPORT = "report.md"
PAGE = "report.html"
SUMMARY = "summary.md"
JUNIT = "junit.xml"
GRAPH = "graph.txt"
#: Files that a record is read from or that are views of it; all others are kept as they are.
_OWN_FILES = {*artifact.NAMES, artifact.MANIFEST, REPORT, PAGE, SUMMARY, JUNIT, GRAPH}


@dataclass(frozen=True)
class Record:
    """Everything an artifact holds about a quantized model.

    Attributes:
        recipe: resolved, every default written out.
        plan: the rows and shared qparams, as JSON.
        table: what calibration measured.
        program: the integer program with its tensors.
        results: the figures, see report.json.
        graph: the fused graph as text, when it was asked for.
        attached: further files by name, such as a search's journal.
    """

    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    table: CalibrationTable
    program: Program
    results: Mapping[str, Any] = field(default_factory=dict)
    graph: str | None = None
    attached: Mapping[str, bytes] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """File name → content. The same record gives the same bytes."""
        files = {
            artifact.RECIPE: _json(self.recipe),
            artifact.PLAN: _json(self.plan),
            artifact.PROGRAM: _json(self.program.to_json()),
            artifact.WEIGHTS: weights_bytes(self.program),
            artifact.CALIBRATION: self.table.to_bytes(),
            **self.result_files(),
        }
        if self.graph is not None:
            files[GRAPH] = self.graph.encode()
        return {**self.attached, **files}

    def result_files(self) -> dict[str, bytes]:
        """The files that evaluate, benchmark and report write again."""
        return {
            artifact.RESULTS: to_json(self.results),
            REPORT: markdown(self.results).encode(),
            PAGE: html(self.results).encode(),
            SUMMARY: summary(self.results).encode(),
            JUNIT: junit(self.results),
        }

    def save(self, directory: str | Path) -> Path:
        """Write the artifact, atomically.

        Raises:
            ArtifactError: the folder holds something else, or can't be written.
        """
        return artifact.write_artifact(Path(directory), self.files(), notices=self.results.get("notices", ()))

    @classmethod
    def load(cls, directory: str | Path) -> Record:
        """Read and verify an artifact. Nothing in it is executed or imported.

        Raises:
            ArtifactError: missing, truncated, changed, or from a newer format; names the file.
        """
        files = artifact.read_artifact(Path(directory))
        required = (
            artifact.RECIPE,
            artifact.PLAN,
            artifact.PROGRAM,
            artifact.WEIGHTS,
            artifact.CALIBRATION,
            artifact.RESULTS,
        )
        if missing := [name for name in required if name not in files]:
            raise ArtifactError(f"'{directory}' lacks {', '.join(missing)}; run the recipe again")
        try:
            tensors = load_tensors(files[artifact.WEIGHTS])
        except SafetensorError as error:
            raise ArtifactError(
                f"'{directory}/{artifact.WEIGHTS}' is damaged ({error}); run the recipe again"
            ) from error
        artifact.parse_json(files[artifact.RESULTS], artifact.RESULTS)
        plan = artifact.parse_json(files[artifact.PLAN], artifact.PLAN)
        if not isinstance(plan.get("rows"), list):
            raise ArtifactError(f"'{directory}/{artifact.PLAN}' holds no rows; run the recipe again")
        return cls(
            recipe=artifact.parse_json(files[artifact.RECIPE], artifact.RECIPE),
            plan=plan,
            table=CalibrationTable.from_bytes(files[artifact.CALIBRATION], artifact.CALIBRATION),
            program=Program.from_json(artifact.parse_json(files[artifact.PROGRAM], artifact.PROGRAM), tensors),
            results=from_json(files[artifact.RESULTS]),
            graph=_graph(files),
            attached={name: content for name, content in files.items() if name not in _OWN_FILES},
        )


def _graph(files: Mapping[str, bytes]) -> str | None:
    try:
        return files[GRAPH].decode() if GRAPH in files else None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{GRAPH} is not UTF-8 text ({error.reason}); run the recipe again") from error


def weights_bytes(program: Program) -> bytes:
    """The program's tensors as one .safetensors file; tensors that share memory are stored apart."""
    return save_tensors(
        {name: tensor.detach().clone().contiguous() for name, tensor in sorted(program.tensors.items())}
    )


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
        return self.record.save(directory)

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
            return super().__call__(*bind(self.compiled.program.inputs, args, kwargs))

    def save(self, path: str | Path, **options: Any) -> Any:
        if str(path).endswith(_SCRIPT_FILES):
            return super().save(str(path), **options)
        return self.record.save(path)

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured, as in results.json."""
        return self.record.results

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8, counted in the TorchScript graph."""
        return self.compiled.runner.int8_layers()


Quantized = QuantizedModel | QuantizedScript


def load(directory: str | Path, *, runtime: str = "auto", device: str = "auto") -> Quantized:
    """The int8 model of an artifact, with outputs identical to those of the model that was saved.

    Neither the float model nor any code the recipe names is needed or touched.

    Args:
        runtime: "auto" takes the runtime the artifact was made with, where this machine has it.

    Raises:
        ArtifactError: missing, truncated, changed, or from a newer format.
        UnavailableError: the runtime or device is not on this machine.
    """
    record = Record.load(directory)
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


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
