from __future__ import annotations

import contextlib
import io
import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantflow.config.compose import load_recipe
from quantflow.report import Progress, make_console, progress, stage_times
from quantflow.tasks.run import run
from quantflow.tasks.stage_times import earlier_times


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_plain_line_per_stage() -> None:
    out = io.StringIO()
    with Progress(make_console(out), waits=False) as shown:  # waiting for another process would be a line more
        with shown.stage("capture"):
            pass
        with shown.stage("calibrate") as stage:
            for done in range(4):
                stage.update(done + 1, 4)
    assert re.fullmatch(r"capture +done +0\.0 s\ncalibrate +done +0\.0 s  4/4\n", out.getvalue())
    assert [stage["name"] for stage in shown.stages] == ["capture", "calibrate"]


def test_a_long_stage_in_a_pipe_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.02)
    out = io.StringIO()
    with Progress(make_console(out)) as shown, shown.stage("calibrate") as stage:
        stage.update(1, 4)
        time.sleep(0.1)
    assert re.search(r"calibrate +running +0 s  1/4  about \d+ s left\n", out.getvalue())


def test_a_failed_stage_is_marked_and_the_error_passes() -> None:
    out = io.StringIO()
    with Progress(make_console(out)) as shown, pytest.raises(RuntimeError), shown.stage("convert"):
        raise RuntimeError
    assert "convert      failed" in out.getvalue()
    assert len(shown.stages) == 1


def test_quiet_shows_nothing_and_keeps_the_times() -> None:
    out = io.StringIO()
    with Progress(make_console(out), quiet=True) as shown, shown.stage("capture") as stage:
        stage.update(1)
    assert out.getvalue() == ""
    assert isinstance(shown.stages[0]["seconds"], float)


def test_a_terminal_gets_bars_and_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    with Progress(make_console(out)) as shown, shown.stage("calibrate") as stage:
        stage.update(3, 4)
        assert shown._view is not None
        shown._view.refresh()
    assert "3/4" in out.getvalue()
    assert "calibrate" in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()


def test_remaining_needs_a_total_and_a_start() -> None:
    stage = progress.Stage("x")
    assert stage.remaining == ""
    stage.update(2, None)
    assert (stage.remaining, stage.count) == ("", " 2")
    stage.update(4, 4)
    assert stage.remaining == ""


def test_remaining_is_told_by_the_speed_of_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came before the first count, a resumed run's batches among it, says nothing about the speed."""
    stage, now = progress.Stage("calibrate"), 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    stage._started = 0.0
    now = 30.0
    stage.update(50, 100)
    assert "about 30 s left" in stage.remaining, "nothing else is known yet"
    now = 35.0
    stage.update(60, 100)
    assert "about 20 s left" in stage.remaining


def test_what_cannot_count_is_expected_to_take_as_long_as_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.02)
    earlier = {"stages": [{"name": "capture", "seconds": 90.0}, {"name": "load", "seconds": math.nan}, "odd"]}
    assert stage_times(earlier) == {"capture": 90.0}
    assert stage_times(["not results"]) == {}
    out = io.StringIO()
    with Progress(make_console(out), expected=stage_times(earlier)) as shown:
        with shown.stage("capture"):
            time.sleep(0.1)
        with shown.stage("compile"):
            time.sleep(0.1)
    assert re.search(r"capture +running +0 s +about (89|90) s left\n", out.getvalue())
    assert re.search(r"compile +running +0 s\n", out.getvalue())


def test_what_a_stage_expects_itself_counts_where_no_earlier_run_tells() -> None:
    stage = progress.Stage("capture")
    stage.expect(None)
    assert stage.remaining == ""
    stage.expect(50.0)
    assert "about 50 s left" in stage.remaining
    stage.expect(70.0)
    assert "about 50 s left" in stage.remaining


def test_a_run_is_expected_to_take_as_long_as_the_last_one_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = [
        "model=entry", "model.entry=torch.nn:Linear", "model.kwargs={in_features:8,out_features:4}", "data=random",
        "data.shape=[[8]]", "data.calibration=4", "data.evaluation=4",
    ]  # fmt: skip
    recipe, other = load_recipe("template", random), load_recipe("template", [*random, "mode=torchscript"])
    assert earlier_times(recipe, Path("nowhere")) == {}
    run(recipe)
    (Path("outputs/template/results.json")).unlink()
    again = load_recipe("template", [*random, "qconfig=affine_uint8"])
    assert {"load", "capture", "compile"} <= earlier_times(again, Path("outputs/template")).keys()
    assert earlier_times(other, Path("nowhere")) == {}
    (file,) = (tmp_path / "cache/quantflow/stages").iterdir()
    file.write_bytes(b"[" * 10)
    assert earlier_times(recipe, Path("nowhere")) == {}


def test_a_late_stage_promises_nothing() -> None:
    assert progress.Stage("capture", expected=0.0).remaining == ""


@pytest.mark.parametrize("plain", [False, True])
def test_a_real_terminal(plain: bool) -> None:
    """Bars that count down in a pseudo terminal; whole lines without a control code when plain."""
    ours, theirs = pty.openpty()
    program = (
        "import sys, time\n"
        "from quantflow.report import Progress, make_console\n"
        f"console = make_console(plain={plain})\n"
        "with Progress(console) as shown, shown.stage('calibrate') as stage:\n"
        "    for done in range(4):\n"
        "        time.sleep(0.15)\n"
        "        stage.update(done + 1, 4)\n"
    )
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end was closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert ("\x1b" in text) is not plain
    assert ("s left" in text) is not plain
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("calibrate    done")
    assert len(last) == 2
    assert "4/4" in last[1]
