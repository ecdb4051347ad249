"""The documentation: the site builds without a warning, and every command and Python block in it runs.

A page is run from top to bottom in a folder of its own. A block with a title is a file that the page shows, and is
written there; Python blocks of a page share their names, as they would in a session; `bash` blocks are run by bash.
Blocks that can't run here are `text`, or have a comment in front of them that says why: <!-- not run here: REASON -->
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import quantflow
from quantflow.schema import Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- not run here: (?P<reason>[^\n]+) -->\n)?"
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"bash", "python", "yaml", "text"}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    title: str | None
    reason: str | None
    line: int


def blocks(page: str) -> list[Block]:
    """What lies between the fences of a page; `page` is relative to docs/."""
    text = (DOCS / page).read_text()
    found = [
        Block(m["language"], m["text"], m["title"], m["reason"], text.count("\n", 0, m.start("text")))
        for m in FENCE.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a fence that is not understood"
    return found


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language != "text" and block.reason is None]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_is_a_file_or_says_why_not(page: str) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}"
        assert block.reason is None or len(block.reason.split()) > 3, f"{page}:{block.line}: say why"
        if block.language == "yaml":
            assert block.title or block.reason, f"{page}:{block.line}: a file has a title"


# What torch says of all TorchScript is no news to somebody who asks for it.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for block in runnable(page):
        if block.title:
            # Pages have modules of the same names: each is imported afresh, and forgotten afterwards.
            monkeypatch.delitem(sys.modules, Path(block.title).stem, raising=False)
    variables = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    names: dict[str, object] = {"__name__": "__main__"}
    for block in runnable(page):
        place = f"docs/{page}:{block.line}"
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, place, "exec"), names)
        else:
            done = subprocess.run(
                ["bash", "-eu", "-c", block.text], env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{place} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    python = [block for block in blocks("../README.md") if block.language == "python"]
    assert python
    for block in python:
        exec(compile("\n" * block.line + block.text, f"README.md:{block.line}", "exec"), {"__name__": "__main__"})


def test_the_site_builds_without_a_warning_and_holds_every_setting(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    for page in PAGES:
        assert (tmp_path / page).with_suffix(".html").is_file()
    settings = (tmp_path / "reference/settings.html").read_text()
    for place in (*Recipe.model_fields, "qconfig.activation", "tune.subject_to", "model: entry", "algorithms: gptq"):
        assert f">{place}<" in settings
    row = "<td><code>smallest</code></td>\n<td>number (&gt; 0, &lt; 1)</td>\n<td><code>0.6</code></td>"
    assert row in settings
    assert ">model: given<" not in settings, "a record, which no recipe can ask for"
    python = (tmp_path / "reference/python.html").read_text()
    for name in quantflow.__all__:
        assert f'id="quantflow.{name}"' in python or name == "PRESETS"
    assert "tune.subject_to" in (tmp_path / "reference/command-line.html").read_text()
