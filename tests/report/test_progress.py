from __future__ import annotations

import io
import re
import time

import pytest

from quantflow.report import Progress, make_console, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_plain_line_per_stage() -> None:
    out = io.StringIO()
    with Progress(make_console(out)) as shown:
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
