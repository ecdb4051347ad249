from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantflow.errors import ModelError, UnavailableError
from quantflow.schema import TorchvisionModel
from quantflow.sources.data import Batch
from quantflow.sources.models import LoadedModel, estimate_batchnorm, load_model, torchvision_zoo


def load(name: str, seed: int = 0, **options: Any) -> LoadedModel:
    return load_model(TorchvisionModel(name=name, **{"weights": "random"} | options), seed)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str) -> None:
        raise UnavailableError(f"{url} can't be reached (no network)")

    monkeypatch.setattr(torchvision_zoo, "download_state", fail)


@pytest.mark.parametrize(
    "first", ["pass", "import contextlib\nwith contextlib.suppress(RuntimeError):\n import torchvision"]
)
def test_torchvision_imports_in_a_fresh_process(first: str) -> None:
    code = f"{first}\nfrom quantflow.sources.models.torchvision_zoo import import_torchvision\nimport_torchvision()\n"
    code += "import torchvision.models, torchvision.transforms\nassert torchvision.models.list_models()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_random_weights_follow_the_seed_and_are_announced() -> None:
    first, again, other = load("resnet18"), load("resnet18"), load("resnet18", seed=1)
    state, same, different = (m.module.state_dict() for m in (first, again, other))
    assert all(torch.equal(state[k], same[k]) for k in state)
    assert not torch.equal(state["conv1.weight"], different["conv1.weight"])
    assert first.notices[0].startswith("RANDOM WEIGHTS: resnet18 runs with weights drawn from seed 0, as asked")
    assert (first.weights_requested, first.weights_used) == ("random", "random (seed 0)")
    assert first.batchnorm_to_estimate
    assert first.outputs == "logits"
    assert not first.module.training


def test_estimated_statistics_make_random_resnets_sane() -> None:
    module = load("resnet18").module
    x = torch.randn(4, 3, 64, 64)
    estimate_batchnorm(module, [Batch((x,))])
    assert 0.05 < module(x).std() < 5


@pytest.mark.usefixtures("offline")
def test_auto_goes_on_and_pretrained_does_not() -> None:
    model = load("resnet18", weights="auto")
    assert "because pretrained ones can't be had: https://download.pytorch.org" in model.notices[0]
    assert (model.weights_requested, model.weights_used) == ("auto", "random (seed 0)")
    with pytest.raises(UnavailableError, match=r"no network.*model\.weights=PATH.*model\.weights=auto"):
        load("resnet18", weights="pretrained")


def test_pretrained_weights_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {k: v + 1 for k, v in load("resnet18").module.state_dict().items()}
    monkeypatch.setattr(torchvision_zoo, "download_state", lambda _: published)
    model = load("resnet18", weights="auto", seed=3)
    assert torch.equal(model.module.fc.weight, published["fc.weight"])
    assert (model.notices, model.batchnorm_to_estimate) == ((), False)
    assert model.weights_used == "pretrained (IMAGENET1K_V1)"


def test_auxiliary_classifiers_in_published_weights_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    models = torchvision_zoo.import_torchvision().models
    published = models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(torchvision_zoo, "download_state", lambda _: published)
    model = load("googlenet", weights="pretrained").module
    assert model.aux1 is None
    assert model.transform_input
    assert not load("googlenet").module.transform_input


def test_weights_from_a_file(tmp_path: Path) -> None:
    save_file(load("resnet18", seed=7, num_classes=4).module.state_dict(), tmp_path / "w.safetensors")
    own = load("resnet18", num_classes=4, weights=str(tmp_path / "w.safetensors"))
    assert own.module(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert own.notices == ()
    with pytest.raises(ModelError, match=r"fc\.weight \(4, 512\) where the model has \(1000, 512\).*number of classes"):
        load("resnet18", weights=str(tmp_path / "w.safetensors"))


def test_another_number_of_classes_has_no_pretrained_weights() -> None:
    with pytest.raises(UnavailableError, match="1000 classes, not num_classes=7"):
        load("resnet18", num_classes=7, weights="pretrained")
    assert "num_classes=7" in load("resnet18", num_classes=7, weights="auto").notices[0]


def test_a_classifier_that_starts_at_zero_is_drawn() -> None:
    model = load("vit_b_32")
    with torch.no_grad():
        assert model.module(torch.randn(1, 3, 224, 224)).std() > 0.1
    assert not model.batchnorm_to_estimate


def test_preprocessing_is_pinned_to_the_weights() -> None:
    inception = load("inception_v3").preprocess
    assert (inception.size, inception.resize, inception.interpolation) == (299, 342, "bilinear")
    assert load("resnet18").preprocess.mean == (0.485, 0.456, 0.406)
    assert load("r3d_18").preprocess is None


def test_segmentation() -> None:
    model = load("lraspp_mobilenet_v3_large")
    assert model.outputs == "other"
    assert set(model.module(torch.zeros(1, 3, 32, 32))) == {"out"}


def test_unknown_and_unfit_architectures() -> None:
    with pytest.raises(ModelError, match="no architecture 'resnet51'; nearest names: resnet50"):
        load("resnet51")
    with pytest.raises(ModelError, match="detection, optical-flow and already quantized ones can't be loaded"):
        load("fasterrcnn_resnet50_fpn")


def test_a_missing_torchvision_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(UnavailableError, match=r"quantflow\[zoo\]"):
        load("resnet18")
