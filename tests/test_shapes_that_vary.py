"""Sizes that differ between calls: found or asked for, in every mode and runtime, kept, and refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantflow as qf
from quantflow.errors import CaptureError, DataError, RecipeError
from quantflow.ir.binding import bind
from quantflow.runtimes.reference import ReferenceRunner

MODES = ("export", "torchscript", "imperative")
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
SERVED = [(mode, runtime) for mode in MODES[:2] for runtime in ("native", "torch", "reference")]
SERVED = [pair for pair in SERVED if pair != ("torchscript", "reference")] + [("imperative", "torch")]


class Sequence(nn.Module):
    """Attention between two linears: sizes are multiplied, divided and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return x + self.out(y)


class UNet(nn.Module):
    """Down and up again, beside what was there: legal for even sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.c = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x).relu()
        return self.c(torch.cat([a, self.up(self.b(a).relu())], 1))


class Points(nn.Module):
    """PointNet's kind: any number of points."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu().amax(-1))


KINDS: dict[str, tuple[type[nn.Module], Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "length": (Sequence, lambda b, n: torch.randn(b, n, 16), [(32, 6), (32, 9), (1, 1), (3, 20)]),
    "height and width": (UNet, lambda b, h, w: torch.randn(b, 3, h, w), [(4, 8, 12), (4, 12, 8), (1, 20, 10)]),
    "points": (Points, lambda b, n: torch.randn(b, 3, n), [(4, 30), (3, 50), (2, 7)]),
}


def sqnr_db(wanted: torch.Tensor, found: torch.Tensor) -> float:
    assert wanted.shape == found.shape
    noise = (wanted.double() - found.double()).pow(2).mean().clamp_min(1e-30)
    return float(10 * torch.log10(wanted.double().pow(2).mean() / noise))


@pytest.mark.parametrize(("mode", "runtime"), SERVED)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_differ_between_batches_vary(kind: str, mode: str, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, draw, sizes = KINDS[kind]
    module = make().eval()
    model = qf.quantize(module, [draw(*size) for size in sizes[:2]], mode=mode, runtime=runtime)
    model.save(tmp_path / "artifact")
    loaded = qf.load(tmp_path / "artifact")
    specification = ReferenceRunner(model.record.program)
    for size in [*sizes, (5, *sizes[-1][1:])]:
        x = draw(*size)
        with torch.no_grad():
            wanted, found = module(x), model(x)
        assert sqnr_db(wanted, found) > 15
        assert torch.equal(loaded(x), found) or mode == "imperative"
        if mode != "imperative":
            assert sqnr_db(specification(bind(model.record.program, (x,), {})), found) > 60


def test_sizes_may_be_asked_for_by_name() -> None:
    module = Sequence().eval()
    model = qf.quantize(module, [torch.randn(4, 6, 16)], dynamic={"x": {1: "tokens"}})
    assert model.record.program.inputs[0].shape == (None, "tokens", 16)
    assert model(torch.randn(2, 11, 16)).shape == (2, 11, 16)


def test_sizes_are_fixed_where_nothing_varies_or_none_is_said() -> None:
    model = qf.quantize(Sequence().eval(), [torch.randn(4, 6, 16)])
    with pytest.raises(DataError, match=r"captured for \(batch, 6, 16\), so dimension 1 must be 6: .*`dynamic`"):
        model(torch.randn(4, 7, 16))
    with pytest.raises(DataError):
        qf.quantize(Sequence().eval(), [torch.randn(4, 6, 16), torch.randn(4, 7, 16)], dynamic="none")


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {1: "length"}}, "dynamic.y: there is no such input; the model takes x"),
        ({"x": {5: "length"}}, "dynamic.x: 'x' has 3 dimensions"),
        ({"x": {1: "a b"}}, "dynamic"),
        ("sometimes", "dynamic"),
    ],
)
def test_what_is_asked_for_must_be_there(dynamic: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        qf.quantize(Sequence().eval(), [torch.randn(4, 6, 16)], dynamic=dynamic)  # type: ignore[arg-type]


def test_a_size_that_the_code_needs_even_is_refused_odd_with_the_reason() -> None:
    draw = KINDS["height and width"][1]
    model = qf.quantize(UNet().eval(), [draw(4, 8, 12), draw(4, 12, 8)])
    with pytest.raises(DataError, match=r"can't take height = 9: it holds only where .*height"):
        model(draw(1, 9, 8))


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * 2 if x.shape[1] > 5 else self.a(x)


def test_a_branch_on_a_size_is_held_to_the_sizes_that_take_it() -> None:
    model = qf.quantize(Long().eval(), [torch.randn(4, 6, 8), torch.randn(4, 9, 8)])
    assert model(torch.randn(4, 7, 8)).shape == (4, 7, 8)
    with pytest.raises(DataError, match=r"length = 4: it holds only where length > 5 \(test_shapes_that_vary.py:\d+"):
        model(torch.randn(4, 4, 8))


class Narrow(nn.Module):
    """AlexNet's kind: small images come to a size of 1 inside it, which torch.export takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        conv, pool = nn.Conv2d(3, 8, 11, stride=4, padding=2), nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(conv, nn.ReLU(), pool, nn.Conv2d(8, 8, 5, padding=2), pool, pool)
        self.pool, self.head = nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


@pytest.mark.skipif(TORCH < (2, 13), reason="torch.export of 2.9 and 2.11 can't solve such sizes")
@pytest.mark.parametrize("other", [(96, 64), (72, 72)], ids=["one is larger inside", "all are 1 inside"])
def test_sizes_that_come_to_1_inside_the_model(other: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = Narrow().eval()
    model = qf.quantize(module, [torch.randn(2, 3, 64, 64), torch.randn(2, 3, *other)])
    for height in (64, 72, 100, 131):
        x = torch.randn(3, 3, height, 64)
        assert sqnr_db(module(x).detach(), model(x)) > 8  # other sizes have other ranges


class Table(nn.Module):
    """A table of positions as long as the model allows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x + self.table)


def test_a_size_that_the_model_fixes_is_named_with_its_line() -> None:
    with pytest.raises(
        DataError, match=r"refuses batch 1 .*self.a\(x \+ self.table\).*dimension 1 of x is 4 and was 6"
    ):
        qf.quantize(Table().eval(), [torch.randn(4, 6, 8), torch.randn(4, 4, 8)])
    with pytest.raises(CaptureError, match=r"fixes dimension 1 of input 'x' to 6 \(.*self.a\(x \+ self.table\)"):
        qf.quantize(Table().eval(), [torch.randn(4, 6, 8)], dynamic={"x": {1: "length"}})


def test_many_shapes_keep_a_bounded_number_of_plans() -> None:
    model = qf.quantize(Sequence().eval(), [torch.randn(2, 6, 16), torch.randn(2, 9, 16)], runtime="native")
    for length in range(1, 60):
        assert model(torch.randn(2, length, 16)).shape == (2, length, 16)
    assert all(len(plans) <= 16 for plans in model.compiled.runner._plans.values())  # type: ignore[union-attr]
