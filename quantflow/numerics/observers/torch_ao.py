"""QConfig as a `torch.ao.quantization.QConfig`, for pipelines built on torch.ao.

torch.ao's own observers divide by 127.5 and can't be told 127 for uint8, and it has no percentile or entropy observer
for activations. The observers here wrap quantflow's, so that scale and zero_point are the very ones a Recipe leads to.
"""

from __future__ import annotations

import torch
from torch.ao.quantization import ObserverBase
from torch.ao.quantization import QConfig as TorchQConfig

from quantflow.errors import UsageError
from quantflow.numerics.affine import ACTIVATION_RANGE, WEIGHT_RANGE, activation_qparams, weight_scale
from quantflow.numerics.observers import make_observer, weight_max_abs
from quantflow.schema import ActivationSpec, QConfig, WeightSpec

_TORCH_DTYPE = {"int8": torch.qint8, "uint8": torch.quint8}
_TORCH_QSCHEME = {
    ("symmetric", "per_tensor"): torch.per_tensor_symmetric,
    ("affine", "per_tensor"): torch.per_tensor_affine,
    ("symmetric", "per_channel"): torch.per_channel_symmetric,
}


def to_torch(qconfig: QConfig) -> TorchQConfig:
    """The equivalent torch.ao QConfig. torch.ao's own kernels saturate without VNNI, unless `reduce_range` is true."""
    if qconfig.weight.terms != 1:
        raise UsageError("qconfig.weight.terms: torch.ao has no weights in two terms; use 1")
    if qconfig.input_terms != 1:
        raise UsageError("qconfig.input_terms: torch.ao has no inputs in two terms; use 1")
    reduced = qconfig.reduce_range is True
    return TorchQConfig(
        activation=ActivationObserver.with_args(spec=qconfig.activation, reduce_range=reduced),
        weight=WeightObserver.with_args(spec=qconfig.weight),
    )


class ActivationObserver(ObserverBase):
    """One of quantflow's activation observers, as torch.ao wants it."""

    def __init__(self, spec: ActivationSpec, reduce_range: bool = False) -> None:
        super().__init__(dtype=_TORCH_DTYPE[spec.dtype])
        self.spec = spec
        self.reduce_range = reduce_range
        self.qscheme = _TORCH_QSCHEME[spec.qscheme, spec.granularity]
        self.quant_min, self.quant_max = ACTIVATION_RANGE[spec.dtype]
        self.observer = make_observer(spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observes `x`, any shape, and returns it."""
        self.observer.observe(x.detach())
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """scale, float32 (1,), and zero_point, int32 (1,)."""
        low, high = self.observer.range()
        qparams = activation_qparams(
            low, high, dtype=self.spec.dtype, qscheme=self.spec.qscheme, reduce_range=self.reduce_range
        )
        return torch.tensor([qparams.scale]), torch.tensor([qparams.zero_point], dtype=torch.int32)


class WeightObserver(ObserverBase):
    """quantflow's weight scales, as torch.ao wants them. Channels are axis 0, as in every torch.ao linear and conv."""

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__(dtype=torch.qint8)
        self.spec = spec
        self.qscheme = _TORCH_QSCHEME[spec.qscheme, spec.granularity]
        self.quant_min, self.quant_max = WEIGHT_RANGE
        self.ch_axis = 0
        self.max_abs: torch.Tensor | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Observes `weight`, (out_channels, …), and returns it."""
        channel_axis = self.ch_axis if self.spec.granularity == "per_channel" else None
        self.max_abs = weight_max_abs(weight.detach(), self.spec, channel_axis)
        return weight

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """scale, float32, and zero_point, int32 zeros; (out_channels,), or (1,) for per_tensor.

        Raises:
            RuntimeError: when no weight was observed yet.
        """
        if self.max_abs is None:
            raise RuntimeError("WeightObserver has seen no weight yet; call it with one before calculate_qparams")
        scale = weight_scale(self.max_abs).reshape(-1)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
