"""What several benchmarks start from: a torchvision architecture and crops of photos at a given size."""

from __future__ import annotations

from torch import nn

from quantflow.sources.data import Data, ImagePreprocess
from quantflow.sources.data.photos import load_photos
from quantflow.sources.data.preprocess import IMAGENET
from quantflow.sources.models import LoadedModel, estimate_batchnorm
from quantflow.sources.models.torchvision_zoo import load_torchvision


def float_module(loaded: LoadedModel) -> nn.Module:
    """The loaded model, which is an ordinary module."""
    assert isinstance(loaded.module, nn.Module)
    return loaded.module


def photos(
    loaded: LoadedModel, *, calibration: int, evaluation: int, batch_size: int = 16, size: int | None = None
) -> Data:
    """Crops prepared as the model asks; `size` replaces its own side length."""
    preprocess = loaded.preprocess or IMAGENET
    assert isinstance(preprocess, ImagePreprocess)
    return load_photos(preprocess.with_size(size), calibration, evaluation, batch_size, 0, ())


def model_on_photos(
    name: str, size: int, *, calibration: int, evaluation: int, batch_size: int = 16, weights: str = "random"
) -> tuple[nn.Module, Data, str]:
    """(module, data, the weights it got); random weights get BatchNorm statistics from the calibration crops."""
    loaded = load_torchvision(name, weights, None, seed=0)
    module = float_module(loaded)
    data = photos(loaded, calibration=calibration, evaluation=evaluation, batch_size=batch_size, size=size)
    if loaded.batchnorm_to_estimate:
        estimate_batchnorm(module, data.calibration)
    return module, data, loaded.weights_used
