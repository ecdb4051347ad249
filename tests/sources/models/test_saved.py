from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from quantflow.errors import ModelError
from quantflow.schema import ExportedModel, ScriptModuleModel
from quantflow.sources.models import LoadedModel, load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*deprecated:DeprecationWarning", "ignore:.*torch.jit.*deprecated:FutureWarning"
)

X = torch.randn(2, 3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9))


def script(path: Path) -> LoadedModel:
    return load_model(ScriptModuleModel(path=str(path)), 0)


def exported(path: Path) -> LoadedModel:
    return load_model(ExportedModel(path=str(path)), 0)


@pytest.mark.parametrize("frozen", [False, True])
def test_scriptmodule_in_eval_mode(tmp_path: Path, frozen: bool) -> None:
    module = network()
    saved = torch.jit.script(module.train())
    torch.jit.save(torch.jit.freeze(saved.eval()) if frozen else saved, tmp_path / "net.pt")
    model = script(tmp_path / "net.pt")
    assert isinstance(model.module, torch.jit.ScriptModule)
    torch.testing.assert_close(model.module(X), module[0](X))
    assert (model.name, model.preprocess, model.weights_used) == ("net", None, str(tmp_path / "net.pt"))


def test_exported_program(tmp_path: Path) -> None:
    module = network().eval()
    torch.export.save(torch.export.export(module, (X,)), tmp_path / "net.pt2")
    model = exported(tmp_path / "net.pt2")
    assert isinstance(model.module, torch.export.ExportedProgram)
    torch.testing.assert_close(model.module.module()(X), module(X))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("load", [script, exported])
def test_missing_truncated_and_foreign_files(tmp_path: Path, load) -> None:
    with pytest.raises(ModelError, match=r"is missing, expected a file written by torch\."):
        load(tmp_path / "net.pt")
    with pytest.raises(ModelError, match="is a directory"):
        load(tmp_path)
    (tmp_path / "net.pt").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="can't be loaded"):
        load(tmp_path / "net.pt")
    if load is script:
        torch.jit.save(torch.jit.script(network()), tmp_path / "net.pt")
    else:
        torch.export.save(torch.export.export(network(), (X,)), tmp_path / "net.pt")
    content = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="expected a complete file"):
        load(tmp_path / "net.pt")
    torch.save(network().state_dict(), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="can't be loaded"):
        load(tmp_path / "net.pt")


def test_pickled_objects_in_an_exported_program_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.export.save(torch.export.export(network(), (X,)), tmp_path / "net.pt2")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    with (
        zipfile.ZipFile(tmp_path / "net.pt2") as source,
        zipfile.ZipFile(tmp_path / "bad.pt2", "w", zipfile.ZIP_STORED) as target,
    ):
        for name in source.namelist():
            is_input = "sample_inputs" in name
            target.writestr(name, (tmp_path / "bomb.pt").read_bytes() if is_input else source.read(name))
    with pytest.raises(ModelError, match=r"model.path"):
        exported(tmp_path / "bad.pt2")
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w") as target:
        target.writestr("net/data/constants/opaque_obj_0", b"")
    with pytest.raises(ModelError, match="pickled Python objects, which are never loaded"):
        exported(tmp_path / "bad.pt2")
    assert not (tmp_path / "exploded").exists()
