"""What messages quote of other people's errors."""

from __future__ import annotations

import pytest

from quantflow.errors import cause_line, first_line

TRACEBACK = """The following operation failed in the TorchScript interpreter.
Traceback of TorchScript (most recent call last):
    return torch.mm(x, w)
RuntimeError: mat1 and mat2 shapes cannot be multiplied
"""


@pytest.mark.parametrize(
    ("text", "first", "cause"),
    [
        ("one", "one", "one"),
        ("\n  \n one \ntwo", "one", "one"),
        ("", "ValueError", "ValueError"),
        (" \n", "ValueError", "ValueError"),
        (TRACEBACK, TRACEBACK.splitlines()[0], TRACEBACK.splitlines()[-1]),
        ("a\nRuntimeError: b\nRuntimeError: c\nd", "a", "RuntimeError: c"),
    ],
)
def test_the_line_that_is_quoted(text: str, first: str, cause: str) -> None:
    assert (first_line(ValueError(text)), cause_line(ValueError(text))) == (first, cause)
