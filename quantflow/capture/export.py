"""torch.export → Graph: the default capture, with a dynamic batch dimension."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind

from quantflow.errors import CaptureError, first_line
from quantflow.ir import activations
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, Input, arguments, name_layers, op_name
from quantflow.ir.passes.normalize import simplify

#: Ops that every pass knows by these names, and whose result is no part of an operand's memory.
_FRESH = frozenset(
    [
        *activations.ATEN, "relu6", "conv1d", "conv2d", "conv3d", "linear", "batch_norm", "add", "sub", "mul", "div",
        "cat", "mean", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pad", "constant_pad_nd", "sym_size",
    ]
)  # fmt: skip
#: And those whose result may be their operand's own memory.
_VIEWS = frozenset(["flatten", "view", "reshape", "permute", "transpose", "contiguous", "dropout"])


def capture_export(model: nn.Module | torch.export.ExportedProgram, example: Batch) -> Graph:
    """Capture a module, or take over a saved ExportedProgram.

    Args:
        example: one calibration batch. A batch of one is doubled, because torch.export treats the size 1 as a constant.

    Raises:
        CaptureError: torch.export refuses the model; the message carries its first line and the other modes to try.
    """
    if isinstance(model, torch.export.ExportedProgram):
        program = model
    else:
        model = model.eval()
        try:
            program = _export(model, at_least_two(example))
        except CaptureError:
            if example.size != 1:
                raise
            program = _export(model, example)  # code for one sample at a time
    if _is_plain(program):
        graph = _to_graph(program)
        _take_out_of_place(graph.fx)
        return simplify(graph)
    with _without_noise(), torch.no_grad():
        program = program.run_decompositions({})
    return simplify(_to_graph(program))


def _export(model: nn.Module, batch: Batch) -> torch.export.ExportedProgram:
    try:
        shapes = _dynamic_batch(model, batch)
        with plain_attention(), _without_noise(), torch.no_grad():
            return torch.export.export(model, batch.args, dict(batch.kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"mode: torch.export can't capture {type(model).__name__}: {first_line(error)}; "
            "try mode=torchscript (traces one path through the code) or mode=imperative"
        ) from error


def _is_plain(program: torch.export.ExportedProgram) -> bool:
    """Whether the program is functional as it stands, but for activations in place, and of ops that need no other form.

    Decomposing a program takes longer than exporting it, and for most convolutional nets it changes nothing.
    """
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    for node in place:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if not isinstance(node.target, torch._ops.OpOverload) or name.removesuffix("_") not in _FRESH | _VIEWS:
            return False
        if name in ("batch_norm", "dropout") and arguments(node)["train" if name == "dropout" else "training"]:
            return False
        if _writes_in_place(node) and not _owns_its_operand(node, place):
            return False
    return True


def _writes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _owns_its_operand(node: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    """Whether what the op writes into is a tensor that an op made, and no view of it was taken before."""
    made = node.args[0]
    while isinstance(made, fx.Node) and _writes_in_place(made):
        made = made.args[0]
    if not isinstance(made, fx.Node) or op_name(made) not in _FRESH:
        return False
    aliases = [made]
    for alias in aliases:
        for user in alias.users:
            if _writes_in_place(user) and user.args[0] is alias:
                aliases.append(user)
            elif op_name(user) in _VIEWS and place[user] < place[node]:
                return False
    return True


def _take_out_of_place(graph: fx.Graph) -> None:
    """relu_(x) as relu(x), which everything behind it reads in place of x."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        if _writes_in_place(node):
            x = node.args[0]
            node.target = getattr(getattr(torch.ops.aten, op_name(node).removesuffix("_")), node.target._overloadname)
            for user in [user for user in x.users if user not in seen]:
                user.replace_input_with(x, node)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention on its traceable path: the fused fast path hides the linears in one opaque op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """torch.export copies its own tree specs in a way that it warns about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


def at_least_two(batch: Batch) -> Batch:
    """The batch itself, or the batch repeated along dimension 0 if it holds a single sample."""
    if batch.size != 1:
        return batch

    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x

    return Batch(args=tuple(double(x) for x in batch.args), kwargs={k: double(v) for k, v in batch.kwargs.items()})


def _dynamic_batch(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Dimension 0 is dynamic in every input that shares the batch size; torch.export decides the rest."""

    def of(x: torch.Tensor) -> dict[int, Any]:
        return {0: torch.export.Dim.AUTO} if x.dim() and x.shape[0] == batch.size else {}

    bound = inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    return {name: torch.utils._pytree.tree_map(of, value) for name, value in bound.arguments.items()}


def _to_graph(program: torch.export.ExportedProgram) -> Graph:
    constants: dict[str, torch.Tensor] = {}
    lifted: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constants[spec.target] = program.constants[spec.target].detach()
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            source = program.state_dict if spec.target in program.state_dict else program.constants
            constants[spec.target] = source[spec.target].detach()
        else:
            raise CaptureError(f"mode: the exported program takes a {spec.kind.name.lower()}, which has no int8 form")
        lifted[spec.arg.name] = spec.target

    if written := list(program.graph_signature.user_inputs_to_mutate.values()):
        raise CaptureError(
            f"mode: the model writes into its input {', '.join(written)}, which an int8 graph can't; "
            "let it work on a copy (x = x.clone())"
        )
    in_spec = program.call_spec.in_spec
    keywords = list(in_spec.child(1).context) if in_spec is not None and in_spec.num_children > 1 else []
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder" and n.name not in lifted]
    positional = len(placeholders) - len(keywords)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            values[node] = graph.get_attr(lifted[node.name])
            _describe(values[node], constants[lifted[node.name]])
            continue
        if node.op == "output":
            user = [o.arg for o in program.graph_signature.output_specs if o.kind.name == "USER_OUTPUT"]
            named = {n.name: n for n in program.graph.nodes}
            flat = [a.value if isinstance(a, ConstantArgument) else values[named[a.name]] for a in user]
            graph.output(_structure(program, flat))
            continue
        values[node] = copied = graph.node_copy(node, values.__getitem__)
        copied.meta = {}
        _describe(copied, node.meta.get("val"))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack and not stack[-1][0].startswith("_"):
            copied.meta["module"] = stack[-1][0].replace("L['self'].", "").replace("L['self']", "")
            copied.meta["module_is_leaf"] = "torch.nn.modules" in str(stack[-1][1])
        if node.op == "placeholder":
            index = len(inputs)
            keyword = keywords[index - positional] if index >= positional else None
            inputs.append(Input(copied.name, keyword, _dtype_name(copied), copied.meta["shape"]))
    notes = []
    dynamic = any(item.shape and item.shape[0] is None for item in inputs)
    if not dynamic:
        notes.append("torch.export fixed the batch size to the example's: the model's code depends on it")
    if changed := list(program.graph_signature.buffers_to_mutate.values()):
        notes.append(
            f"the model changes its own {', '.join(changed)} while it runs; the int8 model leaves them as they are"
        )
    name_layers(graph)
    return Graph(graph, constants, tuple(inputs), dynamic, tuple(notes))


def _structure(program: torch.export.ExportedProgram, flat: list[Any]) -> Any:
    """The model's output in its own nesting, with model-output classes turned into plain dicts."""
    spec = program.call_spec.out_spec
    if spec is None:
        return tuple(flat) if len(flat) != 1 else flat[0]
    return plain(torch.utils._pytree.tree_unflatten(flat, spec))


def plain(output: Any) -> Any:
    """Tensors (or nodes) nested in plain tuples, lists and dicts; empty entries of model-output classes dropped."""
    if isinstance(output, Mapping) or hasattr(output, "keys"):
        return {str(k): plain(output[k]) for k in output.keys() if output[k] is not None}  # noqa: SIM118
    if isinstance(output, (tuple, list)):
        return type(output)(plain(x) for x in output) if type(output) in (tuple, list) else tuple(map(plain, output))
    return output


def _describe(node: fx.Node, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        node.meta["shape"] = tuple(s if isinstance(s, int) else _static(s) for s in value.shape)
        node.meta["dtype"] = value.dtype


def _static(size: torch.SymInt) -> int | None:
    expression = size.node.expr
    return int(expression) if expression.is_number else None


def _dtype_name(node: fx.Node) -> str:
    return str(node.meta["dtype"]).removeprefix("torch.")
