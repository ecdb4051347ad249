from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.errors import DataError, ModelError, VerificationError
from quantflow.ir.batch import Batch
from quantflow.numerics.affine import QParams, dequantize, quantize
from quantflow.numerics.measures import max_error, sqnr_db
from quantflow.stages.evaluate import ErrorSum, compare_layers, evaluate, spearman, tensors


def batches_of(x: torch.Tensor, size: int, labels: torch.Tensor | None = None) -> list[Batch]:
    parts = x.split(size)
    own = labels.split(size) if labels is not None else [None] * len(parts)
    return [Batch((part,), labels=label) for part, label in zip(parts, own, strict=True)]


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.sin(100 * x)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 20))
def test_the_figures_do_not_depend_on_the_batch_size(size: int) -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    result = evaluate(identity, noisy, batches_of(x, size), outputs="logits")
    assert result["sqnr_db"] == pytest.approx(sqnr_db(x, noisy(x)))
    assert result["max_error"] == pytest.approx(max_error(x, noisy(x)))
    assert result["agreement"] == pytest.approx((x.argmax(1) == noisy(x).argmax(1)).double().mean().item())
    assert result["samples"] == 20
    assert not result["identical"]


def test_identical_outputs(logits: torch.Tensor) -> None:
    result = evaluate(identity, identity, batches_of(logits, 8))
    assert (result["sqnr_db"], result["max_error"], result["agreement"]) == (math.inf, 0, 1)
    assert (result["identical"], result["cosine_min"], result["metric"]) == (True, 1, None)


def test_keyword_inputs_reach_both_models() -> None:
    batch = Batch((), {"a": torch.ones(2, 3), "b": torch.ones(2, 3)})
    assert evaluate(lambda a, b: a + b, lambda b, a: a - b, [batch])["sqnr_db"] == 0


def test_progress_counts_batches(logits: torch.Tensor) -> None:
    seen: list[Any] = []
    evaluate(identity, identity, batches_of(logits, 8), progress=lambda *at: seen.append(at))
    evaluate(identity, identity, iter(batches_of(logits, 20)), progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, None)]


@pytest.mark.parametrize(
    ("damage", "nonfinite"),
    [
        (lambda x: x.index_fill(0, torch.tensor([0]), math.nan), {"float": 0, "int8": 5}),
        (lambda x: x.index_fill(1, torch.tensor([0]), math.inf), {"float": 0, "int8": 20}),
    ],
)
def test_nonfinite_int8_outputs_are_counted_and_spoil_the_figures(
    logits: torch.Tensor, damage: Callable[[torch.Tensor], torch.Tensor], nonfinite: dict[str, int]
) -> None:
    result = evaluate(identity, damage, batches_of(logits, 20))
    assert math.isnan(result["sqnr_db"])
    assert result["max_error"] == math.inf
    assert result["nonfinite"] == nonfinite
    assert not result["identical"]


def test_two_models_of_nothing_but_nan_do_not_look_equal(logits: torch.Tensor) -> None:
    result = evaluate(lambda x: x * math.nan, lambda x: x * math.nan, batches_of(logits, 8), outputs="logits")
    assert math.isnan(result["sqnr_db"])
    assert result["agreement"] == 0


def test_infinities_that_agree_are_left_out(logits: torch.Tensor) -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(1, torch.tensor([4]), -math.inf)

    result = evaluate(masked, lambda x: noisy(masked(x)).nan_to_num(nan=-math.inf), batches_of(logits, 20))
    assert 0 < result["sqnr_db"] < 60
    assert result["nonfinite"] == {"float": 20, "int8": 20}


def test_nested_outputs_are_judged_by_their_first_floating_point_tensor(logits: torch.Tensor) -> None:
    def nested(x: torch.Tensor) -> Any:
        return OrderedDict(index=torch.arange(len(x)), more=[(x, 2 * x)], none=None)

    result = evaluate(nested, lambda x: nested(noisy(x)), batches_of(logits, 8))
    assert result["sqnr_db"] == pytest.approx(sqnr_db(logits, noisy(logits)))
    assert [other["output"] for other in result["others"]] == ["output.index", "output.more[0][1]"]
    assert [path for path, _ in tensors(nested(logits))] == ["output.index", "output.more[0][0]", "output.more[0][1]"]


def test_classes_of_segmentation_and_token_outputs() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[:, 1] = 1
    flipped = images.flip(1).contiguous()
    flipped[:, 2, 0] = 2
    assert evaluate(identity, lambda _: flipped, [Batch((images,))], outputs="logits")["agreement"] == 0.75
    tokens = torch.randn(2, 7, 5)
    assert evaluate(identity, lambda x: x.roll(1, -1), [Batch((tokens,))], outputs="logits")["agreement"] == 0


@pytest.mark.parametrize("shape", [(4,), (4, 1), ()])
def test_outputs_without_classes(shape: tuple[int, ...]) -> None:
    result = evaluate(lambda _: torch.ones(shape), lambda _: torch.ones(shape), [Batch((torch.ones(4, 2),))])
    assert (result["agreement"], result["cosine_mean"]) == (None, None)


def test_embeddings_list_a_cosine_for_every_sample() -> None:
    x = torch.eye(3)
    batch = Batch((x,), ids=("a", "b", "c"))
    result = evaluate(identity, lambda x: x + torch.tensor([0, 0, 1.0]), [batch], outputs="embedding")
    assert result["agreement"] is None
    assert [sample["id"] for sample in result["cosine_per_sample"]] == ["a", "b", "c"]
    assert [sample["cosine"] for sample in result["cosine_per_sample"]] == pytest.approx([0.5**0.5, 0.5**0.5, 1])


def test_rows_of_zeros_in_both_have_cosine_1() -> None:
    assert evaluate(torch.zeros_like, torch.zeros_like, [Batch((torch.ones(2, 3),))])["cosine_min"] == 1


# Task metrics


def test_top1_of_both_models_and_the_drop() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    right = torch.eye(4)
    wrong_once = right.clone()
    wrong_once[3] = torch.tensor([9, 0, 0, 0])
    result = evaluate(identity, lambda _: wrong_once, batches_of(right, 4, labels), metric="top1", outputs="logits")
    metric = result["metric"]
    assert (metric["float"], metric["int8"], metric["drop"], metric["samples"]) == (1, 0.75, 0.25, 4)
    assert metric["standard_error"] == pytest.approx(math.sqrt((0.25 - 0.0625) / 4))


def test_a_row_of_nan_is_never_right() -> None:
    x = torch.eye(2)
    result = evaluate(identity, lambda x: x * math.nan, batches_of(x, 2, torch.tensor([0, 1])), metric="top1")
    assert (result["metric"]["float"], result["metric"]["int8"]) == (1, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5]), "labels run from 0 to 5, but the model has 3 classes, 0 to 2"),
        (torch.tensor([-1, 0]), "labels run from -1"),
        (torch.tensor([0]), r"labels \(batch,\); found \(2, 3\) and \(1,\)"),
    ],
)
def test_labels_that_do_not_fit(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(identity, identity, [Batch((torch.ones(2, 3),), labels=labels)], metric="top1")


@pytest.mark.parametrize("metric", ["top1", "spearman"])
def test_a_metric_without_labels_is_missing(logits: torch.Tensor, metric: str) -> None:
    assert evaluate(identity, noisy, batches_of(logits, 8), metric=metric)["metric"] is None


def test_spearman_over_all_pairs_of_all_batches() -> None:
    spearmanr = pytest.importorskip("scipy.stats", reason="scipy is what ours is compared with").spearmanr
    generator = torch.Generator().manual_seed(0)
    x, ratings = torch.randn(12, 6, generator=generator), torch.rand(12, 12, generator=generator)
    result = evaluate(identity, noisy, batches_of(x, 5, ratings), metric="spearman", outputs="embedding")
    first, second = torch.triu_indices(12, 12, offset=1)

    def expected(rows: torch.Tensor) -> float:
        unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
        return float(spearmanr((unit @ unit.T)[first, second], ratings[first, second]).statistic)

    metric = result["metric"]
    assert metric["float"] == pytest.approx(expected(x))
    assert metric["int8"] == pytest.approx(expected(noisy(x)))
    assert metric["drop"] == pytest.approx(metric["float"] - metric["int8"])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_with_ties_equals_scipys(pairs: list[tuple[int, int]]) -> None:
    spearmanr = pytest.importorskip("scipy.stats", reason="scipy is what ours is compared with").spearmanr
    a, b = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(float(spearmanr(a, b).statistic))


def test_spearman_with_nan_is_nan() -> None:
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 2]), torch.tensor([1.0, 2, 3])))


def test_ratings_that_do_not_fit() -> None:
    batch = Batch((torch.ones(4, 3),), labels=torch.ones(4, 3))
    with pytest.raises(DataError, match="4 samples were rated against only 3"):
        evaluate(identity, identity, [batch], metric="spearman")
    with pytest.raises(DataError, match="a row of ratings per sample"):
        evaluate(identity, identity, [Batch((torch.ones(4, 3),), labels=torch.ones(4))], metric="spearman")


# Errors


def test_no_batches() -> None:
    with pytest.raises(DataError, match="evaluation got no batches"):
        evaluate(identity, identity, [])


def test_no_tensor_in_the_output(logits: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="no tensor"):
        evaluate(lambda _: "text", identity, batches_of(logits, 8))


@pytest.mark.parametrize(
    ("int8_fn", "message"),
    [(lambda x: x[:, 1:], r"shape \(8, 5\), int8's has shape \(8, 4\)"), (lambda _: None, "int8's is missing")],
)
def test_outputs_of_another_shape(logits: torch.Tensor, int8_fn: Callable[..., Any], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        evaluate(identity, int8_fn, batches_of(logits, 8))


# Layers


def test_layers_are_compared_in_the_int8_models_order() -> None:
    def run(scale: float, names: tuple[str, ...], *qparams: None) -> Callable[[Batch, Callable[..., None]], None]:
        def layers(batch: Batch, on_value: Callable[..., None]) -> None:
            x = batch.args[0]
            for name in names:
                x = (x + 1) * scale
                on_value(name, x, *qparams)

        return layers

    x = torch.arange(12.0).reshape(4, 3)
    rows = compare_layers(run(1, ("a", "b", "only_float")), run(1.01, ("a", "b", "only_int8"), None), batches_of(x, 3))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[0]["sqnr_db"] == pytest.approx(sqnr_db(x + 1, (x + 1) * 1.01), abs=1e-3)
    assert rows[1]["sqnr_db"] < rows[0]["sqnr_db"]


@pytest.mark.parametrize("shape", [(3, 5, 67, 91), (70_000, 3), (2, 40_000), (131_072,)])
def test_errors_are_added_up_piece_by_piece(shape: tuple[int, ...]) -> None:
    """Whatever the pieces are and however the two lie in memory; every value that is not finite is counted once."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = x + 0.1 * torch.randn(shape)
    if x.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    whole = ErrorSum()
    whole.add(x, y)
    assert whole.sqnr_db == pytest.approx(sqnr_db(x, y), abs=1e-6)
    assert whole.elements == x.numel()
    assert (whole.max_error, whole.largest) == ((x.double() - y.double()).abs().max().item(), x.abs().max().item())
    x.view(-1)[-2:] = torch.tensor([math.inf, math.nan])
    broken = ErrorSum()
    broken.add(x, y)
    assert (broken.nonfinite_float, broken.nonfinite_int8, broken.elements) == (2, 0, x.numel() - 2)
    assert math.isnan(broken.sqnr_db)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (3, 17), ()])
def test_errors_of_codes_are_those_of_what_they_stand_for(dtype: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    qparams = QParams(dtype, 0.03, 7)
    x = torch.randn(shape)
    codes = quantize(x, qparams)
    if x.dim() == 4:
        codes = codes.contiguous(memory_format=torch.channels_last)
    found, wanted = ErrorSum(), ErrorSum()
    found.add(x, codes, qparams)
    wanted.add(x, dequantize(codes, qparams))
    assert found == wanted
    assert found.elements == x.numel()


def test_errors_are_the_same_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, qparams = torch.randn(3, 4, 50, 41), QParams("uint8", 0.03, 128)
    pairs = [(x, x + 0.1 * torch.randn(x.shape), None), (x[:, ::2], quantize(x[:, ::2], qparams), qparams)]
    sums = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr("quantflow.stages.evaluate.error_sums", lambda *_: None)
        for pair in pairs:
            sums.append(ErrorSum())
            sums[-1].add(*pair)
    for a, b in zip(sums[:2], sums[2:], strict=True):
        assert (a.signal, a.noise) == pytest.approx((b.signal, b.noise), rel=1e-12)
        assert (a.largest, a.largest_error, a.elements) == (b.largest, b.largest_error, b.elements)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(1, 40))
def test_error_sum_of_parts_equals_the_whole(values: list[float], cut: int) -> None:
    x = torch.tensor(values)
    y = x.round()
    parts = ErrorSum()
    parts.add(x[:cut], y[:cut])
    parts.add(x[cut:], y[cut:])
    whole = sqnr_db(x, y)
    assert parts.sqnr_db == whole or parts.sqnr_db == pytest.approx(whole)
    assert parts.max_error == max_error(x, y)
