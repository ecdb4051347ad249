"""TorchScript → Graph: trace or script a module, or take over a ScriptModule, and import what it runs.

The import is an abstract interpreter. It runs the TorchScript on two batches of different size at once, follows the
branches they take, and writes down every ATen op that depends on the input. A number that differs between the two
runs follows the batch size and stays symbolic; everything else is a constant.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from quantflow.capture.export import at_least_two, plain, plain_attention
from quantflow.capture.torchscript_values import (
    COMPARISONS,
    ON_STRUCTURES,
    TracedSize,
    TracedTensor,
    compare,
    flat,
)
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import SIZE_FUNCTIONS, Graph, Input, interpret, name_layers
from quantflow.ir.passes.normalize import simplify
from quantflow.sources.models.loaded import eval_mode

aten = torch.ops.aten

_EXPORT = "quantize the nn.Module itself with mode=export"
#: Stands for prim::CallMethod while functions, and only they, are inlined: so every op knows the module it is in.
_CALL = "quantflow::call"
#: Deeper nested functions end as an unsupported call.
_INLINE_PASSES = 16

#: ATen names → what they do to sizes; `int` and truediv by one are exact conversions.
_ARITHMETIC: dict[str, str] = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "truediv": "truediv", "floordiv": "floordiv",
    "floor_divide": "floordiv", "remainder": "mod", "fmod": "mod", "neg": "neg", "pow": "pow", "max": "max",
    "min": "min",
}  # fmt: skip
_SAME_NUMBER = frozenset((
    "to", "detach", "clone", "cpu", "type_as", "item", "ScalarImplicit", "IntImplicit", "FloatImplicit",
    "NumToTensor", "alias",
))  # fmt: skip
#: Reading a tensor's contents as a number: the example's value becomes part of the graph.
_READS_DATA = frozenset((
    "item", "Int", "Float", "Bool", "ScalarImplicit", "IntImplicit", "FloatImplicit", "is_nonzero", "equal",
    "allclose", "_local_scalar_dense",
))  # fmt: skip
#: Their values follow from shape and dtype alone.
_FACTORIES = frozenset(
    ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
)
_LINEAR = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_convolution",
    "linear", "batch_norm",
))  # fmt: skip
#: Ops whose second tensor operand may as well be a number.
_SCALAR_OPERAND = frozenset(("add", "sub", "mul", "div"))
#: Views that can be written into, and the op that puts the result back.
_SCATTER = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}
#: By c10::ScalarType's and c10::MemoryFormat's numbers.
_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32,
    torch.bfloat16,
)  # fmt: skip
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)


def capture_torchscript(
    model: nn.Module | torch.jit.ScriptModule, example: Batch, method: Literal["trace", "script"] = "trace"
) -> Graph:
    """Capture a module by tracing or scripting it, or take over a ScriptModule as it is.

    Where the code (or an earlier trace) depends on the batch size, the graph holds for the example's only, and a note
    says so.

    Args:
        example: one calibration batch.
        method: how an nn.Module becomes TorchScript; a ScriptModule already is.

    Raises:
        CaptureError: the model can't be traced or scripted, holds an op with no functional form, or the imported
            graph does not compute what the model does; the message carries the cure.
    """
    model = eval_mode(model)
    attempts = [(at_least_two(example.head(2)), 2)]
    if example.size > 2:
        attempts.append((example, 2))
    attempts.append((example, 1))
    reason: BaseException | None = None
    with torch.no_grad(), plain_attention(), _quiet():
        try:
            script = _as_script(model, at_least_two(example), method)
        except CaptureError:
            if example.size != 1:
                raise
            script = _as_script(model, example, method)  # code for one sample at a time
        for batch, runs in attempts:
            if runs == 1 and example.size == 1:
                script = _as_script(model, example, method)
            try:
                graph = _import(script, model, [batch] if runs == 1 else [batch, _repeated(batch)])
            except _DependsOnBatch as error:
                reason = error
                continue
            if runs == 1:
                return replace(graph, batch_is_dynamic=False).with_notes(
                    f"the graph holds for batches of {example.size} only: {reason}; for other batch sizes {_EXPORT} or "
                    "mode.method=script, and read sizes from x.shape in its code"
                )
            return graph
    raise CaptureError(
        f"mode: the TorchScript of {_class_name(model)} can't be imported: {reason}; {_EXPORT}"
    ) from reason


class _DependsOnBatch(Exception):
    """The two runs part: the graph can't hold for both batch sizes."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about tracing and scripting: every graph is checked against its model instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _as_script(model: nn.Module | torch.jit.ScriptModule, example: Batch, method: str) -> torch.jit.ScriptModule:
    if isinstance(model, torch.jit.ScriptModule):
        return model
    try:
        if method == "script":
            return torch.jit.script(model)
        options: dict[str, Any] = {"example_inputs": example.args}
        if example.kwargs:
            bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs)
            options = {"example_kwarg_inputs": dict(bound.arguments)}
        return torch.jit.trace(model, check_trace=False, strict=False, **options)
    except Exception as error:  # torch.jit raises many unrelated types, and the model's own
        other = "mode.method=trace" if method == "script" else "mode.method=script"
        raise CaptureError(
            f"mode: torch.jit.{method} can't capture {_class_name(model)}: {_first_line(error)}; "
            f"try {other} or mode=export"
        ) from error


def _repeated(batch: Batch) -> Batch:
    """Every sample twice."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x]) if x.dim() and x.shape[0] == batch.size else x

    return Batch(args=tuple(twice(x) for x in batch.args), kwargs={k: twice(v) for k, v in batch.kwargs.items()})


def _import(
    script: torch.jit.ScriptModule, model: nn.Module | torch.jit.ScriptModule, batches: Sequence[Batch]
) -> Graph:
    expected = []
    for batch in batches:
        try:
            expected.append(plain(model(*batch.args, **batch.kwargs)))
        except Exception as error:  # the model's own code
            if len(batches) > 1:
                raise _DependsOnBatch(f"the model fails on a batch of {batch.size}: {_first_line(error)}") from error
            raise CaptureError(
                f"mode: {_class_name(model)} fails on the example batch: {_first_line(error)}; "
                "check the data's input names and shapes"
            ) from error
    try:
        imported = _Importer(script, batches).run(None if isinstance(model, torch.jit.ScriptModule) else expected[0])
    except (CaptureError, _DependsOnBatch):
        raise
    except Exception as error:  # a builtin of TorchScript that Python does not run in the same way
        raise CaptureError(
            f"mode: the TorchScript of {_class_name(model)} can't be imported: {type(error).__name__}: "
            f"{_first_line(error)}; {_EXPORT}"
        ) from error
    graph = simplify(imported)
    batches, expected = list(batches), list(expected)
    if len(batches) > 1:
        # Both runs hold several samples; code may well treat one sample in another way.
        with contextlib.suppress(Exception):
            single = batches[0].head(1)
            expected.append(plain(model(*single.args, **single.kwargs)))
            batches.append(single)
    for batch, wanted in zip(batches, expected, strict=True):
        try:
            found = interpret(graph, batch.tensors)
        except Exception as error:  # any op may raise anything
            raise _DependsOnBatch(
                f"the imported graph fails on a batch of {batch.size}: {_first_line(error)}"
            ) from error
        if not _agree(found, wanted):
            raise _DependsOnBatch(
                f"the imported graph differs from the model on a batch of {batch.size} (tracing fixed a branch or a "
                "size, or the model draws random numbers or writes into a view of another tensor)"
            )
    return graph


def _agree(found: Any, wanted: Any) -> bool:
    """Same tensors up to rounding: |a - b| <= 1e-5 * max|b| + 1e-4 * |b|."""
    a, b = _tensors(found), _tensors(wanted)
    return len(a) == len(b) and all(
        x.shape == y.shape
        and torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5 * _largest(y), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _largest(x: torch.Tensor) -> float:
    finite = x.double()[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _class_name(model: Any) -> str:
    return getattr(model, "original_name", None) or type(model).__name__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # The TorchScript interpreter quotes the code first; the cause is the last line.
    return lines[-1].removeprefix("RuntimeError: ") if "TorchScript interpreter" in lines[0] else lines[0]


@dataclass(frozen=True)
class _Module:
    script: Any
    path: str

    @property
    def is_leaf(self) -> bool:
        return ".torch.nn.modules." in self.script._type().qualified_name()


class _Importer:
    """One walk through a ScriptModule's forward, for all batches in lockstep."""

    def __init__(self, script: torch.jit.ScriptModule, batches: Sequence[Batch]) -> None:
        self._script: Any = script
        self._batches = batches
        self._graph = fx.Graph()
        self._constants: dict[str, torch.Tensor] = {}
        self._owned: set[int] = set()
        self._constant_nodes: dict[int, tuple[TracedTensor, int, fx.Node]] = {}
        self._notes: dict[str, None] = {}
        self._modules: list[_Module] = []
        self._nearest = ""
        self._batch_input: fx.Node | None = None
        self._batch_node: fx.Node | None = None
        self._methods: dict[tuple[str, str], Any] = {}
        self._handlers: dict[str, Callable[[Any, list[Any], dict[int, Any]], Any]] = {
            "prim::Constant": self._constant,
            "prim::GetAttr": self._get_attribute,
            "prim::If": self._if,
            "prim::Loop": self._loop,
            "prim::ListConstruct": lambda _node, args, _env: list(args),
            "prim::TupleConstruct": lambda _node, args, _env: tuple(args),
            "prim::DictConstruct": lambda _node, args, _env: dict(zip(args[::2], args[1::2], strict=True)),
            "prim::ListUnpack": lambda _node, args, _env: tuple(args[0]),
            "prim::TupleUnpack": lambda _node, args, _env: tuple(args[0]),
            "prim::TupleIndex": lambda _node, args, _env: args[0][args[1]],
            "prim::TupleSlice": lambda node, args, _env: args[0][node.i("beg") : node.i("end")],
            "prim::unchecked_cast": lambda _node, args, _env: args[0],
            "prim::unchecked_unwrap_optional": lambda _node, args, _env: args[0],
            "aten::_unwrap_optional": lambda _node, args, _env: args[0],
            "prim::annotate": lambda _node, args, _env: args[0],
            "prim::data": lambda _node, args, _env: args[0],
            "prim::Uninitialized": lambda _node, _args, _env: None,
            # Without gradients nn.MultiheadAttention takes a fused op that hides its linears.
            "aten::is_grad_enabled": lambda _node, _args, _env: True,
            "prim::requires_grad": lambda _node, _args, _env: True,
            "prim::Print": lambda _node, _args, _env: (),
            "aten::warn": lambda _node, _args, _env: (),
            "aten::str": lambda _node, args, _env: str(args[0]),
            "prim::RaiseException": self._raise,
            _CALL: self._call_method,
        }

    # ── the walk ──────────────────────────────────────────────────────────────

    def run(self, like: Any) -> Graph:
        """The graph, before simplification; its output is nested as `like` is, where the tensors are as many."""
        arguments, inputs = self._inputs()
        root = _Module(self._script._c, "")
        output = self._nodes(self._method(root, "forward", [root, *arguments]))
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(output)):
            raise CaptureError(
                f"mode: {_class_name(self._script)} returns no tensor, so there is nothing to run in int8"
            )
        self._graph.output(_nested_like(like, plain(output)))
        name_layers(self._graph)
        return Graph(self._graph, self._constants, inputs, notes=tuple(self._notes))

    def _inputs(self) -> tuple[list[Any], tuple[Input, ...]]:
        first = self._batches[0]
        schema = self._script._c._get_method("forward").schema.arguments[1:]
        names = [argument.name for argument in schema]
        keywords = [*([None] * len(first.args)), *first.kwargs]
        wanted = [*names[: len(first.args)], *first.kwargs]
        bound: dict[str, Any] = {}
        inputs: list[Input] = []
        for index, (name, keyword) in enumerate(zip(wanted, keywords, strict=True)):
            value = TracedTensor(tuple(batch.tensors[index] for batch in self._batches), self._graph.placeholder(name))
            bound[name] = value
            node = self._described(value)
            shape = node.meta["shape"]
            if self._batch_input is None and shape and shape[0] is None:
                self._batch_input = node
            inputs.append(Input(node.name, keyword, str(node.meta["dtype"]).removeprefix("torch."), shape))
        return [bound.get(a.name, a.default_value) for a in schema], tuple(inputs)

    def _method(self, module: _Module, name: str, arguments: list[Any]) -> Any:
        key = (module.script._type().qualified_name(), name)
        if key not in self._methods:
            self._methods[key] = _with_functions_inlined(module.script._get_method(name).graph)
        self._modules.append(module)
        outputs = self._block(self._methods[key], arguments, {})
        self._modules.pop()
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _block(self, block: Any, arguments: Sequence[Any], env: dict[int, Any]) -> list[Any]:
        env.update(zip((v.unique() for v in block.inputs()), arguments, strict=True))
        nodes = list(block.nodes())
        frees = _last_uses(block, nodes)
        for index, node in enumerate(nodes):
            result = self._execute(node, [env[v.unique()] for v in node.inputs()], env)
            outputs = list(node.outputs())
            results = (result,) if len(outputs) == 1 else result if outputs else ()
            env.update(zip((v.unique() for v in outputs), results, strict=True))
            for unique in frees.get(index, ()):
                del env[unique]
        return [env[v.unique()] for v in block.outputs()]

    def _execute(self, node: Any, args: list[Any], env: dict[int, Any]) -> Any:
        handler = self._handlers.get(node.kind())
        if handler is not None:
            return handler(node, args, env)
        namespace, name = node.kind().split("::")
        if isinstance(args[0] if args else None, (list, tuple, dict, str)) and name in ON_STRUCTURES:
            return ON_STRUCTURES[name](*args)
        if name in ("__is__", "__isnot__"):
            return (args[0] is args[1]) is (name == "__is__")
        if node.kind() == "prim::PythonOp":
            raise self._unsupported(f"call of the Python function '{node.pyname()}'")
        if any(isinstance(a, _Module) for a in args) or node.schema() == "(no schema)" or "(...)" in node.schema():
            raise self._unsupported(node.kind())
        has_tensor = any(isinstance(a, TracedTensor) and (a.node is not None or a.values[0].dim()) for a in flat(args))
        has_size = any(isinstance(a, TracedSize) for a in flat(args))
        if has_size and not has_tensor and (done := self._on_sizes(name, args)) is not None:
            return done
        if node.kind() == "prim::NumToTensor":
            return TracedTensor((torch.tensor(args[0]),) * len(self._batches))
        schema = torch._C.parse_schema(node.schema())
        if has_size or any(isinstance(a, TracedTensor) and a.node is not None for a in flat(args)):
            return self._on_tensors(namespace, name, schema, args)
        return self._on_constants(namespace, name, schema, args)

    # ── values and structure ──────────────────────────────────────────────────

    def _constant(self, node: Any, _args: list[Any], _env: dict[int, Any]) -> Any:
        found = re.fullmatch(r"self\.(.+?)(_fused_bn)?(\.\d+)?", node.output().debugName())
        return self._wrap(self._owns(node.output().toIValue()), found.group(1) if found else "")

    def _get_attribute(self, node: Any, args: list[Any], _env: dict[int, Any]) -> Any:
        owner, name = args[0], node.s("name")
        if not isinstance(owner, _Module):
            raise self._unsupported("an attribute of a TorchScript class")
        value = owner.script.getattr(name)
        path = f"{owner.path}.{name}" if owner.path else name
        if isinstance(value, torch._C.ScriptModule):
            return _Module(value, path)
        return self._wrap(self._owns(value), path, is_attribute=True)

    def _owns(self, value: Any) -> Any:
        """The model's own tensors may not be written to."""
        self._owned.update(leaf.untyped_storage().data_ptr() for leaf in flat(value) if isinstance(leaf, torch.Tensor))
        return value

    def _wrap(self, value: Any, name: str, is_attribute: bool = False) -> Any:
        """A plain value as the interpreter holds it."""
        if isinstance(value, torch.Tensor):
            return TracedTensor((value.detach(),) * len(self._batches), None, name, is_attribute)
        if isinstance(value, dict):
            return {key: self._wrap(item, f"{name}.{key}", is_attribute) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._wrap(item, name and f"{name}.{i}", is_attribute) for i, item in enumerate(value))
        return value

    def _if(self, node: Any, args: list[Any], env: dict[int, Any]) -> Any:
        then, otherwise = node.blocks()
        condition = args[0]
        if isinstance(condition, TracedSize):
            taken = self._same(condition, "a branch")
            other = otherwise if taken else then
            if not any(n.kind() == "prim::RaiseException" for n in other.nodes()):
                sizes = " and ".join(str(batch.size) for batch in self._batches)
                self._notes[
                    f"a branch{self._where()} depends on the batch size; the one for {sizes} samples was captured"
                ] = None
            condition = taken
        outputs = self._block(then if condition else otherwise, (), env)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _loop(self, node: Any, args: list[Any], env: dict[int, Any]) -> Any:
        trips, condition, *carried = args
        trips, condition = self._same(trips, "a loop"), self._same(condition, "a loop")
        body = next(iter(node.blocks()))
        step = 0
        while step < trips and condition:
            condition, *carried = self._block(body, (step, *carried), env)
            condition = self._same(condition, "a loop")
            step += 1
        return carried[0] if len(carried) == 1 else tuple(carried)

    def _same(self, value: Any, what: str) -> Any:
        if not isinstance(value, TracedSize):
            return value
        if len(set(value.values)) > 1:
            raise _DependsOnBatch(f"{what}{self._where()} depends on the batch size")
        return value.values[0]

    def _raise(self, _node: Any, args: list[Any], _env: dict[int, Any]) -> Any:
        raise CaptureError(f"mode: the model refuses the example batch{self._where()}: {args[0]}")

    def _call_method(self, node: Any, args: list[Any], _env: dict[int, Any]) -> Any:
        if not isinstance(args[0], _Module):
            raise self._unsupported(f"a method of a TorchScript class ('{node.s('name')}')")
        return self._method(args[0], node.s("name"), args)

    # ── ops ───────────────────────────────────────────────────────────────────

    def _on_sizes(self, name: str, args: list[Any]) -> Any:
        """The op on plain numbers of which some follow the batch size; None if it is not one."""
        args = [a.values[0].item() if isinstance(a, TracedTensor) else a for a in args]
        first = args[0]
        if name in _SAME_NUMBER and isinstance(first, TracedSize):
            return first
        if name in ("Int", "floor", "ceil", "trunc") and isinstance(first, TracedSize):
            if all(isinstance(v, int) for v in first.values):
                return first
            if name in ("floor", "ceil"):
                flip = -1 if name == "ceil" else 1
                first = self._arithmetic(
                    "mul", self._arithmetic("floordiv", self._arithmetic("mul", first, flip), 1), flip
                )
            return self._arithmetic("int", first)
        if name == "Float" and isinstance(first, TracedSize):
            return self._arithmetic("truediv", first, 1)
        if name in ("add", "sub", "rsub") and len(args) > 2 and args[2] != 1:
            return None
        if name == "rsub":
            return self._arithmetic("sub", args[1], first)
        if name == "div" and len(args) > 2 and args[2] is not None:
            floored = self._arithmetic("floordiv", first, args[1])
            return (
                floored if args[2] == "floor" else self._arithmetic("int", self._arithmetic("truediv", first, args[1]))
            )
        if name == "__derive_index":
            return self._arithmetic("add", args[1], self._arithmetic("mul", first, args[2]))
        if name == "__range_length":
            return TracedSize(tuple(len(range(*v)) for v in zip(*map(self._spread, args), strict=True)), None)
        if name in _ARITHMETIC and not isinstance(first, list):
            return self._arithmetic(_ARITHMETIC[name], *args[: 1 if name == "neg" else 2])
        if name in COMPARISONS and len(args) <= 2:
            return compare(COMPARISONS[name], args, len(self._batches))
        return None

    def _arithmetic(self, function: str, *args: Any) -> Any:
        compute = SIZE_FUNCTIONS[function]
        values = tuple(compute(*v) for v in zip(*map(self._spread, args), strict=True))
        if not any(isinstance(a, TracedSize) for a in args):
            return values[0]
        if any(isinstance(a, TracedSize) and a.node is None for a in args):
            return TracedSize(values, None)
        node = self._graph.call_function(compute, tuple(a.node if isinstance(a, TracedSize) else a for a in args))
        return TracedSize(values, self._placed(node))

    def _spread(self, value: Any) -> tuple[Any, ...]:
        return value.values if isinstance(value, TracedSize) else (value,) * len(self._batches)

    def _on_constants(self, namespace: str, name: str, schema: Any, args: list[Any]) -> Any:
        """Run the op once, in place where it is: what does not depend on the input is computed now."""
        if name in ("Int", "Float", "Bool", "ScalarImplicit", "IntImplicit", "FloatImplicit") and isinstance(
            args[0], TracedTensor
        ):
            number = args[0].values[0].item()
            return {"Int": int, "Float": float, "Bool": bool}.get(name, lambda n: n)(number)
        op = self._overload(namespace, name, schema)
        target = args[0] if schema.is_mutable and isinstance(args[0], TracedTensor) else None
        if target is not None and target.values[0].untyped_storage().data_ptr() in self._owned:
            raise CaptureError(
                f"mode: the model changes its own {target.name or 'parameter or buffer'} while it runs "
                f"({name}{self._where()}), which an int8 graph can't; compute a new tensor instead"
            )
        positional, keywords = _typed(schema, self._concrete(args, 0))
        result = op(*positional, **keywords)
        if name == "lift_fresh":
            result = result.clone()
        if target is not None:
            return target
        source = next((a.name for a in flat(args) if isinstance(a, TracedTensor) and a.name), "")
        wrapped = self._wrap(result, "")
        for made in flat(wrapped):
            if isinstance(made, TracedTensor):
                made.name = source
        self._remember_view(name, wrapped, args)
        return wrapped

    def _on_tensors(self, namespace: str, name: str, schema: Any, args: list[Any]) -> Any:
        if name in ("size", "len", "numel") and isinstance(args[0], TracedTensor):
            return self._size(name, args)
        op = self._overload(namespace, name, schema)
        target = args[0] if schema.is_mutable else None
        if target is not None:
            op = self._functional(namespace, name, schema)
            schema = op._schema
        args = self._plain_operands(name, args)
        try:
            results = [
                op(*a, **k) for a, k in (_typed(schema, self._concrete(args, i)) for i in range(len(self._batches)))
            ]
        except RuntimeError as error:
            raise _DependsOnBatch(f"{name}{self._where()} fails: {_first_line(error)}") from error
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(results[0])):
            return self._read(name, results)
        if name in _FACTORIES and not any(isinstance(a, TracedSize) for a in flat(args)) and _same_shapes(results):
            return self._wrap(results[0], "")
        if namespace != "aten":
            raise self._unsupported(f"{namespace}::{name}")
        if target is not None:
            return self._rebind(target, op, schema, args, results, copied=name == "copy_")
        emitted = self._emit(op, schema, args, results)
        self._remember_view(name, emitted, args)
        return emitted

    def _size(self, name: str, args: list[Any]) -> Any:
        x = args[0]

        def dim(index: int) -> Any:
            sizes = tuple(v.shape[index] for v in x.values)
            if len(set(sizes)) == 1:
                return sizes[0]
            if sizes == tuple(batch.size for batch in self._batches) and self._batch_input is not None:
                if self._batch_node is None:
                    self._batch_node = self._placed(
                        self._graph.call_function(aten.sym_size.int, (self._batch_input, 0))
                    )
                return TracedSize(sizes, self._batch_node)
            node = self._graph.call_function(aten.sym_size.int, (x.node, index % x.values[0].dim()))
            return TracedSize(sizes, self._placed(node))

        if name == "len":
            return dim(0)
        if name == "size" and len(args) > 1 and args[1] is not None:
            return dim(args[1])
        sizes = [dim(index) for index in range(x.values[0].dim())]
        if name == "size":
            return sizes
        count: Any = 1
        for size in sizes:
            count = self._arithmetic("mul", count, size)
        return count

    def _read(self, name: str, results: list[Any]) -> Any:
        """A plain result of an op on tensors: dtype, rank, or a number out of the data."""
        if any(result != results[0] for result in results[1:]):
            raise _DependsOnBatch(f"a number computed from tensor data ({name}{self._where()}) changes with the batch")
        if name in _READS_DATA:
            self._notes[
                f"a number or condition computed from tensor data ({name}{self._where()}) was taken from the example"
            ] = None
        return results[0]

    def _plain_operands(self, name: str, args: list[Any]) -> list[Any]:
        """x * tensor(3.) as x * 3.: traces hold numbers as tensors without dimensions."""
        if (
            name.rstrip("_") not in _SCALAR_OPERAND
            or not isinstance(args[1], TracedTensor)
            or not isinstance(args[0], TracedTensor)
        ):
            return args
        x, other = args[0].values[0], args[1]
        is_number = other.node is None and other.values[0].dim() == 0 and not other.name
        if not is_number or not x.is_floating_point() or args[0].node is None:
            return args
        return [args[0], other.values[0].item(), *args[2:]]

    def _rebind(self, target: Any, op: Any, schema: Any, args: list[Any], results: list[Any], copied: bool) -> Any:
        """An in-place op: its result takes the target's place, also in the tensor that the target is a slice of."""
        if not isinstance(target, TracedTensor):
            raise self._unsupported(str(op))
        before = target.values
        source = args[1] if copied else None
        if (
            isinstance(source, TracedTensor)
            and source.node
            and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(source.values, before, strict=True))
        ):
            made = source
        else:
            made = self._emit(op, schema, args, results)
        if made.values[0].dtype != before[0].dtype:
            made = self._call(aten.to.dtype, [made, before[0].dtype])
        target.node, target.values = made.node, made.values
        written = target
        while written.view is not None:
            base, scatter, rest = written.view
            scattered = self._call(scatter, [base, written, *rest])
            base.node, base.values = scattered.node, scattered.values
            written = base
        return target

    def _remember_view(self, name: str, made: Any, args: list[Any]) -> None:
        if name in _SCATTER and isinstance(made, TracedTensor) and isinstance(args[0], TracedTensor):
            made.view = (args[0], _SCATTER[name], tuple(args[1:]))

    def _call(self, op: Any, args: list[Any]) -> Any:
        results = [op(*self._concrete(args, i)) for i in range(len(self._batches))]
        return self._emit(op, op._schema, args, results)

    def _emit(self, op: Any, schema: Any, args: list[Any], results: list[Any]) -> Any:
        self._name_weights(op, args)
        positional, keywords = _typed(schema, [self._nodes(a) for a in args])
        positional, keywords = _without_defaults(schema, positional, keywords)
        return self._outputs(self._placed(self._graph.call_function(op, tuple(positional), keywords)), results)

    def _outputs(self, node: fx.Node, results: list[Any]) -> Any:
        if isinstance(results[0], torch.Tensor):
            made = TracedTensor(tuple(results), node)
            self._described(made)
            return made
        if results[0] is None:
            return None
        if not isinstance(results[0], (list, tuple)):
            raise self._unsupported(str(node.target))
        if len({len(result) for result in results}) > 1:
            raise _DependsOnBatch(f"{node.target}{self._where()} gives as many tensors as the batch has samples")
        parts = []
        for index, values in enumerate(zip(*results, strict=True)):
            part = self._graph.call_function(operator.getitem, (node, index))
            parts.append(self._outputs(self._placed(part), list(values)))
        return type(results[0])(parts)

    def _overload(self, namespace: str, name: str, schema: Any) -> Any:
        # Python can't call a builtin that takes values of any type.
        if any(_is_generic(argument.type) for argument in schema.arguments):
            raise self._unsupported(f"{namespace}::{name}")
        try:
            packet = getattr(getattr(torch.ops, namespace), name)
            return getattr(packet, schema.overload_name or "default")
        except AttributeError as error:
            raise self._unsupported(f"{namespace}::{name}") from error

    def _functional(self, namespace: str, name: str, schema: Any) -> Any:
        packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
        op = getattr(packet, schema.overload_name or "default", None)
        if op is None or op._schema.is_mutable:
            raise self._unsupported(f"{namespace}::{name}")
        return op

    def _unsupported(self, what: str) -> CaptureError:
        return CaptureError(
            f"mode: TorchScript's {what}{self._where()} can't be imported; {_EXPORT}, or write it with ATen ops"
        )

    # ── names and nodes ───────────────────────────────────────────────────────

    def _where(self) -> str:
        path = self._modules[-1].path if self._modules else ""
        return f" in '{path}'" if path else ""

    def _placed(self, node: fx.Node) -> fx.Node:
        """Say which module the op is in; a graph without calls (a frozen one) goes by the nearest weight."""
        module = self._modules[-1]
        node.meta["module"] = module.path or self._nearest
        node.meta["module_is_leaf"] = bool(module.path) and module.is_leaf
        return node

    def _described(self, tensor: TracedTensor) -> fx.Node:
        assert tensor.node is not None
        shapes = [value.shape for value in tensor.values]
        if len({len(shape) for shape in shapes}) > 1:
            raise _DependsOnBatch(f"a tensor's rank{self._where()} depends on the batch size")
        tensor.node.meta["shape"] = tuple(s[0] if len(set(s)) == 1 else None for s in zip(*shapes, strict=True))
        tensor.node.meta["dtype"] = tensor.values[0].dtype
        return tensor.node

    def _name_weights(self, op: Any, args: list[Any]) -> None:
        """A linear op's constants are named after its module, unless they are parameters with names of their own."""
        name = op._schema.name.removeprefix("aten::")
        if name not in _LINEAR or not isinstance(args[1], TracedTensor) or args[1].node is not None:
            return
        weight = args[1]
        if not weight.is_attribute and not weight.name.endswith("weight"):
            path = self._modules[-1].path or name.lstrip("_").replace("convolution", "conv")
            weight.name = self._free_name(path, ".weight") + ".weight"
        layer = weight.name.removesuffix(".weight")
        if not self._modules[-1].path and layer != weight.name:
            self._nearest = layer.rpartition(".")[0]
        if isinstance(args[2], TracedTensor) and args[2].node is None and not args[2].is_attribute:
            args[2].name = f"{layer}.bias"

    def _free_name(self, wanted: str, suffix: str = "") -> str:
        name, count = wanted, 0
        while name + suffix in self._constants:
            count += 1
            name = f"{wanted}_{count}"
        return name

    def _nodes(self, value: Any) -> Any:
        """The value as FX sees it."""
        if isinstance(value, TracedTensor):
            return value.node if value.node is not None else self._constant_node(value)
        if isinstance(value, TracedSize):
            if value.node is None:
                raise _DependsOnBatch(
                    f"a number{self._where()} depends on the batch size in a way that can't be written down"
                )
            return value.node
        if isinstance(value, dict):
            return {key: self._nodes(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._nodes(item) for item in value)
        return value

    def _constant_node(self, constant: TracedTensor) -> fx.Node:
        value = constant.values[0]
        known = self._constant_nodes.get(id(value))
        if known is not None and known[1] == value._version:
            return known[2]
        wanted = constant.name or f"constant_{len(self._constants)}"
        if (
            constant.is_attribute
            and wanted in self._constants
            and self._constants[wanted].data_ptr() == value.data_ptr()
        ):
            name = wanted
        else:
            name = self._free_name(wanted)
        owned = value if constant.is_attribute else value.clone(memory_format=torch.contiguous_format)
        self._constants[name] = owned
        node = self._graph.get_attr(name)
        node.meta = {"shape": tuple(value.shape), "dtype": value.dtype}
        # The tensor is kept so that its id stays its own.
        self._constant_nodes[id(value)] = (constant, value._version, node)
        return node

    def _concrete(self, value: Any, run: int) -> Any:
        """The value in one run."""
        if isinstance(value, (TracedTensor, TracedSize)):
            return value.values[run]
        if isinstance(value, dict):
            return {key: self._concrete(item, run) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._concrete(item, run) for item in value)
        return value


def _with_functions_inlined(graph: Any) -> Any:
    """A copy in which functions are inlined and methods are still called."""
    copied = graph.copy()
    for node in copied.findAllNodes("prim::CallMethod"):
        outputs = list(node.outputs())
        call = copied.create(_CALL, list(node.inputs()), len(outputs))
        call.s_("name", node.s("name"))
        call.insertBefore(node)
        for old, new in zip(outputs, call.outputs(), strict=True):
            new.setType(old.type())
            old.replaceAllUsesWith(new)
        node.destroy()
    # Each pass inlines one level or all of them, depending on whether the function has run before.
    for _ in range(_INLINE_PASSES):
        torch._C._jit_pass_inline(copied)
        if copied.findNode("prim::CallFunction") is None:
            break
    return copied


def _last_uses(block: Any, nodes: Sequence[Any]) -> dict[int, list[int]]:
    """Position → values of this block that the node there is the last to read, nested blocks included."""
    own = {v.unique() for v in block.inputs()} | {v.unique() for node in nodes for v in node.outputs()}
    own -= {v.unique() for v in block.outputs()}
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for unique in _reads(node):
            last[unique] = index
    frees: dict[int, list[int]] = {}
    for unique, index in last.items():
        if unique in own:
            frees.setdefault(index, []).append(unique)
    return frees


def _reads(node: Any) -> Iterator[int]:
    yield from (v.unique() for v in node.inputs())
    for block in node.blocks():
        yield from (v.unique() for v in block.outputs())
        for inner in block.nodes():
            yield from _reads(inner)


def _is_generic(kind: Any) -> bool:
    return kind.kind() == "VarType" or any(map(_is_generic, kind.containedTypes()))


def _typed(schema: Any, args: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of the op, with TorchScript's integers for dtypes and formats spelled out."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for argument, value in zip(schema.arguments, args, strict=False):
        if type(value) is int:
            kind = str(argument.real_type)
            if "ScalarType" in kind:
                value = _DTYPES[value]
            elif "MemoryFormat" in kind:
                value = _MEMORY_FORMATS[value]
            elif "Layout" in kind:
                value = torch.strided
        if argument.kwarg_only:
            keywords[argument.name] = value
        else:
            positional.append(value)
    return positional, keywords


def _without_defaults(schema: Any, positional: list[Any], keywords: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def is_default(argument: Any, value: Any) -> bool:
        if not argument.has_default_value() or isinstance(value, fx.Node):
            return False
        default = argument.default_value
        return type(default) is type(value) and bool(default == value)

    by_name = {argument.name: argument for argument in schema.arguments}
    places = [argument for argument in schema.arguments if not argument.kwarg_only]
    while positional and is_default(places[len(positional) - 1], positional[-1]):
        positional = positional[:-1]
    return positional, {k: v for k, v in keywords.items() if not is_default(by_name[k], v)}


def _same_shapes(results: Sequence[Any]) -> bool:
    return all(isinstance(r, torch.Tensor) and r.shape == results[0].shape for r in results)


def _nested_like(like: Any, output: Any) -> Any:
    """The output's nodes in the structure of `like`, the module's own output, where both hold as many tensors."""
    nodes = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, fx.Node)]
    leaves, spec = pytree.tree_flatten(like)
    if sum(isinstance(leaf, torch.Tensor) for leaf in leaves) != len(nodes):
        return output
    remaining = iter(nodes)
    return pytree.tree_unflatten([next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
