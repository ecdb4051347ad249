"""Where the triton runtime can run, what is said where it can't, and how its tuner keeps what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow import runtimes
from quantflow.errors import UnavailableError
from quantflow.runtimes import choose_runtime, choose_tested
from quantflow.runtimes.triton import devices
from quantflow.runtimes.triton.tuner import Tuner, Way
from quantflow.schema import Recipe


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend that this machine has such cards, a torch for them and Triton, or not."""

    def pretend(*kinds: str, torch_for: tuple[str, ...] = ("cuda", "xpu"), triton: bool = True) -> None:
        monkeypatch.setattr(devices, "has_card", lambda device: device in kinds)
        monkeypatch.setattr(devices, "find_spec", lambda _: object() if triton else None)
        monkeypatch.setattr(devices, "listed", lambda: [f"{kind}:0 (a card)" for kind in kinds])
        for kind in ("cuda", "xpu"):
            monkeypatch.setattr(torch.version, kind, "1.0" if kind in torch_for else None, raising=False)
        monkeypatch.setattr(runtimes.native_devices, "has_intel_gpu", lambda: False)
        devices.missing.cache_clear()

    yield pretend
    devices.missing.cache_clear()


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_auto_takes_a_card_that_is_there_in_every_mode(mode: str, cards: Callable[..., None]) -> None:
    cards("cuda")
    choice = choose_runtime("auto", "auto", mode)
    assert (choice.runtime.name, choice.device) == ("triton", "cuda")
    assert "a CUDA GPU was found" in choice.reason


def test_an_intel_card_comes_before_another_and_the_native_runtime_before_this_one(
    cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards("cuda", "xpu")
    monkeypatch.setattr(runtimes, "RUNTIMES", {n: r for n, r in runtimes.RUNTIMES.items() if n != "native"})
    choice = choose_runtime()
    assert (choice.runtime.name, choice.device) == ("triton", "xpu")
    assert "an Intel GPU was found" in choice.reason


def test_without_a_card_the_cpu_says_why(cards: Callable[..., None]) -> None:
    cards()
    choice = choose_runtime()
    assert choice.device == "cpu"
    assert "no GPU that can be used was found" in choice.reason


@pytest.mark.parametrize(
    ("kinds", "torch_for", "triton", "said"),
    [
        ((), (), True, "is built without cuda; install PyTorch's CUDA build"),
        ((), ("cuda",), True, "torch finds no cuda device; install the card's driver"),
        (("cuda",), ("cuda",), False, "the package triton is not installed"),
    ],
)
def test_what_is_missing_is_said_with_the_cure(
    kinds: tuple[str, ...], torch_for: tuple[str, ...], triton: bool, said: str, cards: Callable[..., None]
) -> None:
    cards(*kinds, torch_for=torch_for, triton=triton)
    with pytest.raises(UnavailableError, match="device: 'cuda' is not available; devices found: cpu") as refused:
        choose_runtime("triton", "cuda")
    assert said in str(refused.value)
    assert refused.value.exit_code == 4


def test_it_does_not_run_on_the_cpu_but_to_be_checked(
    cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cards()
    with pytest.raises(UnavailableError, match=r"it runs on GPUs \(cuda, xpu\)"):
        choose_runtime("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    devices.missing.cache_clear()
    assert choose_tested("triton", "cpu").runtime.name == "triton"
    assert choose_runtime("auto", "cpu").runtime.name != "triton"


def test_the_self_test_takes_the_runtime_that_serves_the_device(cards: Callable[..., None]) -> None:
    cards("cuda")
    assert choose_tested("auto", "cuda").runtime.name == "triton"
    assert choose_tested("auto", "auto").device == "cuda"


def test_half_precision_takes_the_runtime_that_has_it_or_is_refused(
    cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # else triton serves the CPU, too
    cards("xpu")
    assert choose_runtime("auto", "auto", floats="bfloat16").runtime.name == "triton"
    cards()
    for runtime in ("auto", "native", "torch", "reference"):
        with pytest.raises(UnavailableError, match=r"policy\.float: 'bfloat16' is not possible on runtime") as refused:
            choose_runtime(runtime, "cpu", floats="bfloat16")
        assert "use runtime=triton on a GPU, or policy.float=auto" in str(refused.value)
    choice = choose_runtime("auto", "cpu", floats="auto")
    assert (choice.device, choice.floats) == ("cpu", "auto")


def test_auto_on_a_cpu_is_float32_and_says_why() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model = qf.quantize(net, [torch.randn(4, 4)], device="cpu", runtime="reference", policy={"float": "auto"})
    section = model.results["runtime"]
    assert section["float"] == "float32"
    assert section["float_reason"] == "policy.float=auto: runtime reference computes floats in float32"


def test_how_floats_are_held_is_no_matter_of_calibration_or_of_layers() -> None:
    recipes = [Recipe.from_dict({"policy": {"float": floats}, "task": "doctor"}) for floats in ("float32", "bfloat16")]
    assert len({recipe.calibration_key() for recipe in recipes}) == 1
    assert len({recipe.hash() for recipe in recipes}) == 2


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_model_for_a_device_that_is_not_here(device: str, cards: Callable[..., None]) -> None:
    cards()
    with pytest.raises(UnavailableError, match=f"device: '{device}' is not available"):
        qf.quantize(nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2)], device=device)


# -- the tuner

TIMES = {(1,): 3.0, (2,): 1.0, (3,): 2.0}


def tuner(file: Path | None = None) -> tuple[Tuner, list[Way]]:
    """A tuner over ways that take what TIMES says, and those that it ran."""
    ran: list[Way] = []

    def timed(call: Callable[[], None], _runs: int) -> float:
        call()
        return TIMES[ran[-1]]

    made = Tuner(file, timed)
    made.run = ran.append  # type: ignore[attr-defined]
    return made, ran


def way(made: Tuner, key: str = "gemm") -> Way:
    return made.way(key, lambda: list(TIMES), made.run)  # type: ignore[attr-defined]


def test_the_fastest_way_is_kept(tmp_path: Path) -> None:
    made, ran = tuner(tmp_path / "card.json")
    assert way(made) == (1,), "nothing is measured until that is asked for"
    assert ran == []
    with made.measuring(60) as rows:
        assert way(made) == (2,)
        assert way(made) == (2,), "once"
    assert [(row["kernel"], row["way"], row["ms"]) for row in rows] == [("gemm", [2], 1.0)]
    assert way(made) == (2,)
    again, _ = tuner(tmp_path / "card.json")
    assert way(again) == (2,), "from the file"
    adopting, _ = tuner()
    adopting.adopt(rows)
    assert way(adopting) == (2,)


def test_no_more_is_measured_when_the_time_is_up() -> None:
    made, ran = tuner()
    with made.measuring(-1.0) as rows:
        assert way(made) == (1,)
    assert rows == []
    assert ran == []


def test_a_way_that_the_card_refuses_is_left_out_and_all_refused_is_an_error() -> None:
    made = Tuner(None, lambda call, _: call() or 1.0)

    def run(tried: Way) -> None:
        if tried != (3,):
            raise RuntimeError("out of resource: shared memory")

    with made.measuring(60):
        assert made.way("gemm", lambda: list(TIMES), run) == (3,)
        with pytest.raises(RuntimeError, match="out of resource"):
            made.way("other", lambda: [(1,), (2,)], run)


def test_a_file_that_is_broken_or_can_not_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text("{")
    made, _ = tuner(tmp_path / "card.json")
    with made.measuring(60):
        assert way(made) == (2,)
    (tmp_path / "file").write_text("")
    made, _ = tuner(tmp_path / "file" / "card.json")
    with made.measuring(60):
        assert way(made) == (2,)
