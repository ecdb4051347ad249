"""What quantization returns: callables that take and return torch tensors, and that can be saved and loaded.

QuantizedModel     mode=export, and every loaded artifact: an nn.Module around a compiled program
QuantizedScript    mode=torchscript: a real torch.jit.ScriptModule
QuantizedModule    mode=imperative: an nn.Module around the user's own code with int8 layers swapped in
QuantizedParts     what can't be captured as a whole: an nn.Module around the user's own code with int8 parts put in
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quantflow.errors import ArtifactError, CaptureError, UsageError, first_line
from quantflow.host.environment import environment
from quantflow.ir.batch import as_batches
from quantflow.ir.structure import CONSTANTS
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
from quantflow.stages.record import Record, weights_bytes
from quantflow.store import artifact
from quantflow.store.json_values import decoded, to_json

if TYPE_CHECKING:
    from quantflow.exchange import OnnxExport

#: File name endings that mean torch.jit.save rather than an artifact folder.
_SCRIPT_FILES = (".pt", ".pth", ".ts", ".jit")


_NO_TRAINING = (
    "quantflow: train() changes nothing on an int8 model, which stays in eval mode; train the float model and quantize "
    "it again"
)


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
            warnings.warn(_NO_TRAINING, stacklevel=2)
        return super().train(False)  # type: ignore[misc,no-any-return]

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured, as in results.json."""
        return self.record.results

    def to_onnx(self, path: str | Path, batches: Iterable[Any] | None = None, *, verify: bool = True) -> OnnxExport:
        """Write the int8 program as an ONNX file of QDQ nodes, which onnxruntime and OpenVINO run in int8.

        Args:
            batches: input like the real one, as `quantize` takes it, a few samples: sums that a residual is added to
                are coded in the range that they have there. None: in the widest range that matters, which costs
                accuracy where there are residuals.
            verify: run the file with onnxruntime and compare it with the reference.

        Returns:
            What was written: nodes, float layers by name, SQNR of the comparison.

        Raises:
            UnavailableError: onnx or onnxruntime is not installed: pip install 'quantflow[onnx]'.
            UsageError: an op has no form in ONNX; names the layer.
            VerificationError: onnxruntime gives another result than the reference.
        """
        given = None if batches is None else list(as_batches(batches))
        # Only here: few of those who import quantflow write a file.
        from quantflow.exchange import write_onnx

        return write_onnx(self.record.program, path, given, verify=verify)

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
                inputs = self.compiled.bound(args, kwargs)
            return super().__call__(*inputs)
        inputs, forward = self.compiled.bound(args, kwargs), super().__call__
        with below_autograd():
            output = self.compiled.computed(lambda given: forward(*given), untracked(inputs))
        return self.compiled.returned(output, inputs)

    def save(self, path: str | Path, **options: Any) -> Any:
        if str(path).endswith(_SCRIPT_FILES):
            return super().save(str(path), **options)
        return save_record(self.record, path)

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8, counted in the TorchScript graph."""
        return self.compiled.runner.int8_layers()


Quantized = QuantizedModel | QuantizedScript


#: What torch keeps of a module's forward hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """A module's own forward hooks, by where torch keeps them."""
    return {name: getattr(module, name) for name in _HOOKS}


class Int8Part(Fixed, nn.Module):
    """What stands in a part's place: a call of its int8 model, the float part's hooks and its plain attributes."""

    def __init__(self, name: str, model: Any, part: nn.Module) -> None:
        super().__init__()
        self._name = name
        self._plain = {key: value for key, value in vars(part).items() if _is_plain(key, value)}
        self.model = model
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            known = self.__dict__.get("_plain", {})
            if name in known:
                return known[name]
            raise AttributeError(
                f"the int8 part '{self.__dict__.get('_name')}' has no '{name}': it can be called, and has the float "
                "part's numbers and names; quantize other parts with parts=[…] where the model's code needs more"
            ) from None


def _is_plain(name: str, value: Any) -> bool:
    if name.startswith("_") or name == "training":
        return False
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain("", item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain("", item) for item in value.values())
    return isinstance(value, (*CONSTANTS, torch.Size, torch.device))


def put_in(module: nn.Module, parts: Mapping[str, Any], hooks: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of the module, without the weights of its parts, in which the parts are these.

    Raises:
        CaptureError: the module can't be copied.
    """
    floats = {name: module.get_submodule(name) for name in parts}
    placed = {name: Int8Part(name, parts[name], part) for name, part in floats.items()}
    memo: dict[int, Any] = {id(part): placed[name] for name, part in floats.items()}
    memo[id(memo)] = list(floats.values())  # as copy does: what is named by its id lives on
    try:
        copied = copy.deepcopy(module, memo)
        for name, own in hooks.items():
            placed[name].__dict__.update(copy.deepcopy(dict(own), memo))
    except Exception as error:  # whatever the module holds may refuse in its own way
        raise CaptureError(
            f"parts: int8 parts are put into a copy of the model, which can't be made ({first_line(error)}); quantize "
            "its submodules yourself: model.backbone = quantflow.quantize(model.backbone, its inputs)"
        ) from error
    for _, tensor in _outside(copied, tuple(parts)):
        tensor.requires_grad_(False)
    return copied.eval()


class QuantizedParts(Fixed, nn.Module):
    """The user's own code with int8 parts put in: takes and returns what the float model does.

    Attributes:
        module: the copy of the float model that has the parts in it.
        parts: name → int8 model, each with its own record and results.
        results: what was measured, as in results.json.
    """

    _immutable = ("results",)

    def __init__(self, module: nn.Module, parts: Mapping[str, Quantized], results: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self._names = tuple(parts)
        self.results = results
        self.eval()

    @property
    def parts(self) -> dict[str, Quantized]:
        """Name → int8 model."""
        return {name: self.module.get_submodule(name).model for name in self._names}  # type: ignore[misc]

    @outside_compilers
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        refuse_export()
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Nothing but a notice, as for every int8 model: a detector in training mode would ask for targets."""
        if mode:
            warnings.warn(_NO_TRAINING, stacklevel=2)
        return super().train(False)

    def save(self, directory: str | Path) -> Path:
        """Write the artifact: `quantflow.load(directory, module=the float model)` gives the same model again.

        It holds every part's program and weights, and none of the model's own code.
        """
        numbered = {f"part{index}": (name, part) for index, (name, part) in enumerate(self.parts.items())}
        index = {
            "format": 1,
            "model": type(self.module).__name__,
            "outside_sha256": _digest_outside(self.module, self._names),
            "parts": {name: prefix for prefix, (name, _) in numbered.items()},
        }
        files = {
            artifact.PARTS: (json.dumps(index, indent=1) + "\n").encode(),
            artifact.RESULTS: to_json(self.results),
            **views(self.results),
        }
        for prefix, (_, part) in numbered.items():
            files |= {f"{prefix}.{name}": content for name, content in part.record.files().items()}
        return artifact.write_artifact(Path(directory), files, notices=self.results.get("notices", ()))

    def int8_layers(self) -> int:
        """Convolutions and linears that run in int8, in all parts."""
        return sum(part.int8_layers() for part in self.parts.values())

    def weights_bytes(self) -> int:
        """Of the int8 parts, and of what is float outside them."""
        outside = sum(x.nbytes for _, x in _outside(self.module, self._names))
        return outside + sum(len(weights_bytes(part.record.program)) for part in self.parts.values())

    def extra_repr(self) -> str:
        return f"parts={', '.join(self._names)}, int8_layers={self.int8_layers()}"


def _outside(module: nn.Module, parts: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    inside = tuple(f"{name}." for name in parts)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith(inside):
            yield name, tensor


def _digest_outside(module: nn.Module, parts: Sequence[str]) -> str:
    """sha256 of the names and numbers of what stays float outside the parts."""
    digest = hashlib.sha256()
    for name, x in sorted(_outside(module, parts), key=lambda pair: pair[0]):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@overload
def load(
    directory: str | Path,
    *,
    module: None = None,
    runtime: str = "auto",
    device: str = "auto",
    operators: Sequence[str] = (),
) -> Quantized: ...
@overload
def load(
    directory: str | Path,
    *,
    module: nn.Module,
    runtime: str = "auto",
    device: str = "auto",
    operators: Sequence[str] = (),
) -> QuantizedParts: ...
def load(
    directory: str | Path,
    *,
    module: nn.Module | None = None,
    runtime: str = "auto",
    device: str = "auto",
    operators: Sequence[str] = (),
) -> Quantized | QuantizedParts:
    """The int8 model of an artifact: the program that was saved, on the runtime that it was made with or another.

    On the same runtime and machine its outputs are those of the model that was saved, but in imperative mode: of such a
    model the artifact holds the program alone, whose float parts may round otherwise than the module's own code. It
    takes the sizes of the captured program, returns its structure, and what a program leaves out, such as caches, does
    not come back. Another runtime may differ by single codes.

    Neither the float model nor any code the recipe names is needed or touched. But a model that was quantized in parts
    is the user's own code with int8 parts in it, so that its artifact needs that model, whose parts' own weights do not
    matter.

    Args:
        module: the float model that parts are put into, which is copied, not modified.
        runtime: "auto" takes the runtime the artifact was made with, where this machine has it.
        operators: full names or patterns ("my::*") of registered operators that the model may call besides ATen's and
            torchvision's pure ones. A program made in this process may call any; one from a file only what you name.

    Raises:
        ArtifactError: missing, truncated, changed, from a newer format, one that calls an operator not named, or one of
            parts without the model that they belong to.
        UnavailableError: the runtime or device is not on this machine.
    """
    if module is None:
        return _compiled(Record.load(directory, operators), runtime, device)
    files = artifact.read_artifact(Path(directory))
    index = _index_of_parts(files, directory, module)
    parts: dict[str, Quantized] = {}
    for name, prefix in index["parts"].items():
        own = {
            file.removeprefix(f"{prefix}."): content for file, content in files.items() if file.startswith(f"{prefix}.")
        }
        parts[name] = _compiled(Record.of_files(own, f"{directory}/{prefix}", operators), runtime, device)
    hooks = {name: hooks_of(module.get_submodule(name)) for name in parts}
    results = artifact.parse_json(files.get(artifact.RESULTS, b""), artifact.RESULTS)
    return QuantizedParts(put_in(module, parts, hooks), parts, decoded(results))


def _index_of_parts(files: Mapping[str, bytes], directory: str | Path, module: nn.Module) -> dict[str, Any]:
    """
    Raises:
        ArtifactError: the artifact holds no parts, or those of another model.
    """
    if artifact.PARTS not in files:
        raise ArtifactError(f"'{directory}' holds a whole model, which needs no other: leave module out")
    index = artifact.parse_json(files[artifact.PARTS], artifact.PARTS)
    parts = index.get("parts")
    if not isinstance(parts, dict) or not all(isinstance(prefix, str) for prefix in parts.values()):
        raise ArtifactError(f"'{directory}/{artifact.PARTS}' names no parts; save the model again")
    known = {name for name, _ in module.named_modules()}
    if missing := [name for name in parts if name not in known]:
        raise ArtifactError(
            f"'{directory}' belongs to a {index.get('model')}, and this {type(module).__name__} has no submodule "
            f"{', '.join(missing)}; give the float model that was quantized"
        )
    if index.get("outside_sha256") != _digest_outside(module, tuple(parts)):
        raise ArtifactError(
            f"'{directory}': the {type(module).__name__}'s weights outside its int8 parts ({', '.join(parts)}) are not "
            "those that it had when it was quantized; give the float model that was quantized, with its weights"
        )
    return index


def _compiled(record: Record, runtime: str, device: str) -> Quantized:
    recipe = Recipe.from_dict(record.recipe)
    wanted = recipe.runtime.kind if runtime == "auto" else runtime
    mode = recipe.mode.kind
    choice = choose_runtime(wanted, device, "export" if runtime != "auto" else mode)
    floats = str(_section(record, "runtime").get("float", "float32"))
    if floats in choice.runtime.halves:
        choice = replace(choice, floats=floats)
    elif floats != "float32":
        warnings.warn(
            f"quantflow: this model was measured with floats in {floats}, which runtime {choice.runtime.name} does not "
            "have: they are float32 here",
            stacklevel=3,
        )
    compiled = compile_program(record.program, choice, is_from_file=True)
    if _same_machine(record.results.get("environment")):
        variants = _section(record, "warmup").get("variants")
        compiled.runner.adopt([row for row in variants if isinstance(row, dict)] if isinstance(variants, list) else ())
    if mode == "torchscript" and choice.runtime.script is not None:
        return QuantizedScript.adopt(compiled, record)
    return QuantizedModel(compiled, record)


def _section(record: Record, name: str) -> Mapping[str, Any]:
    """A section of the results, which a file may hold in any form."""
    found = record.results.get(name)
    return found if isinstance(found, dict) else {}


def _same_machine(recorded: Any) -> bool:
    """Whether an artifact was tuned on a machine like this one."""
    found = environment()
    return isinstance(recorded, Mapping) and all(
        recorded.get(k) == found[k] for k in ("quantflow", "cpu", "isa", "cores")
    )
