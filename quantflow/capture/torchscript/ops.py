"""One ATen op or builtin of TorchScript, on what the runs hold: computed in each, and written down where it must be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from quantflow.capture.torchscript.failure import DependsOnBatch, first_line
from quantflow.capture.torchscript.values import (
    COMPARISONS,
    TracedSize,
    TracedTensor,
    compare,
    concrete,
    flat,
    size_text,
    wrapped,
)
from quantflow.capture.torchscript.writer import Writer
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.calls import BATCH
from quantflow.ir.graph import SIZE_FUNCTIONS

aten = torch.ops.aten

#: ATen names → what they do to sizes; `int` and truediv by one are exact conversions.
_ARITHMETIC: dict[str, str] = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "truediv": "truediv", "floordiv": "floordiv",
    "floor_divide": "floordiv", "remainder": "mod", "fmod": "mod", "neg": "neg", "pow": "pow", "max": "max",
    "min": "min",
}  # fmt: skip
#: How they are written in a limit of sizes.
_WRITTEN = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "floordiv": "{} // {}", "mod": "{} % {}", "neg": "-{}",
    "max": "max({}, {})", "min": "min({}, {})", "int": "int({})", "truediv": "{} / {}",
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
#: Their operators stand for no float op: TorchScript's own, and those of models that are quantized already.
_WITHOUT_GRAPH = ("prim", "quantized", "quantflow")
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


class Ops:
    """The ops of one import.

    Attributes:
        batch_input: the first input whose first dimension follows the batch size.
        size_names: (input, dimension) → the name of its size.
    """

    def __init__(self, writer: Writer, batches: Sequence[Batch]) -> None:
        self.batch_input: fx.Node | None = None
        self.size_names: dict[tuple[fx.Node, int], str] = {}
        self._writer = writer
        self._batches = batches
        self._owned: set[int] = set()
        self._batch_node: fx.Node | None = None

    def own(self, value: Any) -> Any:
        """The model's own tensors may not be written to."""
        self._owned.update(leaf.untyped_storage().data_ptr() for leaf in flat(value) if isinstance(leaf, torch.Tensor))
        return value

    def on_sizes(self, name: str, args: list[Any]) -> Any:
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
        node = self._writer.call(compute, tuple(a.node if isinstance(a, TracedSize) else a for a in args))
        texts = [size_text(a) for a in args]
        known = _WRITTEN.get(function) if all(texts) else None
        return TracedSize(values, node, known.format(*texts) if known else "")

    def _spread(self, value: Any) -> tuple[Any, ...]:
        return value.values if isinstance(value, TracedSize) else (value,) * len(self._batches)

    def on_constants(self, namespace: str, name: str, schema: Any, args: list[Any]) -> Any:
        """Run the op once, in place where it is: what does not depend on the input is computed now."""
        builtin = _builtin(namespace, name)
        if builtin in ("Int", "Float", "Bool", "ScalarImplicit", "IntImplicit", "FloatImplicit") and isinstance(
            args[0], TracedTensor
        ):
            number = args[0].values[0].item()
            return {"Int": int, "Float": float, "Bool": bool}.get(name, lambda n: n)(number)
        op = self._overload(namespace, name, schema)
        target = args[0] if schema.is_mutable and isinstance(args[0], TracedTensor) else None
        if target is not None and target.values[0].untyped_storage().data_ptr() in self._owned:
            raise CaptureError(
                f"mode: the model changes its own {target.name or 'parameter or buffer'} while it runs "
                f"({name}{self._writer.where()}), which an int8 graph can't; compute a new tensor instead"
            )
        positional, keywords = _typed(schema, concrete(args, 0))
        result = op(*positional, **keywords)
        if builtin == "lift_fresh":
            result = result.clone()
        if target is not None:
            return target
        source = next((a.name for a in flat(args) if isinstance(a, TracedTensor) and a.name), "")
        held = wrapped(result, len(self._batches))
        for made in flat(held):
            if isinstance(made, TracedTensor):
                made.name = source
        self._remember_view(builtin, held, args)
        return held

    def on_tensors(self, namespace: str, name: str, schema: Any, args: list[Any]) -> Any:
        """Run the op in every run and write it down, in a functional form where it writes into its first argument."""
        builtin = _builtin(namespace, name)
        if builtin in ("size", "len", "numel") and isinstance(args[0], TracedTensor):
            return self._size(builtin, args)
        op = self._overload(namespace, name, schema)
        target = args[0] if schema.is_mutable else None
        if target is not None:
            op = self._functional(namespace, name, schema)
            schema = op._schema
        args = self._plain_operands(builtin, args)
        try:
            results = [op(*a, **k) for a, k in (_typed(schema, concrete(args, i)) for i in range(len(self._batches)))]
        except RuntimeError as error:
            raise DependsOnBatch(f"{name}{self._writer.where()} fails: {first_line(error)}") from error
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(results[0])):
            return self._read(builtin, results)
        if builtin in _FACTORIES and not any(isinstance(a, TracedSize) for a in flat(args)) and _same_shapes(results):
            return wrapped(results[0], len(self._batches))
        if namespace in _WITHOUT_GRAPH:
            raise self._writer.unsupported(f"{namespace}::{name}")
        if target is not None:
            return self._rebind(target, op, schema, args, results, copied=builtin == "copy_")
        emitted = self._emit(op, schema, args, results)
        self._remember_view(builtin, emitted, args)
        return emitted

    def _size(self, name: str, args: list[Any]) -> Any:
        x = args[0]

        def dim(index: int) -> Any:
            sizes = tuple(v.shape[index] for v in x.values)
            if len(set(sizes)) == 1:
                return sizes[0]
            if sizes == tuple(batch.size for batch in self._batches) and self.batch_input is not None:
                if self._batch_node is None:
                    self._batch_node = self._writer.call(aten.sym_size.int, (self.batch_input, 0))
                return TracedSize(sizes, self._batch_node, BATCH)
            index %= x.values[0].dim()
            name = self.size_names.get((x.node, index), "")
            return TracedSize(sizes, self._writer.call(aten.sym_size.int, (x.node, index)), name)

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
        where = self._writer.where()
        if any(result != results[0] for result in results[1:]):
            raise DependsOnBatch(f"a number computed from tensor data ({name}{where}) changes with the batch")
        if name in _READS_DATA:
            self._writer.note(
                f"a number or condition computed from tensor data ({name}{where}) was taken from the example"
            )
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
            raise self._writer.unsupported(str(op))
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
        results = [op(*concrete(args, i)) for i in range(len(self._batches))]
        return self._emit(op, op._schema, args, results)

    def _emit(self, op: Any, schema: Any, args: list[Any], results: list[Any]) -> Any:
        self._writer.name_weights(op, args)
        positional, keywords = _typed(schema, [self._writer.nodes(a) for a in args])
        positional, keywords = _without_defaults(schema, positional, keywords)
        return self._outputs(self._writer.call(op, tuple(positional), keywords), results)

    def _outputs(self, node: fx.Node, results: list[Any]) -> Any:
        if isinstance(results[0], torch.Tensor):
            made = TracedTensor(tuple(results), node)
            self._writer.described(made)
            return made
        if results[0] is None:
            return None
        if not isinstance(results[0], (list, tuple)):
            raise self._writer.unsupported(str(node.target))
        if len({len(result) for result in results}) > 1:
            raise DependsOnBatch(f"{node.target}{self._writer.where()} gives as many tensors as the batch has samples")
        parts = []
        for index, values in enumerate(zip(*results, strict=True)):
            parts.append(self._outputs(self._writer.call(operator.getitem, (node, index)), list(values)))
        return type(results[0])(parts)

    def _overload(self, namespace: str, name: str, schema: Any) -> Any:
        # Python can't call a builtin that takes values of any type.
        if any(_is_generic(argument.type) for argument in schema.arguments):
            raise self._writer.unsupported(f"{namespace}::{name}")
        try:
            packet = getattr(getattr(torch.ops, namespace), name)
            return getattr(packet, schema.overload_name or "default")
        except AttributeError as error:
            raise self._writer.unsupported(f"{namespace}::{name}") from error

    def _functional(self, namespace: str, name: str, schema: Any) -> Any:
        if namespace != "aten":  # that `f_` is `f` in place is a custom of ATen's
            raise self._writer.unsupported(f"{namespace}::{name}")
        packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
        op = getattr(packet, schema.overload_name or "default", None)
        if op is None or op._schema.is_mutable:
            raise self._writer.unsupported(f"{namespace}::{name}")
        return op


def _builtin(namespace: str, name: str) -> str:
    """The name that the tables here know; another library's operator keeps its full name, and is in none of them."""
    return name if namespace in ("aten", "prim") else f"{namespace}::{name}"


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
