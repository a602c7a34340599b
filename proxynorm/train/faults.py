"""One fate for the processes of a run: when one fails, all end, with its message."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from proxynorm.cli import first_line
from proxynorm.errors import ProxynormError

KEY = "fault"
POLL_SECONDS = 1.0
LOST = re.compile(
    "connection (closed|reset) by peer", re.IGNORECASE
)  # gloo's words when a peer is gone
GRACE_SECONDS = 10.0  # for a process to notice by itself that a peer is gone, as gloo does


class PeerError(ProxynormError):
    """Another process of the run failed."""


@contextmanager
def shared_fate(store: dist.Store, rank: int) -> Iterator[None]:
    """Run the block; if it fails, tell the others through the store, and if they failed first, fail with their message.

    Raises PeerError in place of what a lost connection raises. A process that hangs in a collective operation, as with
    NCCL, is ended by a thread of its own.
    """
    ended = threading.Event()
    threading.Thread(target=_watch, args=(store, rank, ended), daemon=True).start()
    try:
        yield
    except Exception as error:
        words = (
            first_line(error)
            if isinstance(error, ProxynormError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        first = _tell(store, json.dumps([rank, words]))
        if first is not None and first[0] != rank and not isinstance(error, ProxynormError):
            raise PeerError(_sentence(first)) from None
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            raise PeerError(
                "the connection to another process of the run is lost: it was killed, or its machine is gone"
            ) from None
        raise
    finally:
        ended.set()


def _tell(store: dist.Store, fault: str) -> tuple[int, str] | None:
    """Store the fault unless there is one; (rank, words) of the one that was first, None if the store is gone."""
    try:
        return tuple(json.loads(store.compare_set(KEY, "", fault)))
    except RuntimeError:
        return None


def _watch(store: dist.Store, rank: int, ended: threading.Event) -> None:
    """End this process if another's fault is known and this one does not end by itself."""
    while not ended.wait(POLL_SECONDS):
        try:
            fault = json.loads(store.get(KEY)) if store.check([KEY]) else None
        except RuntimeError:
            return
        if fault is not None and fault[0] != rank and not ended.wait(GRACE_SECONDS):
            print(f"error: {_sentence(fault)}", file=sys.stderr, flush=True)
            os._exit(1)


def _sentence(fault: tuple[int, str]) -> str:
    return f"process {fault[0]} failed, and with it the run: {fault[1]}"
