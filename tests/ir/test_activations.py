"""What the table says of each activation is true of its formula."""

from __future__ import annotations

import pytest
import torch

from quantflow.ir.activations import ACTIVATIONS, Epilogue, apply_epilogue, tie_tolerance
from quantflow.numerics.agreement import TIE_CODES, TRANSCENDENTAL_TIE_CODES

X = torch.linspace(-8, 8, 4001)


def example(kind: str) -> Epilogue:
    return Epilogue(kind, ACTIVATIONS[kind].example)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_formula_is_its_aten_op(kind: str) -> None:
    activation = ACTIVATIONS[kind]
    numbers = dict(zip(activation.numbers, activation.example, strict=True))
    op = getattr(torch.ops.aten, activation.aten).default
    assert torch.equal(op(X, **numbers, **activation.when), apply_epilogue(X, example(kind)))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_table_tells_the_truth(kind: str) -> None:
    epilogue = example(kind)
    y = apply_epilogue(X, epilogue)
    assert epilogue.is_nonnegative == bool((y >= 0).all())
    assert epilogue.keeps_nonnegative == bool((y[X >= 0] >= 0).all())
    assert epilogue.activation.is_homogeneous == torch.equal(apply_epilogue(4 * X, epilogue), 4 * y)
    if epilogue.bounds:
        assert torch.equal(y, X.clamp(*epilogue.bounds))


def test_a_clamp_to_negative_numbers_keeps_nothing_nonnegative() -> None:
    assert not Epilogue("hardtanh", (-2.0, -1.0)).keeps_nonnegative
    assert not Epilogue("hardtanh", (0.0, -1.0)).is_nonnegative
    assert Epilogue("hardtanh", (0.0, 6.0)).is_nonnegative


def test_approximated_activations_get_a_wider_tie() -> None:
    assert tie_tolerance(Epilogue("gelu")) == TRANSCENDENTAL_TIE_CODES
    assert tie_tolerance(Epilogue("relu")) == tie_tolerance(None) == TIE_CODES < TRANSCENDENTAL_TIE_CODES


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'softplus' is not known"):
        apply_epilogue(X, Epilogue("softplus"))
