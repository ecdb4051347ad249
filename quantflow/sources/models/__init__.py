"""Where models come from: `load_model` turns a recipe's `model` into a float model ready to be captured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.sources.data.preprocess import ImagePreprocess, TextPreprocess
from quantflow.sources.models.batchnorm import estimate_batchnorm
from quantflow.sources.models.loaded import LoadedModel, Progress
from quantflow.sources.models.usable import usable

if TYPE_CHECKING:
    from quantflow.schema import ModelSpec

__all__ = ["ImagePreprocess", "LoadedModel", "TextPreprocess", "estimate_batchnorm", "load_model", "usable"]


def load_model(spec: ModelSpec, seed: int, progress: Progress | None = None) -> LoadedModel:
    """The float model of a recipe, in eval mode, with its preprocessing and what the user must be told.

    Args:
        spec: one of the schema's model kinds.
        seed: the recipe's; random weights are drawn from it.
        progress: called with (done, in all) by what can count its steps: training.

    Raises:
        ModelError: no such model, a file that can't be read, weights that do not fit.
        UnavailableError: a package or pretrained weights that this machine does not have.
    """
    return _LOADERS[spec.kind](spec, seed, progress)


def _torchvision(spec: Any, seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.torchvision_zoo import load_torchvision

    return load_torchvision(spec.name, spec.weights, spec.num_classes, seed)


def _transformers(spec: Any, seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.transformers_zoo import load_transformers

    return load_transformers(spec.path, spec.package, spec.task, spec.weights, spec.max_length, seed)


def _minilm(spec: Any, seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.transformers_zoo import load_minilm

    return load_minilm(spec.weights, spec.max_length, seed)


def _efficientnet_lite0(spec: Any, seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.efficientnet_lite0 import load_efficientnet_lite0

    return load_efficientnet_lite0(spec.weights, seed)


def _mnist_cnn(spec: Any, seed: int, progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.mnist_cnn import load_mnist_cnn

    return load_mnist_cnn(spec.weights, seed, progress)


def _scriptmodule(spec: Any, _seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.saved import load_scriptmodule

    return load_scriptmodule(Path(spec.path))


def _exported(spec: Any, _seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.saved import load_exported

    return load_exported(Path(spec.path))


def _entry(spec: Any, seed: int, _progress: Progress | None) -> LoadedModel:
    from quantflow.sources.models.user_model import load_entry

    return load_entry(spec.entry, dict(spec.kwargs), seed)


_LOADERS = {
    "torchvision": _torchvision,
    "transformers": _transformers,
    "minilm": _minilm,
    "efficientnet_lite0": _efficientnet_lite0,
    "scriptmodule": _scriptmodule,
    "mnist_cnn": _mnist_cnn,
    "exported": _exported,
    "entry": _entry,
}
