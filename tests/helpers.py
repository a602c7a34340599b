"""What several tests share.

The small run's overrides, equality of runs to the last bit, what a test needs installed, and norms
as training leaves them.
"""

from __future__ import annotations

import importlib.util
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from tests.same_run import differences

ROOT = Path(__file__).resolve().parents[1]

SMALL = (
    "model.depth=8",
    "model.width=8",
    "data.limit=200",
    "data.holdout=100",
    "batch=20",
    "epochs=2",
    "log_every=1",
    "logger=none",
    "schedule.warmup_epochs=0.2",
)


def need(condition: bool, reason: str) -> pytest.MarkDecorator:
    """A mark: without `condition` the test is skipped, but fails in continuous integration
    (CI=true), which has everything.
    """
    return pytest.mark.need(bool(condition), reason)


def need_module(name: str) -> pytest.MarkDecorator:
    """`need` of a module that is not a requirement."""
    return need(importlib.util.find_spec(name) is not None, f"{name} is not installed")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes.

    A write takes what fits and refuses the rest, as on a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def assert_same_run(first: SimpleNamespace, second: SimpleNamespace) -> None:
    """Weights, average, optimizer, metrics and best checkpoint of two runs are the same bits.

    Only times differ.
    """
    assert differences(first.folder, second.folder) == []


def with_random_norms(model: nn.Module) -> nn.Module:
    """The model, its batch norms with the parameters and statistics of no particular training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(tensor, low, high)
    return model
