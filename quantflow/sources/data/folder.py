"""Images in a directory of the user's, with a subdirectory per class when they are labelled."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from quantflow.errors import DataError, found_at
from quantflow.ir.batch import Batch
from quantflow.sources.data.preprocess import ImagePreprocess
from quantflow.sources.data.samples import Data, Samples, assemble, split

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")

#: A small file that becomes a huge picture, from 89 million pixels on.
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_folder(
    path: Path, preprocess: ImagePreprocess, calibration: int, evaluation: int, batch_size: int, seed: int,
    notices: tuple[str, ...],
) -> Data:  # fmt: skip
    """A seeded choice of a directory's images, resized and centre-cropped as the model's weights ask.

    Images in subdirectories are labelled: the class is the subdirectory's name where all of them are whole numbers,
    else its position among the sorted names. Images directly in the directory have no label.

    Raises:
        DataError: no such directory, no image in it, some images labelled and others not, or (when its batch is
            made) an image that can't be decoded; names the file.
    """
    if not path.is_dir():
        raise DataError(f"data.path: {path} is {found_at(path)}, expected a directory of images")
    files = sorted(_images(path))
    if not files:
        raise DataError(f"data.path: {path} holds no image; files ending in {', '.join(_SUFFIXES)} are read")
    classes = _classes(path, files)
    chosen, more = split(len(files), calibration, evaluation, seed, f"data.path: {path}")

    def samples(positions: tuple[int, ...]) -> Samples:
        own = [files[i] for i in positions]
        own_labels = None if classes is None else torch.tensor([classes[i] for i in positions])

        def collate(wanted: range) -> Batch:
            pixels = np.stack([_read(own[i], preprocess) for i in wanted])
            labels = None if own_labels is None else own_labels[wanted.start : wanted.stop]
            return Batch((preprocess.normalize(pixels),), labels=labels)

        return Samples(tuple(f.relative_to(path).as_posix() for f in own), collate, _content(own, preprocess))

    return assemble(
        "folder",
        samples(chosen.calibration),
        samples(chosen.evaluation),
        batch_size,
        metric=None if classes is None else "top1",
        notices=(*notices, *more),
    )


def _images(path: Path) -> Iterator[Path]:
    """The image files below a directory. Data must not depend on what lies outside of it, so no link may lead there."""
    root = path.resolve()
    for file in path.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise DataError(
                f"data.path: {file} is a link that leads out of {path}; put the file itself there, or point data.path "
                "at the directory that holds it"
            )
        if file.suffix.lower() in _SUFFIXES and not file.is_dir():
            if not file.is_file():
                raise DataError(f"data.path: {file} is {found_at(file)}, expected an image file; remove it")
            yield file


def _classes(path: Path, files: list[Path]) -> list[int] | None:
    tops = [f.relative_to(path).parts for f in files]
    loose = [f for f, parts in zip(files, tops, strict=True) if len(parts) == 1]
    if len(loose) == len(files):
        return None
    if loose:
        raise DataError(
            f"data.path: {path} holds labelled images (in subdirectories) and unlabelled ones such as "
            f"{loose[0].name}; put every image in its class's subdirectory, or all of them directly in the directory"
        )
    names = sorted({parts[0] for parts in tops})
    numbered = all(c.isdecimal() for c in names)
    numbers = {c: int(c) if numbered else i for i, c in enumerate(names)}
    return [numbers[parts[0]] for parts in tops]


def _read(file: Path, preprocess: ImagePreprocess) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return np.asarray(preprocess.crop(preprocess.convert(image)))
    except (OSError, SyntaxError, ValueError, *_BOMBS) as problem:
        raise DataError(f"{file}: can't be decoded as an image ({problem}); repair or remove the file") from problem


def _content(files: list[Path], preprocess: ImagePreprocess) -> str:
    digest = hashlib.sha256(repr(preprocess).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
