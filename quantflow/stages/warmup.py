"""warmup(compiled, batch) → Warmup: build what depends on shapes, and compare with the reference before going on."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from quantflow.errors import VerificationError
from quantflow.ir.activations import tie_tolerance
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.program import Node
from quantflow.ir.structure import plain
from quantflow.numerics.agreement import disagreement
from quantflow.runtimes.specification import ASKED_FOR, Specification, handed_on, resolve, unrounded
from quantflow.stages.compile import Compiled
from quantflow.stages.evaluate import ErrorSum, tensors

#: Below this the compiled program and its layers one by one are not the same computation. They are equal to the bit
#: unless a float op's result depends on memory layout, which a deep network can amplify.
LEAST_WHOLE_DB = 20.0
#: The same where floats are held in half precision.
LEAST_HALF_DB = 10.0
#: A float32 result may differ by this share of the tensor's largest magnitude.
FLOAT_TOLERANCE = 1e-4
#: Which codes are moved to see whether a model amplifies single steps.
STEP_EVERY = 97
STEP_MARGIN_DB = 3.0


@dataclass(frozen=True)
class Warmup:
    """What warm-up saw.

    Attributes:
        time_to_first_result_s: compiling plus the first call.
        steady_ms: median of the calls after the first, on the warm-up batch.
        sqnr_vs_reference_db: of the whole model's output; one-code differences add up along the model.
        one_code_differences: codes that legally differ from the reference's, over all layers.
        layers_checked: int8 nodes compared with the reference on its own codes.
        variants: what the runtime tried per batch size, and what it keeps (see AbstractRunner.tune).
        choices: by what it chose kernels and their cuts (see AbstractRunner.choices).
    """

    time_to_first_result_s: float
    steady_ms: float
    iterations: int
    batch_size: int
    sqnr_vs_reference_db: float
    one_code_differences: int
    layers_checked: int
    notices: tuple[str, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "notices"}


def warmup(
    compiled: Compiled,
    batch: Batch,
    *,
    iterations: int = 3,
    min_sqnr_db: float = 40.0,
    call: Callable[..., Any] | None = None,
    others: Sequence[Batch] = (),
    tuned_for: Sequence[Batch] = (),
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Callable[[int, int | None], None] | None = None,
) -> Warmup:
    """Run the model, time it, and verify it layer by layer.

    Every node is run on the reference's own codes and may differ by one code, only next to a rounding tie. The whole
    model's output is held to `min_sqnr_db` against the reference's; below that, with every layer legal, the model
    itself may amplify single codes, which is tried, reported, and does not stop the run.

    Args:
        others: batches of other sizes, which the program is verified on, too.
        call: what to time instead of `compiled` (imperative mode: the swapped module).
        tuned_for: batches for which the runtime looks for its fastest variant, once it is verified.
        alone: entered where times are measured.

    Raises:
        VerificationError: a layer differs from the reference in a way that rounding can't explain.
    """
    run = call or compiled
    with alone(), torch.inference_mode():
        start = time.perf_counter()
        run(*batch.args, **batch.kwargs)
        first = time.perf_counter() - start + compiled.seconds
        taken = []
        for done in range(iterations):
            begin = time.perf_counter()
            output = run(*batch.args, **batch.kwargs)
            taken.append((time.perf_counter() - begin) * 1e3)
            if progress is not None:
                progress(done + 1, None)
    whole = output if call is None else _require_code_equals_program(compiled, batch, output)
    reference, differences, checked = _verify(compiled, batch, whole, progress)
    for other in others:
        with torch.inference_mode():
            whole = compiled(*other.args, **other.kwargs)
        _, more, again = _verify(compiled, other, whole, progress)
        differences, checked = differences + more, checked + again
    pairs = zip(tensors(reference), tensors(output), strict=True)
    quality = min((_sqnr_db(a, b) for (_, a), (_, b) in pairs if a.is_floating_point()), default=math.inf)
    notices: tuple[str, ...] = ()
    if not quality >= min_sqnr_db:
        why = (
            f": its floats are held in {compiled.choice.floats} (policy.float)"
            if compiled.runner.halves
            else _why(compiled, batch, reference, min_sqnr_db, differences)
        )
        notices = (
            f"the whole model's output is {quality:.1f} dB from the reference's (warmup.min_sqnr_db: {min_sqnr_db:g}) "
            f"although each layer is within one code of it{why}",
        )
    if left := compiled.left_to_torch():
        named = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        notices += (
            f"{len(left)} nodes run in torch, the runtime has no kernel ({named}{'; …' if len(left) > 5 else ''})",
        )
    with alone():
        variants = [
            row for tuned in tuned_for for row in compiled.runner.tune(bind(compiled.program, tuned.args, tuned.kwargs))
        ]
    return Warmup(
        first, statistics.median(taken), iterations, batch.size, quality, differences, checked, notices,
        tuple(variants), compiled.runner.choices(),
    )  # fmt: skip


def _require_whole_equals_parts(compiled: Compiled, batch: Batch, whole: Any, parts: Any) -> None:
    """The program in one go must give what its nodes give one by one: a value overwritten too early shows here."""
    least = LEAST_HALF_DB if compiled.runner.halves else LEAST_WHOLE_DB
    for (path, expected), (_, actual) in zip(tensors(parts), tensors(whole), strict=True):
        found = _sqnr_db(expected, actual)
        # Float results of a fused kernel differ in the last bits. What a model makes of a code that this moves is what
        # it makes of any.
        if not found >= least and not found >= _stepped_db(compiled, batch, parts)[0] - STEP_MARGIN_DB:
            raise VerificationError(
                f"{path}: the compiled program gives another result than its layers one by one; runtime "
                f"{compiled.choice.runtime.name} must not be used: try {ASKED_FOR}, and report this"
            )


def _require_code_equals_program(compiled: Compiled, batch: Batch, output: Any) -> Any:
    """What a module's own code gives with int8 behind its calls is what a saved artifact gives, which is returned."""
    with torch.inference_mode():
        wanted = compiled(*batch.args, **batch.kwargs)
    for (path, expected), (_, actual) in zip(tensors(plain(wanted)), tensors(plain(output)), strict=True):
        least = LEAST_HALF_DB if compiled.runner.halves else LEAST_WHOLE_DB
        if not _sqnr_db(expected, actual) >= least:
            raise VerificationError(
                f"{path}: the module's own code gives another result ({_sqnr_db(expected, actual):.1f} dB) than the "
                "int8 program that an artifact of it would hold; use mode=export, and report this"
            )
    return wanted


def _sqnr_db(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """As `measures.sqnr_db`, but infinities that both hold (masked scores) don't count."""
    if torch.equal(expected, actual):
        return math.inf
    error = ErrorSum()
    error.add(expected, actual)
    return error.sqnr_db


def _why(compiled: Compiled, batch: Batch, reference: Any, bound_db: float, differences: int) -> str:
    """What a few single rounding steps in the first codes alone do to the reference's output."""
    left, moved = _stepped_db(compiled, batch, reference)
    tried = f"one step in every {STEP_EVERY}th code of {moved} alone leaves the reference {left:.1f} dB"
    if left < bound_db:
        return f": this model amplifies single rounding steps ({tried})"
    return f": {differences} codes differ over all layers, and add up ({tried}); {ASKED_FOR} computes the other result"


def _stepped_db(compiled: Compiled, batch: Batch, reference: Any) -> tuple[float, str]:
    """SQNR of the reference runtime to itself after single steps in the codes of one activation, and which one."""
    program, moved = compiled.program, ""

    def move(node: Node, values: Mapping[str, Any]) -> None:
        nonlocal moved
        held, value = program.values.get(node.output), values[node.output]
        if moved or held is None or not isinstance(value, torch.Tensor) or not value.numel():
            return
        moved = node.name
        codes = value.flatten()
        few = slice(None, None, STEP_EVERY)
        up = codes[few] < held.qparams.range[1]
        codes[few] = torch.where(up, codes[few] + 1, codes[few] - 1)
        value.copy_(codes.view_as(value))

    stepped = Specification(program)(bind(program, batch.args, batch.kwargs), move)
    pairs = zip(tensors(reference), tensors(stepped), strict=True)
    return min((_sqnr_db(a, b) for (_, a), (_, b) in pairs if a.is_floating_point()), default=math.inf), moved


def _verify(
    compiled: Compiled, batch: Batch, whole: Any, progress: Callable[[int, int | None], None] | None
) -> tuple[Any, int, int]:
    """(the reference's output, legal one-code differences, int8 nodes checked).

    The runtime's nodes run one by one beside the reference's. One that read the same to the bit has been run on the
    reference's codes; any other is run on them, too.

    Args:
        whole: what the compiled program gives.
    """
    program, runner = compiled.program, compiled.runner
    inputs, names = bind(program, batch.args, batch.kwargs), [item.name for item in program.inputs]
    wanted, found_by_name = set(program.output_names()), dict[str, Any](zip(names, inputs, strict=True))
    steps, alike = runner.trace(inputs), set(names)
    differing = checked = 0

    def compare(node: Node, values: Mapping[str, Any]) -> None:
        nonlocal differing, checked
        position, found = next(steps)
        if progress is not None:
            progress(position + 1, len(program.nodes))
        if node.output in wanted:
            found_by_name[node.output] = compiled.value(node, found)
        expected, reads_alike = values[node.output], alike.issuperset(node.refs())
        if reads_alike and _is_same(expected, found):
            alike.add(node.output)
        if node.op in ("aten", "size") or not isinstance(expected, torch.Tensor) or not expected.numel():
            return
        checked += 1
        if node.output in alike:
            return
        actual = found if reads_alike else runner.run_node(position, values)
        if expected.is_floating_point():
            wanted_of = handed_on(program, node, values, actual) if node.op == "recurrence" else expected
            _require_close(node, wanted_of, actual)
            return
        if expected.dtype is actual.dtype and torch.equal(expected, actual):
            return  # what lies before rounding costs as much as the node itself
        tolerance = tie_tolerance(node.epilogue)
        illegal, worst = disagreement(expected, actual, unrounded(program, node, values), tolerance)
        differing += int((expected != actual).sum())
        if illegal:
            raise VerificationError(
                f"layer {node.name} ({node.fused_name}): {illegal} of {expected.numel()} codes differ from the "
                f"reference where rounding can't explain it (worst: {worst:.3g} codes from a tie); "
                f"runtime {compiled.choice.runtime.name} must not be used: try {ASKED_FOR}, and report this"
            )

    reference = Specification(program)(inputs, compare)
    _require_whole_equals_parts(compiled, batch, whole, resolve(program, program.output, found_by_name))
    return reference, differing, checked


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit, and lie in the same place."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype is b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _require_close(node: Node, expected: torch.Tensor, actual: torch.Tensor) -> None:
    error = (expected - actual).abs().max().item()
    bound = FLOAT_TOLERANCE * max(expected.abs().max().item(), 1e-30)
    if not error <= bound:
        raise VerificationError(
            f"layer {node.name} ({node.fused_name}): its float output differs from the reference's by {error:.3g}, "
            f"more than {bound:.3g}; report this, and use {ASKED_FOR} meanwhile"
        )
