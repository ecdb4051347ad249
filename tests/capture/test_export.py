"""torch.export capture: the same numbers, for every batch size, under the model's own names."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantflow.capture import SCRIPT_S, at_least_two, capture_export, export, functional, likely_seconds
from quantflow.capture.export import plain_attention
from quantflow.capture.sizes import Sizes
from quantflow.errors import CaptureError
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, interpret, is_aten, op_name
from quantflow.ir.structure import plain
from quantflow.schema import ModeSettings


class Block(nn.Module):
    """conv-bn-relu with a residual, pooled into a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(self.drop(x.mean((2, 3))))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.fc(x) * mask
        return {"y": y, "sum": y.sum(1)}


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).reshape(2, 4)


class DataBranch(FixedBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


def images(samples: int) -> Batch:
    return Batch((torch.randn(samples, 3, 8, 8),))


def layers(graph: Graph) -> list[str]:
    return [n.meta["layer"] for n in graph.fx.nodes if n.op == "call_function"]


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_holds_for_every_batch_size(samples: int) -> None:
    model = Block().eval()
    graph = capture_export(model, images(samples))
    assert graph.batch_is_dynamic
    assert not graph.notes
    assert graph.inputs[0].shape == (None, 3, 8, 8)
    for size in (1, 3):
        batch = images(size)
        with torch.no_grad():
            assert torch.allclose(interpret(graph, batch.tensors), model(*batch.args), atol=1e-6)


def test_layers_carry_the_modules_names() -> None:
    names = layers(capture_export(Block(), images(2)))
    assert {"stem", "body.0", "body.1", "body.2", "add", "head"} <= set(names)
    assert len(set(names)) == len(names)


def test_nodes_are_functional_and_described() -> None:
    graph = capture_export(Block(), images(2))
    for node in graph.fx.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert node.meta["dtype"] is torch.float32
            assert node.meta["shape"][0] is None
    assert not [n for n in graph.fx.nodes if is_aten(n, "dropout")]
    assert set(graph.constants) == {n.target for n in graph.fx.nodes if n.op == "get_attr"}


def test_an_exported_program_is_taken_over() -> None:
    model = Block().eval()
    batch = images(2)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, batch.args, dynamic_shapes=dynamic)
    graph = capture_export(program, batch)
    other = images(5)
    with torch.no_grad():
        assert torch.allclose(interpret(graph, other.tensors), model(*other.args), atol=1e-6)


def test_keywords_and_model_output_classes() -> None:
    model = Keywords().eval()
    batch = Batch((torch.randn(2, 4),), {"mask": torch.rand(2, 4)})
    graph = capture_export(model, batch)
    assert [(item.name, item.keyword) for item in graph.inputs] == [("x", None), ("mask", "mask")]
    output = interpret(graph, batch.tensors)
    assert list(output) == ["y", "sum"]
    assert torch.equal(output["y"], model(*batch.args, **batch.kwargs)["y"])


def test_a_fixed_batch_is_noted() -> None:
    graph = capture_export(FixedBatch(), Batch((torch.randn(2, 4),)))
    assert not graph.batch_is_dynamic
    assert "fixed the batch size" in graph.notes[0]


def test_a_refusal_names_the_other_modes() -> None:
    with pytest.raises(CaptureError, match=r"can't capture DataBranch: .*mode=torchscript.*mode=imperative"):
        capture_export(DataBranch(), Batch((torch.randn(2, 4),)))


def test_attention_shows_its_linears() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    graph = capture_export(layer, Batch((torch.randn(2, 5, 8),)))
    linears = [n.meta["layer"] for n in graph.fx.nodes if is_aten(n, "linear")]
    assert linears == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]


def test_the_fast_path_is_restored_after_an_error() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with plain_attention():
        assert not torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(CaptureError):
        capture_export(DataBranch(), Batch((torch.randn(2, 4),)))
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_at_least_two_repeats_a_single_sample() -> None:
    one = Batch((torch.randn(1, 3),), {"mask": torch.ones(1, 3), "scale": torch.tensor(2.0)})
    two = at_least_two(one)
    assert torch.equal(two.args[0], one.args[0].repeat(2, 1))
    assert two.kwargs["mask"].shape == (2, 3)
    assert two.kwargs["scale"].shape == ()
    assert at_least_two(two) is two


def test_plain_keeps_the_nesting_and_drops_empty_entries() -> None:
    x = torch.zeros(1)
    output = OrderedDict(a=x, b=None, c=(x, [x, {"d": x}]))
    assert plain(output) == {"a": x, "c": (x, [x, {"d": x}])}


def test_how_long_it_will_take_grows_with_the_modules() -> None:
    export = ModeSettings(kind="export")
    times = [likely_seconds(nn.Sequential(*(nn.ReLU() for _ in range(count))), export) for count in (10, 110, 210)]
    assert times[0] is not None
    assert times[1] - times[0] == pytest.approx(2.0)
    assert times[2] - times[1] == pytest.approx(2.0)
    model = Block()
    assert likely_seconds(model, ModeSettings(kind="imperative")) == likely_seconds(model, export)
    exported = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),))
    assert likely_seconds(model, ModeSettings(kind="torchscript")) == likely_seconds(exported, export) == SCRIPT_S


class InPlace(nn.Module):
    """Writes in place in a way that `how` tells, and reads what it wrote under the old name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.conv(x))
        if self.how == "activation":
            before = y * 2
            z = torch.relu_(y)
            return before + y * 3 + z
        if self.how == "sum":
            z = torch.relu(y)
            z += y
            return F.hardtanh_(z, -1.0, 0.5).flatten(1), z
        if self.how == "twice":
            z = torch.relu_(y)
            double = z * 2
            y += 1
            return double, z.flatten(1), y
        if self.how == "twice with a view between":
            rows = torch.relu_(y).flatten(1)
            y += 1
            return rows
        if self.how == "seen through a view":
            rows = y.flatten(1)
            y.relu_()
            return rows
        y[:, 0].relu_()
        return y


@pytest.mark.parametrize(
    ("how", "is_plain"),
    [
        ("activation", True),
        ("sum", True),
        ("twice", True),
        ("twice with a view between", False),
        ("seen through a view", False),
        ("of a part", False),
    ],
)
def test_writing_in_place_means_the_same(how: str, is_plain: bool) -> None:
    torch.manual_seed(0)
    model, x = InPlace(how).eval(), torch.randn(3, 3, 5, 5)
    assert functional.is_plain(export._export(model, Batch((x,)))) is is_plain
    graph = capture_export(model, Batch((x,)))
    assert not any(n.op == "call_function" and op_name(n).endswith("_") for n in graph.fx.nodes)
    with torch.no_grad():
        wanted, found = model(x), interpret(graph, [x])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(interpret(graph, [x[:1]]), _first(wanted))


def _first(output: Any) -> Any:
    return tuple(map(_first, output)) if isinstance(output, tuple) else output[:1]


class Spread(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.linear, self.options = nn.Linear(8, 8), options

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spread, mean = torch.std_mean(self.linear(x), **self.options)
        return spread, mean


@pytest.mark.parametrize(
    "options", [{}, {"dim": -1, "keepdim": True}, {"dim": 1, "unbiased": False}, {"correction": 0}]
)
def test_std_mean_in_every_form(options: dict[str, object]) -> None:
    model, x = Spread(**options).eval(), torch.randn(4, 8)
    graph = capture_export(model, Batch((x,)))
    with torch.no_grad():
        for found, wanted in zip(interpret(graph, [x]), model(x), strict=True):
            torch.testing.assert_close(found, wanted)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.recurrent(packed)[1][0][-1]


def test_packed_sequences_are_refused_in_words_with_a_cure() -> None:
    batch = Batch((torch.randn(3, 5, 8), torch.tensor([5, 4, 2])))
    with pytest.raises(
        CaptureError, match=r"Packs: it packs sequences .*test_export.py:\d+.*mode=torchscript or .*gather"
    ):
        capture_export(Packs(), batch)


class Pyramid(nn.Module):
    """Its smallest level is one pixel wide where the image is no wider than eight."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.fine(x)
        return fine + F.interpolate(self.coarse(fine), size=fine.shape[-2:])


def test_a_size_that_comes_to_one_inside_the_first_batch_still_varies() -> None:
    model = Pyramid().eval()
    batches = [Batch((torch.randn(2, 3, 8, width),)) for width in (8, 24)]
    graph = capture_export(model, batches[0], Sizes({(0, 3): "width"}, tuple(batches[1:])))
    with torch.no_grad():
        for batch in (*batches, Batch((torch.randn(3, 3, 8, 40),))):
            torch.testing.assert_close(interpret(graph, bind(graph, batch.args, batch.kwargs)), model(*batch.args))
