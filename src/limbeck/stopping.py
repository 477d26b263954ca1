"""Stopping in good order. The command line listens for SIGTERM and Ctrl-C; work that would lose something defers the end to a good moment.

The first signal asks: where nothing is deferred, `Stopped` is raised at once, as everything on the disk is whole at any time; else
by the work itself, when it has written what it has. A second signal ends the process there and then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.log import alert, console, is_main_process

TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: no failure, and the same command goes on. 143 and 130, which shells report for a process that a signal killed,
would not tell an orderly end from one that left nothing."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0
"""Seconds within which a repeated signal is the same one: a terminal sends Ctrl-C to a launcher and to its processes, and the launcher
passes it on."""

_asked: int | None = None
_deferrals = 0


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, and what it had is on the disk."""


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _asked is not None


def check() -> None:
    """A good moment to stop, where that was asked for."""
    if asked():
        raise Stopped


@contextmanager
def deferred() -> Iterator[None]:
    """Work that looks for good moments itself, by `check` or `asked`. The last of them is its end."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    check()


@contextmanager
def at_once() -> Iterator[None]:
    """Within work that defers its end: a part at any moment of which everything is on the disk."""
    global _deferrals
    before, _deferrals = _deferrals, 0
    try:
        check()
        yield
    finally:
        _deferrals = before


@contextmanager
def listening() -> Iterator[None]:
    """Answer signals as above until the end of the context. A signal that this process was started to ignore stays ignored."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's own handlers wait for the main thread, which may be inside of a long call: a second signal is answered by another thread
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        for number in before:
            signal.signal(number, _answer)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)
        _asked = None


def _answer(number: int, frame: Any) -> None:
    global _asked
    if _asked is None:
        _asked = number
        if not _deferrals:
            raise Stopped


def _watch(reader: int) -> None:
    """Say what was understood of a first signal, and end the process at a second."""
    first = None
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while byte := stream.read(1):
            number = byte[0]
            if number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                if _deferrals and is_main_process():
                    alert(f"{signal.Signals(number).name}: stopping as soon as what is begun is written; once more stops at once")
            elif time.monotonic() - first > ECHO:
                console.show_cursor()  # which a progress bar hides
                os._exit(128 + number)
