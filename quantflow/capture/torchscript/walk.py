"""The walk through a ScriptModule's forward: modules, calls, branches and loops, for all runs in lockstep."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from quantflow.capture.place import class_name
from quantflow.capture.sizes import Sizes, default_name
from quantflow.capture.torchscript.failure import DependsOnBatch
from quantflow.capture.torchscript.ops import Ops
from quantflow.capture.torchscript.values import ON_STRUCTURES, Module, TracedSize, TracedTensor, flat, wrapped
from quantflow.capture.torchscript.writer import Writer
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.calls import BATCH, Input
from quantflow.ir.graph import Graph, name_layers
from quantflow.ir.structure import Leaf, build, flatten, leaves_of, plain

#: Stands for prim::CallMethod while functions, and only they, are inlined: so every op knows the module it is in.
_CALL = "quantflow::call"
#: Deeper nested functions end as an unsupported call.
_INLINE_PASSES = 16


@dataclass(frozen=True)
class Names:
    """What inputs and their sizes are called.

    Attributes:
        tensors: the inputs' names where the script is of a `Flat` module, whose own name then is no part of a layer's.
        follows_batch: whether the runs hold different numbers of samples.
    """

    sizes: Sizes
    tensors: Sequence[str] | None = None
    follows_batch: bool = True


class Walk:
    """One walk through a ScriptModule's forward."""

    def __init__(self, script: torch.jit.ScriptModule, batches: Sequence[Batch], names: Names) -> None:
        self._script: Any = script
        self._batches = batches
        self._names = names
        self._writer = Writer()
        self._ops = Ops(self._writer, batches)
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

    def run(self, like: Any) -> Graph:
        """The graph, before simplification; its output is nested as `like` is, where the tensors are as many."""
        arguments, inputs = self._inputs()
        root = Module(self._script._c, "")
        result = self._method(root, "forward", [root, *arguments])
        if self._names.tensors is not None:
            result = tuple(map(_as_in_python, result if isinstance(result, tuple) else (result,), like))
        output = self._writer.nodes(result)
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(output)):
            raise CaptureError(
                f"mode: {class_name(self._script)} returns no tensor, so there is nothing to run in int8"
            )
        self._writer.graph.output(_nested_like(like, plain(output)))
        name_layers(self._writer.graph)
        return Graph(
            self._writer.graph, self._writer.constants, inputs, notes=self._writer.notes, limits=self._writer.limits
        )

    def _inputs(self) -> tuple[list[Any], tuple[Input, ...]]:
        first = self._batches[0]
        schema = self._script._c._get_method("forward").schema.arguments[1:]
        names = [argument.name for argument in schema]
        keywords = [*([None] * len(first.args)), *first.kwargs]
        # By place: a trace may give several of its arguments one name.
        places = [*range(len(first.args)), *map(names.index, first.kwargs)]
        bound: dict[int, Any] = {}
        inputs: list[Input] = []
        runs = [batch.tensors for batch in self._batches]
        trees = [flatten(value)[0] for value in (*first.args, *first.kwargs.values())]
        at = 0
        for place, keyword, tree in zip(places, keywords, trees, strict=True):
            leaves = sum(isinstance(leaf, Leaf) for leaf in leaves_of(tree))
            held = []
            for part in range(leaves):
                called = names[place] if isinstance(tree, Leaf) else f"{names[place]}_{part}"
                if self._names.tensors is not None:
                    called = self._names.tensors[at]
                value = TracedTensor(tuple(tensors[at] for tensors in runs), self._writer.graph.placeholder(called))
                inputs.append(self._input(value, at, keyword if isinstance(tree, Leaf) else None, inputs))
                held.append(value)
                at += 1
            bound[place] = build(tree, held)
        return [bound.get(place, argument.default_value) for place, argument in enumerate(schema)], tuple(inputs)

    def _input(self, value: TracedTensor, at: int, keyword: str | None, before: Sequence[Input]) -> Input:
        """What the runs show of an input: a size that differs between them varies."""
        node = self._writer.described(value)
        shape: list[int | str | None] = list(node.meta["shape"])
        batches = [batch.size for batch in self._batches]
        for dim, size in enumerate(shape):
            if size is not None:
                continue
            if dim == 0 and self._names.follows_batch and [x.shape[0] for x in value.values] == batches:
                if self._ops.batch_input is None:
                    self._ops.batch_input = node
                self._ops.size_names[node, dim] = BATCH
                continue
            taken = {name for item in before for name in item.shape if isinstance(name, str)}
            taken |= {name for name in shape if isinstance(name, str)}
            named = self._names.sizes.names.get((at, dim), "")
            shape[dim] = self._ops.size_names[node, dim] = named or default_name(value.values[0], dim, taken)
        return Input(node.name, keyword, str(node.meta["dtype"]).removeprefix("torch."), tuple(shape))

    def _method(self, module: Module, name: str, arguments: list[Any]) -> Any:
        key = (module.script._type().qualified_name(), name)
        if key not in self._methods:
            self._methods[key] = _with_functions_inlined(module.script._get_method(name).graph)
        self._writer.modules.append(module)
        outputs = self._block(self._methods[key], arguments, {})
        self._writer.modules.pop()
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
        is_builtin = namespace in ("aten", "prim")
        if is_builtin and isinstance(args[0] if args else None, (list, tuple, dict, str)) and name in ON_STRUCTURES:
            return ON_STRUCTURES[name](*args)
        if name in ("__is__", "__isnot__"):
            return (args[0] is args[1]) is (name == "__is__")
        if node.kind() == "prim::PythonOp":
            raise self._writer.unsupported(f"call of the Python function '{node.pyname()}'")
        if any(isinstance(a, Module) for a in args) or node.schema() == "(no schema)" or "(...)" in node.schema():
            raise self._writer.unsupported(node.kind())
        has_tensor = any(isinstance(a, TracedTensor) and (a.node is not None or a.values[0].dim()) for a in flat(args))
        has_size = any(isinstance(a, TracedSize) for a in flat(args))
        if is_builtin and has_size and not has_tensor and (done := self._ops.on_sizes(name, args)) is not None:
            return done
        if node.kind() == "prim::NumToTensor":
            return TracedTensor((torch.tensor(args[0]),) * len(self._batches))
        schema = torch._C.parse_schema(node.schema())
        if has_size or any(isinstance(a, TracedTensor) and a.node is not None for a in flat(args)):
            return self._ops.on_tensors(namespace, name, schema, args)
        return self._ops.on_constants(namespace, name, schema, args)

    def _constant(self, node: Any, _args: list[Any], _env: dict[int, Any]) -> Any:
        found = re.fullmatch(r"self\.(.+?)(_fused_bn)?(\.\d+)?", node.output().debugName())
        value = self._ops.own(node.output().toIValue())
        return wrapped(value, len(self._batches), found.group(1) if found else "")

    def _get_attribute(self, node: Any, args: list[Any], _env: dict[int, Any]) -> Any:
        owner, name = args[0], node.s("name")
        if not isinstance(owner, Module):
            raise self._writer.unsupported("an attribute of a TorchScript class")
        value = owner.script.getattr(name)
        path = f"{owner.path}.{name}" if owner.path else name
        if self._names.tensors is not None and owner.script is self._script._c:
            path = ""  # the user's model itself, in its Flat
        if isinstance(value, torch._C.ScriptModule):
            return Module(value, path)
        return wrapped(self._ops.own(value), len(self._batches), path, is_attribute=True)

    def _if(self, node: Any, args: list[Any], env: dict[int, Any]) -> Any:
        then, otherwise = node.blocks()
        condition = args[0]
        if isinstance(condition, TracedSize):
            taken = self._same(condition, "a branch")
            other = otherwise if taken else then
            if self._writer.limit(condition.text, bool(taken)):
                pass
            elif not any(n.kind() == "prim::RaiseException" for n in other.nodes()):
                where = self._writer.where()
                self._writer.note(f"a branch{where} depends on sizes; the one that the example takes was captured")
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
            size = "a size that varies" if self._names.sizes else "the batch size"
            raise DependsOnBatch(f"{what}{self._writer.where()} depends on {size}")
        return value.values[0]

    def _raise(self, _node: Any, args: list[Any], _env: dict[int, Any]) -> Any:
        raise CaptureError(f"mode: the model refuses the example batch{self._writer.where()}: {args[0]}")

    def _call_method(self, node: Any, args: list[Any], _env: dict[int, Any]) -> Any:
        if not isinstance(args[0], Module):
            raise self._writer.unsupported(f"a method of a TorchScript class ('{node.s('name')}')")
        return self._method(args[0], node.s("name"), args)


def _as_in_python(value: Any, like: Any) -> Any:
    """A trace's constant number, which is a tensor there, as the number that it is."""
    is_number = isinstance(value, TracedTensor) and value.node is None and type(like) is int
    return value.values[0].item() if is_number else value


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


def _nested_like(like: Any, output: Any) -> Any:
    """The output's nodes in the structure of `like`, the module's own output, where both hold as many tensors."""
    nodes = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, fx.Node)]
    leaves, spec = pytree.tree_flatten(like)
    if sum(isinstance(leaf, torch.Tensor) for leaf in leaves) != len(nodes):
        return output
    remaining = iter(nodes)
    return pytree.tree_unflatten([next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
