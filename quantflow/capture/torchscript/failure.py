"""Why an import fails, in words for the user."""

from __future__ import annotations

#: What a user can do where an import fails.
CURE = "quantize the nn.Module itself with mode=export"


class DependsOnBatch(Exception):
    """The two runs part: the graph can't hold for both batch sizes."""


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # The TorchScript interpreter quotes the code first; the cause is the last line.
    return lines[-1].removeprefix("RuntimeError: ") if "TorchScript interpreter" in lines[0] else lines[0]
