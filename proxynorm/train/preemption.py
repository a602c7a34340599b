"""Stop signals: the handler sets a flag, and the loop saves and stops at its next step.

This module imports nothing slow, because `train` installs its handlers before it imports torch.
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
REQUEUE = 75  # the exit status after a stop signal: start the run again


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
            discard_output_without_terminal()
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = signal.Signals(number)


def signals_to_handle() -> list[signal.Signals]:
    """Return the stop signals, without SIGHUP if nohup made the process ignore it."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def discard_output_without_terminal() -> None:
    """Redirect output to /dev/null if its terminal was closed: writing to it raises an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for stop signals during the block, then restore the former handlers."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in signals_to_handle()}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Exit with status 75 without saving: a signal handler."""
    with suppress(OSError):  # the terminal may be closed
        os.write(2, f"stopped by {signal.Signals(number).name}; run again to go on\n".encode())
    os._exit(REQUEUE)  # an interrupted import might swallow an exception


def exit_on_signals() -> None:
    """Exit at once on a stop signal, except within a `stop_request` block."""
    for number in signals_to_handle():
        signal.signal(number, exit_at_once)
