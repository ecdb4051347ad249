"""What the self-test runs; that it passes is tested with the native runtime."""

from __future__ import annotations

from quantflow.ir.activations import ACTIVATIONS
from quantflow.ir.ops import OPS
from quantflow.tasks.selftest import _cases


def test_every_op_and_every_activation_has_a_case() -> None:
    nodes = [case.program.nodes[-1] for case in _cases()]
    assert {node.op for node in nodes} == set(OPS) - {"size"}
    assert {node.epilogue.kind for node in nodes if node.epilogue} == set(ACTIVATIONS)
