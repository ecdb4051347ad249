"""Where batches come from: `load_data` turns a recipe's `data` into calibration and evaluation batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.errors import DataError
from quantflow.ir.batch import Batch, as_batches
from quantflow.sources.data.preprocess import IMAGENET, ImagePreprocess, TextPreprocess
from quantflow.sources.data.samples import Data

if TYPE_CHECKING:
    from quantflow.schema import DataSpec

__all__ = ["Batch", "Data", "ImagePreprocess", "TextPreprocess", "as_batches", "load_data"]


def load_data(spec: DataSpec, preprocess: ImagePreprocess | TextPreprocess | None, seed: int) -> Data:
    """Calibration and evaluation batches for a recipe's `data`.

    Args:
        spec: one of the schema's data kinds.
        preprocess: what the model asks of its inputs; None when it does not say.
        seed: the recipe's; which samples are used depends on it.

    Raises:
        DataError: data missing, unreadable, not finite, inconsistent or empty, or of a kind the model can't take.
        UnavailableError: the package that holds the data is not installed.
    """
    return _LOADERS[spec.kind](spec, preprocess, seed)


def _photos(spec: Any, preprocess: ImagePreprocess | TextPreprocess | None, seed: int) -> Data:
    from quantflow.sources.data.photos import load_photos

    images, notices = _images(spec.kind, preprocess, spec.size)
    return load_photos(images, spec.calibration, spec.evaluation, spec.batch_size, seed, notices)


def _folder(spec: Any, preprocess: ImagePreprocess | TextPreprocess | None, seed: int) -> Data:
    from quantflow.sources.data.folder import load_folder

    images, notices = _images(spec.kind, preprocess, spec.size)
    return load_folder(Path(spec.path), images, spec.calibration, spec.evaluation, spec.batch_size, seed, notices)


def _mnist(spec: Any, preprocess: ImagePreprocess | TextPreprocess | None, seed: int) -> Data:
    from quantflow.sources.data.mnist import load_mnist

    images = _images(spec.kind, preprocess, None)[0] if preprocess else None
    return load_mnist(images, spec.calibration, spec.evaluation, spec.batch_size, seed)


def _text(spec: Any, preprocess: ImagePreprocess | TextPreprocess | None, seed: int) -> Data:
    from quantflow.sources.data.text import load_lee, load_lines

    if not isinstance(preprocess, TextPreprocess):
        raise DataError(
            "data=text needs a model with a tokenizer (model=minilm or model=transformers); this one has none"
        )
    length = spec.max_length or preprocess.max_length
    if length > preprocess.limit:
        raise DataError(f"data.max_length: {length} is longer than the {preprocess.limit} tokens the model can take")
    counts = (spec.calibration, spec.evaluation, spec.batch_size, seed)
    if spec.path is None:
        return load_lee(preprocess, length, *counts)
    return load_lines(Path(spec.path), preprocess, length, *counts)


def _tensors(spec: Any, _preprocess: object, seed: int) -> Data:
    from quantflow.sources.data.tensors import load_tensors

    evaluation_path = None if spec.evaluation_path is None else Path(spec.evaluation_path)
    keys = (spec.input_keys, spec.label_key)
    counts = (spec.calibration, spec.evaluation, spec.batch_size, seed)
    return load_tensors(Path(spec.path), evaluation_path, *keys, *counts)


def _random(spec: Any, _preprocess: object, seed: int) -> Data:
    from quantflow.sources.data.tensors import load_random

    return load_random(spec.shape, spec.dtype, spec.calibration, spec.evaluation, spec.batch_size, seed)


def _entry(spec: Any, _preprocess: object, _seed: int) -> Data:
    from quantflow.sources.data.user_data import load_entry

    return load_entry(spec.entry, dict(spec.kwargs), spec.calibration, spec.evaluation)


def _images(
    kind: str, preprocess: ImagePreprocess | TextPreprocess | None, size: int | None
) -> tuple[ImagePreprocess, tuple[str, ...]]:
    if isinstance(preprocess, TextPreprocess):
        raise DataError(f"data={kind} holds images, and the model takes text; use data=text")
    if preprocess is not None:
        return preprocess.with_size(size), ()
    images = IMAGENET.with_size(size)
    notice = (
        f"data={kind}: the model does not say how its images are prepared; ImageNet's mean and standard deviation "
        f"and {images.size} x {images.size} pixels are used (data.size sets another size)"
    )
    return images, (notice,)


_LOADERS = {
    "photos": _photos,
    "folder": _folder,
    "mnist": _mnist,
    "text": _text,
    "tensors": _tensors,
    "random": _random,
    "entry": _entry,
}
