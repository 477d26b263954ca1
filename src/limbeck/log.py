"""What people see while something runs: one rich console on stderr. Standard output is kept for results (`--json`).

Three modes. `auto`: progress bars on a terminal, else as plain. `plain`: no bars and no colours, a line now and then, for log files.
`quiet`: only warnings and errors. `limbeck --plain`, `limbeck --quiet`, or LIMBECK_LOG in the environment.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from limbeck.errors import LimbeckError, nearest

MODES = ("auto", "plain", "quiet")
MODE_VARIABLE = "LIMBECK_LOG"
PLAIN_SECONDS = 10.0
"""Between two lines of a plain progress."""

_UNPRINTABLE = [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: f"\\u{code:04x}" for code in _UNPRINTABLE if chr(code) not in "\n\t"}

console = Console(stderr=True, highlight=False)
_alerts = Console(stderr=True, highlight=False)
_mode = "auto"
_open: list[Progress | None] = []
"""What shows progress now, the outer first: a display, or plain lines."""


def set_mode(mode: str) -> None:
    """Choose `auto`, `plain` or `quiet` for this process."""
    global _mode
    if mode not in MODES:
        raise LimbeckError(f"{MODE_VARIABLE}: found {mode!r}, expected one of: {', '.join(MODES)}{nearest(mode, MODES)}")
    _mode = mode
    console.quiet = mode == "quiet"
    console.no_color = _alerts.no_color = mode == "plain" or bool(os.environ.get("NO_COLOR"))


def visible(text: str) -> str:
    """Control characters and changes of the writing direction in their escapes: foreign text must not steer the terminal."""
    return text.translate(_VISIBLE)


def megabytes(size: float) -> str:
    """Bytes in MB: whole ones, or two digits of what is small."""
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.2g}"


def is_main_process() -> bool:
    """Whether this is rank 0 of the processes that torchrun started (or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line for people, from the main process only."""
    if is_main_process():
        console.print(visible(message), markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """A line that a reader should not miss; quiet mode shows it too."""
    if is_main_process():
        _alerts.print(f"warning: {visible(message)}", style="yellow", markup=False, soft_wrap=True)


def alert(message: str, style: str = "") -> None:
    """A last word, from whichever process fails, in every mode. Not wrapped: a broken path cannot be copied."""
    _alerts.print(visible(message), style=style, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
    """The progress of `total` steps of which `done` are behind us: a bar with elapsed and remaining time, or plain lines. One within
    another has a bar below it, for as long as it lasts, or no plain lines but where it takes long."""
    if not is_main_process() or _mode == "quiet":
        yield ProgressBar()
    elif _mode == "plain" or not console.is_terminal:
        with _within(None):
            yield PlainProgress(description, total, done, is_inner=len(_open) > 1)
    elif _open and (bar := _open[-1]) is not None:
        task = bar.add_task(description, total=total, completed=done, note="")
        try:
            yield RichProgress(bar, task)
        finally:
            bar.remove_task(task)
    else:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=3, no_wrap=True)),
            console=console,
            expand=True,  # bar and note share what the numbers leave
        )
        with bar, _within(bar):
            yield RichProgress(bar, bar.add_task(description, total=total, completed=done, note=""))


@contextmanager
def _within(display: Progress | None) -> Iterator[None]:
    _open.append(display)
    try:
        yield
    finally:
        _open.remove(display)


class ProgressBar:
    """The handle that `progress` yields; this one shows nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done; `note` says what they gave."""


class RichProgress(ProgressBar):
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=steps, note=note)


class PlainProgress(ProgressBar):
    """A line at the first step, at the last, and every `PLAIN_SECONDS` between; the latter alone within another progress."""

    def __init__(self, description: str, total: int, done: int, is_inner: bool = False) -> None:
        self._description, self._total, self._first, self._done, self._is_inner = description, total, done, done, is_inner
        self._start, self._last_line = time.monotonic(), 0.0 if is_inner else -PLAIN_SECONDS

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        passed = time.monotonic() - self._start
        if passed - self._last_line < PLAIN_SECONDS and (self._is_inner or self._done < self._total):
            return
        self._last_line = passed
        left = passed / max(self._done - self._first, 1) * (self._total - self._done)
        times = f"{_clock(passed)} passed, {_clock(left)} left"
        # one line of a log is one line, however narrow the console takes itself to be
        line = f"{self._description}: {self._done}/{self._total}" + (f" | {note}" if note else "") + f" | {times}"
        console.print(line, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory_mb`, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> float:
    """The most memory that this process held since `reset_peak_memory`, resident, in MB; on an accelerator, the most allocated there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# a wrong value is reported by the command line; a library must import
set_mode(mode if (mode := os.environ.get(MODE_VARIABLE, "auto")) in MODES else "auto")
