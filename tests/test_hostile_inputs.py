"""Inputs made to do harm: each is refused with its exit code and a clear message, runs nothing and writes nothing.

What people get wrong by accident is in test_bad_inputs.py, and damage to an artifact's files in test_artifact.py.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from quantflow.cli import command as cli
from quantflow.errors import ArtifactError
from quantflow.ir.program import Program
from tests.test_bad_inputs import (
    FILE,
    FOLDER,
    MODEL,
    NOISE,
    OWN_AGAIN,
    RUN,
    SHORT,
    TENSORS,
    TORCHVISION,
    Case,
    case,
    contents,
    file,
    first,
    forged,
    forged_weights,
    images,
    recipe,
    sign,
    whole_artifact,
)

__all__ = ["whole_artifact"]

GOOD = """
model: {kind: entry, entry: 'mine:net'}
data: {kind: random, shape: [[3, 8, 8]], calibration: 4, evaluation: 4}
mode: torchscript
"""
SECRET = "QUANTFLOW_TEST_SECRET"


def together(*steps: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [step(folder) for step in steps]


def pipe(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.mkfifo(folder / name)


def link(name: str, target: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).symlink_to(target)


def outside(folder: Path) -> None:
    """A picture beside the data folder, which is none of its business."""
    (folder / "private").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "private/face.png")


def bomb(name: str, side: int) -> Callable[[Path], Any]:
    """A PNG of a few kilobytes that unpacks to side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def write(folder: Path) -> None:
        packer = zlib.compressobj(9)
        rows = b"".join(packer.compress(b"\0" * (side // 8 + 1)) for _ in range(side)) + packer.flush()
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        (folder / name).write_bytes(png)

    return write


def npz_of_shape(shape: str) -> Callable[[Path], Any]:
    """An array that claims a shape and holds nothing."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header

    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "x.npz", "w") as archive:
            archive.writestr("x.npy", array)

    return write


def zip_bomb(folder: Path) -> None:
    """Claims to unpack to 16 TB, in the directory at the archive's end."""
    npz_of_shape("(6, 3, 8, 8)")(folder)
    path = folder / "x.npz"
    archive = bytearray(path.read_bytes())
    entry = archive.index(b"PK\x01\x02")
    name = len(b"x.npy")
    extra = struct.pack("<HHQ", 1, 8, 1 << 44)  # zip64: the size that follows does not fit 32 bits
    archive[entry + 24 : entry + 28] = b"\xff" * 4
    archive[entry + 30 : entry + 32] = struct.pack("<H", len(extra))
    archive[entry + 46 + name : entry + 46 + name] = extra
    end = archive.index(b"PK\x05\x06")
    size = struct.unpack_from("<I", archive, end + 12)[0] + len(extra)
    archive[end + 12 : end + 16] = struct.pack("<I", size)
    path.write_bytes(archive)


def safetensors(header: Any, name: str = "x.safetensors", length: int | None = None) -> Callable[[Path], Any]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return file(name, struct.pack("<Q", len(text) if length is None else length) + text)


def alias_bomb(levels: int) -> str:
    """Ten lines that stand for 9 ** levels words."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


TENSORS_RUN = [*MODEL, *TENSORS, *SHORT]
SAFETENSORS = [word.replace("x.npz", "x.safetensors") for word in TENSORS_RUN]
PICTURES = [*MODEL, *FOLDER, "data.calibration=2", "data.evaluation=2", *SHORT]
TWO = images("a.png", "c.png")

RECIPES = [
    case("an alias bomb", FILE, 2, "holds more than 100000 values", prepare=recipe(GOOD + alias_bomb(9))),
    case("an alias inside itself", FILE, 2, "*a stands inside what", prepare=recipe(GOOD + "layers: &a {x: *a}\n")),
    case("deep lists", FILE, 2, "nested deeper than 50", prepare=recipe(GOOD + "name: " + "[" * 9999 + "]" * 9999)),
    case("deep maps", FILE, 2, "nested deeper than 50",
         prepare=recipe(GOOD + "x: " + "{a: " * 3000 + "1" + "}" * 3000)),
    case("endless digits", FILE, 2, "5000 characters", prepare=recipe(GOOD + "seed: " + "9" * 5000)),
    case("a number beyond all", FILE, 2, "gates.min_sqnr_db", prepare=recipe(GOOD + "gates: {min_sqnr_db: 1e999}")),
    case(
        "a gigantic file", FILE, 2, "is longer than 1048576 bytes",
        prepare=together(recipe(GOOD), lambda folder: os.truncate(folder / "mine.yaml", 2 << 20)),
    ),
    case(
        "a Python tag", FILE, 2, "is not YAML", "could not determine a constructor",
        prepare=recipe(GOOD + "description: !!python/object/apply:os.mkdir [pwned]"),
    ),
    case("a pipe as recipe", FILE, 2, "recipe: no such file", prepare=pipe("mine.yaml")),
    case("a device as recipe", ["recipe=/dev/zero"], 2, "recipe: no such file"),
    case("no UTF-8", FILE, 2, "can't be read", prepare=file("mine.yaml", b"name: \xff\n")),
    case(
        "the environment", FILE, 2, "description: ", "can't read environment variables",
        prepare=recipe(GOOD + f"description: '${{oc.env:{SECRET}}}'"),
    ),
    case(
        "the environment, hidden", FILE, 2, "can't read environment variables",
        prepare=recipe(GOOD + f"description: '${{oc.decode:${{name}}}}'\nname: '${{oc.env:{SECRET}}}'"),
    ),
    case(
        "the environment in a group of one's own", ["--config-dir", "own", "report=evil", *FILE], 2,
        "can't read environment variables",
        prepare=together(
            recipe(GOOD),
            lambda folder: (folder / "own/report").mkdir(parents=True),
            file("own/report/evil.yaml", f"# @package _global_\noutput: ${{oc.env:{SECRET}}}\n".encode()),
        ),
    ),
    case(
        "the environment in the defaults list", FILE, 2, "defaults: names are written out here",
        prepare=recipe(GOOD + f"defaults: [_self_, {{override /qconfig: '${{oc.env:{SECRET}}}'}}]"),
    ),
    case(
        "Hydra's own settings", FILE, 2, "Hydra's own settings belong on the command line",
        prepare=recipe(GOOD + "hydra: {run: {dir: /}}"),
    ),
    case(
        "a target in a group of one's own", ["--config-dir", "own", "qconfig=evil", *FILE], 2,
        "_target_: no such setting",
        prepare=together(
            recipe(GOOD),
            lambda folder: (folder / "own/qconfig").mkdir(parents=True),
            file("own/qconfig/evil.yaml", b"_target_: os.system\n"),
        ),
    ),
    case("NUL in the output", FILE, 2, "line 5", "control characters", prepare=recipe(GOOD + 'output: "a\\0b"')),
    case("NUL in an artifact", FILE, 2, "line 2", "control", prepare=recipe('task: inspect\nartifact: "a\\0b"')),
    case("an endless name", [*RUN, "output=" + "a" * 300], 2, "output: ", "255 per name"),
    case("an endless path", [*MODEL, *FOLDER, *SHORT, "data.path=" + "a/" * 4000], 2, "data.path: ", "4095 bytes"),
    case("a name that climbs", [*RUN, "name=.."], 2, "name: found '..'; must be a file name"),
    case(
        "somebody's folder, by its full path", [*RUN, "output=/etc"], 2, "not part of an artifact",
        "choose another output=",
    ),
]  # fmt: skip

DATA = [
    case("a link out of the data folder", PICTURES, 2, "images/b.png is a link that leads out of images",
         prepare=together(TWO, outside, link("images/b.png", "../private/face.png"))),
    case("a linked folder", PICTURES, 2, "images/b is a link that leads out of images",
         prepare=together(TWO, outside, link("images/b", "../private"))),
    case("a link to a device", PICTURES, 2, "images/b.png is a link that leads out",
         prepare=together(TWO, link("images/b.png", "/dev/zero"))),
    case("a pipe as image", PICTURES, 2, "images/b.png is neither a file nor a directory, expected an image file",
         prepare=together(TWO, pipe("images/b.png"))),
    case("a picture of 400 million pixels", PICTURES, 2, "images/b.png: can't be decoded", "decompression bomb",
         prepare=together(TWO, bomb("images/b.png", 20_000))),
    case("a picture of 100 million pixels", PICTURES, 2, "images/b.png: can't be decoded", "decompression bomb",
         prepare=together(TWO, bomb("images/b.png", 10_000))),
    case("a zip bomb", TENSORS_RUN, 2, "its arrays take 1.759e+04 GB", "store fewer samples", prepare=zip_bomb),
    case("an array of terabytes", TENSORS_RUN, 2, "array 'x' can't be used",
         prepare=npz_of_shape("(1000000000000, 3, 8, 8)")),
    case("a shape that overflows", TENSORS_RUN, 2, "array 'x' can't be used",
         prepare=npz_of_shape(f"({1 << 62}, 4, 8, 8)")),
    case("a shape below zero", TENSORS_RUN, 2, "array 'x' can't be used", prepare=npz_of_shape("(-1, 3, 8, 8)")),
    case("a shape that calls", TENSORS_RUN, 2, "array 'x' can't be used",
         prepare=npz_of_shape("__import__('os').mkdir('p')")),
    case("a deep shape", TENSORS_RUN, 2, "array 'x' can't be used",
         prepare=npz_of_shape("(" * 3000 + "1" + ")" * 3000)),
    case("a pipe as tensors", TENSORS_RUN, 2, "x.npz is neither a file nor a directory", prepare=pipe("x.npz")),
    case("a safetensors header of exabytes", SAFETENSORS, 2, "can't be read as safetensors",
         prepare=safetensors(b"{}", length=1 << 62)),
    case("a safetensors shape that overflows", SAFETENSORS, 2, "can't be read as safetensors",
         prepare=safetensors({"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}})),
    case("safetensors offsets beyond the file", SAFETENSORS, 2, "can't be read as safetensors",
         prepare=safetensors({"x": {"dtype": "F32", "shape": [6, 3], "data_offsets": [0, 1 << 60]}})),
    case("a deep safetensors header", SAFETENSORS, 2, "can't be read as safetensors",
         prepare=safetensors(b"[" * 100_000)),
    case("random data beyond the memory", [*MODEL, "data=random", "data.shape=[[100000,100000]]", *SHORT], 2,
         "data.shape: these samples take", "ask for smaller or fewer ones"),
    case("random data beyond all", [*MODEL, "data=random", f"data.shape=[{[2**31 - 1] * 8}]", *SHORT], 2, "data.shape"),
    case("a pipe as model", ["model=scriptmodule", "model.path=m.pt", *NOISE, *SHORT], 2,
         "m.pt is neither a file nor a directory", prepare=pipe("m.pt")),
    case("a device as weights", [*TORCHVISION, "model.weights=w.safetensors", *NOISE, *SHORT], 2,
         "w.safetensors is neither a file nor a directory", prepare=link("w.safetensors", "/dev/zero")),
]  # fmt: skip


# --- artifacts whose manifest agrees with what was done to them


def program(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def write(data: dict[str, Any]) -> None:
        change(data)

    return forged("program.json", write)


def conv(**attrs: Any) -> Callable[[Path], Any]:
    return program(lambda data: first("conv", data["nodes"])["attrs"].update(attrs))


def value(**fields: Any) -> Callable[[Path], Any]:
    return program(lambda data: next(iter(data["values"].values())).update(fields))


def aten(target: str, *args: Any) -> Callable[[Path], Any]:
    """A node more, whose result is the model's output."""

    def change(data: dict[str, Any]) -> None:
        node = {"name": "more", "op": "aten", "output": "more", "args": list(args), "target": target}
        data["nodes"].append(node)
        data["output"] = {"value": "more"}

    return program(change)


def cycle(data: dict[str, Any]) -> None:
    convolutions = [node for node in data["nodes"] if node["op"] == "conv"]
    convolutions[0]["args"][0] = {"value": convolutions[1]["output"]}


def raw(name: str, content: bytes) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        (folder / "art" / name).write_bytes(content)
        sign(folder / "art")

    return write


def deep_program(folder: Path) -> None:
    """Nested so deeply that only a text can say it."""
    path = folder / "art/program.json"
    data = json.loads(path.read_text()) | {"output": "HERE"}
    path.write_text(json.dumps(data).replace('"HERE"', "[" * 100_000 + "]" * 100_000))
    sign(folder / "art")


HUGE = {"kind": "leaky_relu", "values": [10**400]}
AGAIN = ["task=evaluate", "artifact=art", *OWN_AGAIN]
INSPECT = ["task=inspect", "artifact=art"]
ARTIFACTS = [
    case("a cycle", AGAIN, 2, "which no earlier node defines", prepare=program(cycle)),
    case("nodes in reverse", AGAIN, 2, "which no earlier node", prepare=program(lambda p: p["nodes"].reverse())),
    case("one name for two values", AGAIN, 2, "a second time",
         prepare=program(lambda p: p["nodes"][1].update(output=p["nodes"][0]["output"]))),
    case("a deep program", INSPECT, 2, "program.json", prepare=deep_program),
    case("a stride beyond all", AGAIN, 2, "program.json: node", "stride", prepare=conv(stride=[10**30, 1])),
    case("padding beyond all", AGAIN, 2, "program.json: node", "padding", prepare=conv(padding=[2**40, 2**40])),
    case("padding beyond the memory", AGAIN, 2, "stem.0", "elements", prepare=conv(padding=[2**20, 2**20])),
    case("dilation beyond all", AGAIN, 2, "program.json: node", "dilation", prepare=conv(dilation=[2**62, 1])),
    case("groups below zero", AGAIN, 2, "groups -1 does not divide", prepare=conv(groups=-1)),
    case("groups that are true", AGAIN, 2, "program.json: node", "groups", prepare=conv(groups=True)),
    case("a weight by its path", AGAIN, 2, "is not in weights.safetensors", prepare=conv(weight="../../../etc/passwd")),
    case("a weight that is a list", AGAIN, 2, "program.json", prepare=conv(weight=[1])),
    case("a scale beyond float32", AGAIN, 2, "program.json", "scale", prepare=value(scale=1e300)),
    case("a scale that is text", AGAIN, 2, "program.json", prepare=value(scale="x")),
    case("a zero point beyond all", AGAIN, 2, "program.json", "zero_point", prepare=value(zero_point=10**40)),
    case("a format beyond all", INSPECT, 2, "is newer than this quantflow",
         prepare=program(lambda p: p.update(format=10**40))),
    case("a format below zero", INSPECT, 2, "program.json: format -5", prepare=program(lambda p: p.update(format=-5))),
    case("an input beyond all", AGAIN, 2, "input 'x'", "shape",
         prepare=program(lambda p: p["inputs"][0].update(shape=[None, 10**30, 8, 8]))),
    case("tensors out of nothing", AGAIN, 2, "layer more (ones.default)", prepare=aten("ones.default", [1 << 50])),
    case("terabytes out of little", AGAIN, 2, "layer more (repeat.default): a tensor of more than 2^40 elements",
         prepare=aten("repeat.default", {"value": "x"}, [1 << 30, 1 << 10, 1, 1])),
    case("an op that fails", AGAIN, 2, "program.json: it can't be computed on this input (linalg.cholesky: ",
         prepare=aten("linalg_cholesky.default", {"value": "x"})),
    case("an import as op", AGAIN, 2, "__import__", prepare=aten("__import__.default", "os")),
    case("a class as op", AGAIN, 2, "__class__", prepare=aten("__class__.default")),
    case("a file as op", AGAIN, 2, "from_file.default", prepare=aten("from_file.default", "/etc/passwd")),
    case("an epilogue beyond all", AGAIN, 2, "program.json",
         prepare=program(lambda p: first("conv", p["nodes"]).update(epilogue=HUGE))),
    case("a weights header of exabytes", INSPECT, 2, "weights.safetensors' is damaged",
         prepare=raw("weights.safetensors", struct.pack("<Q", 1 << 60) + b"{}")),
    case("a calibration header of exabytes", INSPECT, 2, "not a calibration table",
         prepare=raw("calibration.safetensors", struct.pack("<Q", 1 << 60) + b"{}")),
    case("weights of nothing", AGAIN, 2, "program.json: node",
         prepare=forged_weights(lambda t: t.update({name: torch.empty(0, dtype=x.dtype) for name, x in t.items()}))),
    case("deep results", INSPECT, 2, "results.json",
         prepare=raw("results.json", b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"}")),
    case("results with endless digits", INSPECT, 2, "results.json",
         prepare=raw("results.json", b'{"a":' + b"9" * 9000 + b"}")),
    case("a graph that is no text", INSPECT, 2, "graph.txt", prepare=raw("graph.txt", b"\xff\xfe")),
    case("a deep recipe", AGAIN, 2, "recipe",
         prepare=raw("recipe.json", b'{"layers":' + b'{"a":' * 900 + b"1" + b"}" * 901)),
    case("a recipe that reads the environment", AGAIN, 2, "can't read environment variables",
         prepare=forged("recipe.json", lambda r: r.update(description=f"${{oc.env:{SECRET}}}"))),
    case("compared with a hostile one", ["task=compare", "baseline=art", "candidate=art2"], 2, "reads 'gone'",
         prepare=together(
             lambda folder: shutil.copytree(folder / "art", folder / "whole"),
             program(lambda p: first("quantize", p["nodes"]).update(args=[{"value": "gone"}])),
             lambda folder: (folder / "art").rename(folder / "art2"),
             lambda folder: (folder / "whole").rename(folder / "art"),
         )),
]  # fmt: skip

CASES = [*RECIPES, *DATA, *ARTIFACTS]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder inside another one, where nothing may appear either."""
    folder = tmp_path / "user"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("own_models.py"), folder / "mine.py")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(SECRET, "hunter2")
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("item", CASES, ids=[item.name for item in CASES])
def test_is_refused_runs_nothing_and_writes_nothing(
    item: Case, place: Path, whole_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if item in ARTIFACTS:
        shutil.copytree(whole_artifact, place / "art")
    item.prepare(place)
    before = contents(place.parent)
    assert cli.run(item.arguments) == item.exit_code
    output = capsys.readouterr()
    assert [piece for piece in item.messages if piece not in output.err] == [], output.err
    assert "Traceback" not in output.err
    assert "hunter2" not in output.out + output.err
    assert len(output.err) < 5000
    assert contents(place.parent) == before


# --- harmless in the end


def test_names_in_an_archive_are_keys_and_no_paths(place: Path) -> None:
    with zipfile.ZipFile(place / "x.npz", "w") as archive, archive.open("../../evil.npy", "w") as stream:
        np.save(stream, np.ones((6, 3, 8, 8), np.float32))  # type: ignore[arg-type]
    assert cli.run([*TENSORS_RUN, "output=art", "report.quiet=true"]) == 0
    assert {path.name for path in place.parent.rglob("*.npy")} == set()
    assert {path.name for path in place.parent.iterdir()} == {"user"}


def test_a_link_where_the_checkpoint_goes_is_replaced_and_not_followed(place: Path) -> None:
    (place / "diary.txt").write_text("mine")
    (place / ".art.calibration.safetensors").symlink_to("diary.txt")
    assert cli.run([*RUN, "output=art", "report.quiet=true"]) == 0
    assert (place / "diary.txt").read_text() == "mine"


def test_a_link_inside_the_data_folder_is_fine(place: Path) -> None:
    together(TWO, link("images/b.png", "a.png"), link("images/loop", "."))(place)
    assert cli.run([*PICTURES, "output=art", "report.quiet=true"]) == 0


def test_aliases_that_stay_small_are_fine(place: Path) -> None:
    recipe(GOOD + "layers: {stem.0: &a {weight: {observer: mse}}, block: *a}\n")(place)
    assert cli.run(["quiet=1", "--help"]) == 0
    from quantflow.config.compose import load_recipe

    layers = load_recipe("mine.yaml").to_dict()["layers"]
    assert layers["block"] == layers["stem.0"]


def test_the_environment_can_be_read_by_others_afterwards(place: Path) -> None:
    from omegaconf import OmegaConf

    recipe(GOOD + f"description: '${{oc.env:{SECRET}}}'")(place)
    assert cli.run(FILE) == 2
    assert OmegaConf.create({"x": f"${{oc.env:{SECRET}}}"}).x == "hunter2"


def test_terminal_codes_in_an_artifact_stay_in_it(
    place: Path, whole_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole_artifact, place / "art")
    forged("results.json", lambda r: r.update(verdict="\x1b[2J", notices=["\x1b]0;title\x07"]))(place)
    assert cli.run(INSPECT) == 2
    output = capsys.readouterr()
    assert "control characters" in output.err
    assert "\x1b" not in output.out + output.err


def test_a_program_of_many_nodes_is_read_to_its_end(whole_artifact: Path) -> None:
    data = json.loads((whole_artifact / "program.json").read_text())
    data["nodes"] = [
        {"name": f"n{i}", "op": "aten", "output": f"n{i}", "args": [{"value": "x" if i == 0 else f"n{i - 1}"}],
         "target": "relu.default"}
        for i in range(20_000)
    ]  # fmt: skip
    data |= {"values": {}, "output": {"value": "gone"}}
    with pytest.raises(ArtifactError, match="output 'gone' is not defined"):
        Program.from_json(data, {})


def test_the_files_of_the_cases_are_what_they_seem(tmp_path: Path) -> None:
    """So that no case is refused for a mistake in its own making."""
    bomb("b.png", 64)(tmp_path)
    with Image.open(tmp_path / "b.png") as image:
        assert image.convert("RGB").size == (64, 64)
    zip_bomb(tmp_path)
    assert zipfile.ZipFile(tmp_path / "x.npz").infolist()[0].file_size == 1 << 44
    assert yaml.safe_load(alias_bomb(2))["a1"] == [["x"] * 9] * 9
