"""Weights: read from files without running what they hold, downloaded, or drawn from a seed."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import nn

from quantflow.errors import ModelError, UnavailableError, first_line, found_at
from quantflow.store.tensor_header import require_distinct_file

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"
RANDOM = "random"
AUTO = "auto"

_SHOWN = 5
_CONNECT_TIMEOUT_S = 5.0
_STALL_TIMEOUT_S = 20.0


def is_path(weights: str) -> bool:
    """Whether `weights` names a file rather than one of pretrained, random and auto."""
    return weights not in (PRETRAINED, RANDOM, AUTO)


def random_notice(model: str, seed: int, reason: str | None) -> str:
    """The sentence every report must show when a model's weights are not trained ones."""
    why = "as asked" if reason is None else f"because {reason}"
    return (
        f"RANDOM WEIGHTS: {model} runs with weights drawn from seed {seed}, {why}; its speed and its distance from "
        "float are real, its predictions mean nothing"
    )


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from .pt, .pth and .bin with torch's weights-only unpickler.

    A checkpoint that holds its state under "state_dict" or "model" is opened, and the "module." that
    DistributedDataParallel puts before every name is taken off.

    Raises:
        ModelError: missing or unreadable file, Python objects other than tensors in it, or no tensors.
    """
    if not path.is_file():
        raise ModelError(f"model.weights: {path} is {found_at(path)}, expected a file")
    try:
        loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    except pickle.UnpicklingError as problem:
        raise ModelError(
            f"model.weights: {path} is no plain state dict ({first_line(problem)}); nothing but tensors is ever "
            "unpickled: save model.state_dict() instead, best with safetensors.torch.save_file"
        ) from problem
    except Exception as problem:  # a damaged file can fail anywhere in the unpickler
        raise ModelError(f"model.weights: {path} can't be read ({first_line(problem)}); is it complete?") from problem
    state = _unwrap(loaded)
    if not state:
        raise ModelError(f"model.weights: {path} holds no tensors")
    return state


def apply_state(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads a state dict that must fit exactly.

    Raises:
        ModelError: missing, unexpected or differently shaped entries (lists the first few of each).
    """
    own = module.state_dict()
    counters = {name for name in own if name.endswith(".num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in counters]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} where the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(
            f"model.weights: {source} does not fit the model ({'; '.join(problems)}); check the model's name and "
            "its number of classes"
        )
    module.load_state_dict(dict(state), strict=False)


def download_state(url: str) -> dict[str, torch.Tensor]:
    """Published weights by way of torch.hub's cache; fails within seconds where there is no network.

    Raises:
        UnavailableError: no network, no such file, or a broken download; says what was tried.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not cached.exists():
        _probe(url)
        logger.info("downloading %s", url)
    try:
        with _stall_timeout(_STALL_TIMEOUT_S), contextlib.redirect_stderr(io.StringIO()):
            state = torch.hub.load_state_dict_from_url(
                url, progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as problem:  # the network, the disk, or a damaged file in the unpickler
        cure = f"; delete {cached} to fetch it again" if cached.exists() else ""
        raise UnavailableError(f"{url} can't be loaded ({first_line(problem)}){cure}") from problem
    return state


def draw_zero_weights(module: nn.Module) -> None:
    """Draws weights that an architecture initialises to zero, N(0, 1 / fan_in).

    A classifier that starts at zero (ViT's does) would answer 0 to everything, quantized or not.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and not bool(layer.weight.any()):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any BatchNorm keeps running statistics."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in module.modules())


def _load_safetensors(path: Path) -> object:
    require_distinct_file(path)
    return load_file(path)


def _load_pickled(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(loaded: object) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    for key in ("state_dict", "model"):
        if isinstance(loaded.get(key), Mapping):
            return _unwrap(loaded[key])
    state = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _probe(url: str) -> None:
    """Asks for the file's header in a thread of its own: name resolution knows no timeout."""
    failure: list[BaseException | None] = [TimeoutError(f"no answer within {_CONNECT_TIMEOUT_S:g} s")]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=_CONNECT_TIMEOUT_S):
                failure[0] = None
        except (OSError, ValueError) as problem:
            failure[0] = problem

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_CONNECT_TIMEOUT_S + 1)
    problem = failure[0]
    if problem is not None:
        reason = problem.reason if isinstance(problem, urllib.error.URLError) else problem
        raise UnavailableError(f"{url} can't be reached ({reason})") from problem


@contextlib.contextmanager
def _stall_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
