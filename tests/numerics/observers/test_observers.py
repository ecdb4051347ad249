"""What holds for every observer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.numerics.affine import activation_qparams, dequantize, quantize
from quantflow.numerics.measures import sqnr_db
from quantflow.numerics.observers import OBSERVERS, make_observer
from quantflow.schema import ActivationSpec
from tests.numerics.observers.strategies import SPECS, TENSORS, observed

ALL = pytest.mark.parametrize("name", sorted(OBSERVERS))
BATCHES = st.lists(TENSORS, min_size=2, max_size=5)


@given(SPECS, BATCHES, st.integers(0, 5))
@settings(deadline=None)
def test_two_halves_merged_are_the_whole(spec: ActivationSpec, batches: list[torch.Tensor], cut: int) -> None:
    first, second, whole = observed(spec, batches[:cut]), observed(spec, batches[cut:]), observed(spec, batches)
    kept = first.state()
    merged = first.merge(second)
    assert merged == whole
    assert merged.range() == whole.range()
    assert all(torch.equal(kept[part], x) for part, x in first.state().items())


@given(SPECS.filter(lambda spec: spec.observer != "moving_average"), BATCHES, st.randoms())
@settings(deadline=None)
def test_the_order_of_batches_does_not_matter(
    spec: ActivationSpec, batches: list[torch.Tensor], random: object
) -> None:
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert observed(spec, shuffled) == observed(spec, batches)
    assert observed(spec, [torch.cat(batches)]) == observed(spec, batches)


@given(SPECS, st.lists(TENSORS, max_size=3))
@settings(deadline=None)
def test_state_round_trip(spec: ActivationSpec, batches: list[torch.Tensor]) -> None:
    original, restored = observed(spec, batches), make_observer(spec)
    restored.load_state(original.state())
    assert restored == original
    assert restored.is_empty == original.is_empty == (not batches)


@given(SPECS, BATCHES)
@settings(deadline=None)
def test_ranges_are_legal_and_inside_the_data_and_zero(spec: ActivationSpec, batches: list[torch.Tensor]) -> None:
    low, high = observed(spec, batches).range()
    x = torch.cat(batches)
    activation_qparams(low, high, dtype=spec.dtype, qscheme=spec.qscheme)
    slack = 1e-6 * x.abs().max().item()
    assert min(x.min().item(), 0) - slack <= low <= high <= max(x.max().item(), 0) + slack


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_and_leave_no_trace(name: str, bad: float) -> None:
    observer = observed(ActivationSpec(observer=name), [torch.tensor([1.0, -2.0])])
    before = observed(observer.spec, [torch.tensor([1.0, -2.0])])
    x = torch.zeros(3, 5)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="NaN" if math.isnan(bad) else "Inf"):
        observer.observe(x)
    assert observer == before


@ALL
def test_nothing_observed_has_no_range(name: str) -> None:
    observer = make_observer(ActivationSpec(observer=name))
    observer.observe(torch.empty(0, 4))
    assert observer.is_empty
    assert "empty" in repr(observer)
    with pytest.raises(ValueError, match="nothing was observed"):
        observer.range()


@ALL
@pytest.mark.parametrize("qscheme", ["symmetric", "affine"])
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-45, 3e38])
def test_a_single_value_is_coded_exactly(name: str, qscheme: str, value: float) -> None:
    x = torch.full((7,), value)
    low, high = observed(ActivationSpec(observer=name, qscheme=qscheme), [x]).range()
    qparams = activation_qparams(low, high, dtype="int8", qscheme=qscheme)
    assert dequantize(quantize(x, qparams), qparams) == pytest.approx(x, rel=1e-6, abs=1e-40)


@ALL
def test_layout_dtype_and_shape_do_not_matter(name: str) -> None:
    spec, x = ActivationSpec(observer=name), torch.randn(2, 8, 5, 3).bfloat16().float()
    expected = observed(spec, [x])
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.flatten(),
        x.transpose(1, 3),
        x.repeat_interleave(2, 0)[::2],
        x.double(),
        x.bfloat16(),
        x.clone().requires_grad_(),
    ):
        assert observed(spec, [same]) == expected
    assert observed(spec, [x[:1, :1, :1, :1].expand(4, 4, 1, 1)]) == observed(spec, [x[0, 0, 0, 0].repeat(16)])
    assert observed(spec, [x[0, 0, 0, 0]]) == observed(spec, [x[:1, :1, :1, 0]])


@ALL
def test_observing_works_in_and_out_of_inference_mode(name: str) -> None:
    spec, x = ActivationSpec(observer=name), torch.randn(20)
    observer = make_observer(spec)
    with torch.inference_mode():
        observer.observe(x)
    observer.observe(2 * x)
    assert observer == observed(spec, [x, 2 * x])
    observer.range()


@ALL
def test_only_like_observers_merge(name: str) -> None:
    spec = ActivationSpec(observer=name)
    other = make_observer(spec.model_copy(update={"percentile": 90.0}))
    with pytest.raises(ValueError, match="one kind and one spec"):
        make_observer(spec).merge(other)


@ALL
def test_a_foreign_state_is_refused(name: str) -> None:
    observer = observed(ActivationSpec(observer=name), [torch.randn(9)])
    state = observer.state()
    part = next(iter(state))
    for broken in (
        {},
        {**state, "more": torch.zeros(1)},
        {**state, part: state[part].to(torch.float64)},
        {**state, part: torch.zeros(3, 3, 3, dtype=state[part].dtype)},
    ):
        with pytest.raises(ValueError, match="expected"):
            observer.load_state(broken)
    assert observer.state().keys() == state.keys()


@ALL
@pytest.mark.parametrize("qscheme", ["symmetric", "affine"])
def test_real_looking_data_is_coded_well(name: str, qscheme: str) -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.relu(torch.randn(20_000)) if qscheme == "affine" else torch.randn(20_000)
    qparams = activation_qparams(
        *observed(ActivationSpec(observer=name, qscheme=qscheme), [x]).range(), dtype="int8", qscheme=qscheme
    )
    assert sqnr_db(x, dequantize(quantize(x, qparams), qparams)) > 38


def test_the_table_and_the_schema_name_the_same_observers() -> None:
    legal = ActivationSpec.model_json_schema()["properties"]["observer"]["enum"]
    assert sorted(legal) == sorted(OBSERVERS)
