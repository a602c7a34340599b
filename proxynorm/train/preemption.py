"""Signals that ask a run to stop: a handler sets a flag; the loop saves at the next step.

Imports nothing heavy: a command listens before it imports torch.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
REQUEUE = 75  # exit status of a run that a signal stopped


class Preempted(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """True once a stop signal was received."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; a second Ctrl-C quits at once."""
        if number == signal.SIGHUP:
            leave_dead_terminal()
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = signal.Signals(number)


def heeded() -> list[signal.Signals]:
    """Return the stop signals, but for SIGHUP where nohup has it ignored."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def leave_dead_terminal() -> None:
    """Send output to /dev/null where the terminal has gone: writing to it would raise an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for stop signals during the block, then restore the former handlers."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in heeded()}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Exit with status 75: there is nothing to save yet."""
    with suppress(OSError):  # the terminal may be what has gone
        os.write(2, f"stopped by {signal.Signals(number).name}; run again to go on\n".encode())
    os._exit(REQUEUE)  # an exception might be swallowed by the import that it interrupts


def leave_on_signals() -> None:
    """Exit at once on a stop signal, unless a `stop_request` is open."""
    for number in heeded():
        signal.signal(number, leave_at_once)
