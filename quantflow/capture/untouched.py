"""Capture leaves a model as it found it, and finds it as if it had never run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def untouched(model: object) -> Iterator[None]:
    """Attributes and buffers that the model sets while it is captured are put back afterwards.

    Detection heads that keep the grid of the last shape that they saw, and have a switch for making it anew, make it
    anew in here: else the graph would hold that one grid.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    plain = [module for module in modules if not hasattr(module, "_c")]
    kept = [(module, dict(module.__dict__), dict(module._buffers)) for module in plain]
    for module in plain:
        if getattr(module, "dynamic", None) is False and hasattr(module, "anchors") and hasattr(module, "shape"):
            module.dynamic = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
