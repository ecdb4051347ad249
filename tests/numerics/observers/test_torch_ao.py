from __future__ import annotations

import itertools

import pytest
import torch
from torch.ao.quantization import QConfig as TorchQConfig

from quantflow.errors import UsageError
from quantflow.host.environment import has_exact_int8_products
from quantflow.numerics.affine import activation_qparams
from quantflow.schema import PRESETS, ActivationSpec, QConfig, WeightSpec

X = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("reduce_range", [True, False])
@pytest.mark.parametrize(("dtype", "qscheme"), list(itertools.product(["int8", "uint8"], ["symmetric", "affine"])))
def test_minmax_gives_the_numbers_of_the_affine_formula(dtype: str, qscheme: str, reduce_range: bool) -> None:
    spec = ActivationSpec.model_validate({"dtype": dtype, "qscheme": qscheme})
    converted = QConfig(activation=spec, reduce_range=reduce_range).to_torch()
    assert isinstance(converted, TorchQConfig)
    observer = converted.activation()
    assert observer(X) is X
    scale, zero_point = observer.calculate_qparams()
    expected = activation_qparams(
        float(X.min()), float(X.max()), dtype=dtype, qscheme=qscheme, reduce_range=reduce_range
    )
    assert (float(scale), int(zero_point)) == (expected.scale, expected.zero_point)
    assert observer.dtype == (torch.qint8 if dtype == "int8" else torch.quint8)
    assert observer.qscheme == (torch.per_tensor_symmetric if qscheme == "symmetric" else torch.per_tensor_affine)


def test_codes_keep_their_bits_unless_asked() -> None:
    scales = []
    for reduce_range in ("auto", False, True):
        observer = QConfig(reduce_range=reduce_range).to_torch().activation()
        observer(X)
        scales.append(observer.calculate_qparams()[0])
    assert scales[0] == scales[1] < scales[2]


@pytest.mark.parametrize("name", ["moving_average", "histogram", "percentile", "mse", "entropy"])
def test_every_activation_observer_has_an_equivalent(name: str) -> None:
    spec = ActivationSpec.model_validate({"observer": name})
    observer = QConfig(activation=spec).to_torch().activation()
    observer(X)
    scale, _ = observer.calculate_qparams()
    assert 0 < float(scale) <= float(X.abs().max()) / 127 * 1.01


@pytest.mark.parametrize("name", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize(("granularity", "channels"), [("per_channel", 64), ("per_tensor", 1)])
def test_every_weight_spec_has_an_equivalent(name: str, granularity: str, channels: int) -> None:
    spec = WeightSpec.model_validate({"observer": name, "granularity": granularity})
    observer = QConfig(weight=spec).to_torch().weight()
    with pytest.raises(RuntimeError, match="has seen no weight yet"):
        observer.calculate_qparams()
    observer(X)
    scale, zero_point = observer.calculate_qparams()
    assert scale.shape == zero_point.shape == (channels,)
    assert not zero_point.any()
    if name == "minmax":
        max_abs = X.abs().amax(dim=1) if granularity == "per_channel" else X.abs().amax().reshape(1)
        torch.testing.assert_close(scale, max_abs / 127)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao says so at every call
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_ao_takes_it_from_float_to_int8() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).eval()
    # torch.ao's own kernels saturate where int8 products do.
    saturates = not has_exact_int8_products()
    qconfig = PRESETS["affine_uint8"].model_copy(update={"reduce_range": saturates}).to_torch()
    prepared = prepare_fx(model, {"": qconfig}, (X,))
    prepared(X)
    converted = convert_fx(prepared)
    assert sum(isinstance(module, torch.ao.nn.quantized.Linear) for module in converted.modules()) == 2
    signal, noise = model(X), model(X) - converted(X)
    assert 20 * torch.log10(signal.norm() / noise.norm()) > 30


@pytest.mark.parametrize(
    ("qconfig", "place"),
    [(QConfig(weight=WeightSpec(terms=2)), r"weight\.terms"), (QConfig(input_terms=2), "input_terms")],
)
def test_two_terms_have_none(qconfig: QConfig, place: str) -> None:
    with pytest.raises(UsageError, match=rf"qconfig\.{place}: torch\.ao has no .* in two terms; use 1"):
        qconfig.to_torch()
