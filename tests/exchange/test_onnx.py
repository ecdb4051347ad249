"""The int8 program as ONNX: onnxruntime and OpenVINO run it in int8, and give what the reference gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.cli import command as cli
from quantflow.errors import UnavailableError, UsageError, VerificationError
from quantflow.exchange import onnx_file, onnx_layers, onnx_writer
from quantflow.exchange.expressible import expressible
from quantflow.host import environment
from quantflow.ir.binding import bind
from quantflow.numerics.affine import QParams
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes.reference import ReferenceRunner

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Convolutions(nn.Module):
    """What convolutional nets are made of: clamps, residuals with and without one behind, pools, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        y = torch.relu(self.b(x) + x)
        return self.fc(nn.functional.adaptive_avg_pool2d(torch.cat([y, y], 1), 1).flatten(1))


class Upsampling(nn.Module):
    """What segmentation and generator nets are made of besides; float ops between int8 layers, over any size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.norms = nn.Sequential(nn.GroupNorm(2, 8), nn.PReLU(8), nn.InstanceNorm2d(8, affine=True), nn.Mish())
        self.mix, self.out = nn.Conv2d(11, 16, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(self.down(x)))
        y = self.mix(torch.cat([x, self.norms(y)], 1))
        y = nn.functional.pixel_shuffle(y, 2).roll((1, -2), (2, 3)).flip(3)
        half = nn.functional.max_pool2d(y, 2)
        y = y + nn.functional.interpolate(half, size=y.shape[2:], mode="bilinear") - half.repeat(1, 1, 2, 2)
        return nn.functional.interpolate(self.out(y), scale_factor=2.0, mode="bicubic")


class Attention(nn.Module):
    """What text models are made of: a table, a mask, norms, attention over any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.table(input_ids))
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (attention_mask > 0)[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(x)
        return {"tokens": x, "sentence": x.mean(1)}


def images(count: int = 2, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, size, size, generator=generator) for _ in range(count)]


def made(module: nn.Module, batches: list[Any], **settings: Any) -> Any:
    return qf.quantize(module.eval(), batches, runtime="torch", **settings)


def convolutions(**settings: Any) -> Any:
    torch.manual_seed(0)
    return made(Convolutions(), images(), **settings)


def ran(path: Path, **inputs: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Outputs, and what onnxruntime itself says it ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]
    events = json.loads(Path(session.end_profiling()).read_text())
    kinds = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    return found, {kind: kinds.count(kind) for kind in kinds}


def exactly(path: Path, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the file as it is written: onnxruntime's fused int8 sums saturate on some processors."""
    options = onnxruntime.SessionOptions()
    if not environment.has_exact_int8_products():
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


@pytest.mark.parametrize("qconfig", ["sym_int8", "affine_int8", "sym_uint8", "affine_uint8"])
def test_convolutions_run_in_int8_in_onnxruntime(qconfig: str, tmp_path: Path) -> None:
    model = convolutions(qconfig=qconfig)
    written = model.to_onnx(tmp_path / "m.onnx", images())
    assert written.sqnr_db["output"] > 25
    assert written.codes_that_differ < 1e-3
    assert (written.float_layers, written.split_layers, written.opset) == ({}, 2, 17)
    for size in (1, 7):  # any number of samples
        x = images(1)[0][:1].expand(size, -1, -1, -1).contiguous()
        (y,), kinds = ran(tmp_path / "m.onnx", x=x)
        wanted = ReferenceRunner(model.record.program)(bind(model.record.program, (x,), {}))
        assert y.shape == wanted.shape
        assert sqnr_db(wanted, y) > 20
    assert (kinds["QLinearConv"], kinds["QGemm"], kinds["QLinearAdd"]) == (4, 1, 2)
    assert not {"Conv", "Gemm", "MatMul", "Relu", "Clip"} & kinds.keys()


def test_openvino_runs_the_convolutions_in_int8(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    convolutions(qconfig="affine_uint8").to_onnx(tmp_path / "m.onnx", images())
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled(images()[0].numpy())
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    types = [str(i["runtimePrecision"].astype(str)) for i in layers if i["layerType"].astype(str) == "Convolution"]
    assert len(types) == 4
    assert set(types) <= {"u8", "i8"}


def test_text_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def text(length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(3, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        return {"input_ids": torch.randint(0, 50, (3, length)), "attention_mask": mask}

    model = made(Attention(), [text(9), text(14)])
    written = model.to_onnx(tmp_path / "m.onnx")
    assert written.compared_on == "random numbers"
    assert written.outputs == ("tokens", "sentence")
    shapes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in onnx.load(tmp_path / "m.onnx").graph.input]
    assert all("" not in shape for shape in shapes)
    call = text(23)
    _, kinds = ran(tmp_path / "m.onnx", **call)
    found = exactly(tmp_path / "m.onnx", **call)
    wanted = ReferenceRunner(model.record.program)(bind(model.record.program, (), call))
    assert all(sqnr_db(a, b) > 30 for a, b in zip(wanted.values(), found, strict=True))
    assert kinds["MatMulIntegerToFloat"] == 4


def test_float_ops_over_images_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 16, 24), torch.randn(2, 3, 20, 16)]
    model = made(Upsampling(), batches, qconfig="affine_uint8")
    model.to_onnx(tmp_path / "m.onnx", batches)
    x = torch.randn(3, 3, 28, 12)
    (y,) = exactly(tmp_path / "m.onnx", x=x)
    assert y.shape == (3, 2, 112, 48)
    assert sqnr_db(ReferenceRunner(model.record.program)(bind(model.record.program, (x,), {})), y) > 40


def test_a_second_size_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 16, 24), torch.randn(2, 3, 20, 16)]
    model = made(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), batches)
    sizes = []
    real = onnx_file.onnxruntime_outputs

    def run(path: Path, given: dict[str, torch.Tensor]) -> Any:
        sizes.extend(x.shape for x in given.values())
        return real(path, given)

    monkeypatch.setattr(onnx_file, "onnxruntime_outputs", run)
    model.to_onnx(tmp_path / "m.onnx", batches)
    assert sizes == [x.shape for x in batches]


def test_codes_mean_what_they_did() -> None:
    """Without residuals the expressed program is the program, to the bit."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 28 * 28, 4))
    program = made(module, images()).record.program
    x = bind(program, (images()[0],), {})
    assert torch.equal(ReferenceRunner(program)(x), ReferenceRunner(expressible(program))(x))


def test_measured_sums_are_coded_more_finely(tmp_path: Path) -> None:
    model = convolutions()
    blind = model.to_onnx(tmp_path / "a.onnx").sqnr_to_program_db["output"]
    assert model.to_onnx(tmp_path / "b.onnx", images()).sqnr_to_program_db["output"] > blind


def test_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = made(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), [x])
    model.to_onnx(tmp_path / "m.onnx")
    (y,) = exactly(tmp_path / "m.onnx", **{model.record.program.inputs[0].name: x})
    assert sqnr_db(ReferenceRunner(model.record.program)(bind(model.record.program, (x,), {})), y) > 40
    assert (tmp_path / "m.onnx.data").stat().st_size > 4000


def test_what_has_no_form_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).cumprod(1)

    with pytest.raises(UsageError, match=r"cumprod.*has no form in QDQ ONNX"):
        made(Sorted(), [torch.randn(4, 8)]).to_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_another_result_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MIN_SQNR_DB", 1e6)
    model = made(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)), images())
    with pytest.raises(VerificationError, match="must not be used"):
        model.to_onnx(tmp_path / "m.onnx")
    written = model.to_onnx(tmp_path / "m.onnx", verify=False)
    assert written.sqnr_db is None
    assert "no clamp" in written.float_layers["0"]


def test_a_layer_that_computes_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), images())
    real = onnx_layers.Writer.scale_and_zero
    monkeypatch.setattr(
        onnx_layers.Writer, "scale_and_zero", lambda w, q: real(w, QParams(q.dtype, q.scale * 1.1, q.zero_point))
    )
    with pytest.raises(VerificationError, match=r"layer '.*' .* differs from the reference by"):
        model.to_onnx(tmp_path / "m.onnx")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(onnx_writer.importlib, "import_module", missing)
    with pytest.raises(UnavailableError, match=r"pip install 'quantflow\[onnx\]'"):
        convolutions().to_onnx(tmp_path / "m.onnx")


def test_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convolutions().save(tmp_path / "artifact")
    artifact = tmp_path / "artifact"
    assert cli.run(["task=export", f"artifact={artifact}"]) == 0
    assert "widest range" in " ".join(capsys.readouterr().out.split())
    assert Path(f"{artifact}.onnx").exists()
    assert json.loads((artifact / "results.json").read_text())["onnx"]["opset"] == 17
    qf.load(artifact)
    assert cli.run(["task=export"]) == 2
