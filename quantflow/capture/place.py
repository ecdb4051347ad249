"""Where in the user's code something happened."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from quantflow.errors import CaptureError

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[1])


def line_of(error: BaseException) -> str:
    """The last line of the user's code that an error came through: "model.py:12: if x.sum() > 0:"; "" for none."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        for frame in reversed(traceback.extract_tb(current.__traceback__)):
            if _is_users(frame.filename):
                line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
                return f"{Path(frame.filename).name}:{frame.lineno}: {line}"
        current = current.__cause__ or current.__context__
    return ""


def packs_sequences(error: BaseException) -> bool:
    """Whether an error came up where packed sequences are made, taken apart, or given to a recurrent layer."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(
        frame.f_code.co_name in ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence")
        or any(isinstance(value, PackedSequence) for value in frame.f_locals.values())
        for frame, _ in frames
    )


def solves_sizes(error: BaseException) -> bool:
    """Whether an error came up where torch.export solves for the sizes that a model takes."""
    return any("sympy" in Path(frame.f_code.co_filename).parts for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_users(filename: str) -> bool:
    return not filename.startswith((_TORCH, _OWN, "<")) and "contextlib" not in filename


def writes_into(inputs: Iterable[str]) -> CaptureError:
    """The error of a model that changes what it is given: its graph would compute with other values than it does."""
    return CaptureError(
        f"mode: the model writes into what it is given ({', '.join(inputs)}), which an int8 graph can't; "
        "let it work on a copy (x = x.clone())"
    )


def class_name(model: Any) -> str:
    """Of the user's own class, behind a ScriptModule or a `Flat`."""
    return getattr(model, "original_name", None) or type(model).__name__


def last_line(stack: str | None) -> str:
    """The innermost line of a stack that torch wrote down with a node."""
    lines = [line.strip() for line in (stack or "").splitlines() if line.strip()]
    files = [index for index, line in enumerate(lines) if line.startswith("File ")]
    for index in reversed(files):
        name = lines[index].split('"')[1] if '"' in lines[index] else ""
        if _is_users(name):
            number = lines[index].partition("line ")[2].partition(",")[0]
            code = lines[index + 1] if index + 1 < len(lines) else ""
            return f"{Path(name).name}:{number}: {code}"
    return ""
