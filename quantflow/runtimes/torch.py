"""The torch runtime: a program as TorchScript over the int8 kernels of stock PyTorch.

`lower` turns every program node into calls; `build_script` writes them as one ScriptModule; `run_node` makes the same
calls eagerly for one node, which is how each layer is checked against the reference.

How codes are stored. PyTorch's int8 convolution takes uint8 input only. A signed int8 value is therefore stored as
uint8 codes with zero_point + 128 (the same integers, the top bit flipped). A non-negative symmetric int8 value stays
int8: its bytes are valid uint8 codes with zero_point 0, which spares the kernel the zero-point correction, and int8
saturates where it must. A signed value that only a residual sum reads is stored like that sum's output.

On a CPU without VNNI those int8 kernels are not exact and are not used; the plan then names a float kernel for every
convolution and linear (`kernel_of`) and says what that means (`notes`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.ir.activations import Epilogue
from quantflow.ir.aten_policy import aten_op, computing
from quantflow.ir.graph import SIZE_FUNCTIONS, arguments
from quantflow.ir.ops import LINEAR_OPS, MOVING_OPS
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.program import Node, Program, Ref, TensorRef, substitute
from quantflow.ir.returned import rebuilt, returned
from quantflow.ir.units import CORE, MATMUL, RECURRENCE, Unit
from quantflow.numerics.affine import QParams
from quantflow.runtimes import kernels
from quantflow.runtimes.ordinary import below_autograd, untracked
from quantflow.runtimes.runner import AbstractRunner

_BIAS = 128


@dataclass(frozen=True)
class Call:
    """One call of the lowered program: `output = op(*args, **kwargs)`.

    `op` is "quantflow.NAME", "aten.NAME.OVERLOAD" (NAME is full for an operator that is not ATen's) or "size.NAME".
    """

    output: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """How codes lie in memory: dtype and zero point as the kernels see them."""

    dtype: str
    scale: float
    zero_point: int
    is_nonnegative: bool

    @property
    def is_flipped(self) -> bool:
        """int8 codes held as uint8."""
        return self.dtype == "uint8" and self.shift != 0

    shift: int = 0


def storage(program: Program) -> dict[str, Stored]:
    """Value name → how it is stored."""
    readers: dict[str, list[tuple[Node, int]]] = {}
    for node in program.nodes:
        for index, arg in enumerate(node.args):
            if isinstance(arg, Ref):
                readers.setdefault(arg.name, []).append((node, index))
            elif isinstance(arg, (list, tuple)):
                for item in arg:
                    if isinstance(item, Ref):
                        readers.setdefault(item.name, []).append((node, -1))
    stored: dict[str, Stored] = {}

    def plain(q: QParams, nonnegative: bool) -> Stored:
        return Stored(q.dtype, q.scale, q.zero_point, nonnegative)

    for node in reversed(program.nodes):
        value = program.values.get(node.output)
        if value is None or value.qparams is None:
            continue
        q = value.qparams
        sums = [n for n, index in readers.get(node.output, []) if n.op in LINEAR_OPS and index == 1]
        only_sums = bool(sums) and len(sums) == len(readers[node.output])
        like_sum = only_sums and all(stored[n.output].dtype == "int8" for n in sums if n.output in stored)
        if q.dtype == "uint8" or value.is_nonnegative or (like_sum and all(n.output in stored for n in sums)):
            stored[node.output] = plain(q, value.is_nonnegative)
        else:
            stored[node.output] = Stored("uint8", q.scale, q.zero_point + _BIAS, False, _BIAS)
    return _share_storage(program, stored)


def _share_storage(program: Program, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Ops that pass codes on need one storage for inputs and output; where they differ, all are flipped."""
    changed = True
    while changed:
        changed = False
        for node in program.nodes:
            if node.op not in MOVING_OPS or node.output not in stored:
                continue
            names = [r for r in node.refs() if r in stored] + [node.output]
            if len({stored[n].shift for n in names}) > 1:
                for name in names:
                    item = stored[name]
                    if not item.shift:
                        stored[name] = Stored("uint8", item.scale, item.zero_point + _BIAS, False, _BIAS)
                        changed = True
    return stored


class Lowering:
    """Program nodes → calls, with storage and liveness decided once for the whole program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.stored = storage(program)
        self._dead_after = {name: index for index, names in program.last_uses().items() for name in names}
        self._aliased = _aliases(program)

    def calls(self, index: int) -> list[Call]:
        """The calls that compute one node."""
        node = self.program.nodes[index]
        match node.op:
            case "quantize":
                out = self.stored[node.output]
                return [self._call(node, "quantize", node.args[0], out.scale, out.zero_point, out.dtype)]
            case "dequantize":
                return [self._call(node, "dequantize", *self._operand(node.args[0]))]
            case "conv" | "linear":
                return self._linear(node, index)
            case "matmul":
                a, b = node.args
                return [self._call(node, "matmul", *self._operand(a), *self._operand(b), *self._out(node))]
            case "add" | "mul":
                a, b = node.args
                args = (*self._operand(a), *self._operand(b), *self._out(node), *_epilogue(node.epilogue))
                return [self._call(node, node.fused_name, *args)]
            case "clamp":
                shift = self.stored[node.output].shift
                return [self._call(node, "clamp", node.args[0], node.attrs["low"] + shift, node.attrs["high"] + shift)]
            case "avg_pool":
                # The mean of integers, exact before it meets a scale: its many ties then round as the reference's do.
                centered, mean = f"{node.output}.centered", f"{node.output}.mean"
                x, scale, zero_point = self._operand(node.args[0])
                return [
                    Call(centered, "quantflow.dequantize", (x, 1.0, zero_point), {}),
                    Call(mean, f"aten.{node.target}", (Ref(centered), *node.args[1:]), node.kwargs),
                    self._call(node, "requantize", Ref(mean), scale, *self._out(node)),
                ]
            case "recurrence":
                a, (gates, h0, c0) = node.attrs, node.args
                stored = [
                    None if a[role] is None else TensorRef(a[role]) for role in ("weight", "weight_scale", "bias")
                ]
                return [self._call(node, "recurrence", gates, *stored, h0, c0, a["cell"], a["reverse"])]
            case "max_pool":
                return [self._call(node, "max_pool", node.args[0], *_pool_geometry(node))]
            case "shape" if node.target.startswith("constant_pad_nd"):
                x, pads, fill = node.args
                return [Call(node.output, f"aten.{node.target}", (x, pads, fill + self.stored[node.output].shift), {})]
            case "shape" if "upsample" in node.target:
                return self._through_uint8(node)
            case "size" if node.target in SIZE_FUNCTIONS:
                return [Call(node.output, f"size.{node.target}", node.args, {})]
            case "shape" if node.target in SIZE_FUNCTIONS:
                return [Call(node.output, f"size.{node.target}", node.args, {})]
            case _:
                return [Call(node.output, f"aten.{node.target}", node.args, node.kwargs)]

    def _linear(self, node: Node, index: int) -> list[Call]:
        x, residual = node.args
        a, stored = node.attrs, self.stored[x.name]
        bias = None if a["bias"] is None else TensorRef(a["bias"])
        geometry = (a["stride"], a["padding"], a["dilation"], a["groups"]) if node.op == "conv" else ()
        args = [
            *self._operand(x), stored.is_nonnegative, TensorRef(a["weight"]), TensorRef(a["weight_scale"]), bias,
            *geometry, *self._out(node), *_epilogue(node.epilogue),
        ]  # fmt: skip
        before: list[Call] = []
        if residual is not None:
            operand, scale, zero_point = self._operand(residual) if residual.name in self.stored else (residual, 1.0, 0)
            out, of_residual = self.stored.get(node.output), self.stored.get(residual.name)
            # `conv(x) + x` reads x while it writes the sum.
            owned = self._dead_after.get(residual.name) == index and residual.name not in {x.name, *self._aliased}
            if (
                out is not None
                and of_residual is not None
                and of_residual.dtype != out.dtype
                and {of_residual.dtype, out.dtype} == {"int8", "uint8"}
            ):
                flipped = f"{node.output}.residual"
                before = [Call(flipped, "quantflow.flip", (operand,), {})]
                operand, owned = Ref(flipped), True
                zero_point += _BIAS if of_residual.dtype == "int8" else -_BIAS
            args += [operand, scale, zero_point, owned]
        return [*before, self._call(node, node.fused_name, *args)]

    def _through_uint8(self, node: Node) -> list[Call]:
        """torch has no int8 upsampling; int8 codes are moved as the uint8 codes they correspond to."""
        if self.stored[node.output].dtype == "uint8":
            return [Call(node.output, f"aten.{node.target}", node.args, node.kwargs)]
        seen, moved = f"{node.output}.bytes", f"{node.output}.moved"
        return [
            Call(seen, "quantflow.flip", (node.args[0],), {}),
            Call(moved, f"aten.{node.target}", (Ref(seen), *node.args[1:]), node.kwargs),
            Call(node.output, "quantflow.flip", (Ref(moved),), {}),
        ]

    def _operand(self, ref: Ref) -> tuple[Ref, float, int]:
        stored = self.stored[ref.name]
        return ref, stored.scale, stored.zero_point

    def _out(self, node: Node) -> tuple[float, int, str]:
        stored = self.stored.get(node.output)
        return (1.0, 0, "float32") if stored is None else (stored.scale, stored.zero_point, stored.dtype)

    def _call(self, node: Node, op: str, *args: Any) -> Call:
        return Call(node.output, f"quantflow.{op}", args, {})


class TorchRunner(AbstractRunner):
    """Executes a program as one ScriptModule. Safe to call from several threads."""

    name = "torch"
    script: torch.jit.ScriptModule

    def __init__(self, program: Program) -> None:
        self.program = program
        self._lowering = Lowering(program)
        self.script = build_script(program, self._lowering)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Any:
        with below_autograd():
            return rebuilt(self.program, self.script(*untracked(inputs)))

    def run_node(self, index: int, values: Mapping[str, Any]) -> Any:
        """One node on given codes (as the program defines them), through the kernels the ScriptModule calls."""
        node = self.program.nodes[index]
        local = {name: self._to_stored(name, values[name]) for name in node.refs()}
        with torch.inference_mode():
            for call in self._lowering.calls(index):
                local[call.output] = _invoke(call, self.program, local)
        return self._from_stored(node.output, local[node.output])

    def int8_layers(self) -> int:
        """Convolutions and linears, counted in the ScriptModule's own graph, and recurrent steps on codes."""
        return count_int8_layers(self.script) + sum(n.op == "recurrence" for n in self.program.int8_layers().values())

    def _to_stored(self, name: str, value: Any) -> Any:
        stored = self._lowering.stored.get(name)
        if stored is None or not stored.shift:
            return value.clone() if isinstance(value, torch.Tensor) else value
        return torch.utils._pytree.tree_map(kernels.flip, value)

    def _from_stored(self, name: str, value: Any) -> Any:
        stored = self._lowering.stored.get(name)
        return value if stored is None or not stored.shift else torch.utils._pytree.tree_map(kernels.flip, value)


def as_script(runner: AbstractRunner) -> torch.jit.ScriptModule:
    """The ScriptModule that this runtime's runner runs as."""
    assert isinstance(runner, TorchRunner)
    return runner.script


def count_int8_layers(script: torch.jit.ScriptModule) -> int:
    """The fused int8 convolutions and linears in a ScriptModule's own graph."""
    names = (node.kind() for node in script.inlined_graph.nodes())
    return sum(name.startswith(("quantflow::conv", "quantflow::linear")) for name in names)


def kernel_of(planned: PlannedUnit) -> str:
    """The kernel that will run a unit, for the plan."""
    unit = planned.unit
    kind = unit.epilogue.kind if unit.epilogue else ""
    if unit.kind == CORE:
        as_gemm = unit.op == "linear" or _is_pointwise(unit)
        if not kernels.HAS_INT8_KERNELS:
            name = f"float {'GEMM' if as_gemm else 'convolution'} over int8 codes (exact; this CPU has no VNNI)"
            return name + (", then float sum" if unit.residual else "") + (f", then float {kind}" if kind else "")
        name = "onednn.qlinear_pointwise" if as_gemm else f"onednn.q{unit.op}_pointwise"
        if unit.residual is not None:
            fused = unit.op in ("conv2d", "linear") and kind in ("", "relu") and planned.writes_codes
            return f"{name} + sum" + (f" + {kind}" if kind else "") if fused else f"{name}, then float sum"
        fused = kind in (kernels.FUSED_IN_LINEAR if as_gemm else kernels.FUSED_IN_CONV[int(unit.op[len("conv")])])
        return name + (f" + {kind}" if kind and fused else f", then float {kind}" if kind else "")
    if unit.kind == MATMUL:
        return "float GEMM over int8 codes (exact)"
    if unit.kind == RECURRENCE:
        return "quantflow.recurrence (float GEMM over int8 codes, exact)" if planned.is_int8 else "quantflow.recurrence"
    return {"max_pool": "quantflow.max_pool", "cat": "aten.cat on codes", "clamp": "aten.clamp on codes"}.get(
        unit.kind, f"quantflow.{unit.kind} (dequantize, float, quantize)"
    )


def notes() -> tuple[str, ...]:
    """What a user of this runtime should know about this machine, for the plan."""
    if kernels.HAS_INT8_KERNELS:
        return ()
    return (
        "runtime torch: not accelerated on this CPU. It has no VNNI, so PyTorch's int8 kernels would saturate; "
        "convolutions and linears are computed exactly from the int8 codes in floating point, no faster than the float "
        "model. runtime=native is exact and fast here; runtime=auto takes it wherever it is built",
    )


def _is_pointwise(unit: Unit) -> bool:
    """A 1x1 convolution that is a plain matrix product over pixels."""
    if unit.op != "conv2d":
        return False
    a = arguments(unit.anchor)
    kernel = tuple(a["weight"].meta["shape"])[2:]
    ones, zeros = ([1], [1, 1]), ([0], [0, 0])
    return kernel == (1, 1) and a["groups"] == 1 and list(a["stride"]) in ones and list(a["padding"]) in zeros


def build_script(
    program: Program, lowering: Lowering | None = None, *, calls_native: bool = False, moves: bool = False,
    floats: str = "float32",
) -> torch.jit.ScriptModule:  # fmt: skip
    """The program as a ScriptModule that holds tensors and numbers only.

    forward(*inputs) returns what `returned` says.

    Args:
        calls_native: begin with a call of `quantflow::native`, taken where a runtime can run the program as a whole.
        moves: inputs go to the device that the module is on, and outputs back to the first input's.
        floats: how `quantflow::native` holds floats where it can; the ops behind it compute in float32.
    """
    lowering = lowering or Lowering(program)
    holder = torch.nn.Module()
    writer = _Writer(program, holder)
    lines = [f"def forward({', '.join(['self', *(writer.define(i.name) for i in program.inputs)])}):"]
    if moves:
        lines += writer.moved_in()
    if calls_native:
        lines += writer.native_call(floats)
    for index in range(len(program.nodes)):
        lines += [f"    {writer.statement(call)}" for call in lowering.calls(index)]
    lines.append(f"    return {writer.expression(returned(program), moves=moves)}")
    # torch.jit.script would share one type between all programs, and a type has one `forward`.
    module = torch.jit._recursive.create_script_module(holder.eval(), lambda _: [], share_types=False)
    module.define("\n".join(lines) + "\n")
    return module


def _is_number(program: Program, name: str) -> bool:
    """Whether the value is a size rather than a tensor."""
    return any(n.output == name and n.op == "size" and n.target != "getitem" for n in program.nodes)


class _Writer:
    """Spells calls as TorchScript source and keeps the tensors they read as buffers."""

    def __init__(self, program: Program, module: torch.nn.Module) -> None:
        self._program = program
        self._module = module
        self._names: dict[str, str] = {}
        self._buffers: dict[str, str] = {}
        self._place = "torch.device('cpu')"
        self._moves = False

    def define(self, value: str) -> str:
        return self._names.setdefault(value, f"v{len(self._names)}_{_identifier(value)}")

    def statement(self, call: Call) -> str:
        namespace, _, name = call.op.partition(".")
        args = [self.expression(a) for a in call.args]
        if namespace == "size":
            return f"{self.define(call.output)} = {_size_expression(name, args)}"
        if name == "sym_size.int":
            return f"{self.define(call.output)} = {args[0]}.size({args[1]})"
        args += [f"{k}={self.expression(v)}" for k, v in call.kwargs.items()]
        function = name.partition(".")[0]
        if "::" in function:  # another library's operator, which keeps its full name
            namespace, _, function = function.partition("::")
        return f"{self.define(call.output)} = torch.ops.{namespace}.{function}({', '.join(args)})"

    def moved_in(self) -> list[str]:
        """Lines that move the inputs to the module's device, which everything else is made on."""
        first = self._buffer(next(iter(sorted(self._program.tensors))))
        names = [self._names[i.name] for i in self._program.inputs]
        self._place, self._moves = "place", True
        lines = [f"    place = self.{first}.device", f"    home = {names[0]}.device"]
        return lines + [f"    {name} = {name}.to(place)" for name in names]

    def native_call(self, floats: str) -> list[str]:
        """Lines that run the whole program by `quantflow::native` and return, where that can run."""
        program, module = self._program, self._module
        names = sorted(program.tensors)
        written = program.to_json() | ({} if floats == "float32" else {"floats": floats})
        module.native_program = torch.jit.Attribute(json.dumps(written), str)
        module.native_names = torch.jit.Attribute(names, list[str])
        inputs = [self.expression(Ref(i.name)) for i in program.inputs]
        tensors = [f"self.{self._buffer(name)}" for name in names]
        before, self._names = (
            self._names,
            {
                name: f"int(native[{position}])" if _is_number(program, name) else f"native[{position}]"
                for position, name in enumerate(dict.fromkeys(program.output_names()))
            },
        )
        result = self.expression(returned(program), moves=self._moves)
        self._names = before
        return [
            f"    if torch.ops.quantflow.native_runs({inputs[0]}):",
            f"        native = torch.ops.quantflow.native([{', '.join(inputs)}], self.native_program, "
            f"self.native_names, [{', '.join(tensors)}])",
            f"        return {result}",
        ]

    def expression(self, value: Any, *, moves: bool = False) -> str:
        """The value as source; `moves`: its tensors on the first input's device."""
        back = ".to(home)" if moves else ""
        if isinstance(value, Ref):
            return self._names[value.name] + ("" if _is_number(self._program, value.name) else back)
        if isinstance(value, TensorRef):
            return f"self.{self._buffer(value.name)}{back}"
        if isinstance(value, (list, tuple)):
            items = [self.expression(v, moves=moves) for v in value]
            if isinstance(value, tuple) and not all(isinstance(v, (int, float)) for v in value):
                return f"({', '.join(items)},)" if len(items) == 1 else f"({', '.join(items)})"
            return f"[{', '.join(items)}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.expression(v, moves=moves)}" for k, v in value.items()) + "}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if isinstance(value, torch.device):
            return self._place
        return repr(value)

    def _buffer(self, name: str) -> str:
        if name not in self._buffers:
            attribute = f"t{len(self._buffers)}_{_identifier(name)}"
            self._module.register_buffer(attribute, self._program.tensors[name])
            self._buffers[name] = attribute
        return self._buffers[name]


def _size_expression(name: str, args: list[str]) -> str:
    infix = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "eq": "==", "ne": "!=",
             "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "pow": "**", "and_": "and", "or_": "or"}  # fmt: skip
    if name in infix:
        return f"({args[0]} {infix[name]} {args[1]})"
    if name == "neg":
        return f"(-{args[0]})"
    if name == "getitem":
        return f"{args[0]}[{args[1]}]"
    if name in ("ceil", "floor"):
        return f"torch.ops.aten.{name}({args[0]})"
    if name == "round":
        return f"int(round({args[0]}))"
    name = {"sym_max": "max", "sym_min": "min", "sym_float": "float", "trunc": "int"}.get(name, name)
    return f"{name}({', '.join(args)})"


def _invoke(call: Call, program: Program, values: Mapping[str, Any]) -> Any:
    def of(ref: Ref | TensorRef) -> Any:
        return program.tensors[ref.name] if isinstance(ref, TensorRef) else values[ref.name]

    args, kwargs = substitute(tuple(call.args), of), substitute(dict(call.kwargs), of)
    namespace, _, name = call.op.partition(".")
    if namespace == "quantflow":
        return getattr(torch.ops.quantflow, name)(*args, **kwargs)
    if namespace == "size":
        return SIZE_FUNCTIONS[name](*args)
    return computing(name)(*args, **kwargs)


def _epilogue(epilogue: Epilogue | None) -> tuple[str, list[float]]:
    return ("", []) if epilogue is None else (epilogue.kind, list(epilogue.values))


def _pool_geometry(node: Node) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """kernel, stride, padding, dilation, ceil_mode of an ATen max pool, every list as long as there are dimensions."""
    schema = aten_op(node.target)._schema.arguments[1:]  # type: ignore[attr-defined]
    given = {a.name: v for a, v in zip(schema, node.args[1:], strict=False)} | dict(node.kwargs)
    dims = int(node.target[len("max_pool")])

    def spread(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    kernel = spread(given["kernel_size"])
    stride = spread(given.get("stride") or kernel)
    padding, dilation = spread(given.get("padding", 0)), spread(given.get("dilation", 1))
    return kernel, stride, padding, dilation, bool(given.get("ceil_mode", False))


def _aliases(program: Program) -> set[str]:
    """Values whose memory another value may share: they must not be overwritten."""
    shared = {i.name for i in program.inputs}
    for node in program.nodes:
        if node.op in ("shape", "aten", "cat", "size", "max_pool"):
            shared.update(node.refs())
            shared.add(node.output)
    return shared


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
