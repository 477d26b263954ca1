"""The three modes of the console, as a log file gets them."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from limbeck import cli, log
from limbeck.errors import LimbeckError


@pytest.fixture(autouse=True)
def auto_mode() -> Iterator[None]:
    yield
    log.set_mode("auto")


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(log, "time", found)
    return found


def test_plain_progress_is_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log.set_mode("plain")
    with log.progress("train mine", 40, done=10) as bar:
        for step in range(11, 41):
            clock.now += 3
            bar.advance(1, note=f"ce {step / 10} | 123 tok/s | 1.2 GB")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train mine: 11/40 | ce 1.1 | 123 tok/s | 1.2 GB | 0:00:03 passed, 0:01:27 left"
    assert lines[1] == "train mine: 15/40 | ce 1.5 | 123 tok/s | 1.2 GB | 0:00:15 passed, 0:01:15 left"
    assert lines[-1] == "train mine: 40/40 | ce 4.0 | 123 tok/s | 1.2 GB | 0:01:30 passed, 0:00:00 left"
    assert len(lines) == 1 + 7 + 1, "the first, every tenth second (a fourth step of three), the last"


def test_one_within_another_has_lines_where_it_takes_long(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log.set_mode("plain")
    with log.progress("train", 2) as outer:
        for seconds in (1, 6):
            with log.progress("evaluate", 3) as inner:
                for _ in range(3):
                    clock.now += seconds
                    inner.advance()
            outer.advance()
    lines = [line.split(" |")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["train: 1/2", "evaluate: 2/3", "train: 2/2"]


def test_one_within_another_has_a_bar_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log.set_mode("auto")
    monkeypatch.setattr(log, "console", Console(file=io.StringIO(), force_terminal=True))
    with log.progress("train", 2) as outer:
        with log.progress("evaluate", 3) as inner:
            inner.advance()
            shown = outer._bar.tasks
            assert [(task.description, task.completed) for task in shown] == [("train", 0), ("evaluate", 1)]
        outer.advance()
        assert [(task.description, task.completed) for task in outer._bar.tasks] == [("train", 1)]


def test_quiet_shows_warnings_and_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_mode("quiet")
    log.say("chatter")
    with log.progress("train", 1) as bar:
        bar.advance()
    log.warn("look here")
    log.alert("error: gone", style="red")
    assert capsys.readouterr().err.splitlines() == ["warning: look here", "error: gone"]


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log.set_mode("plain")
    log.say("chatter")
    with log.progress("train", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(LimbeckError, match=r"LIMBECK_LOG: found 'quite', expected one of: auto, plain, quiet; did you mean 'quiet'"):
        log.set_mode("quite")


Limbeck = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_limbeck(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Limbeck:
    """(exit code, stdout, stderr) of a command line, in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["limbeck", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def test_modes_of_the_command_line_stand_anywhere(run_limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch) -> None:
    """assets list shows a table, which quiet mode leaves out; its JSON is a result."""
    assert "licence" in run_limbeck("assets", "list", "--plain")[2]
    assert run_limbeck("--quiet", "assets", "list") == run_limbeck("assets", "list", "--quiet") == (0, "", "")
    assert run_limbeck("assets", "list", "--json", "--quiet")[1].startswith("{")
    monkeypatch.setenv("LIMBECK_LOG", "quiet")
    assert run_limbeck("assets", "list") == (0, "", "")
    monkeypatch.setenv("LIMBECK_LOG", "loud")
    code, _, errors = run_limbeck("assets", "list")
    assert code == 2 and errors.startswith("error: LIMBECK_LOG: found 'loud', expected one of")


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_narrow_terminal_shows_how_far_it_is(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note is what is cut; bars once left out the steps on a terminal of 80 columns."""
    shown = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=shown, force_terminal=True, color_system=None, width=width))
    with log.progress("train study/seed-0", 3000) as bar:
        bar.advance(1200, note="ce 6.121 logits 0.005 hidden 0.321 | 427 tok/s | 0.4 GB")
    assert "1200/3000 0:00:0" in shown.getvalue()
