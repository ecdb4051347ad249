"""Calibration: what it measures, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.errors import ArtifactError, CalibrationError, DataError
from quantflow.ir.batch import Batch
from quantflow.numerics.observers import OBSERVERS, make_observer
from quantflow.schema import ActivationSpec
from quantflow.stages.calibrate import CalibrationTable, calibrate


class TwoLayers:
    """A prepared model stand-in: x → 'double' → 'relu'; the gain can make it overflow."""

    def __init__(self, observer: str = "minmax", gain: float = 2.0, observed: tuple[str, ...] = ()) -> None:
        self.observed: Mapping[str, ActivationSpec] = {
            name: ActivationSpec(observer=observer) for name in ("double", "relu", *observed)
        }
        self.layers = {"double": "block.double"}
        self.gain = gain
        self.runs = 0

    def run(self, batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> torch.Tensor:
        self.runs += 1
        (x,) = batch.args
        double = x @ torch.eye(4) * self.gain
        on_value("double", double)
        on_value("relu", double.relu())
        return double


def some_batches(count: int = 6, size: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(count)
    return [
        Batch((torch.randn(size, 4, generator=generator),), ids=tuple(f"s{index}.{row}" for row in range(size)))
        for index in range(count)
    ]


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_every_value_is_observed_over_all_batches(observer: str) -> None:
    batches, seen = some_batches(), []
    table = calibrate(TwoLayers(observer), batches, progress=lambda done, total: seen.append((done, total)))
    expected = make_observer(ActivationSpec(observer=observer))
    for batch in batches:
        expected.observe(2 * batch.args[0])
    assert table.observers["double"] == expected
    assert table.observers.keys() == {"double", "relu"}
    assert (table.batches, table.samples, table.resumed_batches, table.notices) == (6, 12, 0, ())
    assert seen == [(done, 6) for done in range(1, 7)]


def test_an_iterator_has_no_known_length() -> None:
    seen = []
    table = calibrate(TwoLayers(), iter(some_batches(2)), progress=lambda *progress: seen.append(progress))
    assert seen == [(1, None), (2, None)]
    assert table == calibrate(TwoLayers(), some_batches(2))


@given(st.sampled_from(sorted(OBSERVERS)), st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_two_halves_merged_are_the_whole(observer: str, cut: int) -> None:
    batches, prepared = some_batches(), TwoLayers(observer)
    merged = calibrate(prepared, batches[:cut]).merge(calibrate(prepared, batches[cut:]))
    assert merged == calibrate(prepared, batches)


def test_tables_of_different_values_or_specs_do_not_merge() -> None:
    table = calibrate(TwoLayers(), some_batches())
    with pytest.raises(CalibrationError, match="only one of them observed relu"):
        table.merge(CalibrationTable({"double": table.observers["double"]}, 1, 1, "0" * 64))
    with pytest.raises(CalibrationError, match="one kind and one spec"):
        table.merge(calibrate(TwoLayers("mse"), some_batches()))


def test_the_data_digest_sees_content_and_not_order() -> None:
    batches = some_batches()
    digest = calibrate(TwoLayers(), batches).data_sha256
    assert calibrate(TwoLayers(), batches[::-1]).data_sha256 == digest
    changed = Batch((batches[0].args[0] + 1e-6,))
    assert calibrate(TwoLayers(), [changed, *batches[1:]]).data_sha256 != digest
    int(digest, 16)
    assert len(digest) == 64


# --- the file ---


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_save_and_load(tmp_path: Path, observer: str) -> None:
    table = calibrate(TwoLayers(observer), some_batches())
    path = tmp_path / "new" / "calibration.safetensors"
    table.save(path)
    assert CalibrationTable.load(path) == table
    assert CalibrationTable.from_bytes(table.to_bytes(), "here") == table
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert {table.to_bytes() for _ in range(5)} == {path.read_bytes()}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.safetensors.*No such file.*calibrate again"):
        CalibrationTable.load(tmp_path / "none.safetensors")


def test_any_damage_is_found() -> None:
    data = calibrate(TwoLayers(), some_batches()).to_bytes()
    broken = [data[:length] for length in range(0, len(data), 37)]
    broken += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    for text in broken:
        with pytest.raises(ArtifactError, match=r"^here: "):
            CalibrationTable.from_bytes(text, "here")


def test_a_newer_format_asks_for_an_upgrade() -> None:
    data = calibrate(TwoLayers(), some_batches()).to_bytes()
    newer = data.replace(rb"\"format\": 1", rb"\"format\": 9")
    assert newer != data
    with pytest.raises(ArtifactError, match=r"format 9 is newer.*upgrade"):
        CalibrationTable.from_bytes(newer, "here")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.safetensors"
    old = calibrate(TwoLayers(), some_batches(2))
    old.save(path)

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ArtifactError, match=r"can't be written .disk full.; free some space"):
        calibrate(TwoLayers(), some_batches(3)).save(path)
    assert CalibrationTable.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


# --- resuming ---


class Killed(Exception):
    """Stands for a kill."""


def interrupted(batches: list[Batch], after: int) -> Iterator[Batch]:
    yield from batches[:after]
    raise Killed


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, observer: str, after: int) -> None:
    batches, checkpoint = some_batches(), tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        calibrate(
            TwoLayers(observer), interrupted(batches, after), key="k", checkpoint=checkpoint, checkpoint_every_s=0
        )
    prepared, seen = TwoLayers(observer), []
    table = calibrate(
        prepared, batches, key="k", checkpoint=checkpoint, progress=lambda done, total: seen.append((done, total))
    )
    whole = calibrate(TwoLayers(observer), batches)
    assert table == whole
    assert table.to_bytes() == whole.to_bytes()
    assert (table.resumed_batches, prepared.runs) == (after, 6 - after)
    assert [f"calibration resumed: {after} batches" in notice for notice in table.notices] == [True]
    assert seen == [(done, 6) for done in range(after, 7)]


def test_a_finished_checkpoint_needs_no_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    table = calibrate(TwoLayers(), some_batches(), checkpoint=checkpoint)
    prepared = TwoLayers()
    assert calibrate(prepared, some_batches(), checkpoint=checkpoint) == table
    assert prepared.runs == 0


def test_checkpoints_wait_for_their_time(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    with pytest.raises(Killed):
        calibrate(TwoLayers(), interrupted(some_batches(), 5), checkpoint=checkpoint, checkpoint_every_s=3600)
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("key", "prepared", "batches", "reason"),
    [
        ("other", TwoLayers(), some_batches(), "another recipe"),
        ("k", TwoLayers("mse"), some_batches(), "other values"),
        ("k", TwoLayers(observed=()), some_batches(5), "other data"),
        ("k", TwoLayers(), some_batches()[1:], "other data"),
        ("k", TwoLayers(), some_batches()[:2], "other data"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_replaced_and_mentioned(
    tmp_path: Path, key: str, prepared: TwoLayers, batches: list[Batch], reason: str
) -> None:
    checkpoint = tmp_path / "c"
    calibrate(TwoLayers(), some_batches(), key="k", checkpoint=checkpoint)
    table = calibrate(prepared, batches, key=key, checkpoint=checkpoint)
    assert table == calibrate(prepared, batches)
    assert table.resumed_batches == 0
    assert len(table.notices) == 1
    assert reason in table.notices[0]
    assert CalibrationTable.load(checkpoint) == table


def test_a_damaged_checkpoint_is_replaced_and_mentioned(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    checkpoint.write_bytes(b"half a table")
    table = calibrate(TwoLayers(), some_batches(), checkpoint=checkpoint)
    assert "damaged" in table.notices[0]
    assert CalibrationTable.load(checkpoint) == table


def test_resume_can_be_turned_off(tmp_path: Path) -> None:
    checkpoint, prepared = tmp_path / "c", TwoLayers()
    calibrate(TwoLayers(), some_batches(), checkpoint=checkpoint)
    table = calibrate(prepared, some_batches(), checkpoint=checkpoint, resume=False)
    assert (prepared.runs, table.resumed_batches, table.notices) == (6, 0, ())


def test_an_iterator_over_other_data_cannot_start_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    calibrate(TwoLayers(), some_batches(), checkpoint=checkpoint)
    with pytest.raises(DataError, match=r"pass a list, or calibrate with resume=False"):
        calibrate(TwoLayers(), iter(some_batches(3)), checkpoint=checkpoint)


# --- refusals ---


@pytest.mark.parametrize("batches", [[], [Batch((torch.empty(0, 4),))]])
def test_no_samples(batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match="there are no samples"):
        calibrate(TwoLayers(), batches)


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "Inf")])
def test_non_finite_data_names_the_sample(bad: float, word: str) -> None:
    batches = some_batches()
    batches[3].args[0][1, 2] = bad
    with pytest.raises(DataError, match=rf"input 0 holds {word} in batch 3 \(sample s3\.1\); remove or repair"):
        calibrate(TwoLayers(), batches)


def test_keyword_inputs_are_named_and_integers_are_fine() -> None:
    x = torch.zeros(2, 4)
    x[0, 0] = math.nan
    batch = Batch((torch.zeros(2, 4, dtype=torch.int64),), {"mask": x})
    with pytest.raises(DataError, match=r"mask holds NaN in batch 0 \(sample #0\)"):
        calibrate(TwoLayers(), [batch])


def test_overflow_inside_the_model_names_value_and_sample() -> None:
    batches = some_batches()
    batches[2].args[0][1] = 1e30
    with pytest.raises(
        CalibrationError, match=r"block\.double gives Inf in batch 2 \(sample s2\.1\).*check the model's weights"
    ):
        calibrate(TwoLayers(gain=1e30), batches)


def test_a_wrong_shape_names_batch_samples_and_both_shapes() -> None:
    batches = [*some_batches(2), Batch((torch.zeros(2, 5),), ids=("a", "b"))]
    with pytest.raises(
        DataError, match=r"batch 2 \(samples a, b\).*found input 0 \[5\].*first batch had input 0 \[4\]"
    ):
        calibrate(TwoLayers(), batches)
    with pytest.raises(DataError, match=r"batch 0 .*found input 0 \[5\].*it is the first batch"):
        calibrate(TwoLayers(), batches[2:])


def test_a_model_that_fails_on_a_good_shape_is_not_the_datas_fault() -> None:
    prepared = TwoLayers()
    run = prepared.run

    def fail_later(batch: Batch, on_value: Callable[[str, torch.Tensor], None]) -> torch.Tensor:
        if prepared.runs == 2:
            raise RuntimeError("out of luck\nand more")
        return run(batch, on_value)

    prepared.run = fail_later  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"failed on batch 2 .*batches of these shapes passed: out of luck$"):
        calibrate(prepared, some_batches())


def test_values_that_were_never_observed_are_listed() -> None:
    with pytest.raises(CalibrationError, match=r"side\.0, side\.1 never held a number.*layers: \{NAME: float\}"):
        calibrate(TwoLayers(observed=("side.0", "side.1")), some_batches())


def test_many_samples_are_listed_briefly() -> None:
    batch = Batch((torch.full((9, 4), math.nan),))
    with pytest.raises(DataError, match=r"samples #0, #1, #2, #3, #4 and 4 more\)"):
        calibrate(TwoLayers(), [batch])


def test_calibration_leaves_no_gradients_and_no_mode_behind() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    calibrate(TwoLayers(), [Batch((x,))])
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert x.grad is None


def test_a_refused_input_names_the_batch() -> None:
    prepared = TwoLayers()

    def refuse(*_: object) -> torch.Tensor:
        raise DataError("input 'mask' is missing")

    prepared.run = refuse  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"refuses batch 0 \(samples s0\.0, s0\.1\): input 'mask' is missing"):
        calibrate(prepared, some_batches())
