"""write_onnx(program, path): one ONNX file of QDQ nodes, checked and compared with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantflow.errors import DataError, UsageError, VerificationError
from quantflow.exchange.expressible import SUM, expressible, split_layers
from quantflow.exchange.onnx_check import differing_codes, onnxruntime_outputs
from quantflow.exchange.onnx_layers import write_node
from quantflow.exchange.onnx_writer import IR_VERSION, OPSET, Writer
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.calls import BATCH, Input
from quantflow.ir.program import Node, Program, Ref, TensorRef
from quantflow.ir.structure import Typed
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.specification import Specification, run_node

#: Protobuf holds no more in one file; weights go to a file beside it.
LARGEST_FILE = 2_000_000_000
#: onnxruntime's result of the whole file against the reference's. Every layer by itself is compared code by code;
#: legal differences of one code add up to what int8 costs anyhow, in a deep net to some 20 dB.
MIN_SQNR_DB = 10.0
#: Sizes that are tried where an input's size varies and no batch is given.
_SIZES = (16, 32, 64, 128, 224, 8, 4, 2, 1)


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: the file; weights above 2 GB lie in `path.name + ".data"` beside it.
        opset: of the standard operators; there are no others in it.
        nodes: op → how many.
        outputs: the model's results by name, in order.
        float_layers: layer → why onnxruntime computes it in float; OpenVINO fuses most of these all the same.
        split_layers: how many sums with a residual got codes of their own before it, which rounds once more.
        sqnr_db: output → onnxruntime's against the reference's on the program as it is expressed; None: not compared.
        codes_that_differ: share of all layers' codes that are next to the reference's, each layer from the same
            operands; None: not compared, or the file holds more than 2 GB.
        sqnr_to_program_db: output → the expressed program against the model's own, both by the reference.
        compared_on: what the two were compared on.
    """

    path: str
    opset: int
    nodes: Mapping[str, int]
    outputs: tuple[str, ...]
    float_layers: Mapping[str, str]
    split_layers: int
    sqnr_db: Mapping[str, float] | None
    codes_that_differ: float | None
    sqnr_to_program_db: Mapping[str, float]
    compared_on: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_onnx(
    program: Program, path: str | Path, batches: Sequence[Batch] | None = None, *, verify: bool = True
) -> OnnxExport:
    """Write a program as ONNX: int8 layers between QuantizeLinear and DequantizeLinear, the rest as it is.

    Args:
        batches: input like the real one: sums before a residual are coded in the range that they have there, and the
            file is verified on the first, and on one of other sizes. None: random numbers, and the widest range that
            matters.
        verify: run the file with onnxruntime and compare it with the reference.

    Raises:
        UnavailableError: onnx, or for `verify` onnxruntime, is not installed.
        UsageError: an op of the program has no form in ONNX; names the layer.
        VerificationError: onnxruntime gives another result than the reference.
    """
    path = Path(path)
    inputs = [bind(program, b.args, b.kwargs) for b in batches or ()]
    first = inputs[0] if inputs else _made_up(program)
    expressed = expressible(program, _unfused_sums(program, inputs) if inputs else None)
    seen: dict[str, Any] = {item.name: x for item, x in zip(expressed.inputs, first, strict=True)}
    found = _leaves(
        Specification(expressed)(first, lambda node, values: seen.update({node.output: values[node.output]}))
    )
    wanted = _leaves(Specification(program)(first))
    w = Writer(expressed, seen)
    for item in expressed.inputs:
        w.names[item.name] = item.keyword or item.name
    for node in expressed.nodes:
        write_node(w, node)
    names = _outputs(w, found)
    _save(w, path, names)
    sqnr, share = None, None
    if verify:
        given = {item.keyword or item.name: x for item, x in zip(expressed.inputs, first, strict=True)}
        differ, total = differing_codes(path, w, given) if _bytes(w) <= LARGEST_FILE else (0, 0)
        share = differ / total if total else None
        sqnr = _compared(path, given, names, found)
        if (other := _of_another_size(inputs)) is not None:
            there = _leaves(Specification(expressed)(other))
            given = {item.keyword or item.name: x for item, x in zip(expressed.inputs, other, strict=True)}
            _compared(path, given, names, there)
    return OnnxExport(
        str(path),
        OPSET,
        _counted(w),
        tuple(names),
        dict(w.float_layers),
        len(split_layers(program)),
        sqnr,
        share,
        {
            name: sqnr_db(a.float(), b.float())
            for name, a, b in zip(names, wanted.values(), found.values(), strict=True)
        },
        "the first batch" if inputs else "random numbers",
    )


def _compared(
    path: Path, given: Mapping[str, torch.Tensor], names: Sequence[str], wanted: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """SQNR in dB of each of onnxruntime's results to the reference's."""
    sqnr = {}
    for name, ours, theirs in zip(names, wanted.values(), onnxruntime_outputs(path, given), strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise VerificationError(
                f"ONNX: onnxruntime gives {name} as {theirs.dtype} {list(theirs.shape)}, the reference as "
                f"{ours.dtype} {list(ours.shape)}; report this"
            )
        sqnr[name] = sqnr_db(ours.float(), theirs.float())
        if not sqnr[name] >= MIN_SQNR_DB:
            raise VerificationError(
                f"ONNX: onnxruntime's {name} is {sqnr[name]:.1f} dB from the reference's, where at least "
                f"{MIN_SQNR_DB:g} dB is legal; '{path}' must not be used: on a CPU without VNNI onnxruntime's sums "
                "saturate, else report this"
            )
    return sqnr


def _of_another_size(inputs: Sequence[Sequence[torch.Tensor]]) -> Sequence[torch.Tensor] | None:
    shapes = [[x.shape for x in each] for each in inputs]
    return next((each for each, shape in zip(inputs, shapes, strict=True) if shape != shapes[0]), None)


def _unfused_sums(program: Program, inputs: Sequence[Sequence[torch.Tensor]]) -> dict[str, tuple[float, float]]:
    """Layer's output → the least and the largest number of its sum before the residual is added."""
    # Behind another name, for which the program has no codes, the sum stays float32.
    bare = {
        node.output: replace(node, output=node.output + SUM, args=(node.args[0], None), epilogue=None)
        for node in split_layers(program)
    }
    ranges: dict[str, tuple[float, float]] = {}

    def see(node: Node, held: Mapping[str, Any]) -> None:
        if node.output in bare:
            r = run_node(program, bare[node.output], held)
            low, high = ranges.get(node.output, (0.0, 0.0))
            ranges[node.output] = min(low, float(r.min())), max(high, float(r.max()))

    for each in inputs:
        Specification(program)(each, see)
    return ranges


def _made_up(program: Program) -> list[torch.Tensor]:
    """Inputs of legal sizes: normal numbers, and ones where whole numbers are asked for."""
    generator = torch.Generator().manual_seed(0)
    names = {size for item in program.inputs for size in item.shape if isinstance(size, str)}
    for size in _SIZES:
        sizes = {name: size for name in names} | {BATCH: 2}
        if all(limit.holds(sizes) for limit in program.limits):
            return [_tensor(item, sizes, generator) for item in program.inputs]
    raise DataError("ONNX: the model takes certain sizes only; give batches=[…] with an input that it takes")


def _tensor(item: Input, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [sizes[BATCH] if s is None else sizes[s] if isinstance(s, str) else s for s in item.shape]
    dtype = getattr(torch, item.dtype)
    return (
        torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
    )


def _leaves(output: Any, place: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a result by their places: "last_hidden_state", "0", "output"."""
    if isinstance(output, torch.Tensor):
        return {place or "output": output}
    entries: Any = {}
    if isinstance(output, Typed):
        keys = [field or str(i) for i, field in enumerate(output.fields)]
        entries = dict(zip(keys, output.values, strict=True))
    elif isinstance(output, Mapping):
        entries = output
    elif isinstance(output, (list, tuple)):
        entries = dict(enumerate(output))
    found: dict[str, torch.Tensor] = {}
    for key, value in entries.items():
        found |= _leaves(value, f"{place}.{key}" if place else str(key))
    return found


def _outputs(w: Writer, found: Mapping[str, torch.Tensor]) -> list[str]:
    """Name every tensor of the result; gives the names in order."""
    taken = {item.keyword or item.name for item in w.program.inputs} | {o for node in w.nodes for o in node.output}
    names = []
    sources = _leaves_of_program(w.program.output)
    for place, source in zip(found, sources, strict=True):
        name = place if place not in taken else f"output.{place}"
        taken.add(name)
        w.add("Identity", [w.of(source)], name)
        names.append(name)
    return names


def _leaves_of_program(output: Any) -> list[Ref | TensorRef]:
    if isinstance(output, (Ref, TensorRef)):
        return [output]
    items: Any = output.values if isinstance(output, Typed) else output
    items = items.values() if isinstance(items, Mapping) else items if isinstance(items, (list, tuple)) else ()
    return [leaf for item in items for leaf in _leaves_of_program(item)]


def _save(w: Writer, path: Path, outputs: Sequence[str]) -> None:
    onnx, program = w.onnx, w.program
    values = []
    for item in program.inputs:
        shape = [BATCH if size is None else size for size in item.shape]
        kind = w.onnx_type(getattr(torch, item.dtype))
        values.append(onnx.helper.make_tensor_value_info(item.keyword or item.name, kind, shape))
    results = []
    for name, source in zip(outputs, _leaves_of_program(program.output), strict=True):
        tensor = w.value(source)
        results.append(onnx.helper.make_tensor_value_info(name, w.onnx_type(tensor.dtype), _shape(w, tensor)))
    graph = onnx.helper.make_graph(w.nodes, "quantflow", values, results, list(w.initializers.values()))
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="quantflow", ir_version=IR_VERSION
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _bytes(w) > LARGEST_FILE:
            data = path.with_name(path.name + ".data")
            data.unlink(missing_ok=True)
            onnx.save_model(model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)
        else:
            onnx.save_model(model, str(path))
        onnx.checker.check_model(str(path), full_check=True)
    except OSError as error:
        raise UsageError(f"ONNX: '{path}' can't be written ({error.strerror}); name another file") from error


def _bytes(w: Writer) -> int:
    return sum(len(x.raw_data) for x in w.initializers.values())


def _shape(w: Writer, result: torch.Tensor) -> list[int | str | None]:
    """A result's sizes: those that follow from a size that varies are left open."""
    inputs = w.program.inputs
    if any(isinstance(size, str) for item in inputs for size in item.shape):
        return [None] * result.dim()
    samples = [w.seen[item.name].shape[0] for item in inputs if item.shape and item.shape[0] is None]
    return [BATCH if dim == 0 and size in samples else size for dim, size in enumerate(result.shape)]


def _counted(w: Writer) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in w.nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
