from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from quantflow.sources.data.preprocess import IMAGENET, ImagePreprocess
from quantflow.sources.models.torchvision_zoo import import_torchvision


@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (256, 256)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_torchvision(shape: tuple[int, int], interpolation: str) -> None:
    import_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
    theirs = ImageClassification(crop_size=224, resize_size=256, interpolation=InterpolationMode(interpolation))(image)
    own = ImagePreprocess(224, 256, IMAGENET.mean, IMAGENET.std, interpolation=interpolation)
    ours = own.normalize(np.asarray(own.crop(own.convert(image)))[None])
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)


def test_grey_images_have_one_channel() -> None:
    grey = ImagePreprocess(28, 28, (0.5,), (0.5,))
    assert grey.convert(Image.new("RGB", (28, 28))).mode == "L"
    x = grey.normalize(np.full((2, 28, 28), 255, np.uint8))
    assert x.shape == (2, 1, 28, 28)
    assert torch.equal(x, torch.ones_like(x))


def test_another_size_keeps_the_crops_proportion() -> None:
    small = IMAGENET.with_size(112)
    assert (small.size, small.resize, small.mean) == (112, 128, IMAGENET.mean)
    assert IMAGENET.with_size(None) is IMAGENET
