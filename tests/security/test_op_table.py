"""The table of what a program may do says what PyTorch's operators take, and what is wrong about a call is refused."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from quantflow.errors import ArtifactError
from quantflow.ir.aten_policy import aten_op, require_allowed
from quantflow.ir.op_table import row_of, targets
from quantflow.ir.program import Program
from quantflow.runtimes import native_library
from tests.security.calls import every_wrong_call, node, program
from tests.security.running import outcomes

#: Calls that a run of the tests takes from the 70,000: all of them with QUANTFLOW_CALLS=100000, in half an hour.
CALLS = int(os.environ.get("QUANTFLOW_CALLS", "400"))


@pytest.mark.parametrize("target", targets())
def test_a_row_is_the_operators_own_schema(target: str) -> None:
    row = row_of(target)
    assert row is not None
    name, _, overload = target.partition(".")
    packet = getattr(torch.ops.aten, name, None)
    if not hasattr(packet, overload):
        pytest.skip(f"torch {torch.__version__} has no {target}")
    schema = getattr(packet, overload)._schema
    assert not schema.is_mutable
    assert [a.name for a in row.arguments] == [a.name for a in schema.arguments]
    assert [a.is_keyword for a in row.arguments] == [a.kwarg_only for a in schema.arguments]
    for ours, theirs in zip(row.arguments, schema.arguments, strict=True):
        assert theirs.has_default_value() or not ours.is_optional, ours.name  # stricter is fine
        assert aten_op(target) is not None


@pytest.mark.parametrize(
    "name",
    [
        "max_pool2d_with_indices_backward.default", "as_strided.default", "set.source_Tensor", "resize.default",
        "empty.memory_format", "_foreach_add.Scalar", "native_batch_norm.default", "_fft_r2c.default",
        "embedding_dense_backward.default", "_cudnn_rnn.default", "col_indices.default", "quantize_per_tensor.default",
        "sparse_coo_tensor.size", "segment_reduce.default", "bincount.default", "add_.Tensor", "copy_.default",
        "_reshape_alias.default", "from_file.default", "_nested_view_from_buffer.default", "mkldnn_linear.default",
    ],
)  # fmt: skip
def test_what_reads_or_writes_elsewhere_is_not_in_it(name: str) -> None:
    assert row_of(name) is None
    with pytest.raises(ArtifactError, match="not among the ops that a program from a file may call"):
        require_allowed(name, ())


def test_the_caller_may_allow_an_op_by_name() -> None:
    require_allowed("bincount.default", ["aten::bincount"])


def test_the_native_library_is_built_with_the_same_table() -> None:
    path = native_library.library_path("libquantflow_native.so")
    if path is None:
        pytest.skip("the native library was not built")
    assert Path("quantflow/ir/aten_ops.txt").read_bytes() in path.read_bytes()


def test_a_wrong_call_is_refused_or_computed_as_the_reference_does() -> None:
    every = list(every_wrong_call())
    chosen = every if len(every) <= CALLS else random.Random(0).sample(every, CALLS)
    found = zip(chosen, outcomes([data for _, data in chosen]), strict=True)
    wrong = [f"{what}: {outcome}" for (what, _), outcome in found if outcome.startswith(("signal", "differs"))]
    assert not wrong


def test_an_empty_vector_among_joined_tensors_has_no_say() -> None:
    x, empty = {"value": "x"}, {"tensor": "nothing"}
    joined = program(node("cat.default", [[empty, x], -2]))
    tensors = {"nothing": torch.empty(0)}
    assert Program.from_json(joined, tensors).nodes[0].target == "cat.default"
