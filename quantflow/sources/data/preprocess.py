"""What a model expects of its raw inputs: pinned with the weights, applied by the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImagePreprocess:
    """Pixels to inputs: x = (pixel / divisor - mean) / std, per channel, in float32.

    Attributes:
        size: side of the square the model sees.
        resize: length of the shorter side before the centre crop.
        mean, std: one number per channel, in units of pixel / divisor.
        divisor: 255 for models trained on [0, 1], 1 for those trained on raw pixels.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: float = 255.0
    interpolation: str = "bilinear"

    @property
    def channels(self) -> int:
        return len(self.mean)

    def with_size(self, size: int | None) -> ImagePreprocess:
        """The same normalisation for another input size; the centre crop keeps its proportion."""
        if size is None or size == self.size:
            return self
        resize = round(size * self.resize / self.size)
        return ImagePreprocess(size, resize, self.mean, self.std, self.divisor, self.interpolation)

    def convert(self, image: Image.Image) -> Image.Image:
        """To the model's channels: RGB, or grey for a single channel."""
        return image.convert("L" if self.channels == 1 else "RGB")

    def crop(self, image: Image.Image) -> Image.Image:
        """Shorter side to `resize`, then the middle `size` x `size` (torchvision's Resize and CenterCrop)."""
        width, height = image.size
        short = min(width, height)
        scaled = (int(self.resize * width / short), int(self.resize * height / short))
        image = image.resize(scaled, _RESAMPLING[self.interpolation])
        left, top = (round((side - self.size) / 2.0) for side in scaled)
        return image.crop((left, top, left + self.size, top + self.size))

    def normalize(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """(B, H, W, C) or (B, H, W) uint8 → (B, C, H, W) float32."""
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        values = torch.from_numpy(pixels.reshape(*pixels.shape[:3], self.channels).transpose(0, 3, 1, 2).copy())
        return (values.float() / self.divisor - mean) / std


#: For models that state no preprocessing of their own.
IMAGENET = ImagePreprocess(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TextPreprocess:
    """Texts to token ids, padded and cut to `max_length`.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens per text, padding included.
        limit: the longest sequence the model can take.
    """

    tokenizer: Any = field(repr=False)
    max_length: int
    limit: int

    def encode(self, texts: list[str], max_length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts → input_ids (B, max_length) and attention_mask (B, max_length), both int64."""
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=max_length or self.max_length,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]
