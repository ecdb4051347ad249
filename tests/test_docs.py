"""The documentation: the site builds without a warning, and every command and Python block in it runs.

A page is run from top to bottom in a folder of its own. A block with a title is a file that the page shows, and is
written there; Python blocks of a page share their names, as they would in a session; `bash` blocks are run by bash.
What can't be run is `text`. A comment in front of a block says what is different about it:

    <!-- not run here: REASON -->                     it installs the package
    <!-- without WHAT: ends with CODE, "MESSAGE" -->  what it comes to on a machine that lacks one of `FOUND`

The README's commands are run as well, made small by further settings.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import quantflow
from quantflow.cli import command as cli
from quantflow.cli import sweep
from quantflow.errors import EXIT_GATE, EXIT_PASSED, EXIT_UNAVAILABLE
from quantflow.runtimes import native_devices
from quantflow.runtimes.triton import devices as triton_devices
from quantflow.schema import Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- not run here: (?P<reason>[^\n]+) -->\n)?"
    r'(?:<!-- without (?P<needed>[^:]+): ends with (?P<code>\d+), "(?P<message>[^"\n]+)" -->\n)?'
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"bash", "python", "yaml", "text"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What a block may need → whether this machine has it.
FOUND: dict[str, Callable[[], bool]] = {
    "an Intel GPU": lambda: native_devices.missing("xpu") is None,
    "a CUDA GPU": lambda: triton_devices.missing("cuda") is None,
    "Slurm": lambda: shutil.which("srun") is not None,
}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    title: str | None
    reason: str | None
    needed: str | None
    code: int
    message: str | None
    line: int

    def ending(self) -> tuple[int, str]:
        """The exit code on this machine, and what stderr then holds."""
        return (self.code, self.message or "") if self.needed and not FOUND[self.needed]() else (0, "")


def blocks(page: str) -> list[Block]:
    """What lies between the fences of a page; `page` is relative to docs/."""
    text = (DOCS / page).read_text()
    found = [
        Block(
            m["language"],
            m["text"],
            m["title"],
            m["reason"],
            m["needed"],
            int(m["code"] or 0),
            m["message"],
            text.count("\n", 0, m.start("text")),
        )
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
        assert block.reason is None or block.text.startswith("pip install "), f"{page}:{block.line}: can be run"
        if block.language == "yaml":
            assert block.title, f"{page}:{block.line}: a file has a title"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands that an installation puts beside python, for the code under test."""
    folder = tmp_path_factory.mktemp("bin")
    for name, place in {**PROJECT["scripts"], "torchrun": "torch.distributed.run:main"}.items():
        module, _, function = place.partition(":")
        file = folder / name
        file.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n\n{function}()\n")
        file.chmod(0o755)
    return folder


# What torch says of all TorchScript is no news to somebody who asks for it.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.timeout(3600)  # no page hangs by itself; beside busy processes a long one takes what it takes
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_a_page_runs_from_top_to_bottom(
    page: str, scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for block in runnable(page):
        if block.title:
            # Pages have modules of the same names: each is imported afresh, and forgotten afterwards.
            monkeypatch.delitem(sys.modules, Path(block.title).stem, raising=False)
    variables = os.environ | {
        "PATH": os.pathsep.join(map(str, (scripts, Path(sys.executable).parent, os.environ["PATH"]))),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
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
            code, message = block.ending()
            assert done.returncode == code, f"{place} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
            assert message in done.stderr, place


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    python = [block for block in blocks("../README.md") if block.language == "python"]
    assert python
    for block in python:
        exec(compile("\n" * block.line + block.text, f"README.md:{block.line}", "exec"), {"__name__": "__main__"})


#: Further settings that make the README's commands small.
SMALL = [
    "data.calibration=4", "data.evaluation=4", "data.size=64", "benchmark.rounds=1", "benchmark.min_round_ms=1",
    "evaluate=summary", "gates=none", "sensitivity.samples=1", "tune.time_budget_s=1", "report=quiet",
]  # fmt: skip


def readme_commands() -> list[str]:
    """The command lines of its indented blocks."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return [uncommented(line) for line in re.findall(r"^ {4}((?:python|pip|torchrun) .*)$", text, re.MULTILINE)]


def uncommented(line: str) -> str:
    return re.sub(r" +# .*", "", line).strip()


def endings(said: str) -> set[int]:
    """What a README's command may end with here."""
    if "device=xpu" in said and not FOUND["an Intel GPU"]():
        return {EXIT_UNAVAILABLE}
    return {EXIT_PASSED, EXIT_GATE} if "tune.subject_to" in said else {EXIT_PASSED}  # a search has one second


def small(arguments: list[str], folder: Path) -> list[str]:
    """The arguments of a README's command, with what makes it small; the names in it stand for files in the folder.

    A sweep stays in this process; docs/how-to/sweeps.md is where launchers run.
    """
    said = " ".join(arguments)
    if "recipe=path/to/mine.yaml" in arguments:
        (folder / "path/to").mkdir(parents=True)
        shutil.copy(ROOT / "recipes/template.yaml", folder / "path/to/mine.yaml")
        return arguments
    if "artifact=" in said or "=DIR" in said:
        return [argument.replace("=DIR", "=outputs/resnet18_sym_int8") for argument in arguments]
    if "-m" in arguments:
        return [argument for argument in arguments if not argument.startswith("hydra/launcher=")]
    if "recipe=" not in said:
        return arguments
    return [*arguments, *(["model.weights=random"] if "resnet" in said else []), *SMALL]


def ends_well(request: Path, *_: object) -> int:
    """In place of a sweep's job: those of the README take minutes."""
    request.with_suffix(".ending").write_text('{"exit_code": 0, "reason": ""}')
    return EXIT_PASSED


@pytest.mark.slow
def test_the_readmes_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # Optuna 2 takes SQLAlchemy 1.4, which says it is old
    monkeypatch.setattr(sweep, "start_process", ends_well)
    commands = [command.partition(" -m quantflow ")[2] for command in readme_commands()]
    assert len(commands) > 15
    for command in filter(None, commands):
        code = cli.run(small(shlex.split(command), tmp_path))
        assert code in endings(command), f"{command}\n{capsys.readouterr().err}"


def test_what_is_installed_exists() -> None:
    """Every `pip install` shown names extras of this package; the README's run command is the one that is tested."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / page for page in PAGES)]
    shown = [extras for page in pages for extras in re.findall(r'pip install -e "\.\[([^]]+)\]"', page.read_text())]
    assert len(shown) > 5
    assert {extra for extras in shown for extra in extras.split(",")} <= PROJECT["optional-dependencies"].keys()
    unrun = {uncommented(block.text) for page in PAGES for block in blocks(page) if block.reason}
    assert unrun <= set(readme_commands()), "its second half is run as the README's"


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
