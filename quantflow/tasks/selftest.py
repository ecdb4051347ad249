"""task=selftest: every kernel of the native runtime, and three small models, against the reference on this machine.

Kernels are compared on random and on nasty input (odd sizes, size 1, extremes, saturation) by the rule of
`quantflow.numerics.agreement`; float results within a bound relative to the largest magnitude.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from quantflow import report
from quantflow.capture import capture
from quantflow.errors import EXIT_GATE, EXIT_PASSED
from quantflow.ir.activations import ACTIVATIONS, Epilogue, tie_tolerance
from quantflow.ir.calls import Input
from quantflow.ir.program import Node, Program, Ref, TensorRef, Value
from quantflow.ir.recurrence import BOUNDED, CELLS
from quantflow.numerics.affine import QParams
from quantflow.numerics.agreement import disagreement
from quantflow.numerics.measures import sqnr_db
from quantflow.report import Progress
from quantflow.runtimes import AbstractRunner, card, choose_tested, tested_by_itself
from quantflow.runtimes.specification import Specification, handed_on, unrounded
from quantflow.schema import ModeSettings, QConfig, Recipe
from quantflow.sources.data import as_batches
from quantflow.stages.calibrate import calibrate
from quantflow.stages.convert import convert
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import prepare

FLOAT_TOLERANCE = 2e-5
#: Makes a program's runner on the backend under test.
Build = Callable[[Program], AbstractRunner]
_X = QParams("int8", 0.05, 0)
_U = QParams("uint8", 0.04, 131)
_OUT = QParams("int8", 0.11, -7)
_POSITIVE = Value(QParams("int8", 0.03, 0), is_nonnegative=True)


@dataclass
class Row:
    """One line of the table: a kernel, how many cases, what differed and how long it took."""

    kernel: str
    cases: int = 0
    values: int = 0
    one_code: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Case:
    """One program of a single interesting node, the last one, and the input for it."""

    kernel: str
    name: str
    program: Program
    inputs: tuple[torch.Tensor, ...]


def task(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Check the kernels of our own on this machine's device: 0 all agree, 3 something does not.

    Raises:
        UnavailableError: the device is not here, with the devices found.
    """
    console = report.make_console(plain=recipe.report.plain)
    choice = choose_tested(recipe.runtime.kind, recipe.device.kind)
    assert choice.runtime.backends is not None, "it is tested by itself"
    passed = True
    for backend, build in choice.runtime.backends(choice.device).items():
        with Progress(console, quiet=recipe.report.quiet) as progress, progress.stage(f"selftest {backend}") as stage:
            rows = selftest(build, stage.update)
        about = card(choice.device)
        report.print_selftest(console, f"{backend} on {about['name']}" if about else backend, rows)
        passed = passed and all(row.passed for row in rows)
    return EXIT_PASSED if passed else EXIT_GATE


def selftest(build: Build, progress: Callable[[int, int | None], None] | None = None) -> list[Row]:
    """Run everything on one backend of a runtime.

    Args:
        build: makes a program's runner on it.

    Raises:
        UnavailableError: the backend can't run here.
    """
    rows: dict[str, Row] = {}
    cases = list(_cases())
    models = _models()
    total = len(cases) + len(models)
    for done, case in enumerate(cases, start=1):
        row = rows.setdefault(case.kernel, Row(case.kernel))
        _run(row, case.name, lambda row=row, case=case: _compare(row, case, build))
        if progress is not None:
            progress(done, total)
    for done, (name, module, x) in enumerate(models, start=len(cases) + 1):
        row = rows.setdefault(f"model {name}", Row(f"model {name}"))
        _run(row, name, lambda row=row, module=module, x=x: _compare_model(row, module, x, build))
        if progress is not None:
            progress(done, total)
    return list(rows.values())


def selftest_programs(largest_bytes: int = 20_000) -> Iterator[tuple[str, Program]]:
    """(kernel, program) of one small case per kernel: seeds for a fuzzer."""
    seen: set[str] = set()
    for case in _cases():
        size = sum(tensor.nbytes for tensor in case.program.tensors.values())
        key = f"{case.kernel} {case.program.nodes[-1].target}".strip()
        if key not in seen and size <= largest_bytes:
            seen.add(key)
            yield key, case.program


def _run(row: Row, name: str, check: Callable[[], None]) -> None:
    start = time.perf_counter()
    try:
        check()
    except Exception as error:  # noqa: BLE001 the table lists every failure, and the others still run
        row.failures.append(f"{name}: {type(error).__name__}: {error}")
    row.cases += 1
    row.seconds += time.perf_counter() - start


def _compare(row: Row, case: Case, build: Build) -> None:
    """The case's last node on the reference's own values."""
    runner = build(case.program)
    values: dict[str, Any] = {}
    Specification(case.program)(case.inputs, lambda _, seen: values.update(seen))
    _compare_node(row, case.name, case.program, runner, len(case.program.nodes) - 1, values)
    if left := {
        i: why for i, why in runner.left_to_torch().items() if case.program.nodes[i].op not in runner.kernelless
    }:
        row.failures.append(f"{case.name}: has no kernel on this backend ({'; '.join(left.values())})")


def _compare_node(
    row: Row, name: str, program: Program, runner: AbstractRunner, index: int, values: dict[str, Any]
) -> None:
    node = program.nodes[index]
    expected = values[node.output]
    if not isinstance(expected, torch.Tensor):
        return
    actual = runner.run_node(index, values)
    row.values += expected.numel()
    if expected.is_floating_point():
        expected = handed_on(program, node, values, actual)
        finite = expected.isfinite()
        bound = FLOAT_TOLERANCE * max(1e-30, expected[finite].abs().max().item() if bool(finite.any()) else 0.0)
        same = torch.equal(expected[~finite].nan_to_num(), actual[~finite].nan_to_num())
        error = (expected - actual)[finite].abs().max().item() if bool(finite.any()) else 0.0
        if expected.shape != actual.shape or not error <= bound or not same:
            row.failures.append(f"{name}: differs by {error:.3g}, more than {bound:.3g}")
        return
    real = unrounded(program, node, values)
    illegal, worst = disagreement(expected, actual, real, tie_tolerance(node.epilogue))
    row.one_code += int((expected != actual).sum()) if expected.shape == actual.shape else 0
    if illegal:
        row.failures.append(f"{name}: {illegal} of {expected.numel()} codes wrong, up to {worst:.3g} codes from a tie")


def _compare_model(row: Row, module: nn.Module, x: torch.Tensor, build: Build) -> None:
    program = quantized_program(module, x)
    runner = build(program)
    values: dict[str, Any] = {}
    reference = Specification(program)([x], lambda _, seen: values.update(seen))
    quality = sqnr_db(reference, runner([x]))
    if quality < 40:
        row.failures.append(f"whole model: {quality:.1f} dB from the reference")
    for index in range(len(program.nodes)):
        _compare_node(row, program.nodes[index].name, program, runner, index, values)
    if left := runner.left_to_torch():
        row.failures.append(f"left to torch: {left}")


def quantized_program(
    module: nn.Module, x: torch.Tensor, qconfig: QConfig | None = None, layers: Mapping[str, str] | None = None
) -> Program:
    """The int8 program of a small module, calibrated on x alone; `layers` as in a recipe."""
    batches = list(as_batches([x]))
    qconfig = qconfig or QConfig()
    graph = capture(module.eval(), batches[0], ModeSettings())
    plan = make_plan(
        graph, qconfig, layers, mode="export", kernel_of=tested_by_itself().kernel_of, recipe_name="selftest"
    )
    prepared = prepare(graph, plan, None)
    return convert(prepared, calibrate(prepared, batches, key="selftest"))


# --- cases


def _cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from _linear_cases()
    yield from _conv_cases()
    yield from _epilogue_cases()
    yield from _code_cases()
    yield from _recurrence_cases()
    yield from _float_cases()


def _codes(shape: tuple[int, ...], value: Value, kind: str = "random") -> torch.Tensor:
    """Codes of a value: random, or all at an extreme."""
    assert value.qparams is not None
    low, high = value.qparams.range
    low = 0 if value.is_nonnegative else low
    if kind == "low":
        return torch.full(shape, low, dtype=value.qparams.torch_dtype)
    if kind == "high":
        return torch.full(shape, high, dtype=value.qparams.torch_dtype)
    return torch.randint(low, high + 1, shape).to(value.qparams.torch_dtype)


def coded_program(
    node: Node, values: dict[str, Value], tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> Program:
    """A program of one node over inputs that arrive as codes (or as they are, where `values` lacks them)."""
    described = tuple(
        Input(name, None, str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in inputs.items()
    )
    return Program(described, (node,), values, tensors, Ref(node.output))


def _one(kernel: str, name: str, node: Node, values: dict[str, Value], tensors: dict[str, torch.Tensor],
         inputs: dict[str, torch.Tensor]) -> Case:  # fmt: skip
    return Case(kernel, name, coded_program(node, values, tensors, inputs), tuple(inputs.values()))


def _weights(shape: tuple[int, ...], kind: str = "random") -> dict[str, torch.Tensor]:
    weight = torch.randint(-127, 128, shape) if kind == "random" else torch.full(shape, 127 if kind == "high" else -127)
    return {
        "w": weight.to(torch.int8),
        "s": torch.rand(shape[0]) * 1e-3 + 1e-4,
        "b": torch.randn(shape[0]),
    }


def _linear_cases() -> Iterator[Case]:
    names = {"weight": "w", "weight_scale": "s", "bias": "b"}
    for rows, k, n in ((1, 1, 1), (1, 512, 1000), (49, 130, 33), (7, 64, 64), (128, 384, 96), (3, 4097, 17)):
        for value, kind in ((Value(_X), "random"), (Value(_U), "high"), (Value(_X), "low"), (_POSITIVE, "high")):
            x = _codes((rows, k), value, kind)
            node = Node("linear", "linear", "y", (Ref("x"), None), attrs=names)
            tensors = _weights((n, k), kind)
            yield _one("linear", f"{rows}x{k}x{n} {kind}", node, {"x": value, "y": Value(_OUT)}, tensors, {"x": x})
    x, r = _codes((5, 40), Value(_U)), _codes((5, 24), Value(_X))
    node = Node("linear", "linear", "y", (Ref("x"), Ref("r")), attrs=names, epilogue=Epilogue("relu"))
    values = {"x": Value(_U), "r": Value(_X), "y": Value(_OUT)}
    yield _one("linear", "residual", node, values, _weights((24, 40)), {"x": x, "r": r})
    del values["r"]
    yield _one("linear", "float residual", node, values, _weights((24, 40)), {"x": x, "r": torch.randn(5, 24)})
    node = Node("linear", "linear", "y", (Ref("x"), None), attrs=names)
    yield _one("linear", "float result", node, {"x": Value(_U)}, _weights((24, 40)), {"x": x})


def _conv_cases() -> Iterator[Case]:
    #: input shape, output channels, kernel, stride, padding, dilation, groups
    geometries = (
        ((1, 3, 17, 19), 16, (7, 7), (2, 2), (3, 3), (1, 1), 1),
        ((2, 16, 9, 9), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((1, 64, 14, 14), 64, (3, 3), (2, 2), (1, 1), (1, 1), 1),
        ((3, 33, 5, 7), 65, (1, 1), (1, 1), (0, 0), (1, 1), 1),
        ((1, 64, 7, 7), 128, (1, 1), (2, 2), (0, 0), (1, 1), 1),
        ((1, 24, 8, 8), 24, (3, 3), (1, 1), (1, 1), (1, 1), 24),
        ((2, 40, 9, 5), 40, (5, 5), (2, 2), (2, 2), (1, 1), 40),
        ((1, 32, 6, 6), 64, (3, 3), (1, 1), (1, 1), (1, 1), 4),
        ((1, 8, 12, 12), 8, (3, 3), (1, 1), (2, 2), (2, 2), 1),
        ((1, 5, 1, 1), 7, (3, 3), (1, 1), (3, 3), (1, 1), 1),
        ((2, 6, 11), 9, (3,), (2,), (1,), (1,), 1),
        ((1, 4, 5, 6, 7), 6, (3, 3, 3), (1, 2, 1), (1, 1, 0), (1, 1, 1), 2),
    )
    for shape, out, kernel, stride, padding, dilation, groups in geometries:
        attrs = {
            "weight": "w", "weight_scale": "s", "bias": "b", "stride": list(stride), "padding": list(padding),
            "dilation": list(dilation), "groups": groups,
        }  # fmt: skip
        kernel_name = "depthwise" if groups == shape[1] == out else "conv"
        for value, kind in ((Value(_X), "random"), (Value(_U), "random"), (Value(_U), "high"), (_POSITIVE, "random")):
            x = _codes(shape, value, kind)
            node = Node("conv", "conv", "y", (Ref("x"), None), attrs=attrs, epilogue=Epilogue("relu"))
            tensors = _weights((out, shape[1] // groups, *kernel), kind)
            name = f"{list(shape)} k{list(kernel)} s{list(stride)} g{groups} {kind}"
            yield _one(kernel_name, name, node, {"x": value, "y": Value(_OUT)}, tensors, {"x": x})


def _epilogue_cases() -> Iterator[Case]:
    attrs = {
        "weight": "w", "weight_scale": "s", "bias": "b", "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
        "groups": 1,
    }  # fmt: skip
    for kind, activation in ACTIVATIONS.items():
        epilogue = Epilogue(kind, activation.example)
        x, r = _codes((1, 16, 6, 5), Value(_X)), _codes((1, 20, 6, 5), Value(_U))
        for name, residual in (("", None), (" after a residual", r), (" after a float residual", torch.randn(r.shape))):
            args = (Ref("x"), None if residual is None else Ref("r"))
            node = Node("conv", "conv", "y", args, attrs=attrs, epilogue=epilogue)
            values = {"x": Value(_X), "y": Value(_OUT)} | ({"r": Value(_U)} if residual is r else {})
            inputs = {"x": x} if residual is None else {"x": x, "r": residual}
            yield _one("fused activations", f"{kind}{name}", node, values, _weights((20, 16, 3, 3)), inputs)


def _code_cases() -> Iterator[Case]:
    """Ops on codes other than convolutions and linears."""
    x, y = Value(_X), Value(_OUT)
    special = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 0.125, 0.025])
    for shape in ((9,), (1, 3, 9, 7), (2, 3, 32, 32), (0, 3, 4, 4)):
        data = special if shape == (9,) else torch.randn(shape) * 4
        yield _one("quantize", str(list(shape)), Node("q", "quantize", "y", (Ref("x"),)), {"y": y}, {}, {"x": data})
        codes = _codes(shape, x)
        yield _one(
            "dequantize", str(list(shape)), Node("d", "dequantize", "y", (Ref("x"),)), {"x": x}, {}, {"x": codes}
        )
    pairs = (((2, 8, 5, 5), (2, 8, 5, 5)), ((2, 8, 5, 5), (2, 8, 1, 1)), ((3, 1, 7), (4, 1)))
    for op in ("add", "mul"):
        for a, b in pairs:
            node = Node(op, op, "y", (Ref("a"), Ref("b")), epilogue=Epilogue("relu") if a == b else None)
            inputs = {"a": _codes(a, x), "b": _codes(b, Value(_U))}
            yield _one(op, f"{list(a)} {list(b)}", node, {"a": x, "b": Value(_U), "y": y}, {}, inputs)
    inputs = {"a": _codes((2, 3, 9, 17), x), "b": _codes((2, 3, 17, 5), Value(_U))}
    node = Node("matmul", "matmul", "y", (Ref("a"), Ref("b")))
    yield _one("matmul of codes", "batched", node, {"a": x, "b": Value(_U), "y": y}, {}, inputs)
    for shape, args in (((1, 17, 9, 9), ([3, 3], [2, 2], [1, 1])), ((2, 4, 5, 5), ([2, 2], [1, 1], [0, 0], [2, 2]))):
        node = Node("pool", "max_pool", "y", (Ref("x"), *args), target="max_pool2d.default")
        yield _one("max_pool", str(list(shape)), node, {"x": x, "y": x}, {}, {"x": _codes(shape, x)})
    averages: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("avg_pool2d.default", ([3, 3], [2, 2], [1, 1])),
        ("adaptive_avg_pool2d.default", ([1, 1],)),
        ("adaptive_avg_pool2d.default", ([3, 2],)),
        ("mean.dim", ([2, 3],)),
    )
    for target, args in averages:
        node = Node("pool", "avg_pool", "y", (Ref("x"), *args), target=target)
        yield _one("avg_pool", target, node, {"x": x, "y": y}, {}, {"x": _codes((2, 19, 7, 7), x)})
    clamp = Node("clamp", "clamp", "y", (Ref("x"),), attrs={"low": -5, "high": 60})
    yield _one("clamp", "codes", clamp, {"x": x, "y": x}, {}, {"x": _codes((3, 50), x)})
    joined = Node("cat", "cat", "y", ([Ref("a"), Ref("b")], 1), target="cat.default")
    inputs = {"a": _codes((2, 3, 5, 5), x), "b": _codes((2, 4, 5, 5), x)}
    yield _one("cat", "channels", joined, {"a": x, "b": x, "y": x}, {}, inputs)
    shapes: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("permute.default", ([0, 2, 3, 1],)), ("reshape.default", ([2, 6, 30],)), ("slice.Tensor", (2, 1, 4, 2)),
        ("constant_pad_nd.default", ([1, 2, 0, 1], 3)), ("upsample_nearest2d.vec", (None, [2.0, 2.0])),
        ("pixel_shuffle.default", (2,)),
    )  # fmt: skip
    for target, args in shapes:
        node = Node("shape", "shape", "y", (Ref("x"), *args), target=target)
        yield _one("moving codes", target, node, {"x": x, "y": x}, {}, {"x": _codes((2, 4, 9, 5), x)})


def _recurrence_cases() -> Iterator[Case]:
    """Steps of every cell, with weights in codes and in float32, from zeros and from states around and beyond 1."""
    sizes = ((1, 1, 1), (5, 1, 33), (3, 9, 64), (2, 70, 20))
    for cell, rows in CELLS.items():
        for (length, batch, hidden), start, is_int8 in product(sizes, (0.0, 0.5, 3.0), (True, False)):
            if is_int8 and cell not in BOUNDED:
                continue
            inputs = {"x": torch.randn(length, batch, rows * hidden)}
            if start:
                inputs |= {
                    name: torch.randn(batch, hidden) * start for name in ("h", "c")[: 2 if cell == "lstm" else 1]
                }
            tensors = _weights((rows * hidden, hidden))
            tensors |= {"s": tensors["s"] * 10 / hidden**0.5, "b": torch.randn(hidden)}
            if not is_int8:
                tensors["w"] = tensors["w"] * tensors["s"].reshape(-1, 1)
            attrs = {
                "cell": cell, "reverse": batch > 1, "weight": "w", "weight_scale": "s" if is_int8 else None,
                "bias": "b" if cell == "gru" and start else None,
            }  # fmt: skip
            args = (Ref("x"), *(Ref(name) if name in inputs else None for name in "hc"))
            name = f"{cell} {length}x{batch}x{hidden} from {start:g}, {'int8' if is_int8 else 'float'}"
            yield _one("recurrence", name, Node("op", "recurrence", "y", args, attrs=attrs), {}, tensors, inputs)


def _float_cases() -> Iterator[Case]:
    """Float ops: the ATen op with its own arguments."""
    image, rows, heads = torch.randn(2, 6, 9, 7), torch.randn(3, 17, 96), torch.randn(2, 3, 33, 32)
    weights = {"g": torch.randn(96), "h": torch.randn(96), "c": torch.rand(6) + 0.5, "d": torch.randn(6)}
    weights |= {"table": torch.randn(50, 24), "lw": torch.randn(40, 96), "lb": torch.randn(40)}
    weights |= {"cw": torch.randn(8, 6, 3, 3), "cb": torch.randn(8), "dw": torch.randn(6, 1, 3, 3)}

    def aten(kernel: str, target: str, *args: Any, **inputs: torch.Tensor) -> Case:
        node = Node("op", "aten", "y", args, target=target)
        return _one(kernel, f"{target} {[list(x.shape) for x in inputs.values()]}", node, {}, weights, inputs)

    g, h, c, d = (TensorRef(name) for name in "ghcd")
    yield aten("layer_norm", "layer_norm.default", Ref("x"), [96], g, h, 1e-5, x=rows * 3 + 1)
    for axis, x in ((-1, heads), (1, rows), (-1, torch.tensor([[0.0, 1e4, -1e4], [-float("inf"), 0.0, 1.0]]))):
        yield aten("softmax", "softmax.int", Ref("x"), axis, x=x)
    yield aten("attention", "scaled_dot_product_attention.default", Ref("q"), Ref("k"), Ref("v"), q=heads,
               k=heads.flip(2), v=heads * 2)  # fmt: skip
    yield aten("attention", "scaled_dot_product_attention.default", Ref("q"), Ref("k"), Ref("v"), Ref("m"), q=heads,
               k=heads.flip(2), v=heads * 2, m=torch.rand(2, 1, 33, 33) > 0.3)  # fmt: skip
    yield aten("matmul", "matmul.default", Ref("a"), Ref("b"), a=heads, b=heads.transpose(2, 3).contiguous())
    yield aten("matmul", "matmul.default", Ref("a"), Ref("b"), a=torch.randn(5, 7), b=torch.randn(7))
    yield aten("float linear", "linear.default", Ref("x"), TensorRef("lw"), TensorRef("lb"), x=rows)
    yield aten(
        "float convolution", "conv2d.default", Ref("x"), TensorRef("cw"), TensorRef("cb"), [2, 1], [1, 0], x=image
    )
    yield aten(
        "float convolution", "conv2d.default", Ref("x"), TensorRef("dw"), None, [1, 1], [1, 1], [1, 1], 6, x=image
    )
    yield aten("batch_norm", "batch_norm.default", Ref("x"), c, d, d, c, False, 0.1, 1e-5, True, x=image)
    for x in (image, image.flatten(2)):
        yield aten("group_norm", "group_norm.default", Ref("x"), 3, c, d, 1e-5, x=x * 2 + 1)
        yield aten("group_norm", "instance_norm.default", Ref("x"), c, d, None, None, True, 0.1, 1e-5, True, x=x)
    yield aten("embedding", "embedding.default", TensorRef("table"), Ref("i"), i=torch.randint(0, 50, (2, 9)))
    plain = dict.fromkeys(activation.aten for activation in ACTIVATIONS.values() if not activation.numbers)
    for name in (*plain, "exp", "neg", "abs", "erf"):
        yield aten("float functions", f"{name}.default", Ref("x"), x=torch.randn(3, 37) * 4)
    for name in ("add", "sub", "mul", "div"):
        yield aten("float arithmetic", f"{name}.Tensor", Ref("a"), Ref("b"), a=image, b=torch.rand(6, 1, 1) + 0.5)
        yield aten("float arithmetic", f"{name}.Tensor", Ref("a"), 3, a=image)
    yield aten("pooling", "max_pool2d.default", Ref("x"), [3, 3], [2, 2], [1, 1], x=image)
    yield aten("pooling", "adaptive_avg_pool2d.default", Ref("x"), [1, 1], x=image)
    yield aten("reductions", "mean.dim", Ref("x"), [1], x=rows)
    yield aten("reductions", "sum.dim_IntList", Ref("x"), [0, 2], True, x=rows)
    yield aten("upsampling", "upsample_bilinear2d.vec", Ref("x"), None, False, [2.0, 2.0], x=image)
    for target, args in (("permute.default", ([3, 1, 0, 2],)), ("roll.default", ([2, -1], [2, 3])),
                         ("repeat.default", ([2, 1, 1, 3],)), ("pad.default", ([1, 2, 0, 3],))):  # fmt: skip
        yield aten("moving floats", target, Ref("x"), *args, x=image)
    yield aten("comparisons", "where.self", Ref("m"), Ref("a"), Ref("b"), m=rows > 0, a=rows, b=-rows)
    yield aten("comparisons", "eq.Scalar", Ref("i"), 0, i=torch.randint(0, 2, (3, 5)))


# --- models


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.n1(self.a(x)))
        return torch.relu(self.n2(self.b(y)) + x)


class _Gated(nn.Module):
    """Depthwise convolution with squeeze-and-excitation, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(3 * channels, channels, 1)
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 5, 2, 2, groups=3 * channels)
        self.squeeze, self.excite = nn.Conv2d(3 * channels, 8, 1), nn.Conv2d(8, 3 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.hardswish(self.depthwise(nn.functional.hardswish(self.expand(x))))
        gate = nn.functional.hardsigmoid(self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1)))))
        return self.project(y * gate)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


def _models() -> list[tuple[str, nn.Module, torch.Tensor]]:
    torch.manual_seed(1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    residual = nn.Sequential(
        nn.Conv2d(3, 32, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), _Residual(32), _Residual(32), *head
    )
    gated = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), _Gated(16), nn.Conv2d(16, 32, 1), nn.ReLU6(), *head)
    attention = nn.Sequential(nn.Linear(24, 48), _Attention(48, 4), _Attention(48, 4), nn.LayerNorm(48))
    image = torch.randn(2, 3, 40, 40)
    return [
        ("residual CNN", residual, image),
        ("depthwise CNN", gated, image),
        ("transformer", attention, torch.randn(2, 19, 24)),
    ]
