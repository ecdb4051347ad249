"""Which layers cost accuracy: what each adds by itself, and how the worst ones' values lie under their codes.

An error measured at a layer's output holds the errors of all layers before it. Here each int8 layer is given float's
own values instead, so that what is left is its own: the rounding and clipping of its inputs, weights and output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from quantflow.ir.graph import Graph, is_aten
from quantflow.ir.ops import COMPUTING_OPS, LINEAR_OPS
from quantflow.ir.program import Node
from quantflow.numerics.affine import WEIGHT_RANGE, QParams, quantize
from quantflow.stages.compile import Compiled
from quantflow.stages.evaluate import ErrorSum

#: Ranges whose bins float32 tells apart.
PLAIN_RANGES = 1e-30, 1e38
#: Histograms are kept of the inputs, weights and outputs of this many layers.
WORST_LAYERS = 6
BINS = 64


def own_errors(
    graph: Graph,
    compiled: Compiled,
    floats: Mapping[str, Any],
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[dict[str, ErrorSum], list[dict[str, Any]]]:
    """Each int8 layer's own error, and histograms of the worst layers.

    Args:
        graph: the float model that `compiled` was made from.
        floats: node name → its value where the float model computes a batch.
        progress: called with (nodes done, nodes) after each node.

    Returns:
        layer → the error of its output when it reads float's values;
        [{"name", "input", "weight", "output"}], the worst first; each a `histogram`, where the layer has one.
    """
    program, frees = compiled.program, compiled.program.last_uses()
    errors: dict[str, ErrorSum] = {}
    held: dict[str, Any] = {}  # as int8 layers read them

    def read(name: str) -> Any:
        if name not in held:
            held[name] = _held(floats[float_source(name)], compiled.coding(name))
            if graph.place.type not in compiled.runner.takes and isinstance(held[name], torch.Tensor):
                held[name] = held[name].cpu()
        return held[name]

    with torch.inference_mode():
        for index, node in enumerate(program.nodes):
            if node.op in COMPUTING_OPS and all(float_source(name) in floats for name in (*node.refs(), node.output)):
                found = compiled.runner.run_node(index, {name: read(name) for name in node.refs()})
                expected = floats[node.output]
                if isinstance(expected, torch.Tensor) and expected.shape == found.shape:
                    errors.setdefault(node.name, ErrorSum()).add(expected, found, compiled.coding(node.output))
            for dead in frees.get(index, ()):
                held.pop(dead, None)
            if progress is not None:
                progress(index + 1, len(program.nodes))
    worst = sorted(errors, key=lambda name: errors[name].sqnr_db)[:WORST_LAYERS]
    nodes = {node.name: node for node in program.nodes if node.op in COMPUTING_OPS}
    return errors, [_histograms(graph, compiled, nodes[name], floats) for name in worst]


def histogram(x: torch.Tensor, clips: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """How values lie, and where codes end.

    Args:
        x: floating point, any shape, not empty; what is not finite is left out.
        clips: (lowest, highest) value that has a code of its own; one pair per channel where channels differ.

    Returns:
        low, high: the values' range; counts: values per bin, `BINS` bins of one width over that range;
        clip: the widest of the clips; clip_narrowest: the narrowest one, where there are several;
        clipped: share of the values beyond `clip`.
    """
    x = x.detach().flatten().to(torch.float32)
    low, high = _extremes(x)
    if not math.isfinite(high - low):
        x = x[x.isfinite()]
        low, high = _extremes(x)
    counts = _counts(x, low, high)
    ordered = sorted(clips, key=lambda clip: clip[1] - clip[0])
    narrowest, widest = ordered[0], ordered[-1]
    beyond = int(torch.count_nonzero(x < widest[0])) if low < widest[0] else 0
    beyond += int(torch.count_nonzero(x > widest[1])) if high > widest[1] else 0
    found = {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "clip": list(widest),
        "clipped": beyond / x.numel() if x.numel() else 0.0,
    }
    return found | ({"clip_narrowest": list(narrowest)} if len(ordered) > 1 else {})


def _counts(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Values per bin; torch.histc takes three times as long."""
    if high == low:
        counts = torch.zeros(BINS, dtype=torch.int64)
        counts[BINS // 2] = x.numel()
        return counts
    x = x if PLAIN_RANGES[0] < high - low < PLAIN_RANGES[1] else x.double()
    bins = torch.sub(x, low).mul_(BINS / (high - low)).clamp_(0, BINS - 1).to(torch.uint8)
    return torch.bincount(bins, minlength=BINS)


def _extremes(x: torch.Tensor) -> tuple[float, float]:
    if not x.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(x)
    return low.item(), high.item()


def float_source(value: str) -> str:
    """The graph's value behind a program's one: convert adds these endings where it changes how a value is held."""
    return value.removesuffix(".codes").removesuffix(".float")


def _held(x: Any, qparams: QParams | None) -> Any:
    return quantize(x, qparams) if qparams is not None and isinstance(x, torch.Tensor) else x


def _histograms(graph: Graph, compiled: Compiled, node: Node, floats: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": node.name}
    for part, value in (("input", next(node.refs())), ("output", node.output)):
        qparams, x = compiled.coding(value), floats[float_source(value)]
        if qparams is not None and x.numel():
            shown[part] = histogram(x, [_clip(qparams)])
    weight = _float_weight(graph, node.name)
    if node.op in LINEAR_OPS and weight is not None:
        scale = compiled.program.tensors[node.attrs["weight_scale"]]
        shown["weight"] = histogram(weight, [(s * WEIGHT_RANGE[0], s * WEIGHT_RANGE[1]) for s in scale.tolist()])
    return shown


def _clip(qparams: QParams) -> tuple[float, float]:
    """The values of the lowest and the highest code."""
    low, high = ((q - qparams.zero_point) * qparams.scale for q in qparams.range)
    return low, high


def _float_weight(graph: Graph, layer: str) -> torch.Tensor | None:
    for node in graph.fx.nodes:
        if node.meta.get("layer") == layer and is_aten(node, "conv1d", "conv2d", "conv3d", "linear"):
            return graph.constants.get(str(node.args[1].target))
    return None
