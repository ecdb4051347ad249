"""Small models through every stage: the torch runtime agrees with the reference node by node, and as a whole."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from quantflow.capture import capture_export
from quantflow.ir.activations import tie_tolerance
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.passes.transposed_convolutions import transposed_to_convolutions
from quantflow.ir.program import Node, Program
from quantflow.numerics.agreement import disagreement
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.reference import ReferenceRunner, unrounded
from quantflow.runtimes.torch import TorchRunner
from quantflow.schema import PRESETS, QConfig, WeightSpec

Stages = Callable[..., Any]


class ResNet(nn.Module):
    """A block with an identity and one with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.down, self.bn3 = nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24)
        self.conv3, self.bn4 = nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        x = F.relu(self.bn4(self.conv3(x)) + self.bn3(self.down(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SelfSum(nn.Module):
    """conv(x) + x: the kernel must not sum into the tensor it reads, nor into one that a view still shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 8)
        self.pool = nn.MaxPool2d(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = self.b(x) + x
        x = self.c(x) + x
        pooled = self.pool(x)
        x = self.b(x) + pooled
        x = x + self.c(pooled)
        rows = x.flatten(2).transpose(1, 2)
        return self.fc(rows) + rows


class Inception(nn.Module):
    """Branches that share one scale through cat, max pool and average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one, self.three, self.tail = (
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(8, 7, (1, 3), padding=(0, 1)),
            nn.Conv2d(29, 5, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        pooled = F.max_pool2d(x, 3, 1, 1, ceil_mode=True)
        averaged = F.avg_pool2d(x, 3, 1, 1)
        return self.tail(torch.cat([F.relu(self.one(x)), self.three(x), pooled, averaged], 1)).mean((2, 3))


class SqueezeExcite(nn.Module):
    """mobilenet_v3's block: hardswish, a gate by sigmoid, a broadcast product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 5, 1, 2, groups=16)
        self.down, self.up, self.out = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.depthwise(F.relu6(self.conv(x))))
        gate = torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.out(x * gate)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 33), nn.Linear(33, 20), nn.Linear(20, 7)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.b(F.gelu(self.a(x)))
        return self.c(self.norm(F.gelu(x, approximate="tanh")))


class Convolution1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 8, 5, 2, padding=2), nn.Conv1d(8, 8, 3, dilation=2, groups=2, padding=2)
        self.c = nn.ConvTranspose1d(8, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.a(x), 0.1)
        return self.c(F.max_pool1d(torch.tanh(self.b(x)) + x, 2))


class Convolution3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.Conv3d(4, 6, (1, 2, 3), stride=2)
        self.bn = nn.BatchNorm3d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(self.b(F.max_pool3d(F.relu(self.bn(self.a(x))), 2))).mean((2, 3, 4))


class Transposed(nn.Module):
    """Transposed convolutions of every kind: grouped, dilated, uneven, cropped, as the output, added to a residual."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem, self.up, self.norm = conv(3, 8, 3, padding=1), up(8, 8, 4, 2, 1, groups=2, bias=False), norm(8)
        self.same = up(8, 8, 3, 1, 2, dilation=2)
        self.more, self.last = up(8, 4, 3, 2, 1, output_padding=1), up(4, 3, (2, 1, 3)[:dims], (2, 2, 1)[:dims])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.up(F.relu(self.stem(x)))))
        return self.last(F.silu(self.more(self.same(x) + x)))


class Shuffle(nn.Module):
    """shufflenet's split, cat and channel shuffle; pixel shuffle, nearest upsampling and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.b, self.out = nn.Conv2d(16, 16, 1), nn.Conv2d(4, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat((left, F.relu(self.a(right))), 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        x = F.pixel_shuffle(self.b(x), 2)
        x = F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (1, 0, 0, 2))
        return self.out(x)


class NormAfterRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.bn(F.relu(self.a(x))))


class Bare(nn.Module):
    """No BatchNorm, an uneven padding="same", and tensors multiplied with and added to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 4, padding="same", bias=False)
        self.b, self.c = nn.Conv2d(8, 4, (2, 3), padding="same", dilation=(1, 2)), nn.Conv2d(4, 4, 3, padding="valid")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).clamp(-1.0, 0.75)
        x = self.b(x * x + x)
        return self.c(torch.clamp(F.max_pool2d(x + x, 2), -0.5, -0.1))


class Structured(nn.Module):
    """Two inputs, one by keyword, and outputs in a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = F.relu(self.a(x)), self.b(other)
        return {"sum": a + b, "first": a, "input": x}


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, list[torch.Tensor]]]:
        x = self.a(x)
        y = self.b(x)
        return x, (y, [y.flatten(1), x.mean((2, 3))])


class Embedder(nn.Module):
    """Attention over tokens: integer inputs, a mask, softmax and LayerNorm stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens))[:, 0])


class Odd(nn.Module):
    """A forward written as a lambda over a first layer, a second one and the input."""

    def __init__(self, forward: Callable[..., Any], first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self._forward = first, second, forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(self.first, self.second, *inputs)


def _odd(
    forward: Callable[..., Any], wide: int = 8, channels: int = 8, make: type = nn.Conv2d
) -> Callable[[], nn.Module]:
    size = (3, 1, 1) if make is nn.Conv2d else ()
    return lambda: Odd(forward, make(3 if size else 8, channels, *size), make(wide, 4, *size))


#: What the plain models do not have: each once broke, or could break, a stage.
ODD: dict[str, Callable[[], nn.Module]] = {
    "an output that is None": _odd(lambda a, b, x: (b(a(x)), None)),
    "a number among the outputs": _odd(lambda a, b, x: (b(a(x)), 3)),
    "the input and a parameter as outputs": _odd(lambda a, b, x: [x, a.weight, b(a(x))]),
    "one output twice": _odd(lambda a, b, x: (lambda y: (y, y))(b(a(x)))),
    "no value is read as codes": _odd(lambda a, _, x: a(x), channels=4),
    "in-place ops": _odd(lambda a, b, x: (lambda y: b(F.relu_(y.add_(y))))(a(x))),
    "parts read as codes and as floats": _odd(
        lambda a, b, x: (lambda p: b(p[0]) + F.softmax(p[1], 1))(a(x).chunk(2, 1)), wide=4
    ),
    "parts read as floats only": _odd(lambda a, b, x: b(x * (lambda p: p[0].sigmoid() * p[1])(a(x).chunk(2, 1))), 3, 6),
    "values and indices": _odd(lambda a, b, x: (lambda p: (b(p[0]), p[1]))(F.max_pool2d(a(x), 2, return_indices=True))),
    "a clamp to negative numbers": _odd(lambda a, b, x: b(F.hardtanh(F.relu(a(x)) + F.relu(a(-x)), -2.0, -1.0))),
    "a pad with a number": _odd(lambda a, b, x: b(F.pad(F.relu(a(x)), (1, 0, 1, 2), value=-2.5))),
    "a pad with -inf": _odd(lambda a, b, x: b(F.max_pool2d(F.pad(a(x), (1, 1, 1, 1), value=float("-inf")), 3))),
    "float16 in between": _odd(lambda a, b, x: b(a(x).half().float())),
    "cat with integers": _odd(lambda a, b, x: b(torch.cat([a(x), (x > 0).long()], 1)), wide=11),
    "constants made at run time": _odd(
        lambda a, b, x: b(torch.cat([a(x), x.new_ones(x.shape[0], 1, 8, 8)], 1)), wide=9
    ),
    "a size of codes": _odd(
        lambda a, b, x: (lambda y: b(y.reshape(y.shape[0] * 2, -1, 8, 8)) / y.numel())(a(x)), wide=4
    ),
    "a broadcast residual": _odd(lambda a, b, x: b(a(x) + a(x).mean((2, 3), keepdim=True)) + b(a(x)[:1])),
    "a weight cut from a parameter": _odd(lambda a, b, x: b(F.conv2d(x, a.weight.split(4)[1], a.bias[4:])), wide=4),
}


def _image(size: int = 16) -> Batch:
    return Batch((torch.randn(3, 3, size, size),))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "resnet": (ResNet, lambda: _image(32)),
    "self sum": (SelfSum, _image),
    "inception": (Inception, _image),
    "squeeze excite": (SqueezeExcite, _image),
    "perceptron": (Perceptron, lambda: Batch((torch.randn(3, 20),))),
    "perceptron of rows": (Perceptron, lambda: Batch((torch.randn(3, 5, 20),))),
    "conv1d": (Convolution1d, lambda: Batch((torch.randn(3, 4, 33),))),
    "conv3d": (Convolution3d, lambda: Batch((torch.randn(3, 2, 6, 8, 10),))),
    "transposed 1d": (lambda: Transposed(1), lambda: Batch((torch.randn(3, 3, 17),))),
    "transposed 2d": (lambda: Transposed(2), lambda: Batch((torch.randn(3, 3, 5, 8),))),
    "transposed 3d": (lambda: Transposed(3), lambda: Batch((torch.randn(3, 3, 3, 2, 5),))),
    "shuffle": (Shuffle, lambda: _image(8)),
    "norm after relu": (NormAfterRelu, _image),
    "bare": (Bare, _image),
    "structured": (Structured, lambda: Batch((torch.randn(3, 6),), {"other": torch.randn(3, 5)})),
    "tuples": (Tuples, _image),
    "embedder": (Embedder, lambda: Batch((torch.randint(0, 50, (3, 7)),))),
}


#: torch says that an uneven padding="same" costs a copy; capture makes that copy a pad of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@functools.cache
def made(name: str) -> tuple[nn.Module, Batch, Graph]:
    """The model with BatchNorm statistics that are not 0 and 1, a batch of three, and the captured graph."""
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    example = batch()
    return model, example, transposed_to_convolutions(fold_batch_norms(capture_export(model, example)))


def require_agreement(program: Program, inputs: list[torch.Tensor]) -> None:
    """Every node of the torch runtime, fed with the reference's values, follows the rule; so does the whole model."""
    runner = TorchRunner(program)
    position = 0

    def compare(node: Node, values: Mapping[str, Any]) -> None:
        nonlocal position
        index, position = position, position + 1
        expected, actual = values[node.output], runner.run_node(index, values)
        assert type(expected) is type(actual)
        if not isinstance(expected, torch.Tensor):
            return
        if node.output not in program.values:
            assert torch.allclose(expected, actual, rtol=1e-5, atol=1e-5), node
            return
        tolerance = tie_tolerance(node.epilogue)
        illegal, worst = disagreement(expected, actual, unrounded(program, node, values), tolerance)
        assert not illegal, f"{node.name} ({node.fused_name}): {illegal} codes, up to {worst} from a tie"

    reference = ReferenceRunner(program)(inputs, compare)
    assert position == len(program.nodes)
    whole = runner(inputs)
    expected, structure = pytree.tree_flatten(reference)
    actual, same = pytree.tree_flatten(whole)
    assert structure == same
    for a, b in zip(expected, actual, strict=True):
        assert a == b if not isinstance(a, torch.Tensor) else sqnr_db(a, b) >= 40


QCONFIGS = PRESETS | {
    f"{preset}, all in two terms": PRESETS[preset].model_copy(
        update={"input_terms": 2, "weight": WeightSpec(terms=2)},
    )
    for preset in ("sym_int8", "affine_uint8")
}


@pytest.mark.parametrize("preset", QCONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_both_runtimes_agree(name: str, preset: str, stages: Stages) -> None:
    _, batch, graph = made(name)
    program = stages(graph, batch, QCONFIGS[preset]).program
    again = Program.from_json(json.loads(json.dumps(program.to_json())), program.tensors)
    assert again == program
    sizes = (3, 1) if preset in ("sym_int8", "affine_uint8") else (3,)
    for size in sizes:
        part = batch.head(size)
        require_agreement(again, bind(again, part.args, part.kwargs))


def distances(name: str, qconfig: QConfig, stages: Stages) -> list[float]:
    """SQNR of each output against float, dB."""
    model, batch, graph = made(name)
    program = stages(graph, batch, qconfig).program
    with torch.inference_mode():
        float_output = pytree.tree_leaves(model(*batch.args, **batch.kwargs))
    int8_output = pytree.tree_leaves(ReferenceRunner(program)(bind(program, batch.args, batch.kwargs)))
    assert program.int8_nodes()
    return [sqnr_db(a, b) for a, b in zip(float_output, int8_output, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_close_to_the_float_model(name: str, stages: Stages) -> None:
    assert min(distances(name, PRESETS["affine_uint8"], stages)) > 15


@pytest.mark.parametrize("name", MODELS)
def test_two_terms_bring_every_model_closer_to_float(name: str, stages: Stages) -> None:
    plain, exact = (
        min(distances(name, QCONFIGS[q], stages)) for q in ("affine_uint8", "affine_uint8, all in two terms")
    )
    assert exact > plain + 1  # where little but residuals rounds


@pytest.mark.parametrize("preset", ["sym_int8", "sym_int8, all in two terms"])
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str, preset: str, stages: Stages) -> None:
    torch.manual_seed(0)
    batch = _image(8)
    program = stages(ODD[name](), batch, QCONFIGS[preset]).program
    assert program.int8_nodes()
    require_agreement(Program.from_json(json.loads(json.dumps(program.to_json())), program.tensors), list(batch.args))


def test_running_twice_gives_the_same_bits(stages: Stages) -> None:
    """Sums in place must not reach a tensor that the next call reads."""
    _, batch, graph = made("self sum")
    runner = TorchRunner(stages(graph, batch).program)
    first = runner(batch.args)
    assert torch.equal(first, runner(batch.args))
    assert torch.equal(first[:1], runner((batch.args[0][:1],)))
