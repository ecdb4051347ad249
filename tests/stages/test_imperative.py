"""Imperative mode computes what the module computes, whatever its code does, unit by unit of the same program."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_models import Own
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import quantflow as qf
from quantflow.errors import UsageError
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import native_library
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.imperative.tensors import Coded, Weight

native_only = pytest.mark.skipif(
    native_library.library_path("libquantflow_native.so") is None, reason="the native library was not built here"
)
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def quantized(module: nn.Module, x: Any, **settings: Any) -> Any:
    return qf.quantize(module.eval(), [x], mode="imperative", device="cpu", **settings)


def holds(module: nn.Module, x: Any, least_db: float = 25.0, int8: int | None = None, **settings: Any) -> Any:
    """The model, whose output is near float's, and that of the program which an artifact would hold."""
    model = quantized(module, x, **settings)
    args = x if isinstance(x, tuple) else (x,)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted, found, program = module(*args), model(*args), model.compiled(*args)
    assert type(found) is torch.Tensor
    assert found.shape == wanted.shape
    assert sqnr_db(wanted, found) >= least_db
    assert sqnr_db(program, found) >= 35
    if int8 is not None:
        assert model.results["int8_proof"]["int8_layers_run"] == int8
    return model


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3 + x


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5


class TransposedWeight(nn.Module):
    """As transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 5) / 3), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 5)


class PaddedSame(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def in_place(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    y += x
    y.mul_(2).clamp_(min=-1)
    return s.b(y)


def a_view_is_changed(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.b(s.a(x).relu())
    part = y.view(-1, 4)[:, 1:]
    part += 10
    return y * 2


def codes_whose_view_is_changed(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x).relu()
    z = s.b(y)
    y.view(2, -1).zero_()
    return z + y


def an_input_is_changed_behind_a_layer(s: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    y = s.a(x)
    x.zero_()
    return s.b(torch.relu(y)) + x


def scaled_and_added(s: Any, x: torch.Tensor) -> torch.Tensor:
    """As ConvNeXt's blocks: the sum is written where a float product was."""
    y = 0.5 * s.a(x)
    y += x
    return y


def read_in_between(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    if float(y.abs().max()) > 1e9:  # a debugger, a print
        raise ValueError
    return s.b(F.relu(y))


LINEARS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a subclass with its own forward": (lambda: nn.Sequential(Scaled(8, 8), nn.ReLU(), nn.Linear(8, 4)), 2),
    "an adapter": (lambda: nn.Sequential(Adapter(), nn.ReLU(), nn.Linear(8, 4)), 4),
    "a weight held transposed": (lambda: nn.Sequential(nn.Linear(8, 8), TransposedWeight()), 2),
    "functions on weights": (
        lambda: Own(lambda s, x: F.linear(F.linear(x, s.a.weight).relu(), s.b.weight, s.b.bias)), 2,
    ),
    "a matmul with a weight": (lambda: Own(lambda s, x: s.b(x @ s.a.weight.t()) + s.a(x)), 2),
    "a layer that is called twice": (lambda: Own(lambda s, x: s.a(5 * s.a(x).tanh())), 2),
    "layers of a list": (
        lambda: Own(lambda s, x: sum(f(x) for f in s.fs), fs=nn.ModuleList(nn.Linear(8, 8) for _ in range(3))), 3,
    ),
    "weights of a list": (
        lambda: Own(
            lambda s, x: F.linear(F.linear(x, s.ws[0]), s.ws[1]),
            ws=nn.ParameterList(torch.randn(8, 8) for _ in range(2)),
        ), 2,
    ),
    "attributes that are read": (
        lambda: Own(lambda s, x: s.b(s.a(x.to(s.a.weight.dtype).to(s.a.weight.device))) * s.a.weight.shape[0]), 2,
    ),
    "changes in place": (lambda: Own(in_place), 2),
    "a change of a view": (lambda: Own(a_view_is_changed), 2),
    "a change of a view of codes": (lambda: Own(codes_whose_view_is_changed), 2),
    "an input that is changed": (lambda: Own(an_input_is_changed_behind_a_layer), 2),
    "a value that is read in between": (lambda: Own(read_in_between), 2),
    "an activation in place": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)), 2),
    "gelu": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), 2),
    "a batch norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), 2),
    "a dropout": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 4)), 2),
    "one layer alone": (lambda: nn.Linear(8, 4), 1),
    "a residual of float": (lambda: Own(lambda s, x: s.b((s.a(x) + x).relu())), 2),
    "a join": (lambda: Own(lambda s, x: s.b(torch.cat([s.a(x)[:, :4].relu(), s.a(x)[:, 4:].relu()], 1))), 3),
    "sums in place of what stays float": (
        lambda: Own(lambda s, x: s.b(scaled_and_added(s, scaled_and_added(s, s.a(x))))), 4,
    ),
    "a product": (lambda: Own(lambda s, x: s.b(s.a(x).relu() * s.b(x).sigmoid())), 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINEARS)
def test_it_computes_what_the_module_computes(kind: str) -> None:
    torch.manual_seed(0)
    make, int8 = LINEARS[kind]
    holds(make(), X, int8=int8)


def convolutions(*between: nn.Module, **settings: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, **settings), *between, nn.Conv2d(8, 4, 3, stride=2))


class Residual(nn.Module):
    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=in_place)
        )
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.shortcut = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.relu, self.last, self.in_place = nn.ReLU(inplace=in_place), nn.Linear(8, 5), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.second(self.relu(self.first(x))))
        if self.in_place:
            y += self.shortcut(x)
        else:
            y = y + self.shortcut(x)
        y = F.max_pool2d(self.relu(y), 2)
        return self.last(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def settled(module: nn.Module) -> nn.Module:
    """With statistics of its own in every BatchNorm."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            with torch.no_grad():
                child.running_mean.uniform_(-0.3, 0.3)
                child.running_var.uniform_(0.5, 2)
                child.weight.uniform_(0.5, 1.5)
    return module


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "circular padding": (lambda: convolutions(nn.ReLU(), padding_mode="circular"), 2),
    "padding as needed": (lambda: nn.Sequential(PaddedSame(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 3)), 2),
    "the same size": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 4, 3, padding="valid")), 2,
    ),
    "a batch norm": (lambda: settled(convolutions(nn.BatchNorm2d(8), nn.ReLU())), 2),
    "a batch norm alone": (lambda: settled(convolutions(nn.BatchNorm2d(8))), 2),
    "a group norm": (lambda: convolutions(nn.GroupNorm(2, 8), nn.ReLU()), 2),
    "pools": (lambda: convolutions(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1)), 2),
    "a residual": (lambda: settled(Residual()), 5),
    "a residual in place": (lambda: settled(Residual(in_place=True)), 5),
    "transposed": (
        lambda: settled(
            nn.Sequential(nn.ConvTranspose2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))
        ), 2,
    ),
    "channels moved": (lambda: convolutions(nn.ReLU(), nn.ChannelShuffle(2)), 2),
    "a flat end": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 4)), 2),
    "in three dimensions": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, (1, 3, 3)), nn.ReLU(), nn.Conv3d(4, 2, 2)), 2,
    ),
    "in one dimension": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1)), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("runtime", ["native", "torch", "reference"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str, runtime: str) -> None:
    torch.manual_seed(0)
    make, int8 = CONVOLUTIONS[kind]
    holds(make(), IMAGE, int8=int8, runtime=runtime)


def test_attention_and_encoder_layers_are_reached() -> None:
    torch.manual_seed(0)
    model = holds(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), SEQUENCE)
    assert model.results["int8_proof"]["coverage"] == 1.0
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    holds(Own(lambda s, x, mask: s.f1(x, x, x, attn_mask=mask)[0], f1=attention), (SEQUENCE, mask), int8=2)


def test_weights_that_are_computed_stay_float_by_name() -> None:
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    model = holds(Own(lambda s, x: s.b(s.norm(x).relu()), norm=layer), X)
    (left,) = model.results["int8_proof"]["float_layers"]
    assert left["name"].startswith("norm")
    assert "does not call it in a way" in left["reason"]


def test_hooks_are_part_of_what_is_computed() -> None:
    torch.manual_seed(0)
    module = settled(convolutions(nn.BatchNorm2d(8), nn.ReLU()))
    module[0].register_forward_hook(lambda _, __, y: y * 2)
    module[1].register_forward_hook(lambda _, __, y: y + 1)
    module[3].register_forward_pre_hook(lambda _, x: (x[0] * 3,))
    holds(module, IMAGE)


def test_hooks_on_every_module_see_the_calls_of_float_in_their_order() -> None:
    torch.manual_seed(0)
    module = settled(Residual(in_place=True)).eval()
    model = quantized(module, IMAGE)

    def walked(root: nn.Module, call: Callable[[torch.Tensor], Any]) -> list[tuple[str, tuple[int, ...], float]]:
        seen: list[tuple[str, tuple[int, ...], float]] = []
        handles = [
            child.register_forward_hook(
                lambda _, __, y, name=name: seen.append((name, tuple(y.shape), float(y.detach().double().mean())))
            )
            for name, child in root.named_modules()
        ]
        with torch.no_grad():
            call(IMAGE)
        for handle in handles:
            handle.remove()
        return seen

    plain, wanted = model(IMAGE), walked(module, module)
    found = walked(model.module, model)
    assert [each[:2] for each in found] == [each[:2] for each in wanted]
    assert all(abs(a[2] - b[2]) < 0.05 for a, b in zip(found, wanted, strict=True))
    assert torch.equal(model(IMAGE), plain)


def test_watching_changes_nothing() -> None:
    torch.manual_seed(0)
    module = settled(Residual()).eval()
    model = quantized(module, IMAGE)
    plain = model(IMAGE)
    watched = []
    for child in model.module.modules():
        child.register_forward_hook(lambda _, __, y: watched.append(y.sum().item()))
    assert torch.equal(model(IMAGE), plain)
    assert len(watched) > 10


class Block(nn.Sequential):
    """A Sequential of the user's, as torchvision's Conv2dNormActivation."""


def in_a_row() -> nn.Sequential:
    return nn.Sequential(
        Block(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 1), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(8 * 64, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_sequential_in_fewer_calls_computes_the_same() -> None:
    torch.manual_seed(0)
    module = settled(in_a_row()).eval()
    model = holds(module, IMAGE, least_db=20, int8=6)
    assert str(type(model.module[0])) == str(Block)
    assert isinstance(model.module[0], Block)
    plain, called = model(IMAGE), []
    for other in (copy.deepcopy(model), qf.quantize(module, [IMAGE], mode="imperative", device="cpu", inplace=True)):
        assert torch.equal(other(IMAGE), plain)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        assert torch.equal(model(IMAGE), plain)
    assert F.hardswish in called
    assert F.gelu in called

    lines, before = [], sys.gettrace()
    sys.settrace(lambda frame, *_: lines.append(frame.f_code.co_qualname))
    try:
        assert torch.equal(model(IMAGE), plain)
    finally:
        sys.settrace(before)
    assert {"ReLU.forward", "Hardswish.forward", "GELU.forward"} <= set(lines)

    with nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m).__name__)):
        assert torch.equal(model(IMAGE), plain)
    assert {"ReLU6", "Hardswish", "GELU", "FoldedBatchNorm2d"} <= set(map(str, called))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].__setitem__(2, nn.Identity()),
        lambda m: setattr(m[0][2], "max_val", 1.0),
        lambda m: m[0][1].train(),
        lambda m: setattr(m[0][1], "running_mean", torch.ones(8)),
        lambda m: setattr(m[3], "forward", torch.neg),
        lambda m: m[5].register_forward_hook(lambda _, __, y: y * 2),
        lambda m: m[1].register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
        lambda m: setattr(m[4], "forward", torch.neg),
        lambda m: m.pop(-1),
    ],
)
def test_a_sequential_that_was_changed_computes_what_its_modules_do(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = quantized(settled(in_a_row()), IMAGE)
    plain = model(IMAGE)
    change(model.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = model(IMAGE)
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert torch.equal(model(IMAGE), found)
        assert not torch.equal(found, plain)


def blocks() -> nn.Sequential:
    models = import_torchvision().models
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        models.resnet.BasicBlock(8, 8),
        models.resnet.Bottleneck(8, 2, downsample=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))),
        models.mobilenetv2.InvertedResidual(8, 8, 1, 2),
        nn.Conv2d(8, 8, 1),
    )


def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, run = [], native_library.run_plan
    monkeypatch.setattr(native_library, "run_plan", lambda *args: (calls.append(1), run(*args))[1])
    return calls


@native_only
def test_known_blocks_are_one_call_where_nobody_looks_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = settled(blocks()).eval()
    model = holds(module, IMAGE, least_db=20, int8=11)
    plain, other = model(IMAGE), torch.randn(2, 3, 9, 10)
    model(other)
    calls = native_calls(monkeypatch)
    assert torch.equal(model(IMAGE), plain)
    assert len(calls) == 2  # the image's codes, and all eleven layers
    noted = model(other)
    assert len(calls) == 4
    runner: Any = next(p for p in model.module.parameters() if isinstance(p, Weight)).site.engine._runner
    functions = len(runner._ready)
    for size in (8, 9, 11):
        model(torch.randn(1, 3, size, 12))
    assert len(runner._ready) == functions  # for all sizes
    calls[:] = calls[:4]
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert torch.equal(model(IMAGE), plain)
        assert torch.equal(model(other), noted)
    assert len(calls) > 20
    calls.clear()
    seen: list[str] = []
    with model.module[2].relu.register_forward_hook(lambda m, *_: seen.append(type(m).__name__)):
        assert torch.equal(model(IMAGE), plain)
    assert seen == ["ReLU"] * 3
    assert 2 < len(calls) < 12  # the other blocks are one call each
    calls.clear()
    with model.module.register_forward_hook(lambda *_: None), torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IMAGE), plain)
    lines, before = [], sys.gettrace()
    sys.settrace(lambda frame, *_: lines.append(frame.f_code.co_qualname))
    try:
        assert torch.equal(model(IMAGE), plain)
    finally:
        sys.settrace(before)
    assert {"BasicBlock.forward", "Bottleneck.forward", "InvertedResidual.forward"} <= set(lines)


@native_only
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[1], "relu", nn.Identity()),
        lambda m: setattr(m[2].relu, "forward", torch.neg),
        lambda m: m[1].bn1.train(),
        lambda m: setattr(m[2].bn2, "running_mean", torch.ones(2)),
        lambda m: setattr(m[2], "downsample", None),
        lambda m: setattr(m[3], "use_res_connect", False),
        lambda m: m[2].conv3.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
        lambda m: m[1].register_forward_hook(lambda _, __, y: y * 2),
        lambda m: setattr(m[3].conv[1][0], "dilation", (2, 2)) or setattr(m[3].conv[1][0], "padding", (2, 2)),
        lambda m: m.pop(-1),
    ],
)
def test_a_block_that_was_changed_computes_what_its_modules_do(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = quantized(settled(blocks()), IMAGE)
    plain = model(IMAGE)
    assert torch.equal(model(IMAGE), plain)
    change(model.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [model(IMAGE), model(IMAGE)]
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            stepped = model(IMAGE)
    assert torch.equal(found[0], stepped)
    assert torch.equal(found[1], stepped)
    assert not torch.equal(stepped, plain)


def test_a_layer_looks_like_what_it_stands_for() -> None:
    torch.manual_seed(0)
    module = settled(Residual()).eval()
    model = quantized(module, IMAGE)
    layer, float_layer = model.module.first, module.first
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight, Weight)
    assert (layer.weight.dtype, layer.weight.shape, layer.stride) == (torch.float32, float_layer.weight.shape, (1, 1))
    assert torch.equal(layer.weight * 1, float_layer.weight)
    assert model.module.second.bias is None
    assert list(model.module.state_dict()) == list(module.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.module.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert [n for n, _ in model.module.named_parameters()] == [n for n, _ in module.named_parameters()]
    module.load_state_dict(model.module.state_dict())
    model.module.load_state_dict(module.state_dict())
    with pytest.raises((UsageError, RuntimeError), match="compiled and can't be changed"):
        model.module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    with pytest.raises(UsageError, match="compiled and can't be changed"):
        layer.weight.mul_(2)
    with pytest.raises(UsageError, match="can't be pickled"):
        torch.save(model.module, "/dev/null")


def test_copies_are_the_same_and_of_their_own() -> None:
    torch.manual_seed(0)
    model = quantized(settled(Residual(in_place=True)), IMAGE)
    wanted = model(IMAGE)
    for copied in (copy.deepcopy(model), copy.deepcopy(model.module)):
        found = copied(IMAGE)
        assert torch.equal(found + 0, wanted)


def test_training_mode_of_the_modules_inside_is_floats_own() -> None:
    torch.manual_seed(0)
    module = settled(Residual()).eval()
    model = quantized(module, IMAGE)
    wanted = model(IMAGE)
    model.module.train()
    module.train()
    with torch.no_grad():
        assert sqnr_db(module.stem(IMAGE), model.module.stem(IMAGE) + 0) > 25
        assert model(IMAGE).isfinite().all()
    model.module.eval()
    assert torch.equal(model(IMAGE), wanted)


def test_parts_may_be_called_by_themselves() -> None:
    torch.manual_seed(0)
    module = settled(Residual()).eval()
    model = quantized(module, IMAGE)
    with torch.no_grad():
        found = model.module.stem(IMAGE)
        assert sqnr_db(module.stem(IMAGE), found + 0) > 25
        assert type(found * 1) is torch.Tensor
        assert found.numpy().shape == found.shape


@dataclass
class Result:
    first: torch.Tensor
    second: dict[str, Any]


def test_no_inner_tensor_comes_out() -> None:
    torch.manual_seed(0)
    model = quantized(
        Own(lambda s, x: Result(s.a(x), {"y": [s.b(s.a(x).relu()), (s.a(x).relu(), 3)], "size": x.shape})), X
    )
    found = model(X)
    assert isinstance(found, Result)
    leaves = [found.first, found.second["y"][0], found.second["y"][1][0]]
    assert all(type(leaf) is torch.Tensor for leaf in leaves)
    assert not any(isinstance(leaf, Coded) for leaf in leaves)


def test_a_call_that_was_not_captured_is_float_and_says_so() -> None:
    torch.manual_seed(0)
    module = convolutions(nn.ReLU()).eval()
    model = quantized(module, IMAGE)
    model.module[2].stride = module[2].stride = (1, 1)
    with pytest.warns(RuntimeWarning, match="2 computes in float32 in this call"):
        found = model(IMAGE)
    with torch.no_grad():
        assert sqnr_db(module(IMAGE), found) > 25


def test_a_weight_is_multiplied_by_as_the_code_does_it() -> None:
    """One weight of a square layer, as a linear's and as a factor: each call is what it says, or float."""
    torch.manual_seed(0)

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, s.a.weight) if s.as_linear else x @ s.a.weight

    for captured, other in ((True, False), (False, True)):
        module: Any = Own(forward)
        module.as_linear = captured
        model = holds(module, X, int8=1)
        model.module.as_linear = module.as_linear = other
        with torch.no_grad(), pytest.warns(RuntimeWarning, match="computes in float32 in this call"):
            assert sqnr_db(module(X), model(X)) > 100


def test_sums_with_options_are_as_torch_has_them() -> None:
    torch.manual_seed(0)

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.add(s.a(x).relu(), x, alpha=2)
        out = torch.empty_like(x)
        torch.add(s.b(y), x, out=out)
        return out

    holds(Own(forward), X)


def test_in_place_the_users_own_module_becomes_the_int8_one() -> None:
    torch.manual_seed(0)
    module = settled(Residual()).eval()
    kept = copy.deepcopy(module)
    model = quantized(module, IMAGE, inplace=True)
    assert model.module is module
    assert "int8[" in repr(module.first)
    with torch.no_grad():
        assert sqnr_db(kept(IMAGE), module(IMAGE) + 0) > 25
        assert torch.equal(model(IMAGE), module(IMAGE) + 0)
    with pytest.raises(qf.QuantflowError, match=r"inplace.*mode='imperative'"):
        qf.quantize(kept, [IMAGE], inplace=True)


def test_every_shape_and_thread_is_right() -> None:
    torch.manual_seed(0)
    module = settled(Residual()).eval()
    other = torch.randn(2, 3, 20, 16)
    model = qf.quantize(module, [IMAGE, other], mode="imperative", device="cpu")
    for size in ((1, 3, 8, 8), (3, 3, 9, 14), (2, 3, 33, 17)):
        x = torch.randn(size)
        with torch.no_grad():
            assert sqnr_db(module(x), model(x)) > 20
        with torch.inference_mode():
            assert sqnr_db(module(x), model(x)) > 20


def test_a_folded_batchnorm_is_known_after_it_was_moved() -> None:
    # `to` another device makes new buffers, as another dtype does.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model = qf.quantize(net, [torch.randn(2, 3, 8, 8)], mode="imperative")
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    norm = next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    before = norm.running_mean
    norm.double()
    norm.float()
    assert norm.running_mean is not before
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class LowerInside(nn.Module):
    """Asks for lower precision around two layers, and reads their result as float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.b(torch.relu(self.a(x)))
        return self.fc(x.float().mean((2, 3)))


def test_lower_precision_around_layers_is_left_out() -> None:
    torch.manual_seed(0)
    model = qf.quantize(LowerInside().eval(), [torch.rand(4, 3, 12, 12)], mode="imperative")
    assert model.results["int8_proof"]["int8_layers"] == 3
    assert model.results["accuracy"]["sqnr_db"] > 30
    assert any("autocast" in notice for notice in model.results["notices"])
