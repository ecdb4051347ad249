from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantflow.errors import ModelError, UnavailableError
from quantflow.numerics.seed import seeded
from quantflow.sources.models import weights
from quantflow.sources.models.weights import apply_state, download_state, draw_zero_weights, load_state


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_every_format_holds_the_same_state(tmp_path: Path) -> None:
    state = network().state_dict()
    save_file(state, tmp_path / "s.safetensors")
    torch.save(state, tmp_path / "s.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "s.pth")
    for name in ("s.safetensors", "s.pt", "s.pth"):
        loaded = load_state(tmp_path / name)
        assert set(loaded) == set(state)
        assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    torch.save({"w": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ModelError, match="nothing but tensors is ever unpickled"):
        load_state(tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError):
        load_state(tmp_path / "plain.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["s.safetensors", "s.pt"])
def test_missing_truncated_and_empty_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    with pytest.raises(ModelError, match="missing, expected a file"):
        load_state(file)
    if name.endswith("pt"):
        torch.save(network().state_dict(), file)
    else:
        save_file(network().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"model.weights"):
        load_state(file)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ModelError, match="holds no tensors"):
        load_state(tmp_path / "none.pt")


def test_a_state_that_does_not_fit_lists_what_is_wrong() -> None:
    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {"0.weight": torch.zeros(9, 3), "1.weight": torch.zeros(4), "head.bias": torch.zeros(1)}
    with pytest.raises(ModelError) as caught:
        apply_state(module, state, "w.pt")
    message = str(caught.value)
    assert "missing: 0.bias, 1.bias, 1.running_mean, 1.running_var" in message
    assert "unexpected: head.bias" in message
    assert "0.weight (9, 3) where the model has (4, 3)" in message
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_counters_may_be_missing() -> None:
    state = {k: v + 1 for k, v in network().state_dict().items() if "num_batches" not in k}
    module = network()
    apply_state(module, state, "w.pt")
    assert torch.equal(module[0].weight, state["0.weight"])


def test_seeded_gives_the_generator_back_even_after_an_error() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert torch.equal(torch.rand(1), expected)


def test_zero_layers_are_drawn_and_others_left() -> None:
    module = nn.Sequential(nn.Linear(100, 50), nn.Conv2d(3, 4, 1))
    nn.init.zeros_(module[0].weight)
    kept = module[1].weight.clone()
    with seeded(0):
        draw_zero_weights(module)
    assert module[0].weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(module[1].weight, kept)


def test_a_download_without_network_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(weights, "_CONNECT_TIMEOUT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"https://weights\.invalid/w-00000000\.pth can't be reached"):
        download_state("https://weights.invalid/w-00000000.pth")
    assert time.monotonic() - start < 10
    assert not list(tmp_path.iterdir())


def test_what_is_already_downloaded_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = network().state_dict()
    torch.save(state, tmp_path / "checkpoints" / "w-00000000.pth")
    assert set(download_state("https://weights.invalid/w-00000000.pth")) == set(state)
    (tmp_path / "checkpoints" / "w-00000000.pth").write_bytes(b"broken")
    with pytest.raises(UnavailableError, match=r"delete .*w-00000000\.pth to fetch it again"):
        download_state("https://weights.invalid/w-00000000.pth")
