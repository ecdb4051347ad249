"""Models saved by torch.jit.save and torch.export.save."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from quantflow.errors import ModelError, first_line, found_at
from quantflow.sources.models.inspected import check_exported, check_script
from quantflow.sources.models.loaded import LoadedModel, eval_mode

#: What torch.export.save names the constants that only an unrestricted unpickler can read.
_OPAQUE = "opaque_obj"
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_scriptmodule(path: Path) -> LoadedModel:
    """A ScriptModule file, in eval mode.

    Raises:
        ModelError: missing, truncated, not written by torch.jit.save, or calling what reaches beyond its tensors.
    """
    _check_exists(path, "torch.jit.save")
    try:
        check_script(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            module = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as problem:
        raise _unreadable(path, "torch.jit.save", problem) from problem
    return LoadedModel(eval_mode(module), path.stem, weights_used=str(path), notices=(_runs(path, "TorchScript"),))


def load_exported(path: Path) -> LoadedModel:
    """An ExportedProgram file. Nothing but tensors is unpickled while it loads.

    Raises:
        ModelError: missing, truncated, not written by torch.export.save, or holding pickled Python objects or
            anything else that is no operator on tensors and no arithmetic on sizes.
    """
    _check_exists(path, "torch.export.save")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as problem:
        raise _unreadable(path, "torch.export.save", problem) from problem
    if any(_OPAQUE in name for name in names):
        raise ModelError(
            f"model.path: {path} holds pickled Python objects, which are never loaded; export it without them"
        )
    try:
        check_exported(path)
        with _weights_only():
            program = torch.export.load(path)
    except pickle.UnpicklingError as problem:
        raise ModelError(
            f"model.path: {path} holds pickled Python objects ({first_line(problem)}), which are never loaded"
        ) from problem
    except ModelError:
        raise
    except Exception as problem:
        raise _unreadable(path, "torch.export.save", problem) from problem
    notice = _runs(path, "torch.export's operators")
    return LoadedModel(program, path.stem, weights_used=str(path), notices=(notice,))


def _runs(path: Path, what: str) -> str:
    return f"model.path: {path} is a program of {what}, which was run; take such files only from whom you trust"


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Makes torch.load refuse anything but tensors, whatever its caller (here torch.export.load) asks for."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _check_exists(path: Path, writer: str) -> None:
    if not path.is_file():
        raise ModelError(f"model.path: {path} is {found_at(path)}, expected a file written by {writer}")


def _unreadable(path: Path, writer: str, problem: Exception) -> ModelError:
    reason = first_line(problem)
    return ModelError(f"model.path: {path} can't be loaded ({reason}); expected a complete file written by {writer}")
