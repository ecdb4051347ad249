"""What a user can get wrong: each ends with its exit code, a message that says where and what to do, and no trace."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quantflow.cli import command as cli

OWN_CODE = Path(__file__).with_name("own_models.py")
ROOT = Path(cli.__file__).parents[2]

MODEL = ["model=entry", "model.entry=mine:net"]
NOISE = ["data=random", "data.shape=[[3,8,8]]", "data.calibration=4", "data.evaluation=4"]
OWN_DATA = ["data=entry", "data.calibration=8", "data.evaluation=2"]
#: Fast: TorchScript's import is quicker than torch.export.
SHORT = ["mode=torchscript", "benchmark=disabled", "evaluate=summary", "calibrate.checkpoint_every_s=0"]
RUN = [*MODEL, *NOISE, *SHORT]


@dataclass(frozen=True)
class Case:
    """One bad input. `messages`: pieces of the message, the place and the cure."""

    name: str
    arguments: list[str]
    exit_code: int
    messages: tuple[str, ...]
    prepare: Callable[[Path], Any] = lambda _: None


def case(
    name: str, arguments: list[str], exit_code: int, *messages: str, prepare: Callable[[Path], Any] = lambda _: None
) -> Case:
    return Case(name, arguments, exit_code, messages, prepare)


# --- what the files of a case hold


def recipe(text: str) -> Callable[[Path], Any]:
    """A recipe file, mine.yaml."""
    return lambda folder: (folder / "mine.yaml").write_text(text)


def file(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def npz(**arrays: np.ndarray) -> Callable[[Path], Any]:
    return lambda folder: np.savez(folder / "x.npz", **arrays)  # type: ignore[arg-type]


def images(*names: str, corrupt: str = "") -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        for name in names:
            target = folder / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (9, 80, 200)).save(target)
        if corrupt:
            (folder / "images" / corrupt).write_bytes(b"\x89PNG not at all")

    return write


def scriptmodule(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(torch.nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)).save(folder / "m.pt")


def wrong_weights(folder: Path) -> None:
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7), "head.bias": torch.zeros(1)}, folder / "w.safetensors")


def poisoned_pickle(name: str) -> Callable[[Path], Any]:
    class Poison:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("pwned",)

    return file(name, pickle.dumps(Poison(), 2))


FINITE = np.ones((6, 3, 8, 8), np.float32)


def spoiled(value: float) -> np.ndarray:
    x = FINITE.copy()
    x[4, 1, 2, 3] = value
    return x


TENSORS = ["data=tensors", "data.path=x.npz", "data.calibration=3", "data.evaluation=3"]
FOLDER = ["data=folder", "data.path=images", "data.size=8"]
FILE = ["recipe=mine.yaml"]
TORCHVISION = ["model=torchvision", "model.name=resnet18"]
MINE = "model: {kind: entry, entry: 'mine:net'}\n"

RECIPES = [
    case(
        "unknown keys, all at once",
        FILE,
        2,
        "2 problems",
        "qconfig.activation.obsrver: no such setting; nearest: observer",
        "gates.min_sqrn_db: no such setting; nearest: min_sqnr_db",
        prepare=recipe(MINE + "qconfig: {activation: {obsrver: mse}}\ngates: {min_sqrn_db: 3}"),
    ),
    case(
        "wrong types, all at once",
        FILE,
        2,
        "3 problems",
        "seed: found 'one'; must be a whole number",
        "data.batch_size: found true; must be a whole number",
        "benchmark.batch_sizes: found 4; must be a list",
        prepare=recipe(MINE + "seed: one\ndata: {batch_size: true}\nbenchmark: {batch_sizes: 4}"),
    ),
    case("not YAML", FILE, 2, "mine.yaml: is not YAML", prepare=recipe("model: [entry")),
    case("a list", FILE, 2, "mine.yaml: must be a mapping", prepare=recipe("- model\n- data\n")),
    case("binary", FILE, 2, "mine.yaml", prepare=file("mine.yaml", b"\xff\xfe\x00\x80" * 8)),
    case("an empty recipe", FILE, 2, "model: is required; choose one", prepare=recipe("")),
    case("a folder as recipe", ["recipe=./"], 2, "recipe: no such file; known recipes are"),
    case(
        "a recipe that is not there",
        ["recipe=resnet18_sym_int"],
        2,
        "recipe: 'resnet18_sym_int' is not known; nearest: resnet18_sym_int8",
    ),
    case(
        "an import path where a name belongs",
        FILE,
        2,
        "model._target_: no such setting",
        prepare=recipe("model: {kind: entry, entry: 'mine:net', _target_: os.system}"),
    ),
    case(
        "a name that leaves the folder", [*RUN, "name=../../evil"], 2, "name: found '../../evil'; must be a file name"
    ),
    case(
        "int4 weights",
        [*RUN, "qconfig.weight.dtype=int4"],
        2,
        "qconfig.weight.dtype: 'int4' is not possible here; use int8",
    ),
    case(
        "affine weights",
        [*RUN, "qconfig.weight.qscheme=affine"],
        2,
        "qconfig.weight.qscheme: 'affine' is not possible here; use symmetric",
    ),
    case(
        "per_channel activations",
        [*RUN, "qconfig.activation.granularity=per_channel"],
        2,
        "'per_channel' is not possible here; use per_tensor",
    ),
    case(
        "percentile out of range",
        [*RUN, "qconfig.activation.percentile=40"],
        2,
        "qconfig.activation.percentile: found 40; must be more than 50",
    ),
    case(
        "percentile not a number",
        [*RUN, "qconfig.activation.percentile=nan"],
        2,
        "qconfig.activation.percentile: found nan; must be",
    ),
    case("negative seed", [*RUN, "seed=-1"], 2, "seed: found -1; must be at least 0"),
    case(
        "a pattern that matches nothing",
        [*RUN, "layers={blok: float}"],
        2,
        "layers.blok: 'blok' matches nothing; nearest names: block",
    ),
    case(
        "two patterns that match nothing",
        [*RUN, "layers={blok: float, steem.*: float}"],
        2,
        "2 problems",
        "layers.blok",
        "layers.steem.*",
    ),
    case("a precision that does not exist", [*RUN, "layers={block: int4}"], 2, "layers.block", "'int4'"),
    case(
        "int8 where there is no int8 form",
        [*RUN, "model.entry=mine:Normed", "layers={norm: int8}"],
        2,
        "layers.norm: can't run in int8",
        "remove the override",
    ),
    case("everything float", [*RUN, "layers={*: float}"], 2, "the recipe says so: layers.*"),
    case(
        "a gate that is no number",
        [*RUN, "gates.min_sqnr_db=high"],
        2,
        "gates.min_sqnr_db: found 'high'; must be a number",
    ),
    case(
        "the output is a file",
        [*RUN, "output=there"],
        2,
        "there' is a file",
        "choose another output=",
        prepare=file("there", b"mine"),
    ),
    case(
        "the output holds the user's files",
        [*RUN, "output=there"],
        2,
        "not part of an artifact ('thesis.txt')",
        "choose another output=",
        prepare=lambda folder: ((folder / "there").mkdir(), (folder / "there" / "thesis.txt").write_text("x")),
    ),
    case("the output can't be made", [*RUN, "output=/proc/quantflow"], 2, "choose another output="),
]

MODELS = [
    case(
        "an unknown architecture",
        [*TORCHVISION, "model.name=resnet19", *NOISE, *SHORT],
        2,
        "torchvision has no architecture 'resnet19'; nearest names: resnet18",
    ),
    case(
        "a detection architecture",
        [*TORCHVISION, "model.name=fasterrcnn_resnet50_fpn", *NOISE, *SHORT],
        2,
        "not a classification, segmentation or video architecture",
    ),
    case(
        "pretrained without a network",
        [*TORCHVISION, "model.weights=pretrained", *NOISE, *SHORT],
        4,
        "pretrained weights of resnet18 can't be had",
        "use model.weights=PATH",
        "model.weights=auto",
    ),
    case(
        "weights of another model",
        [*TORCHVISION, "model.weights=w.safetensors", *NOISE, *SHORT],
        2,
        "model.weights: w.safetensors does not fit the model (missing: bn1.weight",
        "unexpected: head.bias",
        "check the model's name",
        prepare=wrong_weights,
    ),
    case(
        "a missing weights file",
        [*TORCHVISION, "model.weights=w.safetensors", *NOISE, *SHORT],
        2,
        "model.weights: w.safetensors is missing, expected a file",
    ),
    case(
        "weights that would run code",
        [*TORCHVISION, "model.weights=w.pt", *NOISE, *SHORT],
        2,
        "model.weights: w.pt is no plain state dict",
        "save model.state_dict() instead",
        prepare=poisoned_pickle("w.pt"),
    ),
    case(
        "a missing ScriptModule",
        ["model=scriptmodule", "model.path=m.pt", *NOISE, *SHORT],
        2,
        "model.path: m.pt is missing, expected a file written by torch.jit.save",
    ),
    case(
        "a corrupt ScriptModule",
        ["model=scriptmodule", "model.path=m.pt", *NOISE, *SHORT],
        2,
        "model.path: m.pt can't be loaded",
        "expected a complete file written by torch.jit.save",
        prepare=file("m.pt", b"PK\x03\x04 cut off"),
    ),
    case(
        "a corrupt ExportedProgram",
        ["model=exported", "model.path=m.pt2", *NOISE, *SHORT],
        2,
        "model.path: m.pt2 can't be loaded",
        "expected a complete file written by torch.export.save",
        prepare=file("m.pt2", b"PK\x03\x04 cut off"),
    ),
    case(
        "an ExportedProgram that is a pickle",
        ["model=exported", "model.path=m.pt2", *NOISE, *SHORT],
        2,
        "model.path: m.pt2",
        prepare=poisoned_pickle("m.pt2"),
    ),
    case(
        "a transformers folder without a config",
        ["model=transformers", "model.path=.", *NOISE, *SHORT],
        2,
        "config.json",
    ),
    case(
        "an entry module that is not there",
        [*RUN, "model.entry=yours:net"],
        2,
        "model.entry: 'yours:net': no module 'yours'",
        "run from the directory that holds it",
    ),
    case("an entry that is not there", [*RUN, "model.entry=mine:nett"], 2, "'mine' has no 'nett'; nearest names: net"),
    case(
        "an entry that is not callable",
        [*RUN, "model.entry=mine:table"],
        2,
        "is a OrderedDict, expected something to call",
    ),
    case(
        "an entry that returns text",
        [*RUN, "model.entry=mine:returns_text"],
        2,
        "returned str; expected torch.nn.Module",
    ),
    case(
        "an entry that raises",
        [*RUN, "model.entry=mine:raises"],
        2,
        "raised RuntimeError at",
        "mine.py:",
        "no such checkpoint: v3",
    ),
    case("an entry that exits", [*RUN, "model.entry=mine:gives_up"], 2, "model.entry: 'mine:gives_up'", "SystemExit"),
    case(
        "an entry whose module does not compile",
        [*RUN, "model.entry=broken:net"],
        2,
        "importing it raised SyntaxError",
        prepare=file("broken.py", b"def net(:\n"),
    ),
    case(
        "an entry called with too little",
        [*RUN, "model.entry=mine:needs_width"],
        2,
        "missing 1 required positional argument: 'width'",
    ),
    case("NaN weights", [*RUN, "model.entry=mine:nan_weights"], 2, "model: 'block.weight' holds NaN"),
    case(
        "NaN weights, exported",
        [*RUN, "model.entry=mine:nan_weights", "mode=export"],
        2,
        "model: 'block.weight' holds NaN",
    ),
    case("weights that overflow", [*RUN, "model.entry=mine:overflows"], 2, "Inf", "check the model's weights"),
    case("a half-precision model on float32", [*RUN, "model.entry=mine:half"], 2, "model fails on the first batch"),
    case(
        "a model that was never initialised",
        [*RUN, "model.entry=mine:lazy"],
        2,
        "'1.weight' has no shape yet",
        "call a model with lazy layers once",
    ),
    case(
        "a model on the meta device",
        [*RUN, "model.entry=mine:on_meta"],
        2,
        "is on the meta device",
        "load its weights first",
    ),
    case(
        "a model without layers",
        [*RUN, "model.entry=mine:no_layers"],
        2,
        "the model has no convolution and no linear layer",
    ),
    case("a model without an output", [*RUN, "model.entry=mine:Empty"], 2, "returns no tensor that can be found"),
    case(
        "a model without an output, exported",
        [*RUN, "model.entry=mine:Empty", "mode=export"],
        2,
        "Empty returns no tensor that can be found",
        "return tensors",
    ),
    case(
        "a model that fails on its input",
        [*RUN, "data.shape=[[4,8,8]]"],
        2,
        "the model fails on the first batch",
        "to have 3 channels, but got 4",
        "found input 0 float32 [4, 4, 8, 8]",
    ),
    case(
        "a model that fails on its input, exported",
        [*RUN, "data.shape=[[4,8,8]]", "mode=export"],
        2,
        "the model fails on the first batch",
        "to have 3 channels, but got 4",
        "found input 0 float32 [4, 4, 8, 8]",
    ),
    case(
        "a model that fails on its input, imperative",
        [*RUN, "data.shape=[[4,8,8]]", "mode=imperative"],
        2,
        "the model fails on the first batch",
        "to have 3 channels, but got 4",
        "found input 0 float32 [4, 4, 8, 8]",
    ),
]

DATA = [
    case(
        "a missing folder", [*MODEL, *FOLDER, *SHORT], 2, "data.path: images is missing, expected a directory of images"
    ),
    case(
        "an empty folder",
        [*MODEL, *FOLDER, *SHORT],
        2,
        "data.path: images holds no image; files ending in .jpg",
        prepare=lambda folder: (folder / "images").mkdir(),
    ),
    case(
        "a corrupt image",
        [*MODEL, *FOLDER, *SHORT],
        2,
        "images/b.png: can't be decoded as an image",
        "repair or remove the file",
        prepare=images("a.png", "c.png", corrupt="b.png"),
    ),
    case(
        "some images labelled",
        [*MODEL, *FOLDER, *SHORT],
        2,
        "unlabelled ones such as a.png",
        prepare=images("a.png", "cats/b.png"),
    ),
    case(
        "labels beyond the classes",
        [*MODEL, *FOLDER, *SHORT],
        2,
        "labels run from",
        "but the model has 5 classes",
        prepare=images("7/a.png", "8/b.png"),
    ),
    case(
        "NaN in a tensor",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "array 'x': sample 4 holds NaN (1 of 6 samples are not finite)",
        "repair the data",
        prepare=npz(x=spoiled(float("nan"))),
    ),
    case(
        "Inf in a tensor",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "array 'x': sample 4 holds Inf",
        prepare=npz(x=spoiled(float("inf"))),
    ),
    case(
        "a missing tensor file",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "data.path: x.npz is missing, expected a file of tensors",
    ),
    case(
        "a file that is no archive",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "x.npz can't be read as .npz",
        prepare=file("x.npz", b"nonsense"),
    ),
    case(
        "Python objects in a tensor file",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "never loaded",
        prepare=npz(x=np.array([{}, {}], object)),
    ),
    case(
        "a wrong input key",
        [*MODEL, *TENSORS, "data.input_keys=[image]", *SHORT],
        2,
        "no array 'image'",
        "it holds: images",
        "nearest: images",
        prepare=npz(images=FINITE),
    ),
    case(
        "inputs of unequal length",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "must agree; found shapes 'a' (6, 3, 8, 8), 'b' (5,)",
        prepare=npz(a=FINITE, b=np.zeros(5)),
    ),
    case("no samples", [*MODEL, *TENSORS, *SHORT], 2, "holds no sample", prepare=npz(x=FINITE[:0])),
    case(
        "labels that are no classes",
        [*MODEL, *TENSORS, "data.label_key=y", *SHORT],
        2,
        "labels are class indices",
        prepare=npz(x=FINITE, y=np.full(6, 0.5)),
    ),
    case(
        "keywords the model does not know",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "unexpected keyword argument 'a'; found a float32 [3, 3, 8, 8], b float32",
        prepare=npz(a=FINITE, b=FINITE),
    ),
    case(
        "whole numbers for a float model",
        [*MODEL, *TENSORS, *SHORT],
        2,
        "found input 0 int64 [3, 3, 8, 8]",
        prepare=npz(x=FINITE.astype(np.int64)),
    ),
    case(
        "a text model with photos",
        ["model=minilm", "model.weights=random", "data=photos", *SHORT],
        2,
        "data=photos holds images, and the model takes text; use data=text",
    ),
    case("photos read as text", [*MODEL, "data=text", *SHORT], 2, "data=text needs a model with a tokenizer"),
    case(
        "a missing text file",
        ["model=minilm", "model.weights=random", "data=text", "data.path=x.txt", *SHORT],
        2,
        "data.path: x.txt is missing, expected a text file",
    ),
    case(
        "a data entry that is not there",
        [*MODEL, *OWN_DATA, "data.entry=mine:batchez", *SHORT],
        2,
        "data.entry: 'mine:batchez'",
        "nearest names:",
    ),
    case(
        "a data entry of arrays",
        [*MODEL, *OWN_DATA, "data.entry=mine:arrays", *SHORT],
        2,
        "found numpy.ndarray",
        "torch.from_numpy",
    ),
    case(
        "a data entry that breaks down",
        [*MODEL, *OWN_DATA, "data.entry=mine:breaks_down", *SHORT],
        2,
        "raised OSError while yielding batches: disk gone",
    ),
    case(
        "a data entry without batches",
        [*MODEL, *OWN_DATA, "data.entry=mine:nothing", *SHORT],
        2,
        "yielded no calibration batch; 8 samples were asked for",
    ),
    case(
        "a late batch of another shape",
        [*MODEL, *OWN_DATA, "data.entry=mine:odd_one_out", *SHORT],
        2,
        "batch 2",
        "dimension 1 of x is 4 and was 3 in the first batch",
        "give every sample the shape",
    ),
    case("a late NaN", [*MODEL, *OWN_DATA, "data.entry=mine:late_nan", *SHORT], 2, "batch 2", "NaN"),
]

MODES = [
    case(
        "imperative of a ScriptModule",
        ["model=scriptmodule", "model.path=m.pt", *NOISE, *SHORT, "mode=imperative"],
        2,
        "the model is a ScriptModule; use mode=torchscript",
        prepare=scriptmodule,
    ),
    case(
        "script of the unscriptable",
        [*RUN, "model.entry=mine:Unscriptable", "mode.method=script"],
        2,
        "torch.jit.script can't capture Unscriptable",
        "try mode.method=trace",
    ),
    case(
        "export of branches on data",
        [*RUN, "model.entry=mine:Branching", "mode=export"],
        2,
        "torch.export can't capture Branching",
        "try mode=torchscript",
    ),
    case(
        "script outside torchscript",
        [*RUN, "mode=export", "mode.method=script"],
        2,
        "mode.method: script is possible in mode=torchscript only",
    ),
    case(
        "torchscript on the reference",
        [*RUN, "runtime=reference"],
        4,
        "runtime: 'reference' can't serve mode=torchscript",
        "native, torch, triton, auto",
    ),
    case(
        "a GPU that is not there",
        [*RUN, "device=xpu"],
        4,
        "device: 'xpu' is not available; devices found: cpu",
        "use device=cpu",
    ),
    case("a plan on a GPU that is not there", [*RUN, "task=plan", "device=xpu"], 4, "device: 'xpu' is not available"),
]


# --- artifacts: the one in `folder/art` is whole before `prepare` changes it

ART = "artifact=art"
OWN_AGAIN = ["model=entry", "model.entry=mine:net"]


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """One file changed behind the manifest's back."""

    def write(folder: Path) -> None:
        path = folder / "art" / name
        path.write_bytes(change(path.read_bytes()))

    return write


def forged(name: str, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """One JSON file changed, and the manifest made to agree, as somebody with a plan would."""

    def write(folder: Path) -> None:
        path = folder / "art" / name
        data = json.loads(path.read_text())
        data = change(data) or data
        path.write_text(json.dumps(data))
        sign(folder / "art")

    return write


def forged_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        path = folder / "art" / "weights.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        sign(folder / "art")

    return write


def sign(art: Path) -> None:
    manifest = json.loads((art / "manifest.json").read_text())
    for path in art.iterdir():
        if path.name != "manifest.json":
            content = path.read_bytes()
            manifest["files"][path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(
        json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    (art / "manifest.json").write_text(json.dumps(manifest))


def first(op: str, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    return next(node for node in nodes if node["op"] == op)


def negative_scale(program: dict[str, Any]) -> None:
    next(iter(program["values"].values()))["scale"] = -0.5


def reaches_out(program: dict[str, Any]) -> None:
    program["nodes"][-1].update(op="aten", target="from_file.default")


def loses(key: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        del data[key]

    return change


def nonsense_scales(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name] = -tensors[name]


def cut_weights(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, x in tensors.items() if x.dtype is torch.int8)
    tensors[name] = tensors[name][1:].clone()


def link(folder: Path) -> None:
    (folder / "plan.json").write_bytes((folder / "art" / "plan.json").read_bytes())
    (folder / "art" / "plan.json").unlink()
    (folder / "art" / "plan.json").symlink_to(folder / "plan.json")


AGAIN = ["task=evaluate", ART, *OWN_AGAIN]
ARTIFACTS = [
    case(
        "no artifact",
        ["task=inspect", "artifact=nowhere"],
        2,
        "no artifact at",
        "give artifact= the directory that a run wrote",
    ),
    case("an artifact that is a file", ["task=inspect", "artifact=mine.py"], 2, "no artifact at"),
    case("a folder that is no artifact", ["task=inspect", "artifact=."], 2, "manifest.json missing"),
    case(
        "an artifact's task without one",
        ["task=evaluate", *MODEL],
        2,
        "artifact: task=evaluate needs the folder that a run wrote",
    ),
    case(
        "truncated weights",
        ["task=inspect", ART],
        2,
        "weights.safetensors has",
        "(truncated)",
        "run the recipe again",
        prepare=changed("weights.safetensors", lambda b: b[:-9]),
    ),
    case(
        "tampered weights",
        AGAIN,
        2,
        "weights.safetensors was changed after it was written",
        prepare=changed("weights.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    ),
    case(
        "a tampered program",
        ["task=benchmark", ART, *OWN_AGAIN],
        2,
        "program.json was changed",
        prepare=changed("program.json", lambda b: b.replace(b'"relu"', b'"tanh"')),
    ),
    case(
        "a tampered manifest",
        ["task=inspect", ART],
        2,
        "manifest.json was changed after it was written",
        prepare=changed("manifest.json", lambda b: b.replace(b'"created": "2', b'"created": "1')),
    ),
    case(
        "a missing file",
        ["task=report", ART],
        2,
        "'plan.json' missing",
        prepare=lambda folder: (folder / "art" / "plan.json").unlink(),
    ),
    case(
        "an extra file",
        ["task=report", ART],
        2,
        "'notes.txt' not in its manifest",
        "move what does not belong there",
        prepare=file("art/notes.txt", b"x"),
    ),
    case("a link", ["task=inspect", ART], 2, "plan.json is a link", prepare=link),
    case(
        "a newer format",
        ["task=inspect", ART],
        2,
        "has format 2, and this quantflow reads formats up to 1; install quantflow",
        prepare=forged("manifest.json", lambda m: m.update(format=2)),
    ),
    case(
        "a newer program",
        ["task=inspect", ART],
        2,
        "program.json: format 3 is newer",
        prepare=forged("program.json", lambda p: p.update(format=3)),
    ),
    case("a negative scale", AGAIN, 2, "program.json", "scale", "-0.5", prepare=forged("program.json", negative_scale)),
    case(
        "negative weight scales",
        AGAIN,
        2,
        "weight_scale holds a value that is not positive and finite",
        prepare=forged_weights(nonsense_scales),
    ),
    case("weights of another shape", AGAIN, 2, "program.json: node", prepare=forged_weights(cut_weights)),
    case(
        "an op that reaches out",
        AGAIN,
        2,
        "'from_file.default' is not an ATen op that a program may use",
        prepare=forged("program.json", reaches_out),
    ),
    case(
        "an op that does not exist",
        AGAIN,
        2,
        "op 'exec' is not one of",
        prepare=forged("program.json", lambda p: first("conv", p["nodes"]).update(op="exec")),
    ),
    case(
        "a program that reads what is not there",
        AGAIN,
        2,
        "reads 'gone', which no earlier node defines",
        prepare=forged("program.json", lambda p: first("quantize", p["nodes"]).update(args=[{"value": "gone"}])),
    ),
    case(
        "a program without nodes",
        ["task=inspect", ART],
        2,
        "program.json",
        prepare=forged("program.json", loses("nodes")),
    ),
    case("a plan without rows", ["task=inspect", ART], 2, "plan.json", prepare=forged("plan.json", loses("rows"))),
    case(
        "results that are a list",
        ["task=report", ART],
        2,
        "results.json",
        prepare=forged("results.json", lambda _: [1]),
    ),
    case(
        "a recipe of another schema",
        AGAIN,
        2,
        "kalibrate: no such setting",
        prepare=forged("recipe.json", lambda r: r.update(kalibrate=1)),
    ),
    case(
        "an artifact that names code",
        ["task=evaluate", ART],
        2,
        "the artifact names code ('mine:net')",
        "add model=entry model.entry=mine:net",
    ),
    case(
        "an artifact and a recipe",
        ["recipe=resnet18_sym_int8", "task=evaluate", ART],
        2,
        "an artifact holds its own recipe; leave recipe=… out",
    ),
    case("an artifact evaluated on a GPU", [*AGAIN, "device=xpu"], 4, "device: 'xpu' is not available"),
    case(
        "an artifact evaluated on no data",
        [*AGAIN, "data=folder", "data.path=images"],
        2,
        "data.path: images is missing",
    ),
    case(
        "an artifact evaluated with another model",
        ["task=evaluate", ART, "model=entry", "model.entry=mine:Branching"],
        2,
        "not the float model that 'art' was made from",
        "has shape (4, 4, 6, 6)",
    ),
]

CASES = [*RECIPES, *MODELS, *DATA, *MODES, *ARTIFACTS]
#: Also as a program of its own.
PROGRAMS = ("a pattern that matches nothing", "a GPU that is not there", "a late NaN", "truncated weights")


@pytest.fixture(scope="session")
def whole_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run's artifact."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(OWN_CODE, folder / "mine.py")
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        assert cli.run([*RUN, "output=art", "report.quiet=true"]) == 0
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("mine", None)
    return folder / "art"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, and a machine without a network."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path.parent / "no-downloads"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(OWN_CODE, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below the folder with its bytes; None for folders and links."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


def prepared(item: Case, folder: Path, whole_artifact: Path) -> dict[str, bytes | None]:
    if item in ARTIFACTS:
        shutil.copytree(whole_artifact, folder / "art")
    item.prepare(folder)
    return contents(folder)


@pytest.mark.parametrize("item", CASES, ids=[item.name for item in CASES])
def test_says_what_to_do_and_writes_nothing(
    item: Case, place: Path, whole_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepared(item, place, whole_artifact)
    assert cli.run(item.arguments) == item.exit_code
    message = capsys.readouterr().err
    assert [piece for piece in item.messages if piece not in message] == [], message
    assert "Traceback" not in message
    assert contents(place) == before


@pytest.mark.parametrize("item", [item for item in CASES if item.name in PROGRAMS], ids=PROGRAMS)
def test_as_a_program(item: Case, place: Path, whole_artifact: Path) -> None:
    before = prepared(item, place, whole_artifact)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "quantflow", *item.arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == item.exit_code
    assert [piece for piece in item.messages if piece not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert contents(place) == before
