"""What several tests share: the small run's overrides, and equality of runs to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

from proxynorm.train.compare import differences

SMALL = ("model.depth=8", "model.width=8", "data.limit=200", "data.holdout=100", "batch=20", "epochs=2", "log_every=1",
         "logger=none", "schedule.warmup_epochs=0.2")


def assert_same_run(first: SimpleNamespace, second: SimpleNamespace) -> None:
    """Weights, average, optimizer, metrics and best checkpoint of two runs are the same bits; only times differ."""
    assert differences(first.folder, second.folder) == []
