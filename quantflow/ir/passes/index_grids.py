"""Indexing a tensor by its own coordinates is a view of it.

x[i, j] with i = 0 … m-1 and j = 0 … n-1, each in a dimension of its own and in order, is x with dimensions of size 1
in between. Attention masks are read that way, and kernels have no general index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quantflow.ir.graph import arguments, is_aten

aten = torch.ops.aten


def indexes_to_views(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """Write such an `index` as a chain of `unsqueeze`."""
    for node in list(graph.nodes):
        if not is_aten(node, "index"):
            continue
        missing = _missing_dimensions(node, constants)
        if missing is None:
            continue
        view = node.args[0]
        with graph.inserting_before(node):
            for dim in missing:
                view = graph.call_function(aten.unsqueeze.default, (view, dim))
                view.meta = {key: node.meta[key] for key in ("dtype", "layer") if key in node.meta}
        view.meta = dict(node.meta)
        node.replace_all_uses_with(view)
        graph.erase_node(node)


def _missing_dimensions(node: fx.Node, constants: dict[str, torch.Tensor]) -> list[int] | None:
    """The dimensions of the result that x lacks, ascending; None: the index is something else."""
    x, indices = node.args[0], node.args[1]
    shape = x.meta.get("shape") if isinstance(x, fx.Node) else None
    if shape is None or not isinstance(indices, (list, tuple)) or len(indices) != len(shape):
        return None
    shapes = [i.meta.get("shape") if isinstance(i, fx.Node) else None for i in indices]
    if any(s is None for s in shapes):
        return None
    rank = max(len(s) for s in shapes if s is not None)
    places = []
    for dim, (index, index_shape) in enumerate(zip(indices, shapes, strict=True)):
        assert index_shape is not None
        wide = [axis for axis, size in enumerate(index_shape) if size != 1]
        if len(wide) != 1 or not _counts_up(index, x, dim, shape[dim], constants):
            return None
        places.append(rank - len(index_shape) + wide[0])
    if places != sorted(set(places)):
        return None
    return [axis for axis in range(rank) if axis not in places] or None


def _counts_up(index: Any, x: fx.Node, dim: int, size: int | None, constants: dict[str, torch.Tensor]) -> bool:
    """Whether the index holds 0 … (size of x's dimension) - 1."""
    if index.op == "get_attr":
        value = constants[str(index.target)].flatten()
        return size is not None and torch.equal(value, torch.arange(size, dtype=value.dtype))
    while is_aten(index, "unsqueeze"):
        index = index.args[0]
    if not is_aten(index, "arange") or len(index.args) != 1:
        return False
    end = index.args[0]
    if size is not None or not is_aten(end, "sym_size"):
        return size is not None and end == size
    # A size that is not known before the run: it has to be read off the same input.
    while is_aten(x, "_to_copy", "to"):
        x = x.args[0]  # type: ignore[assignment]
    source = arguments(end)
    return x.op == "placeholder" and source["self"] is x and source["dim"] == dim
