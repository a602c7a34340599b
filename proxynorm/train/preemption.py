"""Signals that ask a run to stop: a handler only sets a flag; the loop saves at its next step boundary.

Imports nothing heavy: a command listens before it imports what is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
REQUEUE = 75  # the exit status of what a signal stopped


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the command ends with status 75."""


class StopRequest:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; a second interrupt from the keyboard quits at once."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for stop signals during the block, then restore the former handlers."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End with status 75 and one line: there is nothing to save yet. No exception, which an import might swallow."""
    os.write(2, f"stopped by {signal.Signals(number).name}; run again to go on\n".encode())
    os._exit(REQUEUE)


def leave_on_signals() -> None:
    """Meet stop signals with `leave_at_once`, wherever no `stop_request` is open."""
    for number in STOP_SIGNALS:
        signal.signal(number, leave_at_once)
