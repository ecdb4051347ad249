"""What the algorithms of a run have finished, kept in its work folder: after a kill none of them starts over.

    ALGORITHM-DIGEST.json           what it did, as the results say it
    ALGORITHM-DIGEST.safetensors    the tensors that it changed

The digest says what an algorithm worked on: the product before it, the data, and the settings of all those since the
first. Equal digests, equal products.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save

from quantflow.algorithms import Applied, Keep, afresh
from quantflow.algorithms.smooth import multiply_input
from quantflow.ir.graph import Graph, copied, is_aten
from quantflow.numerics.affine import QParams
from quantflow.schema import Algorithm
from quantflow.stages.prepare import Prepared
from quantflow.stages.refined import LayerNumbers, Refined
from quantflow.store.run_folder import Work

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]
#: (product before, product after) → (JSON, tensors); None: it can't be kept.
Pack = Callable[[T, T], tuple[Any, Tensors] | None]
#: (product before, JSON, tensors) → product after.
Unpack = Callable[[T, Any, Tensors], T]

_APPLIED = TypeAdapter(Applied)


class KeptAlgorithms:
    """Where a run keeps them.

    Args:
        work: its folder; None keeps nothing.
        inputs: what all algorithms depend on besides the work folder's key and the product before the first.
        writes: whether finished ones are added.
    """

    def __init__(self, work: Work | None, inputs: str = "", *, writes: bool = True) -> None:
        self._work = work
        self._inputs = inputs
        self._writes = writes

    def graphs(self) -> Keep[Graph]:
        """For one `rewrite`."""
        if self._work is None:
            return afresh
        return _Kept(
            self._work, self._writes, lambda graph: f"{self._inputs} {graph.digest}", _pack_graph, _unpack_graph
        )

    def numbers(self, prepared: Prepared) -> Keep[Refined]:
        """For one `refine`."""
        if self._work is None:
            return afresh

        def digest(refined: Refined) -> str:
            plan = json.dumps(prepared.plan.to_json(), sort_keys=True)
            return f"{self._inputs} {prepared.graph.digest} {plan} {_digest(refined)}"

        return _Kept(self._work, self._writes, digest, _pack_numbers, _unpack_numbers)


NOTHING_KEPT = KeptAlgorithms(None)


@dataclass
class _Kept(Generic[T]):
    """One list of algorithms, in its order. `key` describes the product before the first; it grows with each."""

    work: Work
    writes: bool
    first_key: Callable[[T], str]
    pack: Pack[T]
    unpack: Unpack[T]
    key: str = ""

    def __call__(self, settings: Algorithm, before: T, carry_out: Callable[[], tuple[T, Applied]]) -> tuple[T, Applied]:
        self.key = _sha256(f"{self.key or self.first_key(before)} {settings.model_dump_json()}".encode())
        name = f"{settings.name}-{self.key[:12]}"
        if (found := self.work.get_tensors(name, self.key)) is not None:
            content, tensors = found
            applied = _APPLIED.validate_python({**content["applied"], "settings": settings})
            return self.unpack(before, content["product"], load(tensors)), applied
        after, applied = carry_out()
        packed = self.pack(before, after) if self.writes else None
        if packed is not None:
            product, changed = packed
            done = {key: value for key, value in asdict(applied).items() if key != "settings"}
            content = {"applied": done, "product": product}
            own = {key: tensor.detach().contiguous().clone() for key, tensor in changed.items()}
            self.work.put(name, self.key, content, save(own))
        return after, applied


def _pack_graph(before: Graph, after: Graph) -> tuple[Any, Tensors] | None:
    """Constants that differ, and the inputs that SmoothQuant multiplies at run time. Other ops are not kept."""
    known = {node.name for node in before.fx.nodes}
    product = [
        {
            "input": node.args[0].name,
            "factors": str(node.args[1].target),
            "readers": [reader.name for reader in node.users],
        }
        for node in after.fx.nodes
        if node.name not in known and is_aten(node, "mul") and node.args[1].op == "get_attr"
    ]
    tensors = {name: t for name, t in after.constants.items() if t is not before.constants.get(name)}
    return (product, tensors) if str(_unpack_graph(before, product, tensors)) == str(after) else None


def _unpack_graph(before: Graph, product: Any, tensors: Tensors) -> Graph:
    inserted = {row["factors"] for row in product}
    constants = {**before.constants, **{name: t for name, t in tensors.items() if name not in inserted}}
    graph = replace(before, fx=copied(before.fx), constants=constants)
    nodes = {node.name: node for node in graph.fx.nodes}
    for row in product:
        readers = [nodes[name] for name in row["readers"]]
        multiply_input(graph, nodes[row["input"]], readers, tensors[row["factors"]])
    return graph


def _pack_numbers(before: Refined, after: Refined) -> tuple[dict[str, Any], Tensors]:
    """Every range, and the layers that differ, their tensors by LAYER.FIELD."""
    changed = {name: numbers for name, numbers in after.layers.items() if numbers is not before.layers.get(name)}
    tensors = {
        f"{name}.{field}": tensor
        for name, numbers in changed.items()
        for field, tensor in vars(numbers).items()
        if tensor is not None
    }
    return {"qparams": {root: asdict(q) for root, q in after.qparams.items()}, "layers": list(changed)}, tensors


def _unpack_numbers(before: Refined, product: Any, tensors: Tensors) -> Refined:
    layers = {
        name: LayerNumbers(tensors[f"{name}.codes"], tensors[f"{name}.scale"], tensors.get(f"{name}.bias"))
        for name in product["layers"]
    }
    qparams = {root: QParams(**q) for root, q in product["qparams"].items()}
    return Refined(qparams, {**before.layers, **layers})


def _digest(refined: Refined) -> str:
    """sha256 of every number."""
    nothing = Refined({}, {})
    product, tensors = _pack_numbers(nothing, refined)
    own = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    return _sha256(json.dumps(product, sort_keys=True).encode() + save(own))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
