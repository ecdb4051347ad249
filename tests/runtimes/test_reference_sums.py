"""The reference's sums are exact, whichever floats it adds them up in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from quantflow.host.place import adds_exactly_in_float32
from quantflow.numerics.affine import QParams
from quantflow.runtimes.reference import FLOAT32_INTEGERS, _exact_operands

#: The zero point is 0: what is given is centered.
CENTERED = QParams("int8", 1.0, 0)


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("depth", [1, 300, 515, 520, 4096])
@pytest.mark.parametrize("largest", [128, 255])
def test_sums_are_exact_up_to_the_last_whole_number_that_float32_holds(depth: int, largest: int) -> None:
    torch.manual_seed(depth)
    weight = torch.randint(-127, 128, (16, depth), dtype=torch.int8)
    weight[0] = 127
    x = torch.randint(-largest, largest + 1, (8, depth)).to(torch.float64)
    x[0] = largest
    a, b = _exact_operands(x, CENTERED, weight)
    fits = depth * 127 * largest <= FLOAT32_INTEGERS
    assert a.dtype == b.dtype == (torch.float32 if fits and adds_exactly_in_float32() else torch.float64)
    assert torch.equal(F.linear(a, b).double(), F.linear(x, weight.double()))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("batch", [1, 17])
def test_convolutions_sums_are_exact(groups: int, batch: int) -> None:
    torch.manual_seed(groups)
    weight = torch.randint(-127, 128, (32, 32 // groups, 3, 3), dtype=torch.int8)
    x = torch.randint(-255, 256, (batch, 32, 12, 12)).to(torch.float64)
    a, b = _exact_operands(x, CENTERED, weight)
    found = F.conv2d(a, b, None, 1, 1, 1, groups)
    assert torch.equal(found.double(), F.conv2d(x, weight.double(), None, 1, 1, 1, groups))


@pytest.mark.usefixtures("restored")
def test_float64_adds_up_where_a_user_lets_float32_be_shorter() -> None:
    torch.set_float32_matmul_precision("medium")
    assert not adds_exactly_in_float32()
    a, b = _exact_operands(torch.ones(2, 3, dtype=torch.float64), CENTERED, torch.ones(4, 3, dtype=torch.int8))
    assert a.dtype == b.dtype == torch.float64


@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_codes_are_centered_by_their_zero_point(zero_point: int) -> None:
    q = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    weight = torch.full((2, 64), 127, dtype=torch.int8)
    a, b = _exact_operands(q, QParams("uint8", 0.5, zero_point), weight)
    assert torch.equal(a.double(), q.double() - zero_point)
    assert torch.equal(b.double(), weight.double())
    assert a.dtype == b.dtype
