"""Embedding tables in int8: a quarter of the bytes, dequantized row by row as they are looked up.

    W[i]  →  float(Q[i]) s[i],   s = max|W| / 127 and Q = round(W / s) per row

The ops are ATen's own, so that every runtime has them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from quantflow.ir.graph import Graph, copied, is_aten
from quantflow.ir.passes.normalize import add_constant
from quantflow.numerics.affine import quantize_weight, weight_scale

aten = torch.ops.aten


def int8_embeddings(graph: Graph) -> Graph:
    """Put every float32 table that only embeddings read into int8; a note says how many, and which are left."""
    found = replace(graph, fx=copied(graph.fx), constants=dict(graph.constants))
    constants = found.constants
    assert isinstance(constants, dict)
    done, left = 0, []
    for table in [node for node in found.fx.nodes if node.op == "get_attr"]:
        lookups = [user for user in table.users if is_aten(user, "embedding") and user.args[0] is table]
        weight = constants[str(table.target)]
        if not lookups or weight.dtype is not torch.float32 or not bool(weight.isfinite().all()):
            continue
        if len(lookups) < len(table.users):
            left.append(str(table.target))
            continue
        scale = weight_scale(weight.abs().amax(1))
        halves = {"int8": quantize_weight(weight, scale, 0), "scale": scale.reshape(-1, 1)}
        tables = [
            add_constant(found.fx, constants, table, f"{table.target}.{half}", value) for half, value in halves.items()
        ]
        for half in tables:
            half.meta["layer"] = half.target
        for lookup in lookups:
            _look_up_codes(found.fx, lookup, tables)
        found.fx.erase_node(table)
        del constants[str(table.target)]
        done += 1
    notes = [f"policy.embedding: embedding tables in int8, one scale per row: {done}"]
    if left:
        notes.append(f"policy.embedding: other ops than embeddings read {', '.join(left)}, left in float")
    return found.with_notes(*notes)


def _look_up_codes(graph: fx.Graph, lookup: fx.Node, tables: list[fx.Node]) -> None:
    """Replace a lookup by one in each of (codes, scales) and their product."""
    index, shape, layer = lookup.args[1], lookup.meta["shape"], lookup.meta["layer"]
    with graph.inserting_before(lookup):
        rows, steps = (graph.call_function(aten.embedding.default, (table, index)) for table in tables)
        values = graph.call_function(aten._to_copy.default, (rows,), {"dtype": torch.float32})
        product = graph.call_function(aten.mul.Tensor, (values, steps))
    rows.meta = {**lookup.meta, "dtype": torch.int8}
    steps.meta = {**lookup.meta, "shape": (*shape[:-1], 1), "layer": f"{layer}.scale", "is_scale": True}
    values.meta = {**lookup.meta, "layer": f"{layer}.float"}
    product.meta = {**lookup.meta, "layer": f"{layer}.dequantize"}
    lookup.replace_all_uses_with(product)
    graph.erase_node(lookup)
