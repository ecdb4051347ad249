"""A user's own models, as tests hand them to quantflow: `write_models(folder)` puts this file there as mine.py.

Small on purpose: every one runs in milliseconds on images of (batch, 3, 8, 8).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Own(nn.Module):
    """Two linears, further parts, and any forward: forward(module, *args)."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(8, 8), nn.Linear(8, 8), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.f(self, *args)


def net() -> nn.Module:
    """conv-bn-relu, a residual block, a classifier."""
    return Net()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(x + self.block(x))
        return self.head(x.mean((2, 3)))


def no_layers() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Flatten())


def only_functions() -> nn.Module:
    return Functional()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight)


def nan_weights() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.block.weight[0, 0, 0, 0] = float("nan")
    return model


def overflows() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.stem[0].weight.fill_(1e38)
    return model


def half() -> nn.Module:
    return Net().half()


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


def on_meta() -> nn.Module:
    return Net().to("meta")


def returns_text() -> str:
    return "resnet18"


def raises() -> nn.Module:
    raise RuntimeError("no such checkpoint: v3")


def needs_width(width: int) -> nn.Module:
    return nn.Linear(width, width)


class Branching(nn.Module):
    """Its path depends on the data: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y if float(y.sum()) > 0 else -y


class Unscriptable(nn.Module):
    """*args and a generator are beyond torch.jit.script."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return sum(self.conv(x) for x in xs)  # type: ignore[return-value]


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> None:
        self.conv(x)


table = OrderedDict(a=1)


def good_batches() -> list[torch.Tensor]:
    return list(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(2))


def odd_one_out() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)]


def late_nan() -> list[torch.Tensor]:
    batches = good_batches()
    batches[2][1, 0, 0, 0] = float("nan")
    return batches


def arrays() -> list[object]:
    return [torch.zeros(2, 3, 8, 8).numpy()]


def breaks_down() -> Iterator[torch.Tensor]:
    yield torch.randn(2, 3, 8, 8)
    raise OSError("disk gone")


def nothing() -> list[torch.Tensor]:
    return []


def gives_up() -> nn.Module:
    raise SystemExit(0)


class Normed(nn.Module):
    """A LayerNorm, which has no int8 form, after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))
