"""What several tests share: the small run's overrides, equality of runs to the last bit, and what a test needs installed."""

from __future__ import annotations

import importlib.util
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from proxynorm.train.compare import differences

SMALL = ("model.depth=8", "model.width=8", "data.limit=200", "data.holdout=100", "batch=20", "epochs=2", "log_every=1",
         "logger=none", "schedule.warmup_epochs=0.2")


def need(condition: bool, reason: str) -> pytest.MarkDecorator:
    """A mark: without `condition` the test is skipped, but fails in continuous integration (CI=true), which has everything."""
    return pytest.mark.need(bool(condition), reason)


def need_module(name: str) -> pytest.MarkDecorator:
    """`need` of a module that is not a requirement."""
    return need(importlib.util.find_spec(name) is not None, f"{name} is not installed")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write takes what fits and refuses the rest, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def assert_same_run(first: SimpleNamespace, second: SimpleNamespace) -> None:
    """Weights, average, optimizer, metrics and best checkpoint of two runs are the same bits; only times differ."""
    assert differences(first.folder, second.folder) == []
