"""The table of what a program may do says what PyTorch's operators take, and what is wrong about a call is refused."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.errors import ArtifactError
from quantflow.ir.aten_policy import aten_op, require_allowed
from quantflow.ir.op_shapes import ANY, Shape, result
from quantflow.ir.op_table import Row, row_of, targets
from quantflow.ir.program import Node, Program, Ref, TensorRef
from quantflow.ir.program_shapes import check_shapes
from quantflow.runtimes import native_library
from quantflow.runtimes.reference import resolve
from tests.security.calls import X, every_wrong_call, legal, node, program, tensor
from tests.security.running import outcomes
from tests.security.worker import inputs, stored

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


def test_a_legal_call_gives_the_shape_that_its_rule_says() -> None:
    tensors, given, ran, wrong = stored(), inputs(), 0, []
    for target in targets():
        row = row_of(target)
        assert row is not None
        args, kwargs = legal(row)
        try:
            made = Program.from_json(program(node(target, args, kwargs)), tensors)
            call = made.nodes[0]
            out = aten_op(target)(*resolve(made, call.args, given), **resolve(made, dict(call.kwargs), given))
        except (ArtifactError, RuntimeError, LookupError):
            continue  # what PyTorch refuses has no shape
        ran += 1
        found = result(row, _with_shapes(row, call, tensors, given))
        results = list(out) if isinstance(out, (list, tuple)) else [out]
        shapes = found if isinstance(found, list) else [found] * len(results)
        if len(shapes) != len(results) or not all(map(_fits, shapes, results)):
            wrong.append(f"{target}: {found} for {[tuple(x.shape) for x in results if isinstance(x, torch.Tensor)]}")
    assert not wrong
    assert ran >= 600


def _with_shapes(
    row: Row, call: Node, tensors: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
) -> dict[str, Any]:
    def known(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [known(item) for item in value]
        held = given[value.name] if isinstance(value, Ref) else value
        held = tensors[value.name] if isinstance(value, TensorRef) else held
        return Shape(tuple(held.shape)) if isinstance(held, torch.Tensor) else held

    names = [argument.name for argument in row.arguments]
    return {name: known(value) for name, value in (*zip(names, call.args, strict=False), *call.kwargs.items())}


def _fits(shape: Any, found: Any) -> bool:
    if not isinstance(shape, Shape) or not isinstance(found, torch.Tensor):
        return True
    if shape.dims is None:
        return shape == ANY or found.numel() <= shape.most
    return len(shape.dims) == found.dim() and all(a in (None, b) for a, b in zip(shape.dims, found.shape, strict=True))


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("tensor_split.sections", [X, 2**40], "makes 1099511627776 parts"),
        ("diag.default", [tensor("w4"), 2**40], "more than 2^40 elements"),
        ("adaptive_max_pool2d.default", [X, [2**20, 2**20]], "elements"),
        ("fft_fft2.default", [X, [2**20, 2**20]], "elements"),
        ("stft.default", [tensor("w66"), 2**20, 1], "elements"),
        ("native_group_norm.default", [X, None, None, 2, 4, 37, 2, 1e-5], "takes 2 * 4 * 37 elements"),
        ("native_group_norm.default", [X, None, None, 2, 4, 36, 0, 1e-5], "must be a whole number in [1,"),
        ("gru_cell.default", [tensor("cube"), X, tensor("w44"), tensor("w44")], "takes (batch, features)"),
        ("lstm.input", [tensor("block"), [tensor("state")] * 2, [tensor("w16_4")], True, 2**40, 0.0, False, False,
                        False], "has 1099511627776 layers"),
    ],
)  # fmt: skip
def test_what_would_make_too_much_is_refused(target: str, arguments: list[Any], words: str) -> None:
    given = {**stored(), "input": inputs()["x"]}
    with pytest.raises(ArtifactError) as caught:
        check_shapes(Program.from_json(program(node(target, arguments)), given), [(2, 4, 6, 6)])
    assert words in str(caught.value)


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
