"""An exported program in functional ops, without tracing it once more.

torch's run_decompositions traces the whole program again, which takes longer than the export did, and changes few of
its ops: those that torch computes by others and whose result may be a view of their operand (reshape, flatten, to,
chunk), and those that write in place. Each such op is computed here by itself, on the tensors without numbers that the
nodes of the program carry, and what it came to stands in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from quantflow.ir import activations
from quantflow.ir.graph import arguments, op_name
from quantflow.ir.ops import TRANSPOSED

try:
    from torch._export.utils import _is_cia_op, _is_preservable_cia_op
except ImportError:  # a torch that keeps them elsewhere: programs are traced again
    _is_cia_op = _is_preservable_cia_op = None  # type: ignore[assignment]

#: Ops that every pass knows by these names, and whose result is no part of an operand's memory.
_FRESH = frozenset(
    [
        *activations.ATEN, *TRANSPOSED, "relu6", "conv1d", "conv2d", "conv3d", "linear", "batch_norm", "add", "sub",
        "mul", "div", "cat", "mean", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pad", "constant_pad_nd", "sym_size",
    ]
)  # fmt: skip
#: And those whose result may be their operand's own memory.
_VIEWS = frozenset(["flatten", "view", "reshape", "permute", "transpose", "contiguous", "dropout"])
#: They come to nothing, or to a copy, which a graph without writes has no use for: they are left for `simplify`.
_IDENTITIES = frozenset(["dropout", "contiguous"])
#: Their results depend on more than their operands, or they change a state, while a model is trained.
_TRAINED = {"batch_norm": "training", "instance_norm": "use_input_stats", "dropout": "train", "rrelu": "training"}
#: torch has another form for it, which is among its overloads.
_REPLACED = frozenset([torch.ops.aten.std_mean.dim])


class _UnknownError(Exception):
    """Only a new trace says what an op comes to."""


def is_plain(program: torch.export.ExportedProgram) -> bool:
    """Whether the program is functional as it stands, but for activations in place, and of ops that need no other form.

    For most convolutional nets it is.
    """
    if _changes_state(program):
        return False
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    for node in place:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if not isinstance(node.target, OpOverload) or name.removesuffix("_") not in _FRESH | _VIEWS:
            return False
        if name in ("batch_norm", "dropout") and arguments(node)[_TRAINED[name]]:
            return False
        if _writes_in_place(node) and not _owns_its_operand(node, place):
            return False
    return True


def take_out_of_place(graph: fx.Graph) -> None:
    """relu_(x) as relu(x), which everything behind it reads in place of x."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        if _writes_in_place(node):
            x = node.args[0]
            node.target = _out_of_place(node)
            for user in [user for user in x.users if user not in seen]:
                user.replace_input_with(x, node)


def functional_graph(program: torch.export.ExportedProgram) -> fx.Graph | None:
    """The program's graph in the ops that `run_decompositions` gives, but for the numbers in names, copies, and where a
    result that is a view of what was written in place is made: there at last, here where the code makes it.

    Placeholders and results are those of the program, in their order.

    Returns:
        None where only a new trace can tell, as for a write into a view.
    """
    if _is_cia_op is None or _changes_state(program):
        return None
    try:
        with torch.no_grad():
            return _Rewriting(program).graph
    except Exception:  # noqa: BLE001 torch raises many types; its own way, which is slower, says what is wrong
        return None


def _changes_state(program: torch.export.ExportedProgram) -> bool:
    return bool(program.graph_signature.buffers_to_mutate or program.graph_signature.user_inputs_to_mutate)


def _writes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _owns_its_operand(node: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    """Whether what the op writes into is a tensor that an op made, and no view of it was taken before."""
    made = node.args[0]
    while isinstance(made, fx.Node) and _writes_in_place(made):
        made = made.args[0]
    if not isinstance(made, fx.Node) or made.op != "call_function" or _may_be_a_view(made):
        return False
    aliases = [made]
    for alias in aliases:
        for user in alias.users:
            if _writes_in_place(user) and user.args[0] is alias:
                aliases.append(user)
            elif place[user] < place[node] and _may_be_a_view(user):
                return False
    return True


def _may_be_a_view(node: fx.Node) -> bool:
    """Whether an op's result may be the memory of an operand that it does not write into."""
    op, name = node.target, op_name(node)
    if name in _FRESH or node.op == "output" or _writes_in_place(node):
        return False
    if not isinstance(op, OpOverload) or name in _VIEWS or name == "_unsafe_view" or _is_cia_op is None:
        return True
    return _is_of_others(op) or any(argument.alias_info is not None for argument in op._schema.arguments)


def _is_of_others(op: OpOverload) -> bool:
    """Whether torch computes it by other ops, which a trace puts in its place: its result may be a view."""
    return _is_cia_op(op) and not _is_preservable_cia_op(op)


def _out_of_place(node: fx.Node) -> Any:
    """
    Raises:
        AttributeError: torch has no such op.
    """
    return getattr(getattr(torch.ops.aten, op_name(node).removesuffix("_")), node.target._overloadname)


class _Recorder(TorchDispatchMode):
    """The ops that an op comes to, with their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(each, torch.Tensor) for each in pytree.tree_leaves(result)):  # not where it asks for a size
            self.calls.append((func, args, kwargs or {}, result))
        return result


class _Rewriting:
    """The graph under construction; `graph` is the result."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.graph = fx.Graph()
        self._nodes = list(program.graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        values = (node.meta.get("val") for node in self._nodes)
        self._mode: FakeTensorMode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        #: What stands for a node, or a nest of it where one op with several results came to several ops.
        self._new: dict[fx.Node, Any] = {}
        #: Where a size that varies is read.
        self._sizes: dict[Any, fx.Node] = {}
        for node in self._nodes:
            self._new[node] = self._of(node)

    def _of(self, node: fx.Node) -> Any:
        if node.op == "output":
            return self.graph.output(fx.map_arg(node.args[0], self._new.__getitem__))
        if node.op == "placeholder":
            return self.graph.node_copy(node)
        if node.op != "call_function":
            raise _UnknownError
        if node.target is operator.getitem and not isinstance(self._new[node.args[0]], fx.Node):
            return self._new[node.args[0]][node.args[1]]
        op, name = node.target, op_name(node)
        if isinstance(op, OpOverload):
            if op in _REPLACED or (name in _TRAINED and arguments(node)[_TRAINED[name]]):
                raise _UnknownError
            if _writes_in_place(node):
                return self._written(node)
            if name not in _IDENTITIES and _is_of_others(op):
                return self._in_parts(node, op)
        elif isinstance(op, torch._ops.HigherOrderOperator):
            raise _UnknownError
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._new.__getitem__)
        copied = self._call(op, args, kwargs)
        copied.meta = dict(node.meta)
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self._sizes.setdefault(value.node.expr, copied)
        return copied

    def _written(self, node: fx.Node) -> Any:
        """What an op in place would have made, which stands for its operand from here on."""
        written = [a for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if len(written) > 1 or written[0].name != "self" or not _owns_its_operand(node, self._place):
            raise _UnknownError
        new = self._in_parts(node, _out_of_place(node))
        made = node.args[0]
        while _writes_in_place(made):
            self._new[made] = new
            made = made.args[0]
        self._new[made] = new
        return new

    def _in_parts(self, node: fx.Node, op: Callable[..., Any]) -> Any:
        """The ops that one comes to, in its place."""
        known: dict[int, fx.Node] = {}

        def value(x: fx.Node) -> Any:
            held = x.meta["val"]
            if isinstance(self._new[x], fx.Node) and isinstance(held, torch.Tensor):
                known[id(held)] = self._new[x]
            return held

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        with self._mode, _Recorder() as recorder:
            result = op(*args, **kwargs)
        expected = node.meta["val"]
        if isinstance(expected, torch.Tensor) and (result.dtype, result.dim()) != (expected.dtype, expected.dim()):
            raise _UnknownError

        def referred(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return known[id(x)]
            return self._size(x) if isinstance(x, torch.SymInt) else x

        last: fx.Node | None = None
        for target, its_args, its_kwargs, made in recorder.calls:
            if target._schema.is_mutable or _is_of_others(target):
                raise _UnknownError
            its_args, its_kwargs = pytree.tree_map(referred, (tuple(its_args), dict(its_kwargs)))
            last = self._call(target, its_args, its_kwargs)
            last.meta = {**node.meta, "val": made}
            if isinstance(made, torch.Tensor):
                known[id(made)] = last
            elif any(a is not b for a, b in zip(pytree.tree_leaves(made), pytree.tree_leaves(result), strict=True)):
                raise _UnknownError
        if isinstance(result, torch.Tensor):
            return known[id(result)]
        if last is not None and not isinstance(last.meta["val"], torch.Tensor):
            return last
        return [known[id(each)] for each in result]

    def _call(self, op: Any, args: Any, kwargs: Any) -> fx.Node:
        """Numbered anew and without its overload, as in a trace: folded constants are named after their nodes."""
        name = op._overloadpacket.__name__.strip("_") if isinstance(op, OpOverload) else None
        return self.graph.create_node("call_function", op, args, kwargs, name)

    def _size(self, size: torch.SymInt) -> int | fx.Node:
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        if expression not in self._sizes:
            self._sizes[expression] = self._read(expression)
        return self._sizes[expression]

    def _read(self, expression: Any) -> fx.Node:
        """The size of an input."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in inputs:
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == expression:
                    with self.graph.inserting_after(inputs[-1]):
                        read = self.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    read.meta["val"] = size
                    return read
        raise _UnknownError
