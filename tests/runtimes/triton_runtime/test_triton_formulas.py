"""GELU for codes in fewer terms: how far it is off, and where it is taken."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from quantflow.ir.activations import TRANSCENDENTAL_TIE_CODES, Epilogue
from quantflow.numerics.affine import QParams, quantize
from quantflow.numerics.agreement import disagreement
from quantflow.runtimes.triton import devices

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: .ci/run installs it"),
    pytest.mark.skipif(
        not devices.is_interpreting(), reason="needs TRITON_INTERPRET=1 from the start: .ci/run sets it"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where r * r overflows
]


@pytest.mark.parametrize("number", [10, 11])
def test_a_short_gelu_is_as_far_off_as_it_says(number: int) -> None:
    from quantflow.runtimes.triton import formulas
    from tests.runtimes.triton_runtime.activation_kernel import activate

    # Every 1,217th float of 2^-18 to 2^20, and of both signs: numpy in blocks of 2^18.
    bits = torch.arange(109 << 23, 147 << 23, 1217, dtype=torch.int32)
    bits = torch.cat([bits, torch.zeros(-len(bits) % 2**18, dtype=torch.int32)])
    worst = 0.0
    for part in bits.split(2**18):
        for x in (part.view(torch.float32), -part.view(torch.float32)):
            y = torch.empty_like(x)
            activate[(1,)](x, y, NUMBER=number, SIZE=2**18)
            wide = x.to(torch.float64)
            # Codes are cut behind the last of 255 steps: there only the share of r counts.
            error = (y - nn.functional.gelu(wide)).abs() / wide.abs().clamp(min=16.0) * 16.0
            worst = max(worst, float(error.max()))
    assert worst <= formulas.SHORT_GELUS[number]
    for extreme, expected in ((3e38, 3e38), (-3e38, 0.0), (0.0, 0.0)):
        y = torch.empty(1)
        activate[(1,)](torch.tensor([extreme]), y, NUMBER=number, SIZE=1)
        assert float(y) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("scale", "number"), [(0.05, 10), (0.03, 10), (0.01, 11), (0.004, 6), (None, 6)])
def test_it_is_taken_where_codes_allow_it(scale: float | None, number: int) -> None:
    from quantflow.runtimes.triton.cards import card_of
    from quantflow.runtimes.triton.layers import _MOST_OFF, Finish, Layer

    assert _MOST_OFF < TRANSCENDENTAL_TIE_CODES
    torch.manual_seed(0)
    x, weight = torch.randint(-128, 128, (512, 32)).to(torch.int8), torch.randint(-127, 128, (64, 32)).to(torch.int8)
    weight_scale, bias, q = torch.rand(64) * 6e-4, torch.randn(64), QParams("int8", 0.1, 3)
    out = None if scale is None else QParams("int8", scale, -100)
    layer = Layer(weight, weight_scale, bias, None, Finish(q, out, epilogue=Epilogue("gelu")), card_of("cpu"))
    assert layer.activation == number
    found = layer(x)
    sums = (x.to(torch.int64) - 3) @ weight.to(torch.int64).t()
    real = nn.functional.gelu(sums.to(torch.float32) * (weight_scale * q.scale) + bias)
    if out is None:
        assert ((found - real).abs() <= 4e-6 * (1 + real.abs())).all()
        return
    steps = real.to(torch.float64) / out.scale + out.zero_point
    illegal, _ = disagreement(quantize(real, out), found, steps, TRANSCENDENTAL_TIE_CODES)
    assert not illegal
