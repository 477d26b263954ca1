"""What people see while something runs: one rich console on stderr. Standard output is kept for results (`--json`)."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """Whether this is rank 0 of the processes that torchrun started (or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line for people, from the main process only."""
    if is_main_process():
        console.print(message, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """A line that a reader should not miss."""
    if is_main_process():
        console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
    """A progress bar with rate and remaining time; where the console is no terminal, one line at the start and one at the end."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not (is_main_process() and console.is_terminal),
    )
    if not console.is_terminal:
        say(f"{description}: {total}")
    with bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield ProgressBar(bar, task)


class ProgressBar:
    """The handle that `progress` yields."""

    def __init__(self, bar: Progress, task: object) -> None:
        self._bar, self._task = bar, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=steps, note=note)  # type: ignore[arg-type]


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
