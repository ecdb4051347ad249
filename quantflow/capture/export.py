"""torch.export → Graph: the default capture, with a dynamic batch dimension and other sizes that vary."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind

from quantflow.capture.export_sizes import SizeNotFree, described_input, limits_of, require_dynamic
from quantflow.capture.functional import functional_graph, is_plain, take_out_of_place
from quantflow.capture.place import class_name, last_line, line_of, packs_sequences, solves_sizes, writes_into
from quantflow.capture.quick_export import quick_export
from quantflow.capture.sizes import FIXED, Sizes, larger
from quantflow.errors import CaptureError, DataError, first_line
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.calls import Input
from quantflow.ir.graph import Graph, name_layers
from quantflow.ir.passes.normalize import simplify
from quantflow.ir.structure import plain

#: What may take a model that torch.export refuses.
OTHER_MODES = "; try mode=torchscript (traces one path through the code) or mode=imperative"


def capture_export(
    model: nn.Module | torch.export.ExportedProgram,
    example: Batch,
    sizes: Sizes = FIXED,
    names: Sequence[str] | None = None,
) -> Graph:
    """Capture a module, or take over a saved ExportedProgram.

    Args:
        example: one calibration batch. A batch of one is doubled, because torch.export treats the size 1 as a constant.
        sizes: what varies beside the number of samples.
        names: of the inputs, where the module takes tensors by position and has no better names for them.

    Raises:
        CaptureError: torch.export refuses the model, or the model fixes a size that varies; the message carries the
            line of its code, and the other modes to try.
    """
    if isinstance(model, torch.export.ExportedProgram) or not sizes:
        return _captured(model, example, sizes, names)
    # torch.export takes a size of 1 for a constant, also one that a varying size comes to inside the model.
    # A graph that holds only while a size is 1 there is kept for want of a better one.
    seen = (example, *sizes.others)
    tried: list[Graph | SizeNotFree] = []
    narrow: Graph | None = None
    for batch in (*seen, larger(example, sizes.names)):
        try:
            graph = _captured(model, batch, sizes, names)
        except SizeNotFree as error:
            tried.append(error)
            continue
        except CaptureError:
            if not tried:
                raise
            continue
        if all(_takes(graph, each) for each in seen):
            if not any(limit.expression.endswith("== 1") for limit in graph.limits):
                return graph
            narrow = narrow or graph
        tried.append(graph)
    if narrow is not None:
        return narrow
    if isinstance(tried[0], SizeNotFree):
        raise tried[0]
    return tried[0]


def _takes(graph: Graph, batch: Batch) -> bool:
    """Whether the sizes of the batch are legal."""
    try:
        bind(graph, batch.args, batch.kwargs)
    except DataError:
        return False
    return True


def _captured(
    model: nn.Module | torch.export.ExportedProgram, example: Batch, sizes: Sizes, names: Sequence[str] | None
) -> Graph:
    if isinstance(model, torch.export.ExportedProgram):
        return _graph_of(model, model, sizes, names)
    model = model.eval()
    program = _exported(model, example, sizes)
    try:
        return _graph_of(program, model, sizes, names)
    except SizeNotFree:
        raise
    except CaptureError as error:
        placed = _exported(model, example, sizes, places=True)
        _graph_of(placed, model, sizes, names)  # says the same, with the line of code
        raise error from None


def _exported(model: nn.Module, example: Batch, sizes: Sizes, *, places: bool = False) -> torch.export.ExportedProgram:
    try:
        return _export(model, at_least_two(example), sizes, places=places)
    except CaptureError:
        if example.size != 1:
            raise
        return _export(model, example, sizes, places=places)  # code for one sample at a time


def _graph_of(
    program: torch.export.ExportedProgram,
    model: nn.Module | torch.export.ExportedProgram,
    sizes: Sizes,
    names: Sequence[str] | None,
) -> Graph:
    limits = limits_of(program)
    if is_plain(program):
        graph = _to_graph(program, program.graph, sizes, names)
        take_out_of_place(graph.fx)
    elif (functional := functional_graph(program)) is not None:
        graph = _to_graph(program, functional, sizes, names)
    else:
        program = _decomposed(program, model)
        graph = _to_graph(program, program.graph, sizes, names)
    if sizes:
        require_dynamic(program, graph, sizes, model)
    return simplify(replace(graph, limits=limits(graph)))


def _export(
    model: nn.Module, batch: Batch, sizes: Sizes = FIXED, *, places: bool = False
) -> torch.export.ExportedProgram:
    """
    Args:
        places: whether nodes say which line of code they come from.
    """
    try:
        shapes = _dynamic(model, batch, sizes)
        with plain_attention(), _without_noise(), quick_export(places=places), torch.no_grad():
            return torch.export.export(model, batch.args, dict(batch.kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        where = line_of(error)
        if packs_sequences(error):
            raise CaptureError(
                f"mode: torch.export can't capture {class_name(model)}: it packs sequences (pack_padded_sequence)"
                + (f" (at {where})" if where else "")
                + ", whose lengths are data; use mode=torchscript or mode=imperative, where that recurrent layer stays "
                "float, or give the layer the padded batch and take each sequence's last step from its output with "
                "torch.gather: then it runs in int8"
            ) from error
        if sizes and solves_sizes(error):
            raise SizeNotFree(
                f"mode: torch.export can't solve what {class_name(model)} asks of the sizes that vary: "
                f"{first_line(error)}; use mode=torchscript or mode=imperative, or give it batches of one size"
            ) from error
        raise CaptureError(
            f"mode: torch.export can't capture {class_name(model)}: {first_line(error)}"
            + (f" (at {where})" if where else "")
            + OTHER_MODES
        ) from error


def _std_mean(x: Any, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Any:
    """torch's own decomposition of this overload fails on its arguments."""
    return torch.ops.aten.std_mean.correction(x, dim, correction=int(unbiased), keepdim=keepdim)


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    table = {torch.ops.aten.std_mean.dim: _std_mean}
    try:
        return program.run_decompositions(table)
    except NameError:
        # torch 2.9 calls checks of the inputs that it wrote itself, and misnames those that arrive as *args. A program
        # without example inputs gets none.
        examples, program.example_inputs = program.example_inputs, None
        try:
            return program.run_decompositions(table)
        finally:
            program.example_inputs = examples


def _decomposed(
    program: torch.export.ExportedProgram, model: nn.Module | torch.export.ExportedProgram
) -> torch.export.ExportedProgram:
    """The program in functional ops.

    Raises:
        CaptureError: torch can't write one of its ops so.
    """
    try:
        with _without_noise(), quick_export(places=True), torch.no_grad():
            return _functional(program)
    except Exception as error:  # torch raises many unrelated types
        where = last_line(str(error))
        raise CaptureError(
            f"mode: torch.export can't write {class_name(model)} in functional ops: {first_line(error)}"
            + (f" (at {where})" if where else "")
            + "; try mode=torchscript, or write that line with other ops"
        ) from error


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
    """torch.export tells of its own doings: copies of its tree specs, attributes, which are put back, half a graph.

    What it can't do is in its error.
    """
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.ExitStack() as stack:
        logger.addFilter(_is_no_warning)
        stack.callback(logger.removeFilter, _is_no_warning)
        warnings.filterwarnings("ignore", message=".*(was|were) assigned during export.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


def _is_no_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING


def at_least_two(batch: Batch) -> Batch:
    """The batch itself, or the batch repeated along dimension 0 if it holds a single sample."""
    if batch.size != 1:
        return batch

    return batch.mapped(lambda x: torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x)


def _dynamic(model: nn.Module, batch: Batch, sizes: Sizes) -> dict[str, Any]:
    """Dynamic are dimension 0 of every input that shares the batch size, and what varies; torch.export decides."""
    place = {id(x): at for at, x in enumerate(batch.tensors)}

    def of(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, torch.Tensor):
            return None
        dims = [dim for at, dim in sizes.names if at == place[id(x)]]
        if x.dim() and x.shape[0] == batch.size:
            dims.append(0)
        return dict.fromkeys(sorted(set(dims)), torch.export.Dim.AUTO)

    bound = inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    return {name: torch.utils._pytree.tree_map(of, value) for name, value in bound.arguments.items()}


def _to_graph(
    program: torch.export.ExportedProgram, exported: fx.Graph, sizes: Sizes, names: Sequence[str] | None
) -> Graph:
    """
    Args:
        exported: the program's graph, or the same in other ops.
    """
    constants: dict[str, torch.Tensor] = {}
    lifted: dict[str, str] = {}
    own = "" if names is None else "module."
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        name = str(spec.target).removeprefix(own)
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[spec.target].detach()
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            source = program.state_dict if spec.target in program.state_dict else program.constants
            constants[name] = source[spec.target].detach()
        else:
            raise CaptureError(f"mode: the exported program takes a {spec.kind.name.lower()}, which has no int8 form")
        lifted[spec.arg.name] = name

    if written := list(program.graph_signature.user_inputs_to_mutate.values()):
        raise writes_into(written)
    in_spec = program.call_spec.in_spec
    keywords: list[str] = []
    if in_spec is not None and in_spec.num_children > 1 and names is None:
        # A spec's children have another name in each version of torch; what it unflattens to has not.
        _, by_name = torch.utils._pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        keywords = list(by_name)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    placeholders = [n for n in exported.nodes if n.op == "placeholder" and n.name not in lifted]
    positional = len(placeholders) - len(keywords)
    for node in exported.nodes:
        if node.op == "placeholder" and node.name in lifted:
            values[node] = graph.get_attr(lifted[node.name])
            _describe(values[node], constants[lifted[node.name]])
            continue
        if node.op == "output":
            specs = zip(program.graph_signature.output_specs, node.args[0], strict=True)
            user = [(spec.arg, made) for spec, made in specs if spec.kind.name == "USER_OUTPUT"]
            flat = [arg.value if isinstance(arg, ConstantArgument) else values[made] for arg, made in user]
            graph.output(tuple(flat) if names is not None else _structure(program, flat))
            continue
        _require_an_op(node)
        values[node] = copied = graph.node_copy(node, values.__getitem__)
        copied.meta = {}
        _describe(copied, node.meta.get("val"))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack and not stack[-1][0].startswith("_"):
            copied.meta["module"] = _path(stack[-1][0], is_flat=names is not None)
            copied.meta["module_is_leaf"] = "torch.nn.modules" in str(stack[-1][1])
        if node.op == "placeholder":
            index = len(inputs)
            keyword = keywords[index - positional] if index >= positional else None
            if names is not None:
                copied._rename(names[index])
            inputs.append(described_input(copied, node.meta["val"], index, keyword, inputs, sizes, placeholders))
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


def _path(module: str, *, is_flat: bool) -> str:
    """A module's name in the user's model; `Flat` holds that as "module"."""
    path = module.replace("L['self'].", "").replace("L['self']", "")
    return path.removeprefix("module").removeprefix(".") if is_flat else path


def _structure(program: torch.export.ExportedProgram, flat: list[Any]) -> Any:
    """The model's output in its own nesting, with model-output classes turned into plain dicts."""
    spec = program.call_spec.out_spec
    if spec is None:
        return tuple(flat) if len(flat) != 1 else flat[0]
    return plain(torch.utils._pytree.tree_unflatten(flat, spec))


def _require_an_op(node: fx.Node) -> None:
    """
    Raises:
        CaptureError: the node runs one of several graphs (torch.cond), or a graph of its own.
    """
    if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
        what = node.target if node.op == "get_attr" else f"torch.{getattr(node.target, '__name__', node.target)}"
        where = last_line(node.meta.get("stack_trace"))
        raise CaptureError(
            f"mode: the model runs {what}"
            + (f" (at {where})" if where else "")
            + ", a choice or a loop that depends on "
            "the data, which an int8 graph can't hold; leave it out of the part that is quantized, or write it with "
            "torch.where"
        )


def _describe(node: fx.Node, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        node.meta["shape"] = tuple(s if isinstance(s, int) else _static(s) for s in value.shape)
        node.meta["dtype"] = value.dtype


def _static(size: torch.SymInt) -> int | None:
    expression = size.node.expr
    return int(expression) if expression.is_number else None
