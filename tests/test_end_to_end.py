"""The main job as a user meets it: every recipe, every mode, and what comes out of it."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.cli import command as cli
from quantflow.config.recipe_file import recipe_files
from quantflow.stages.benchmark import UNSTEADY_NOTICE, unsteady
from quantflow.stages.record import Record

ROOT = Path(cli.__file__).parents[2]
MODES = ("export", "torchscript", "imperative")
TINY = ["data.calibration=4", "data.evaluation=4", "benchmark.rounds=1", "benchmark.min_round_ms=1", "gates=none"]
RANDOM = "model.weights=random"
#: What makes each recipe small: weights that need no network, and images as small as the architecture takes.
SMALLER = {
    "resnet18_sym_int8": [RANDOM, "data.size=64"],
    "resnet50_sym_int8": [RANDOM, "data.size=64"],
    "resnet50_affine_uint8": [RANDOM, "data.size=64"],
    "mobilenet_v2_affine_uint8": [RANDOM, "data.size=64"],
    "efficientnet_lite0_sym_int8": ["data.size=64"],
    "efficientnet_lite0_affine_uint8": ["data.size=64"],
    "vit_b_16_sym_int8": [RANDOM, "data.batch_size=2"],
    "minilm_sym_int8": ["model.max_length=24"],
    "efficientnet_lite0_tuned": ["data.size=64", "tune=none"],
    "minilm_tuned": ["model.max_length=24", "tune=none"],
}
SLOW = ("vit_b_16_sym_int8", "minilm_sym_int8", "minilm_tuned", "resnet50_sym_int8", "resnet50_affine_uint8")
BUILT = ("program.json", "weights.safetensors")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder."""
    shutil.copy(Path(own_models.__file__), tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def in_a_fresh_process(code: str, folder: Path) -> str:
    """What `code` prints there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def built(artifact: Path) -> list[bytes]:
    return [(artifact / name).read_bytes() for name in BUILT]


# --- every recipe


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in recipe_files()]
)
def test_every_recipe_runs(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([f"recipe={name}", *TINY, *SMALLER.get(name, [])]) == 0, capsys.readouterr().err
    record = Record.load(place / "outputs" / name)
    proof, accuracy = record.results["int8_proof"], record.results["accuracy"]
    tables = sum(layer["op"] == "embedding" for layer in proof["float_layers"])
    assert proof["int8_layers_run"] == proof["int8_layers"] == proof["core_layers"] - tables > 0
    assert proof["output_differs"]
    assert accuracy["sqnr_db"] > 3
    assert accuracy["nonfinite"] == {"float": 0, "int8": 0}
    assert record.results["warmup"]["layers_checked"] >= proof["int8_layers"]
    assert record.results["benchmark"]["configs"][0]["speedup"] > 0
    assert sorted(path.name for path in (place / "outputs").iterdir()) == [name]


# --- resnet18 in three modes


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[qf.QuantizedModel, Path]]:
    """mode → (the result, its artifact); built once."""
    results: dict[str, tuple[Any, Path]] = {}

    def of(mode: str) -> tuple[Any, Path]:
        if mode not in results:
            folder = tmp_path_factory.mktemp(mode) / "art"
            overrides = [*TINY, RANDOM, "data.size=64", f"mode={mode}", f"output={folder}", "report=quiet"]
            results[mode] = qf.run(qf.load_recipe("resnet18_sym_int8", overrides)), folder
        return results[mode]

    return of


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("mode", MODES)
def test_an_artifact_gives_the_same_output_in_a_fresh_process(mode: str, resnet18: Callable[..., Any]) -> None:
    model, artifact = resnet18(mode)
    x = images()
    torch.save({"x": x, "y": model(x)}, artifact.parent / "xy.pt")
    code = """
import torch, quantflow as qf
saved = torch.load("xy.pt", weights_only=True)
model = qf.load("art")
print(torch.equal(model(saved["x"]), saved["y"]), model.int8_layers(), isinstance(model, torch.jit.ScriptModule))
"""
    assert in_a_fresh_process(code, artifact.parent) == f"True 21 {mode == 'torchscript'}"


def test_a_torchscript_result_is_a_scriptmodule(resnet18: Callable[..., Any]) -> None:
    model, artifact = resnet18("torchscript")
    assert isinstance(model, torch.jit.ScriptModule)
    assert not model.training
    x = images()
    torch.save({"x": x, "y": model(x)}, artifact.parent / "xy.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(model, artifact.parent / "m.ts")
    code = """
import torch, quantflow
saved = torch.load("xy.pt", weights_only=True)
model = torch.jit.load("m.ts")
with torch.no_grad():
    graph = str(model.graph_for(saved["x"]))
    print(torch.equal(model(saved["x"]), saved["y"]), graph.count("quantflow::conv_sum_relu("))
"""
    assert in_a_fresh_process(code, artifact.parent) == "True 8"


def fused(model: Any, x: torch.Tensor) -> dict[str, int]:
    """Fused convolutions in the optimized graph."""
    with torch.inference_mode():
        graph = str(model.graph_for(x))
    return {name: len(re.findall(rf"quantflow::{name}\(", graph)) for name in ("conv_relu", "conv_sum_relu", "conv")}


#: The stem and the first convolution of each of 8 blocks; the second ones; 3 projections.
IN_EVERY_BLOCK = {"conv_relu": 9, "conv_sum_relu": 8, "conv": 3}


def test_every_block_is_fused_when_traced(resnet18: Callable[..., Any]) -> None:
    assert fused(resnet18("torchscript")[0], images()) == IN_EVERY_BLOCK


@pytest.mark.parametrize("source", ["scripted", "saved trace", "saved script"])
def test_every_block_is_fused_from(source: str, tmp_path: Path) -> None:
    from quantflow.sources.models.torchvision_zoo import load_torchvision

    module: Any = load_torchvision("resnet18", "random", None, 0).module
    mode: dict[str, str] = {"kind": "torchscript", "method": "script" if source == "scripted" else "trace"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if source == "saved trace":
            torch.jit.trace(module, images()).save(tmp_path / "m.pt")
        if source == "saved script":
            torch.jit.script(module).save(tmp_path / "m.pt")
        if source.startswith("saved"):
            module = torch.jit.load(tmp_path / "m.pt")
    model = qf.quantize(module, [images()], mode=mode)
    assert isinstance(model, torch.jit.ScriptModule)
    assert fused(model, images()) == IN_EVERY_BLOCK


def test_the_graph_is_written_on_request(place: Path) -> None:
    arguments = ["model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]", *TINY, "report=quiet"]
    assert cli.run([*arguments, "mode=torchscript", "report.graph_dump=true"]) == 0
    assert "quantflow::conv_sum_relu(" in (place / "outputs/custom/graph.txt").read_text()
    assert cli.run([*arguments, "mode=torchscript"]) == 0
    assert not (place / "outputs/custom/graph.txt").exists()


# --- what every result can do


def calibration(*shape: int, batches: int = 2, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(size, *shape, generator=generator) for _ in range(batches)]


@pytest.fixture(scope="module", params=MODES)
def small(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """(float module, int8 model) of one mode."""
    torch.manual_seed(0)
    module = own_models.net().train()
    module.stem[1].running_mean.normal_()
    return module, qf.quantize(module, calibration(3, 8, 8), mode=request.param)


def test_takes_any_batch_size(small: tuple[nn.Module, Any]) -> None:
    _, model = small
    x = images(5, 8)
    whole = model(x)
    assert torch.equal(torch.cat([model(x[:1]), model(x[1:4]), model(x[4:])]), whole)
    assert torch.equal(model(x.to(memory_format=torch.channels_last)), whole)
    assert torch.equal(model(x.transpose(2, 3).contiguous().transpose(2, 3)), whole)


def test_takes_keywords(small: tuple[nn.Module, Any]) -> None:
    module, model = small
    assert torch.equal(model(x=images(2, 8)), model(images(2, 8)))
    assert module.training


def test_is_clean(small: tuple[nn.Module, Any]) -> None:
    _, model = small
    assert not model(images(2, 8)).requires_grad
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_an_input_is_not_written_to(small: tuple[nn.Module, Any]) -> None:
    x = images(2, 8)
    before = x.clone()
    small[1](x)
    assert torch.equal(x, before)


def test_leaves_the_users_module_alone() -> None:
    torch.manual_seed(0)
    for mode in MODES:
        module = own_models.net().train()
        module.head.eval()
        state, structure = copy.deepcopy(module.state_dict()), str(module)
        flags = {name: child.training for name, child in module.named_modules()}
        random_state = torch.get_rng_state()
        qf.quantize(module, calibration(3, 8, 8), mode=mode)
        assert {name: child.training for name, child in module.named_modules()} == flags
        assert str(module) == structure
        assert all(torch.equal(state[name], x) for name, x in module.state_dict().items())
        assert all(p.requires_grad for p in module.parameters())
        assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
        assert torch.equal(torch.get_rng_state(), random_state)


def test_is_safe_from_several_threads(small: tuple[nn.Module, Any]) -> None:
    _, model = small
    inputs = [images(1 + i % 3, 8) * (i + 1) for i in range(8)]
    expected = [model(x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        wrong.extend(index for _ in range(50) if not torch.equal(model(inputs[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("call", [lambda m: m(images(2, 9)), lambda m: m(images(2, 8).double()), lambda m: m(),
                                  lambda m: m(images(2, 8), images(2, 8)), lambda m: m(y=images(2, 8)),
                                  lambda m: m([[1.0]])])  # fmt: skip
def test_refuses_a_call_that_does_not_fit(call: Callable[[Any], Any]) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model = qf.quantize(module, calibration(3, 8, 8))
    with pytest.raises(qf.QuantflowError, match=r"the model (takes|was captured for)|not a tensor"):
        call(model)


# --- models of all kinds


def close(model: Any, module: nn.Module, *args: torch.Tensor, sqnr_db: float = 15, **kwargs: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = module.eval()(*args, **kwargs), model(*args, **kwargs)
    error = 20 * torch.log10(expected.norm() / (expected - found).norm())
    assert float(error) > sqnr_db


def test_imperative_shows_its_qparams() -> None:
    torch.manual_seed(0)
    model = qf.quantize(own_models.net(), calibration(3, 8, 8), mode="imperative")
    text = repr(model.module)
    assert re.search(r"weight=int8\[8x3x3x3\] per_channel, input=int8\(scale=[\d.e-]+, zero_point=0\)", text)
    assert len(re.findall(r"Int8(Conv2d|Linear)\(", text)) == 3


class Twice(nn.Module):
    """One layer used twice, with another range each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(x + 3 * self.layer(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


class Named(nn.Module):
    """Two inputs of different kinds, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.image = nn.Linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.image(features)) + self.words(ids).mean(1)
        return {"logits": self.head(hidden), "hidden": hidden}


class OneAtATime(nn.Module):
    """Works for batches of one only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).reshape(1, 144))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Twice, (16,)), (Attention, (6, 16)), (Residual, (4, 8, 8))],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_models_of_all_kinds(mode: str, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    batches = calibration(*shape)
    model = qf.quantize(module, batches, mode=mode)
    close(model, module, batches[0])
    close(model, module, batches[0][:1])
    assert model.int8_layers() >= 1


@pytest.mark.parametrize("mode", MODES)
def test_two_inputs_and_a_dict(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Named().eval()
    generator = torch.Generator().manual_seed(3)
    ids, features = torch.randint(0, 50, (4, 7), generator=generator), torch.randn(4, 20, generator=generator)
    for batches in ([(ids, features)], [{"ids": ids, "features": features}]):
        model = qf.quantize(module, batches, mode=mode)
        output = model(ids=ids, features=features)
        assert list(output) == ["logits", "hidden"]
        assert output["logits"].shape == (4, 3)
        assert torch.equal(model(ids[:3], features[:3])["logits"], output["logits"][:3])
        model.save(tmp_path / mode)
        assert torch.equal(qf.load(tmp_path / mode)(ids, features)["hidden"], output["hidden"])


@pytest.mark.parametrize("mode", MODES)
def test_a_model_for_one_sample_at_a_time(mode: str) -> None:
    torch.manual_seed(0)
    module = OneAtATime().eval()
    batches = [x for batch in calibration(3, 8, 8) for x in batch.split(1)]
    model = qf.quantize(module, batches, mode=mode)
    close(model, module, batches[0])


def test_hooks_are_part_of_the_model() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    module[0].register_forward_hook(lambda _, __, y: y * 3)
    module[1].register_forward_pre_hook(lambda _, x: (x[0] + 1,))
    for mode in MODES:
        close(qf.quantize(module, calibration(8), mode=mode), module, calibration(8)[0], sqnr_db=30)


class Stateful(nn.Module):
    """Counts its calls, or writes into its input."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.writes = writes
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            x += 1
        else:
            self.calls.add_(1)
        return self.layer(x)


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_side_effects_are_named() -> None:
    notices = qf.quantize(Stateful(), calibration(8)).results["notices"]
    assert "the model changes its own calls while it runs; the int8 model leaves them as they are" in notices
    with pytest.raises(qf.QuantflowError, match=r"changes its own calls"):
        qf.quantize(Stateful(), calibration(8), mode="torchscript")
    for mode in MODES:
        with pytest.raises(qf.QuantflowError, match=r"writes into what it is given .* a copy"):
            qf.quantize(Stateful(writes=True), calibration(8), mode=mode)
    with pytest.raises(qf.QuantflowError, match=r"can't be made .* use mode=export"):
        qf.quantize(Uncopyable(), calibration(8), mode="imperative")


# --- every setting does something


BASE: dict[str, Any] = {
    "model": {"kind": "entry", "entry": "mine:net"},
    "data": {"kind": "random", "shape": [[3, 8, 8]], "calibration": 16, "evaluation": 8, "batch_size": 4},
    "mode": {"kind": "torchscript"},
    "benchmark": {"enabled": False, "rounds": 1, "min_round_ms": 1},
    "report": {"quiet": True},
    "output": "art",
}


def run(**changes: Any) -> tuple[list[bytes], Any]:
    """([program, weights], results) of the base recipe with sections changed."""
    settings = copy.deepcopy(BASE)
    for section, change in changes.items():
        settings[section] = settings.get(section, {}) | change if isinstance(change, dict) else change
    results = qf.run(qf.Recipe.from_dict(settings)).results
    return built(Path("art")), results


@pytest.mark.usefixtures("place")
def test_the_same_recipe_gives_the_same_bytes() -> None:
    assert run()[0] == run()[0]


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes_for_resnet18(place: Path) -> None:
    arguments = ["recipe=resnet18_sym_int8", *TINY, RANDOM, "data.size=64", "benchmark=disabled", "report=quiet"]
    for output, observer in (("a", "histogram"), ("b", "histogram")):
        assert cli.run([*arguments, f"output={output}", f"observer={observer}"]) == 0
    assert built(place / "a") == built(place / "b")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("base", "changed"),
    [
        *(({}, {"qconfig": {"activation": {"observer": o}}}) for o in
          ("moving_average", "histogram", "mse", "entropy")),
        ({}, {"qconfig": {"activation": {"observer": "percentile", "percentile": 99}}}),
        ({"qconfig": {"activation": {"observer": "percentile", "percentile": 99.9}}},
         {"qconfig": {"activation": {"observer": "percentile", "percentile": 90}}}),
        ({"qconfig": {"activation": {"observer": "moving_average", "averaging_constant": 0.01}}},
         {"qconfig": {"activation": {"observer": "moving_average", "averaging_constant": 0.5}}}),
        ({"qconfig": {"reduce_range": False}}, {"qconfig": {"reduce_range": True}}),
        ({}, {"qconfig": {"activation": {"qscheme": "affine"}}}),
        ({}, {"qconfig": {"activation": {"dtype": "uint8"}}}),
        ({}, {"qconfig": {"weight": {"granularity": "per_tensor"}}}),
        ({}, {"qconfig": {"weight": {"observer": "mse"}}}),
        ({"qconfig": {"weight": {"observer": "percentile", "percentile": 99}}},
         {"qconfig": {"weight": {"observer": "percentile", "percentile": 80}}}),
        ({}, {"seed": 1}),
        ({}, {"data": {"calibration": 4}}),
        ({}, {"layers": {"head": "float"}}),
        ({}, {"layers": {"stem.*": {"weight": {"granularity": "per_tensor"}}}}),
        ({}, {"layers": {"conv2d": {"activation": {"qscheme": "affine"}}}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_changes_the_model(base: dict[str, Any], changed: dict[str, Any]) -> None:
    assert run(**base)[0] != run(**changed)[0]


@pytest.mark.usefixtures("place")
def test_an_override_without_effect_is_noted() -> None:
    _, results = run(layers={"head": {"activation": {"qscheme": "affine"}}})
    assert [notice for notice in results["notices"] if "layers.head: its activation settings change nothing" in notice]
    _, results = run(layers={"stem.*": {"activation": {"qscheme": "affine"}}})
    assert not [notice for notice in results["notices"] if "change nothing" in notice]


@pytest.mark.usefixtures("place")
def test_settings_change_what_is_measured() -> None:
    _, plain = run()
    assert "benchmark" not in plain
    assert plain["accuracy"]["per_layer"]
    assert plain["warmup"]["iterations"] == 3
    assert run(warmup={"iterations": 2})[1]["warmup"]["iterations"] == 2
    assert {row["name"] for row in plain["accuracy"]["histograms"]} <= {row["name"] for row in plain["plan"]}
    assert any("own_sqnr_db" in row for row in plain["accuracy"]["per_layer"])
    without = run(evaluate={"per_layer": False})[1]["accuracy"]
    assert "per_layer" not in without
    assert "histograms" not in without
    assert "accuracy" not in run(evaluate={"enabled": False})[1]
    assert run(data={"evaluation": 6})[1]["accuracy"]["samples"] == 6
    timed = run(benchmark={"enabled": True, "batch_sizes": [1, 3], "threads": 1, "rounds": 2})[1]
    assert [config["batch_size"] for config in timed["benchmark"]["configs"]] == [1, 3]
    assert [len(config["int8"]["rounds"]) for config in timed["benchmark"]["configs"]] == [2, 2]
    assert timed["benchmark"]["threads"] == 1
    assert timed["benchmark"]["per_layer"]
    untimed = run(benchmark={"enabled": True, "rounds": 1, "min_round_ms": 1, "per_layer": False})[1]
    assert "per_layer" not in untimed["benchmark"]


@pytest.mark.usefixtures("place")
def test_a_runtime_changes_who_computes() -> None:
    _, by_torch = run(mode={"kind": "export"}, runtime={"kind": "torch"})
    _, by_reference = run(mode={"kind": "export"}, runtime={"kind": "reference"})
    assert (by_torch["runtime"]["chosen"], by_reference["runtime"]["chosen"]) == ("torch", "reference")


def test_a_failed_gate_ends_with_3_and_saves_everything(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "model=entry",
        "model.entry=mine:net",
        "data=random",
        "data.shape=[[3,8,8]]",
        *TINY,
        "mode=torchscript",
    ]
    assert cli.run([*arguments, "gates.min_sqnr_db=200", "gates.min_int8_coverage=1"]) == 3
    shown = capsys.readouterr().out
    record = Record.load(place / "outputs/custom")
    assert record.results["verdict"] == "failed"
    assert {gate["name"]: gate["passed"] for gate in record.results["gates"]} == {
        "min_sqnr_db": False,
        "min_int8_coverage": True,
    }
    page = unescape((place / "outputs/custom/report.html").read_text())
    for text in (shown, (place / "outputs/custom/report.md").read_text(), page):
        assert "dB is not >= 200 dB" in text
        assert "failed" in text
    assert "min_sqnr_db | FAILED" in (place / "outputs/custom/summary.md").read_text()
    assert (place / "outputs/custom/junit.xml").read_text().count("<failure") == 1
    assert cli.run([*arguments, "gates.min_sqnr_db=1"]) == 0
    assert Record.load(place / "outputs/custom").results["verdict"] == "passed"


@pytest.mark.parametrize("mode", MODES)
def test_the_tasks_of_an_artifact(mode: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=entry", "model.entry=mine:net", "data=random", "data.shape=[[3,8,8]]", *TINY, f"mode={mode}"]
    assert cli.run([*arguments, "task=plan"]) == 0
    assert "block" in capsys.readouterr().out
    assert not (place / "outputs").exists()
    assert cli.run([*arguments, "output=art"]) == 0
    before = Record.load("art").results
    art = ["artifact=art", "model=entry", "model.entry=mine:net"]
    assert cli.run(["task=inspect", "artifact=art"]) == 0
    assert cli.run(["task=report", "artifact=art"]) == 0
    assert cli.run(["task=evaluate", *art, "data.evaluation=7"]) == 0
    assert cli.run(["task=benchmark", *art, "benchmark.batch_sizes=[2]"]) == 0
    after = Record.load("art").results
    assert before["accuracy"]["samples"] == 4
    assert after["accuracy"]["samples"] == 7
    assert after["accuracy"]["per_layer"]
    assert [config["batch_size"] for config in after["benchmark"]["configs"]] == [2]
    said = [notice for notice in after["notices"] if notice.startswith(UNSTEADY_NOTICE)]
    assert said == list(unsteady(after["benchmark"]["configs"]))
    assert cli.run(["task=evaluate", *art, "gates.min_sqnr_db=200"]) == 3
