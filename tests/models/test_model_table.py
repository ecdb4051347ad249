"""One or two models of each family in the quick run, and the table's own keeping of what it found.

All of them: `python -m pytest -m models tests/models`.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import model_table
from bench.model_table import COLUMNS, Entry, Result, Table, entries, page, run

MACHINE: dict[str, Any] = {"versions": {"torch": "1", "timm": "2", "rich": "3"}}
RIGHT = Result("ok", "", "2 of 2", 30.0)

#: Package and model → the mode that it is tried in here; the table tries all three.
QUICK = {
    "torchvision squeezenet1_1": "export",
    "torchvision RetinaNet's head": "torchscript",
    "transformers DistilBERT": "export",
    "transformers T5": "torchscript",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_a_model_of_each_family(name: str) -> None:
    package, _, model = name.partition(" ")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    (entry,) = [entry for _, entry in entries([package]) if entry.name == model]
    result = run(entry, QUICK[name])
    assert result.verdict == "ok", result.note


def entry_of(module: nn.Module) -> Entry:
    return Entry("mine", lambda: module, lambda: [torch.randn(8, 4), torch.randn(8, 4)], lambda: torch.randn(3, 4))


class Sleeps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(60)
        return x


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"no such thing as {len(x)}")


def test_a_model_that_takes_too_long_is_a_row_that_says_so() -> None:
    start = time.monotonic()
    assert run(entry_of(Sleeps()), "export", seconds=0.5) == Result("crashed", "takes more than 0.5 s")
    assert time.monotonic() - start < 20


def test_a_model_that_fails_by_itself_is_refused_in_the_words_of_its_data() -> None:
    result = run(entry_of(Fails()), "export")
    assert result.verdict == "refused"
    assert "no such thing" in result.note


def test_a_wrong_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    called, first = model_table._called, []

    def wrong(model: Any, call: Any) -> Any:
        first.append(model)
        found = called(model, call)
        return found if model is first[0] else -found

    monkeypatch.setattr(model_table, "_called", wrong)
    result = run(entry_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), "export")
    assert result.verdict == "wrong"
    assert "with its last layer alone in int8" in result.note


def test_a_table_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    table = Table(path, MACHINE)
    table.fill("timm a", "export", lambda: RIGHT)

    def stopped() -> Result:
        assert Table(path, MACHINE).rows["timm b"]["export"]["note"] == "ended the process"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.fill("timm b", "export", stopped)
    again = Table(path, MACHINE)
    assert again.has("timm a", "export")
    assert not again.has("timm a", "torchscript")
    assert not again.has("timm b", "export")
    again.fill("timm a", "torchscript", lambda: Result("refused", "mode: no | but <so>"))
    again.fill("transformers c", "export", lambda: Result("ok", "", "1 of 1", float("inf")))
    shown = Table(path, MACHINE).shown()
    assert [row["model"] for row in shown] == ["timm a", "transformers c"]
    text = page(shown, MACHINE)
    assert "export 2 of 2 right, torchscript 0 of 1 right, 1 refused. With torch 1, timm 2." in text
    assert "| timm a | ok | refused |  | 2 of 2 | 30 | torchscript: mode: no \\| but &lt;so> |" in text


def test_results_of_other_versions_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    Table(path, MACHINE).fill("timm a", "export", lambda: RIGHT)
    assert not Table(path, {"versions": {"torch": "2"}}).rows


def test_the_page_has_every_column() -> None:
    assert "| " + " | ".join(COLUMNS) + " |" in (Path(__file__).parents[2] / "docs/models.md").read_text()


def test_modes_that_differ_are_named() -> None:
    table = Table(None, MACHINE)
    for name, layers, db in (("timm a", "2 of 2", 30.0), ("timm b", "2 of 2", 28.5), ("timm c", "1 of 2", 30.5)):
        table.fill(name, "export", lambda: RIGHT)
        table.fill(name, "imperative", lambda layers=layers, db=db: Result("ok", "", layers, db))
    table.fill("timm d", "imperative", lambda: RIGHT)
    assert table.unlike() == [
        "timm b: 28.5 dB to float in imperative mode, 30.0 in export",
        "timm c: 1 of 2 in int8 in imperative mode, 2 of 2 in export",
    ]
