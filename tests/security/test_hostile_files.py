"""Model files, settings, folders and inputs made to do harm: refused by name, nothing run, nothing touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.cli import command as cli
from quantflow.config.compose import load_recipe, prepare
from quantflow.errors import ArtifactError, DataError, ModelError, RecipeError
from quantflow.sources.models.inspected import is_arithmetic, is_operator
from quantflow.sources.models.saved import load_exported, load_scriptmodule
from quantflow.store.artifact import check_destination, read_artifact, write_artifact
from tests.test_bad_inputs import NOISE, SHORT

#: Of TorchScript, and of tensors that few use.
pytestmark = pytest.mark.filterwarnings("ignore")
FILES = {"recipe.json": b"{}", "weights.safetensors": b"w"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


# --- exported programs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "good.pt2"
    size = torch.export.Dim("size", min=8, max=256)
    program = torch.export.export(Net().eval(), (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {2: size}})
    torch.export.save(program, path)
    return path


def changed(good: Path, bad: Path, change: Callable[[str], str]) -> Path:
    """The same archive with another description of the model."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("models/model.json"):
                text = change(content.decode())
                assert text != content.decode(), "nothing was changed"
                content = text.encode()
            target.writestr(info.filename, content)
    return bad


def test_a_good_one_loads_and_says_what_it_is(exported: Path) -> None:
    loaded = load_exported(exported)
    assert "is a program of torch.export's operators, which was run" in loaded.notices[0]
    assert loaded.module is not None


COMMAND = "__import__('os').system('touch pwned')"
EVALUATED = [
    COMMAND, "().__class__.__base__", "[x for x in (1,)]", "(lambda: 1)()", "exec('1')", "open('pwned', 'w')",
    "s77.__init__", "Symbol('s77', cls=print)", "Symbol(__import__('os').name)", "9**9**9", "Pow(Integer(9), s77)",
    "f'{1}'", "'text'", "s77 if 1 else 2", "Integer", "print(1)", "s77[0]", "{1: 2}", "a := 1", "*s77", "1" * 400,
    "Symbol('a b')", "Integer(1).func", "lambda: 0", "globals()", "S('1')", "sympify('1')", "eval('1')",
]  # fmt: skip


@pytest.mark.parametrize("expression", EVALUATED)
def test_an_expression_that_is_no_arithmetic(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_arithmetic(expression)

    def change(text: str) -> str:
        data = json.loads(text)
        values = data["graph_module"]["graph"]["tensor_values"]
        at = next(s for v in values.values() for s in v["sizes"] if "as_expr" in s)
        at["as_expr"]["expr_str"] = expression
        return json.dumps(data)

    with pytest.raises(ModelError, match=r"holds the expression .* is not loaded"):
        load_exported(changed(exported, tmp_path / "bad.pt2", change))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s77', positive=True, integer=True)", "2*s77 + 1", "FloorDiv(s0, 2)", "Max(1, s0 - 3)", "s0**2",
        "Mul(Integer(56), Max(Integer(1), Add(Symbol('s39', positive=True, integer=True), Integer(-2))))", "s0 <= 8",
        "Mod(s0, 8)", "Float('0.5', precision=53)", "And(Eq(s0, 1), s1 > 2)", "u0", "-s0", "TruncToInt(s0/2)",
    ],
)  # fmt: skip
def test_arithmetic_is_legal(expression: str) -> None:
    assert is_arithmetic(expression)


def test_range_constraints_are_expressions_too(exported: Path, tmp_path: Path) -> None:
    def change(text: str) -> str:
        data = json.loads(text)
        data["range_constraints"] = {COMMAND: {"min_val": 1, "max_val": 2}}
        return json.dumps(data)

    with pytest.raises(ModelError, match="holds the expression"):
        load_exported(changed(exported, tmp_path / "bad.pt2", change))


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load", "torch.load", "torch.save", "torch.ops.aten.save.default", "torch.ops.aten.from_file.default",
        "torch.ops.image.write_file.default", "torch.ops.load_library", "torch._C._jit_set_profiling_mode",
        "_operator.attrgetter", "_operator.methodcaller", "_operator.call", "operator.setitem", "math.__loader__",
        "builtins.exec", "os.system", "torch.utils.cpp_extension.load_inline", "torch.ops.rpc.anything.default",
        "torch.ops.aten.add.Tensor.op.__globals__", "#extension", "exec", "torch.sym_int.__globals__",
    ],
)  # fmt: skip
def test_a_call_of_what_is_no_operator(exported: Path, tmp_path: Path, target: str) -> None:
    assert not is_operator(target)
    with pytest.raises(ModelError, match="holds a call of"):
        load_exported(
            changed(exported, tmp_path / "bad.pt2", lambda text: text.replace("torch.ops.aten.relu.default", target))
        )


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.relu.default", "torch.ops.mine.op.default", "_operator.add", "math.ceil", "torch.sym_max"],
)
def test_operators_are_legal(target: str) -> None:
    assert is_operator(target)


def test_a_class_to_import(exported: Path, tmp_path: Path) -> None:
    def change(text: str) -> str:
        data = json.loads(text)
        signature = data["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["in_spec"])
        spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
        signature["in_spec"] = json.dumps(spec)
        return json.dumps(data)

    with pytest.raises(ModelError, match="the name of a Python class to import"):
        load_exported(changed(exported, tmp_path / "bad.pt2", change))


def test_compiled_code(exported: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(exported.read_bytes())
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("good/data/aotinductor/model/x.so", b"\x7fELF")
    with pytest.raises(ModelError, match="holds compiled code"):
        load_exported(bad)


# --- TorchScript


class Saves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "pwned")
        return x


class Forks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.jit.wait(torch.jit.fork(torch.relu, x))


class Remembers(nn.Module):
    """What its file runs when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> int:
        return 1

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        torch.save(state, "pwned")
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("make", [Saves, Forks, Remembers])
def test_a_script_that_reaches_beyond_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: type[nn.Module]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(make()), "m.pt")
    with pytest.raises(ModelError, match="reaches beyond its tensors"):
        load_scriptmodule(Path("m.pt"))
    assert cli.run(["task=plan", "model=scriptmodule", "model.path=m.pt", *NOISE, *SHORT]) == 2
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "code",
    [
        "torch . save(x, 'f')", "f = torch.save\nf(x, 'f')", "ops.image.write_file('f', x)", "ops.aten.save(x, 'f')",
        "x.save('f')", "torch.#c\nsave(x)", "rpc_async(x)", "ops.prim.rpc_remote(x)", "torch.from_file('f')",
        "torch.\\\nsave(x, 'f')",
    ],
)  # fmt: skip
def test_code_by_any_spelling(tmp_path: Path, code: str) -> None:
    torch.jit.save(torch.jit.script(Net()), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as source, zipfile.ZipFile(tmp_path / "bad.pt", "w") as target:
        for info in source.infolist():
            more = f"\n{code}\n".encode() if info.filename.endswith(".py") else b""
            target.writestr(info.filename, source.read(info) + more)
    load_scriptmodule(tmp_path / "good.pt")
    with pytest.raises(ModelError, match="reaches beyond its tensors"):
        load_scriptmodule(tmp_path / "bad.pt")


@pytest.mark.parametrize(("kind", "file"), [("scriptmodule", "m.pt"), ("exported", "m.pt2")])
def test_an_artifacts_model_file_is_not_run_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    if kind == "exported":
        torch.export.save(torch.export.export(Net().eval(), (x,)), file)
    else:
        torch.jit.save(torch.jit.script(Net().eval()), file)
    data = ["data=random", "data.shape=[[3,16,16]]", "data.calibration=2", "data.evaluation=2"]
    model = [f"model={kind}", f"model.path={file}"]
    assert cli.run(["task=run", *model, *data, "output=art", "benchmark.enabled=false"]) == 0
    assert f"model.path: {file} is a program of" in "".join(capsys.readouterr())
    assert cli.run(["task=evaluate", "artifact=art"]) == 2
    assert f"names a file that is a program ('{file}')" in capsys.readouterr().err
    assert cli.run(["task=evaluate", "artifact=art", *model]) == 0


# --- code that somebody else's recipe names

CODE = "from torch import nn\nopen('ran', 'w').close()\n\ndef net():\n    return nn.Linear(4, 2)\n"
NAMES_CODE = """
model: {kind: entry, entry: "theirs:net"}
data: {kind: random, shape: [[4]], calibration: 2, evaluation: 2}
benchmark: {enabled: false}
"""


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody else's beside the working folder, which holds the module that its files name."""
    for name in ("mine", "theirs/recipe", "theirs/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mine" / "theirs.py").write_text(CODE)
    (tmp_path / "theirs" / "recipe" / "given.yaml").write_text(NAMES_CODE)
    (tmp_path / "theirs" / "model" / "given.yaml").write_text("kind: entry\nentry: theirs:net\n")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=../theirs/recipe/given.yaml"],
        ["recipe=given", "--config-dir", "../theirs"],
        ["model=given", "data=random", "data.shape=[[4]]", "data.calibration=2", "data.evaluation=2", "--config-dir",
         "../theirs"],
        ["recipe=linked.yaml"],
        ["-m", "recipe=../theirs/recipe/given.yaml", "qconfig=sym_int8,affine_int8"],
    ],
    ids=["file", "config-dir", "group", "link", "sweep"],
)  # fmt: skip
def test_code_that_somebody_elses_recipe_names_is_named_again(
    apart: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("linked.yaml").symlink_to(apart / "recipe" / "given.yaml")
    assert cli.run(["task=plan", *words]) != 0
    assert "is not run unless you say so: add model.entry=theirs:net" in " ".join(capsys.readouterr().err.split())
    assert not Path("ran").exists()
    if "-m" not in words:
        assert cli.run(["task=plan", "model.entry=theirs:net", *words]) == 0
        assert Path("ran").exists()


def test_a_model_file_that_somebody_elses_recipe_names_is_named_again(
    apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(4, 2).eval()), "m.pt")
    recipe = apart / "recipe" / "file.yaml"
    recipe.write_text(NAMES_CODE.replace('kind: entry, entry: "theirs:net"', "kind: scriptmodule, path: m.pt"))
    assert cli.run(["task=plan", f"recipe={recipe}"]) == 2
    assert "names a model file that is a program ('m.pt')" in " ".join(capsys.readouterr().err.split())
    assert cli.run(["task=plan", f"recipe={recipe}", "model.path=m.pt"]) == 0


def test_code_that_a_recipe_of_the_working_folder_names_is_run(apart: Path) -> None:
    Path("own.yaml").write_text((apart / "recipe" / "given.yaml").read_text())
    assert cli.run(["task=plan", "recipe=own.yaml"]) == 0


# --- settings

RECIPE = """
model: {kind: torchvision, name: resnet18, weights: random}
data: {kind: random, shape: [[3, 32, 32]], calibration: 2, evaluation: 2}
"""
CALLBACK = "_target_: os.mkdir\npath: pwned\n"


@pytest.mark.parametrize(
    "entry",
    [
        "/model@hydra.callbacks: x", "/data@hydra.callbacks.evil: x", "override /hydra/launcher: x",
        "hydra/callbacks: x",
        "/hydra/callbacks@_global_: x", "/model@hydra: x", "/model@hydra.launcher: x", "/recipe@hydra.sweeper: x",
        "override hydra/job_logging: x", "/hydra/callbacks@model: x",
    ],
)  # fmt: skip
def test_a_recipe_that_speaks_of_hydra(tmp_path: Path, entry: str) -> None:
    group, _, name = entry.rpartition(": ")
    (tmp_path / "evil.yaml").write_text(f'defaults: [{{"{group}": "{name}"}}]{RECIPE}')
    with pytest.raises(RecipeError, match="Hydra's own settings belong on the command line"):
        load_recipe(tmp_path / "evil.yaml")


GROUPS = {
    "model/x.yaml": CALLBACK,
    "data/x.yaml": "callbacks:\n  deep: [{" + "_target_: os.mkdir}]\n",
    "report/x.yaml": "# @package hydra.callbacks\nevil: {path: pwned}\n",
    "qconfig/x.yaml": "# @package _global_\nhydra: {callbacks: {evil: {path: pwned}}}\n",
    "hydra/launcher/x.yaml": "path: pwned\n",
    "gates/x.yaml": "defaults: [{/model@hydra.callbacks: x}]\n",
    "mode/x.yaml": 'defaults: [{"/model@${oc.decode:hy}dra.callbacks": x}]\n',
    "mode/y.yml": '"\\x5ftarget_": os.mkdir\n',
    "recipe/x.yaml": "defaults: [{/model@hydra.callbacks: x}]\n",
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_folder_of_settings_that_names_objects_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own" / name
    file.parent.mkdir(parents=True)
    file.write_text(GROUPS[name])
    (tmp_path / "mine.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"belong on the command line|no such setting|are written out here"):
        prepare(["--config-dir", "own", "recipe=mine.yaml", "task=plan"])
    assert cli.run(["--config-dir", "own", "recipe=mine.yaml", "task=plan"]) == 2
    assert not (tmp_path / "pwned").exists()


def test_a_target_in_the_composed_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {kind: entry, entry: 'a:b', kwargs: {x: {_target_: os.mkdir}}}\n")
    with pytest.raises(RecipeError, match=r"model.kwargs.x._target_: no such setting"):
        load_recipe(tmp_path / "mine.yaml")


# --- folders


def foreign(folder: Path, *files: str, manifest: str | None = None) -> dict[str, bytes]:
    folder.mkdir()
    for name in files:
        if name.endswith("/"):
            (folder / name).mkdir()
            (folder / name / "inside").write_text("keep me")
        else:
            (folder / name).write_text("keep me")
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    return snapshot(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("files", "manifest"),
    [
        (("results.json",), "not json"),
        (("results.json", "plan.json/"), "not json"),
        (("results.json",), '{"name": "a web app"}'),
        (("results.json",), "[]"),
        (("recipe.json",), '{"quantflow": "1", "files": {"recipe.json": {}}}'),
        (("results.json",), '{"quantflow": "1", "files": {}}'),
        (("plan.json/",), None),
        (("weights.safetensors",), None),
        (("notes.txt",), ""),
        (("manifest.json/",), None),
    ],
)
def test_what_is_not_ours_is_never_touched(tmp_path: Path, files: tuple[str, ...], manifest: str | None) -> None:
    before = foreign(tmp_path / "out", *files, manifest=manifest)
    with pytest.raises(ArtifactError, match="not part of an artifact"):
        check_destination(tmp_path / "out")
    with pytest.raises(ArtifactError):
        write_artifact(tmp_path / "out", FILES)
    assert snapshot(tmp_path / "out") == before


def test_a_directory_named_like_a_file_of_ours(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", FILES)
    (tmp_path / "out/recipe.json").unlink()
    (tmp_path / "out/recipe.json").mkdir()
    (tmp_path / "out/recipe.json/mine").write_text("keep me")
    before = snapshot(tmp_path / "out")
    with pytest.raises(ArtifactError, match="not part of an artifact"):
        write_artifact(tmp_path / "out", FILES)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("place", ["loop", "loop/inside", "a"])
def test_a_link_that_leads_to_itself(tmp_path: Path, place: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ArtifactError, match="leads to itself"):
        check_destination(tmp_path / place)


@pytest.mark.parametrize("place", ["/proc/quantflow", "/sys/quantflow", "/dev/null/x"])
def test_a_place_where_nothing_can_be_written(place: str) -> None:
    with pytest.raises(ArtifactError, match=r"is not writable|is a file"):
        check_destination(Path(place))


MOUNTED = """
import os, sys
from pathlib import Path
from quantflow.store import artifact
from quantflow.store.artifact import MANIFEST, add_files, check_destination, read_artifact, write_artifact
from quantflow.store.run_folder import Work
out = Path(sys.argv[1])
(out / "lost+found").mkdir()
check_destination(out)
write_artifact(out, {"recipe.json": b"1", "weights.safetensors": b"2", "old.bin": b"x"})
write_artifact(out, {"recipe.json": b"3", "weights.safetensors": b"4"})
add_files(out, {"results.json": b"5"})
assert sorted(os.listdir(out)) == ["lost+found", MANIFEST, "recipe.json", "results.json", "weights.safetensors"]
assert read_artifact(out)["recipe.json"] == b"3"
Work(out, "key").put("plan", "x", {"a": 1})
check_destination(out)
move_in = artifact._move_in
def killed(*_): raise KeyboardInterrupt
artifact._move_in = killed
try:
    write_artifact(out, {"recipe.json": b"6", "weights.safetensors": b"7"})
except KeyboardInterrupt:
    pass
artifact._move_in = move_in
assert read_artifact(out)["recipe.json"] == b"6"
(out / "mine.txt").write_text("keep me")
try:
    check_destination(out)
except artifact.ArtifactError:
    print("ok")
"""


def test_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mount = f'mount -t tmpfs tmpfs {tmp_path / "out"} && exec {sys.executable} -c "$1" {tmp_path / "out"}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", MOUNTED], capture_output=True, text=True, check=False, env=os.environ
    )
    if "not permitted" in done.stderr or "denied" in done.stderr:
        pytest.skip("only root may mount")
    assert done.stdout == "ok\n", done.stderr


# --- inputs


@pytest.fixture(scope="module", params=["native", "torch", "reference"])
def int8(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    try:
        return qf.quantize(Net().eval(), [torch.randn(4, 3, 8, 8)], runtime=request.param)
    except qf.QuantflowError as error:
        pytest.skip(str(error))


X = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: X.to("meta"), "has no data"),
        (X.to_sparse, "a sparse_coo tensor"),
        (X.to_mkldnn, "a _mkldnn tensor"),
        (lambda: X.reshape(6, 64).to_sparse_csr(), "a sparse_csr tensor"),
        (lambda: torch.nested.nested_tensor([X[0], X[1]]), "a nested tensor"),
        (lambda: X.double(), "is float64"),
        (lambda: X[0], "has shape"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "is qint8"),
    ],
)
def test_an_input_without_its_numbers_in_memory(int8: Any, given: Callable[[], torch.Tensor], words: str) -> None:
    with pytest.raises(DataError, match=words):
        int8(given())


def test_lazily_negated_and_conjugated_views_are_the_numbers_that_they_mean(int8: Any) -> None:
    negated = torch.complex(torch.zeros_like(X), X).conj().imag
    assert negated.is_neg()
    assert torch.equal(int8(negated), int8(-X))
    assert torch.equal(int8(torch._efficientzerotensor(X.shape)), int8(torch.zeros_like(X)))
    assert torch.equal(int8(X.to(memory_format=torch.channels_last)), int8(X))
    assert torch.equal(int8(X[:1].expand(2, 3, 8, 8)), int8(X[:1].repeat(2, 1, 1, 1)))


def test_read_artifact_still_reads(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", FILES)
    assert read_artifact(tmp_path / "out")["recipe.json"] == b"{}"
