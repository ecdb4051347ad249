"""MNIST digits for calibration and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from quantflow.ir.batch import Batch
from quantflow.sources.data.digits import DIGITS_PREPROCESS, load_digits
from quantflow.sources.data.preprocess import ImagePreprocess
from quantflow.sources.data.samples import Data, Samples, assemble, hash_of, take


def load_mnist(
    preprocess: ImagePreprocess | None, calibration: int, evaluation: int, batch_size: int, seed: int
) -> Data:
    """Digits of the calibration and evaluation parts, resized and coloured where the model asks for it."""
    images = preprocess or DIGITS_PREPROCESS
    first, notices = _samples("calibration", calibration, images, seed)
    second, more = _samples("evaluation", evaluation, images, seed)
    return assemble("mnist", first, second, batch_size, metric="top1", notices=(*notices, *more))


def _samples(part: str, count: int, preprocess: ImagePreprocess, seed: int) -> tuple[Samples, tuple[str, ...]]:
    digits = load_digits(part)
    positions, notices = take(len(digits.labels), count, seed, f"data=mnist ({part})")
    chosen = list(positions)
    pixels, labels = digits.pixels[chosen], torch.from_numpy(digits.labels[chosen])
    side = (preprocess.size, preprocess.size)

    def image(i: int) -> Image.Image:
        digit = preprocess.convert(Image.fromarray(pixels[i]))
        return digit if digit.size == side else digit.resize(side, Image.Resampling.BICUBIC)

    def collate(wanted: range) -> Batch:
        stacked = np.stack([np.asarray(image(i)) for i in wanted])
        return Batch((preprocess.normalize(stacked),), labels=labels[wanted.start : wanted.stop])

    ids = tuple(f"mnist:{row}" for row in digits.rows[chosen])
    content = hash_of([pixels.tobytes(), digits.labels[chosen].tobytes(), repr(preprocess).encode()])
    return Samples(ids, collate, content), notices
