"""A small CNN, trained in seconds on real digits and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from quantflow.errors import ModelError, UnavailableError
from quantflow.host.environment import cache_folder
from quantflow.numerics.seed import seeded
from quantflow.sources.data.digits import DIGITS_PREPROCESS, load_digits
from quantflow.sources.models.loaded import LoadedModel, Progress
from quantflow.sources.models.weights import AUTO, RANDOM, apply_state, is_path, load_state, random_notice

logger = logging.getLogger(__name__)

#: Whatever changes the trained weights is in here, so that the cache can't serve stale ones.
_TRAINING = {"version": 1, "epochs": 10, "batch_size": 50, "max_lr": 0.01, "shift": 2}


class MnistCnn(nn.Module):
    """Three times convolution, BatchNorm and ReLU, then a max pool and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(64 * 3 * 3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) → (B, 10) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def load_mnist_cnn(weights: str, seed: int, progress: Progress | None = None) -> LoadedModel:
    """The small CNN: trained here (weights=auto or pretrained), random, or from a file.

    Training takes seconds and happens once per seed; the result lies in $XDG_CACHE_HOME/quantflow.

    Args:
        progress: called with (steps of training done, steps in all).

    Raises:
        ModelError: a weights file that does not fit.
        UnavailableError: weights=pretrained and the digits' package is missing.
    """
    with seeded(seed):
        module = MnistCnn()
    used = f"random (seed {seed})"
    notices: tuple[str, ...] = ()
    estimate = False
    if is_path(weights):
        apply_state(module, load_state(Path(weights)), weights)
        used = weights
    elif weights == RANDOM:
        notices, estimate = (random_notice("mnist_cnn", seed, None),), True
    else:
        try:
            state, used = _trained(seed, progress)
            apply_state(module, state, used)
        except UnavailableError as problem:
            if weights != AUTO:
                raise
            notices, estimate = (random_notice("mnist_cnn", seed, str(problem)),), True
    return LoadedModel(
        module=module.eval(),
        name="mnist_cnn",
        preprocess=DIGITS_PREPROCESS,
        weights_requested=weights,
        weights_used=used,
        notices=notices,
        batchnorm_to_estimate=estimate,
        outputs="logits",
    )


def _trained(seed: int, progress: Progress | None) -> tuple[dict[str, torch.Tensor], str]:
    key = hashlib.sha256(json.dumps(_TRAINING | {"seed": seed}, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / f"mnist_cnn-{key}.safetensors"
    used = f"trained on {len(load_digits('train').labels)} digits (seed {seed})"
    if file.is_file():
        try:
            state = load_file(file)
            apply_state(MnistCnn(), state, str(file))
        except (SafetensorError, OSError, ModelError) as problem:
            logger.warning("the cached %s can't be used (%s); training again", file, problem)
        else:
            return state, used
    logger.info("training the digit CNN (a few seconds, once); it will be kept as %s", file)
    module = train(seed, progress)
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    try:
        _write(file, save(state))
    except OSError as problem:
        logger.warning("the trained digit CNN can't be kept in %s (%s)", file.parent, problem)
    return state, used


def train(seed: int, progress: Progress | None = None) -> MnistCnn:
    """Trains on the digits' train part with AdamW, a one-cycle learning rate and random shifts.

    One thread: the order of float additions, and with it the weights, would follow the number of threads.

    Args:
        progress: called with (steps done, steps in all).
    """
    digits = load_digits("train")
    inputs = DIGITS_PREPROCESS.normalize(digits.pixels)
    labels = torch.from_numpy(digits.labels)
    epochs, size, shift = int(_TRAINING["epochs"]), int(_TRAINING["batch_size"]), int(_TRAINING["shift"])
    steps = -(-len(labels) // size)
    with seeded(seed), _one_thread(), torch.enable_grad(), torch.inference_mode(False):
        module = MnistCnn().train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _TRAINING["max_lr"], epochs=epochs, steps_per_epoch=steps)
        for epoch in range(epochs):
            for step, chosen in enumerate(torch.randperm(len(labels)).split(size), start=1):
                loss = F.cross_entropy(module(_shifted(inputs[chosen], shift)), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                if progress is not None:
                    progress(epoch * steps + step, epochs * steps)
    return module.eval().requires_grad_(False)


def _shifted(images: torch.Tensor, most: int) -> torch.Tensor:
    """Each image (B, 1, H, W) rolled by up to `most` pixels down and right; the border is empty."""
    count, _, height, width = images.shape
    down, right = torch.randint(-most, most + 1, (2, count, 1))
    rows = (torch.arange(height) - down) % height
    columns = (torch.arange(width) - right) % width
    return images[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.stem, delete=False) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
