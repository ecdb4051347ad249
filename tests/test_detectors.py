"""Models that are quantized in parts: detectors, which take images of different sizes and return what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.cli import command as cli
from quantflow.errors import ArtifactError, CaptureError, DataError, RecipeError, UsageError
from quantflow.sources.models.torchvision_zoo import import_torchvision

pytestmark = pytest.mark.filterwarnings("ignore")


class Finder(nn.Module):
    """A detector in small: what it returns has as many rows as cells that it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.stride = 2
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()
        )
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, Any]]:
        found = []
        for image in images:
            cells = self.head(self.backbone(image[None]))[0].flatten(1)
            liked = cells[4] > cells[4].median()
            found.append({"boxes": cells[:4, liked].T, "scores": cells[4, liked].sigmoid(), "size": image.shape[1:]})
        return found


class Fixed(Finder):
    """The same for one tensor of images, which would be captured as a whole but for what its code asks of the rows."""

    def forward(self, images: torch.Tensor) -> Any:  # type: ignore[override]
        cells = self.head(self.backbone(images)).flatten(2)
        boxes = cells[:, :4].permute(0, 2, 1)[cells[:, 4] > 0]
        return boxes[:100] if len(boxes) > 100 else boxes


def finder(kind: type[Finder] = Finder) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.rand(3, *size) for size in sizes]


BATCHES = [images((32, 40), (24, 24)), images((48, 32))]


def same(found: Any, wanted: Any) -> bool:
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for a, b in zip(found, wanted, strict=True)
        for key in (*a, *b)
    )


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_lists_of_images_of_different_sizes_in_lists_of_dicts_out(mode: str, tmp_path: Path) -> None:
    module = finder()
    model: Any = qf.quantize(module, BATCHES, mode=mode)
    assert isinstance(model, qf.QuantizedParts)
    assert list(model.parts) == ["backbone", "head"]
    assert model.int8_layers() == 3
    other = images((26, 30), (40, 64), (24, 24))
    found, wanted = model(other), module(other)
    assert [(list(each), each["size"]) for each in found] == [(list(each), each["size"]) for each in wanted]
    results = model.results
    assert results["int8_proof"]["coverage"] == 1.0
    assert [row["name"] for row in results["plan"]] == ["backbone.0", "backbone.3", "head", "Finder (its own code)"]
    assert [part["name"] for part in results["parts"]] == ["backbone", "head"]
    assert all(part["accuracy"]["sqnr_db"] > 25 and part["sqnr_in_model_db"] > 25 for part in results["parts"])
    assert any("in parts" in notice and "float outside them: Finder" in notice for notice in results["notices"])
    assert isinstance(module.backbone, nn.Sequential), "the user's own model is as it was"

    model.save(tmp_path / "art")
    with pytest.raises(ArtifactError, match=r"parts of a model \(backbone, head\).*module=the float model"):
        qf.load(tmp_path / "art")
    fresh = finder()
    with torch.no_grad():
        fresh.head.weight.zero_()  # a part's own weights do not matter
    assert same(qf.load(tmp_path / "art", module=fresh)(other), found)
    assert "Finder (its own code)" in (tmp_path / "art/report.md").read_text()


def test_what_is_no_image_of_a_detector_is_no_batch_of_it() -> None:
    with pytest.raises(DataError, match=r"the model fails on the first batches: .*; give it the inputs"):
        qf.quantize(finder(), [([torch.rand(3, 8)],), ([torch.rand(3, 8), torch.rand(3, 9)],)])


def test_a_model_on_tensors_whose_result_has_any_number_of_rows() -> None:
    module = finder(Fixed)
    x = torch.rand(4, 3, 32, 32)
    model: Any = qf.quantize(module, [x, torch.rand(4, 3, 32, 32)])
    assert list(model.parts) == ["backbone", "head"]
    assert model(x[:0]).shape == (0, 4)
    assert "depend on the data (index)" in model.results["notices"][0]
    with pytest.raises(CaptureError):
        qf.quantize(module, [x], parts="none")


def test_a_part_without_a_sample_gives_none() -> None:
    module = finder()
    model: Any = qf.quantize(module, BATCHES)
    assert model([]) == module([]) == []
    assert model.parts["head"](torch.empty(0, 16, 5, 5)).shape == (0, 5, 5, 5)


def test_parts_by_name_and_layers_by_name() -> None:
    module: Any = finder()
    model: Any = qf.quantize(module, BATCHES, parts=["backbone"], layers={"backbone.0": "float"})
    rows = {row["name"]: row["precision"] for row in model.results["plan"]}
    assert rows == {"backbone.0": "float", "backbone.3": "int8", "Finder (its own code)": "float", "head": "float"}
    assert model.results["int8_proof"]["core_layers"] == 3
    model = qf.quantize(module, BATCHES, layers={"head": "float", "*.3": {"weight": {"granularity": "per_tensor"}}})
    assert list(model.parts) == ["backbone"]
    assert {row["name"]: row["reason"] for row in model.results["outside"]}["head"] == "layers: head keeps it float"
    for parts, message in (
        (["bakbone"], r"no submodule 'bakbone'; nearest names: backbone"),
        (["backbone", "backbone.0"], r"'backbone.0' lies in 'backbone'"),
    ):
        with pytest.raises(RecipeError, match=message):
            qf.quantize(module, BATCHES, parts=parts)
    with pytest.raises(RecipeError, match=r"'bakbone.0' matches nothing in any part; nearest names: backbone.0"):
        qf.quantize(module, BATCHES, layers={"bakbone.0": "float"})


def test_what_parts_can_not_be_made_with_is_refused_by_name() -> None:
    module: Any = finder()
    for settings, message in (
        ({"dynamic": {"images": {1: "height"}}}, "dynamic: names inputs of the whole model"),
        ({"mode": "imperative", "inplace": True}, r"inplace=True: Finder is quantized in parts, which .* a copy"),
    ):
        with pytest.raises(UsageError, match=message):
            qf.quantize(module, BATCHES, **settings)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match=r"captured as a whole .* quantize it in parts"):
        qf.sensitivity(module, [(batch,) for batch in BATCHES])


def test_in_imperative_mode_a_part_runs_its_own_code() -> None:
    module: Any = finder()
    seen: list[str] = []
    model: Any = qf.quantize(module, BATCHES, mode="imperative", parts=["backbone"])
    own = model.parts["backbone"]
    assert isinstance(own, qf.QuantizedModule)
    found = model(BATCHES[0])
    for name, layer in own.module.named_children():
        layer.register_forward_hook(lambda _layer, _inputs, _output, name=name: seen.append(name))
    assert same(model(BATCHES[0]), found)
    assert seen == ["0", "1", "2", "3", "4"] * 2, "once per image"
    exported: Any = qf.quantize(module, BATCHES, parts=["backbone"])
    x, program = BATCHES[0][0][None], exported.parts["backbone"].record.program
    assert program.nodes == own.record.program.nodes
    assert torch.allclose(exported.parts["backbone"](x), own(x), rtol=1e-5, atol=1e-6)


class Peeks(Finder):
    """Its code reads more of a part than what a call of it gives."""

    def forward(self, images: list[torch.Tensor]) -> Any:
        return [{**each, "scale": self.head.weight.abs().max()} for each in super().forward(images)]


class Counts(Finder):
    """It reads a part's plain attributes, and a hook on a part changes what that gives."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.stride = 2
        self.calls = 0
        self.head.register_forward_hook(self._double)

    def _double(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return output * 2

    def forward(self, images: list[torch.Tensor]) -> Any:
        return [{**each, "stride": self.backbone.stride} for each in super().forward(images)]


def test_code_that_uses_more_of_a_part_than_a_call() -> None:
    with pytest.raises(qf.QuantflowError, match=r"uses more of a part than a call: name other ones with parts="):
        qf.quantize(finder(Peeks), BATCHES)
    model: Any = qf.quantize(finder(Peeks), BATCHES, parts=["backbone"])
    assert model(BATCHES[0])[0]["scale"] > 0
    module = finder(Counts)
    counted: Any = qf.quantize(module, BATCHES)
    counted.module.calls = 0
    found, wanted = counted(BATCHES[0]), module(BATCHES[0])
    assert counted.module.calls == 2, "a call of the hook per image"
    assert found[0]["stride"] == 2
    assert torch.allclose(found[0]["boxes"].abs().max(), wanted[0]["boxes"].abs().max(), rtol=0.2)


def test_what_comes_back_is_ordinary(tmp_path: Path) -> None:
    import copy
    import pickle

    module = finder()
    model: Any = qf.quantize(module, BATCHES)
    found = model(BATCHES[0])
    assert same(copy.deepcopy(model)(BATCHES[0]), found)
    with pytest.raises(UsageError, match=r"model\.save"):
        pickle.dumps(model)
    with pytest.warns(UserWarning, match="stays in eval mode"):
        model.train()
    assert not model.module.backbone.training
    with pytest.raises(UsageError, match="can't become float16"):
        model.half()
    model.save(tmp_path / "art")
    other = finder()
    other.register_buffer("anchors", torch.ones(2))
    with pytest.raises(ArtifactError, match="weights outside its int8 parts"):
        qf.load(tmp_path / "art", module=other)
    with pytest.raises(ArtifactError, match="no submodule backbone, head"):
        qf.load(tmp_path / "art", module=nn.Linear(2, 2))
    whole: Any = qf.quantize(nn.Linear(8, 4).eval(), [torch.randn(8, 8)])
    whole.save(tmp_path / "whole")
    with pytest.raises(ArtifactError, match="leave module out"):
        qf.load(tmp_path / "whole", module=module)


def test_gates_and_benchmark_of_the_whole() -> None:
    model: Any = qf.quantize(
        finder(), BATCHES, benchmark=True, gates={"min_int8_coverage": 0.9, "min_sqnr_db": 20, "max_size_ratio": 2.0}
    )
    assert model.results["verdict"] == "passed"
    assert model.results["accuracy"]["part"] in model.parts
    assert model.results["benchmark"]["configs"][0]["batch_size"] == 2, "images"


MINE = """
import sys
sys.path.insert(0, {tests!r})
import torch, test_detectors as t
net = t.finder
def data():
    return [([torch.rand(3, 24 + 8 * i, 40)] * (1 + i % 2),) for i in range(8)]
"""


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(tests=str(Path(__file__).parent)))
    arguments = ["model=entry", "model.entry=mine:net", "data=entry", "data.entry=mine:data", "data.calibration=8",
                 "data.evaluation=4", "benchmark=disabled"]  # fmt: skip
    paths = os.pathsep.join((str(Path(cli.__file__).parents[2]), str(tmp_path)))

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quantflow", *arguments, *more]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )

    done = run("output=art")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "art/results.json").read_text())
    assert [part["name"] for part in results["parts"]] == ["backbone", "head"]
    assert results["calibration"]["samples"] == 9, "images, in whole batches"
    done = run("task=plan")
    assert done.returncode == 2
    assert "quantize it in parts, which the other tasks can't" in done.stderr


# -- torchvision's own code, on a backbone that takes milliseconds


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torchvision.models.detection, with a plain non-maximum suppression where its compiled one can't be loaded."""
    import_torchvision()
    from torchvision import extension
    from torchvision.models import detection
    from torchvision.ops import boxes

    if not extension._has_ops():
        monkeypatch.setattr(boxes, "_assert_has_ops", lambda: None)
        library = torch.library.Library("torchvision", "IMPL", "CPU")
        library.impl("nms", _nms)
        yield detection
        library._destroy()
    else:
        yield detection


def _nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    from torchvision.ops.boxes import box_iou

    order = scores.argsort(descending=True, stable=True)
    overlaps, kept = box_iou(dets[order], dets[order]) > iou_threshold, torch.ones(len(order), dtype=torch.bool)
    for at in range(len(order)):
        if kept[at]:
            kept[at + 1 :] &= ~overlaps[at, at + 1 :]
    return order[kept]


def backbone() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 4, 1), nn.ReLU())
    net.out_channels = 32  # type: ignore[assignment]
    return net


def frozen() -> nn.Module:
    """Stock detectors' kind: no bias, frozen statistics, and small images come to feature maps with sides of 1."""
    from torchvision.ops import FrozenBatchNorm2d

    def layer(i: int, o: int, stride: int) -> list[nn.Module]:
        norm = FrozenBatchNorm2d(o)
        for value in (norm.weight, norm.running_var):
            value.uniform_(0.5, 2)
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), norm, nn.ReLU()]

    net = nn.Sequential(*layer(3, 16, 8), *layer(16, 64, 8))
    net.out_channels = 64  # type: ignore[assignment]
    return net


def detector(detection: Any, kind: str, backbone: Any = backbone) -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 128, "num_classes": 3}
    if kind in ("RetinaNet", "FCOS"):
        anchors = anchors if kind == "RetinaNet" else AnchorGenerator(((16,),), ((1.0,),))
        return getattr(detection, kind)(backbone(), anchor_generator=anchors, score_thresh=0.001, **sizes).eval()
    pools = {
        name: MultiScaleRoIAlign(["0"], size, 2)
        for name, size in (("box_roi_pool", 5), ("mask_roi_pool", 8), ("keypoint_roi_pool", 8))
        if name.startswith(("box", kind[:4].lower()))
    }
    few = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 12, "box_detections_per_img": 6}
    return getattr(detection, kind)(backbone(), rpn_anchor_generator=anchors, **pools, **few, **sizes).eval()


PARTS = {
    "RetinaNet": ["backbone", "head"],
    "FCOS": ["backbone", "head"],
    "FasterRCNN": ["backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"],
    "MaskRCNN": [
        "backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head",
        "roi_heads.mask_predictor",
    ],
    "KeypointRCNN": [
        "backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.keypoint_head",
        "roi_heads.keypoint_predictor",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("RetinaNet", "export"),
        ("RetinaNet", "torchscript"),
        *(
            pytest.param(kind, "export", marks=pytest.mark.slow)
            for kind in ("FCOS", "FasterRCNN", "MaskRCNN", "KeypointRCNN")
        ),
        *(pytest.param(kind, "torchscript", marks=pytest.mark.slow) for kind in ("FasterRCNN", "MaskRCNN")),
        *(pytest.param(kind, "imperative", marks=pytest.mark.slow) for kind in PARTS),
    ],
)
def test_torchvisions_detectors(detection: Any, kind: str, mode: str, tmp_path: Path) -> None:
    module = detector(detection, kind)
    model: Any = qf.quantize(module, [images((60, 80), (64, 64)), images((70, 50))], mode=mode)
    assert list(model.parts) == PARTS[kind]
    assert model.results["int8_proof"]["coverage"] == 1.0
    outside = {row["name"] for row in model.results["outside"]}
    assert {f"{kind} (its own code)", "transform"} <= outside
    other = images((90, 50), (64, 100))
    found, wanted = model(other), module(other)
    assert [list(each) for each in found] == [list(each) for each in wanted]
    assert all(a[key].dtype == b[key].dtype for a, b in zip(found, wanted, strict=True) for key in a)
    assert all(part["sqnr_in_model_db"] > 15 for part in model.results["parts"])
    model.save(tmp_path / "art")
    again = qf.load(tmp_path / "art", module=module)(other)
    if mode != "imperative":
        assert same(again, found)
    # Float code outside the parts may round otherwise on a result that lies otherwise in memory.
    for a, b in zip(again, found, strict=True):
        assert all(torch.allclose(a[key].float(), b[key].float(), rtol=1e-3, atol=1e-3) for key in b)


@pytest.mark.slow
def test_frozen_statistics_in_a_detector(detection: Any) -> None:
    module = detector(detection, "FasterRCNN", frozen)
    model: Any = qf.quantize(module, [images((64, 64), (60, 120)), images((60, 60))])
    assert list(model.parts) == PARTS["FasterRCNN"]
    rows = [row for row in model.results["plan"] if row["name"].startswith("backbone")]
    assert [(row["precision"], row["reason"]) for row in rows] == [("int8", "BatchNorm folded")] * 2
    for other in (images((64, 64)), images((90, 50), (64, 120))):
        assert [list(each) for each in model(other)] == [list(each) for each in module(other)]


class Small(Finder):
    """Images come to feature maps with sides of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 8, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 8, 1), nn.ReLU())


@pytest.mark.parametrize("mode", ["export", "torchscript", pytest.param("imperative", marks=pytest.mark.slow)])
def test_feature_maps_with_a_side_of_1(mode: str) -> None:
    module = finder(Small)
    model: Any = qf.quantize(module, [images((64, 64), (60, 120)), images((60, 60))], mode=mode)
    assert list(model.parts) == ["backbone", "head"]
    for other in (images((64, 64)), images((190, 50), (64, 320), (130, 130))):
        found, wanted = model(other), module(other)
        assert [(list(each), each["size"]) for each in found] == [(list(each), each["size"]) for each in wanted]
