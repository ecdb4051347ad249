"""Random crops of natural photos that arrive in scikit-image and scikit-learn: data without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quantflow.ir.batch import Batch
from quantflow.sources.data.packages import file_in_package
from quantflow.sources.data.preprocess import ImagePreprocess
from quantflow.sources.data.samples import Data, Samples, assemble, hash_of

_SKIMAGE = ("skimage", "data", "scikit-image")
_SKLEARN = ("sklearn", "datasets/images", "scikit-learn")
#: Disjoint photos for calibration and evaluation, each with the offset of its random seed.
_CALIBRATION = (
    (_SKIMAGE, "astronaut.png"),
    (_SKIMAGE, "coffee.png"),
    (_SKIMAGE, "rocket.jpg"),
    (_SKLEARN, "china.jpg"),
)
_EVALUATION = (
    (_SKIMAGE, "chelsea.png"),
    (_SKLEARN, "flower.jpg"),
    (_SKIMAGE, "motorcycle_left.png"),
    (_SKIMAGE, "ihc.png"),
    (_SKIMAGE, "hubble_deep_field.jpg"),
)
_CALIBRATION_SEED = 1
_EVALUATION_SEED = 2


@dataclass(frozen=True)
class Crop:
    """A square of `side` pixels at (top, left) of photo number `photo`, mirrored or not."""

    photo: int
    top: int
    left: int
    side: int
    mirrored: bool

    def cut(self, pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
        """(H, W) or (H, W, C) → the crop, resized to size x size."""
        square = pixels[self.top : self.top + self.side, self.left : self.left + self.side]
        resized = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))
        return resized[:, ::-1] if self.mirrored else resized


def draw_crops(shapes: list[tuple[int, int]], count: int, seed: int) -> list[Crop]:
    """`count` crops, the photos in turn: sides of 35 to 100 % of the shorter side, uniform position, half mirrored.

    Args:
        shapes: (height, width) of each photo.
    """
    random = np.random.default_rng(seed)
    crops = []
    for i in range(count):
        height, width = shapes[i % len(shapes)]
        side = int(min(height, width) * random.uniform(0.35, 1.0))
        top = int(random.integers(0, height - side + 1))
        left = int(random.integers(0, width - side + 1))
        crops.append(Crop(i % len(shapes), top, left, side, bool(random.random() < 0.5)))
    return crops


def load_photos(
    preprocess: ImagePreprocess, calibration: int, evaluation: int, batch_size: int, seed: int, notices: tuple[str, ...]
) -> Data:
    """Crops of four photos for calibration and of five others for evaluation."""
    return assemble(
        "photos",
        _samples(_CALIBRATION, calibration, _CALIBRATION_SEED + seed, preprocess),
        _samples(_EVALUATION, evaluation, _EVALUATION_SEED + seed, preprocess),
        batch_size,
        notices=notices,
    )


def _samples(
    photos: tuple[tuple[tuple[str, str, str], str], ...], count: int, seed: int, preprocess: ImagePreprocess
) -> Samples:
    files = [_find(package, name) for package, name in photos]
    pixels = []
    for file in files:
        with Image.open(file) as image:
            pixels.append(np.asarray(preprocess.convert(image)))
    crops = draw_crops([p.shape[:2] for p in pixels], count, seed)

    def collate(positions: range) -> Batch:
        cuts = [crops[i].cut(pixels[crops[i].photo], preprocess.size) for i in positions]
        return Batch((preprocess.normalize(np.stack(cuts)),))

    ids = tuple(f"{files[c.photo].stem}@{c.top},{c.left}+{c.side}{'-mirrored' * c.mirrored}" for c in crops)
    return Samples(ids, collate, hash_of([*(f.read_bytes() for f in files), repr(preprocess).encode()]))


def _find(package: tuple[str, str, str], name: str) -> Path:
    module, directory, distribution = package
    return file_in_package(module, f"{directory}/{name}", purpose="data=photos", distribution=distribution)
