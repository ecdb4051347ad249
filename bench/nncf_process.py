"""bench/peer_nncf.py as a process of another environment, asked for one round at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

_SCRIPT = Path(__file__).with_name("peer_nncf.py")


def started(
    python: str, folder: Path, module: nn.Module, inputs: Sequence[torch.Tensor], *, is_text: bool
) -> subprocess.Popen[str]:
    """The process, with the module traced and its calibration inputs in the folder."""
    with torch.no_grad():
        torch.jit.trace(module, tuple(x[:2] for x in inputs)).save(str(folder / "model.pt"))  # type: ignore[no-untyped-call]
    np.savez(folder / "data.npz", **{str(i): x.numpy() for i, x in enumerate(inputs)})
    command = [python, str(_SCRIPT), str(folder), *(["--transformer"] if is_text else [])]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def asked(peer: subprocess.Popen[str]) -> dict[str, float]:
    """What one round took, in seconds.

    Raises:
        SystemExit: the peer has ended.
    """
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write("quantize\n")
    peer.stdin.flush()
    line = peer.stdout.readline()
    if not line:
        raise SystemExit("the peer ended without an answer; run bench/peer_nncf.py by itself to see why")
    answer: dict[str, float] = json.loads(line)
    return answer
