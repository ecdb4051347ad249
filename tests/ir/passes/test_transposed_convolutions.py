"""Transposed convolutions as ordinary ones: the same numbers, names that stay, and what can't be written so."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, is_aten, op_name
from quantflow.ir.ops import TRANSPOSED
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.passes.transposed_convolutions import transposed_to_convolutions
from quantflow.ir.units import CORE, find_units

MAKE: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Written(nn.Module):
    """A forward written as a function over `up` and the input."""

    def __init__(self, up: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.up, self._forward = up, forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self.up, x)


def written(forward: Callable[..., Any], up: nn.Module | None = None) -> tuple[nn.Module, torch.Tensor, Graph]:
    """(the model, an input, its graph), in float64, with BatchNorm folded and transposed convolutions rewritten."""
    model = Written(up or nn.ConvTranspose2d(4, 6, 3, 2), forward).double().eval()
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    return model, x, transposed_to_convolutions(fold_batch_norms(capture_export(model, Batch((x,)))))


def transposed(graph: Graph) -> int:
    return sum(is_aten(node, *TRANSPOSED) for node in graph.fx.nodes)


def require_equal(model: nn.Module, x: torch.Tensor, graph: Graph) -> None:
    with torch.no_grad():
        expected, found = model(x), interpret(graph, [x])
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 if x.dtype is torch.float32 else 1e-12)


def described(graph: Graph, x: torch.Tensor) -> None:
    """Every node's shape and dtype are those of its value; names are unique."""

    def compare(node: Any, value: Any) -> None:
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            assert node.meta["dtype"] is value.dtype
            assert [n for n in node.meta["shape"] if n is not None] == [
                size for size, n in zip(value.shape, node.meta["shape"], strict=True) if n is not None
            ]

    interpret(graph, [x], compare)
    layers = [node.meta["layer"] for node in graph.fx.nodes if node.op == "call_function"]
    assert len(set(layers)) == len(layers)


def geometries(dims: int, wanted: int) -> list[dict[str, Any]]:
    """Drawn: any kernel, stride, padding, output padding, dilation, groups and sizes that torch takes."""
    draw = random.Random(dims)
    found: list[dict[str, Any]] = []
    while len(found) < wanted:
        kernel, stride, dilation, size = (
            [draw.choice(values) for _ in range(dims)]
            for values in ((1, 2, 3, 4, 5), (1, 2, 2, 3, 4), (1, 1, 2, 3), (1, 2, 3, 5, 6))
        )
        padding = [draw.randint(0, 5) for _ in range(dims)]
        more = [draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
        lengths = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(size, stride, padding, dilation, kernel, more, strict=True)
        ]
        if min(lengths) > 0:
            given = {"kernel_size": kernel, "stride": stride, "padding": padding, "output_padding": more}
            found.append(given | {"dilation": dilation, "groups": draw.choice([1, 2, 3]), "size": size})
    return found


def by_hand(layer: nn.Module, shape: Sequence[int]) -> Graph:
    """The layer's graph for any batch and any size."""
    module = torch.fx.Graph()
    x = module.placeholder("x")
    x.meta = {"shape": (None, shape[1], *[None] * (len(shape) - 2)), "dtype": torch.float64, "layer": "x"}
    constants = {name: value.detach() for name, value in layer.named_parameters()}
    used = []
    for name, value in constants.items():
        used.append(module.get_attr(name))
        used[-1].meta = {"shape": tuple(value.shape), "dtype": value.dtype, "layer": name}
    op = (
        torch.ops.aten.conv_transpose1d.default,
        torch.ops.aten.conv_transpose2d.input,
        torch.ops.aten.conv_transpose3d.input,
    )[len(shape) - 3]
    bias = used[1] if len(used) > 1 else None
    geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    node = module.call_function(op, (x, used[0], bias, *map(lambda v: v if isinstance(v, int) else list(v), geometry)))
    outputs = constants["weight"].shape[1] * int(layer.groups)  # type: ignore[arg-type]
    node.meta = {"shape": (None, outputs, *[None] * (len(shape) - 2)), "dtype": torch.float64}
    node.meta |= {"layer": "up", "owner": "up"}
    module.output(node)
    return Graph(module, constants, ())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_any_geometry_gives_the_same_numbers(dims: int) -> None:
    """One graph serves every size: what is cut off does not depend on it."""
    for number, given in enumerate(geometries(dims, 60 if dims < 3 else 30)):
        size = given.pop("size")
        layer = MAKE[dims](2 * given["groups"], 3 * given["groups"], **given, bias=number % 3 > 0).double()
        shape = (2, 2 * given["groups"], *size)
        graph = transposed_to_convolutions(by_hand(layer, shape))
        assert transposed(graph) == 0
        for larger in (0, 3):
            x = torch.randn(*shape[:2], *[n + larger for n in size], dtype=torch.float64)
            require_equal(layer, x, graph)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(4, 6, 4, 2, 1),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, (3, 2), (1, 3), dilation=(2, 1), bias=False),
        nn.ConvTranspose3d(4, 6, 2, 2),
    ],
    ids=["1d", "2d, grouped", "2d, uneven", "3d"],
)
def test_a_captured_layer_keeps_its_name_and_says_its_shapes(layer: nn.Module) -> None:
    x = torch.randn(2, 4, *(5, 7, 3)[: layer.weight.dim() - 2])  # type: ignore[union-attr, operator]
    model = Written(layer, lambda up, x: up(x)).eval()
    before = capture_export(model, Batch((x,)))
    graph = transposed_to_convolutions(before)
    require_equal(model, x, graph)
    described(graph, x)
    (unit,) = (unit for unit in find_units(graph) if unit.kind == CORE)
    assert (unit.name, unit.anchor.meta["owner"], unit.float_reason) == ("up", "up", "")
    assert unit.layer_type == f"conv_transpose{x.dim() - 2}d"
    assert transposed(before) == 1, "the graph that was given is left as it was"
    assert all(name.startswith("up.phases_") for name in graph.constants), "what nothing reads is dropped"


def test_stride_1_moves_no_data() -> None:
    model, x, graph = written(lambda up, x: up(x), nn.ConvTranspose2d(4, 6, 3, 1, 1))
    require_equal(model, x, graph)
    assert [op_name(node) for node in graph.fx.nodes if node.op == "call_function"] == ["conv2d"]


@pytest.mark.parametrize("activation", [F.relu, F.gelu, lambda y: F.leaky_relu(y, 0.2), lambda y: y.clamp(-0.1, 0.4)])
def test_an_activation_goes_in_front_of_the_data_movement(activation: Callable[..., Any]) -> None:
    model, x, graph = written(lambda up, x: activation(up(x)))
    require_equal(model, x, graph)
    described(graph, x)
    (unit,) = (unit for unit in find_units(graph) if unit.kind == CORE)
    assert unit.epilogue is not None


@pytest.mark.parametrize(
    "forward",
    [lambda up, x: (lambda y: F.relu(y) + y)(up(x)), lambda up, x: F.softmax(up(x), 1)],
    ids=["two readers", "no activation of an element"],
)
def test_what_reads_more_than_an_element_stays_behind_it(forward: Callable[..., Any]) -> None:
    model, x, graph = written(forward)
    require_equal(model, x, graph)
    (unit,) = (unit for unit in find_units(graph) if unit.kind == CORE)
    assert unit.epilogue is None


def test_one_layer_called_twice_is_two() -> None:
    model, x, graph = written(lambda up, x: up(F.relu(up(x))), nn.ConvTranspose2d(4, 4, 3, 2, 1))
    require_equal(model, x, graph)
    units = [unit for unit in find_units(graph) if unit.kind == CORE]
    assert [unit.name for unit in units] == ["up", "up_1"]
    assert {unit.anchor.meta["owner"] for unit in units} == {"up"}


def test_a_weight_that_a_convolution_reads_too_stays_for_it() -> None:
    up = nn.ConvTranspose2d(4, 4, 3, padding=1)
    model, x, graph = written(lambda up, x: F.conv2d(up(x), up.weight, padding=1), up)
    require_equal(model, x, graph)
    assert {"up.weight", "up.phases_weight"} <= set(graph.constants)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda up, x: F.conv_transpose2d(x, up.weight * x.mean()), "its weight is computed at run time"),
        (lambda up, x: F.conv_transpose2d(x, up.weight, x.mean((0, 2, 3)).repeat(2)[:6]), "its bias is computed"),
        (lambda up, x: up(x[0]), "its input has no batch dimension"),
    ],
    ids=["weight", "bias", "no batch"],
)
def test_the_others_stay_float_and_count(forward: Callable[..., Any], why: str) -> None:
    model, x, graph = written(forward)
    require_equal(model, x, graph)
    (unit,) = (unit for unit in find_units(graph) if unit.kind == CORE)
    assert why in unit.float_reason


def test_a_graph_without_any_is_the_same_graph() -> None:
    graph = capture_export(nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), Batch((torch.randn(2, 4, 5, 5),)))
    assert transposed_to_convolutions(graph) is graph
