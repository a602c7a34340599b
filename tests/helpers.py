"""What several tests share: the small run's overrides, and equality of runs to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import torch

SMALL = ("model.depth=8", "model.width=8", "data.limit=200", "data.holdout=100", "batch=20", "epochs=2", "log_every=1",
         "logger=none", "schedule.warmup_epochs=0.2")


def same(first: object, second: object) -> bool:
    """Whether two nested structures are equal, tensors to the last bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


TIMINGS = {"images_per_second", "data_wait", "step_ms_p50", "step_ms_p95", "seconds"}


def without_timings(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_run(first: SimpleNamespace, second: SimpleNamespace) -> None:
    """Weights, average, optimizer, metrics and best checkpoint of two runs are the same bits; only times differ."""
    from proxynorm.train import checkpoint

    for key in ("model", "ema", "optimizer", "scaler", "loss_sum", "last_result"):
        assert same(first.last[key], second.last[key]), key
    counters = [{k: v for k, v in run.last["counters"].items() if k != "train_seconds"} for run in (first, second)]
    assert counters[0] == counters[1]
    assert without_timings(first.rows) == without_timings(second.rows)
    best = [checkpoint.load(run.folder / "checkpoints" / "best.pt") for run in (first, second)]
    assert same(best[0]["model"], best[1]["model"]) and best[0]["step"] == best[1]["step"]
