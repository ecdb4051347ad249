"""Int8 embedding tables: a quarter of the bytes, the same rows up to rounding, in both capturing modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.capture import capture_export
from quantflow.errors import RecipeError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import interpret
from quantflow.ir.passes.int8_embeddings import int8_embeddings
from quantflow.runtimes import RUNTIMES
from quantflow.schema import Recipe


class Tagger(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(500, 16), nn.Embedding(12, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 500, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.relu(self.hidden(x)))


def tagger(*, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Tagger(tied=tied).eval()
    with torch.no_grad():
        model.words.weight[7] = 0  # padding's row
        model.words.weight[9] *= 4  # one scale for all rows would lose the others
    return model


def ids(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 500, (count, 12), generator=torch.Generator().manual_seed(count))


def test_rows_come_back_up_to_rounding() -> None:
    model, batch = tagger(), Batch((ids(),))
    graph = capture_export(model, batch)
    found = int8_embeddings(graph)
    tables = [t for t in found.constants.values() if t.dtype is torch.int8]
    assert [t.shape for t in tables] == [(500, 16)]
    assert "words.weight" not in found.constants
    assert found.notes[-1].endswith(": 1")
    assert len({node.meta["layer"] for node in found.fx.nodes if node.op == "call_function"}) == sum(
        node.op == "call_function" for node in found.fx.nodes
    ), "layer names stay unique"
    rows = torch.tensor([[7] * 12, [9] * 12, list(range(12))])
    seen: dict[str, torch.Tensor] = {}
    interpret(found, [rows], lambda node, value: seen.update({str(node.meta.get("layer")): value}))
    weight = model.words.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((seen["words.dequantize"] - weight[rows]).abs() <= step[rows] / 2 + 1e-6).all()


def test_a_table_that_is_read_twice_is_kept_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.words(ids) - self.words(ids.flip(1))

    torch.manual_seed(0)
    model, x = Twice().eval(), ids() % 50
    found = int8_embeddings(capture_export(model, Batch((x,))))
    assert sorted(found.constants) == ["words.weight.int8", "words.weight.scale"]
    torch.testing.assert_close(interpret(found, [x]), model(x).detach(), atol=0.05, rtol=0)


def test_a_table_that_a_linear_reads_too_stays() -> None:
    found = int8_embeddings(capture_export(tagger(tied=True), Batch((ids(),))))
    assert found.notes[-2].endswith(": 0")
    assert "words.weight" in found.notes[-1] or "head.weight" in found.notes[-1]


@pytest.mark.parametrize(
    ("mode", "runtime"),
    [
        (mode, name)
        for name, entry in RUNTIMES.items()
        if entry.missing("cpu") is None
        for mode in entry.modes
        if mode != "imperative"
    ],
)
def test_the_model_is_smaller_and_as_good(mode: str, runtime: str, tmp_path: Path) -> None:
    found, size = {}, {}
    for precision in ("float", "int8"):
        model = qf.quantize(
            tagger(), [ids(n) for n in (6, 5)], mode=mode, runtime=runtime, policy={"embedding": precision}
        )
        folder = tmp_path / precision
        model.save(folder)
        size[precision] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        found[precision] = model.results["accuracy"]["sqnr_db"]
        assert torch.equal(qf.load(folder)(ids()), model(ids()))
    assert found["int8"] > found["float"] - 1
    assert size["int8"] < size["float"] - 500 * 16 * 2


def test_imperative_mode_refuses() -> None:
    with pytest.raises(RecipeError, match=r"policy\.embedding: int8 has no place in mode=imperative"):
        Recipe.from_dict(
            {
                "model": {"kind": "given", "name": "m"},
                "data": {"kind": "given"},
                "mode": {"kind": "imperative"},
                "policy": {"embedding": "int8"},
            },
            "test",
        )
