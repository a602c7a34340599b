"""Fixtures shared by all tests: one thread, and small training runs in this process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from proxynorm.config import compose_config, settings_from

torch.set_num_threads(1)

SMALL = ("model.depth=8", "model.width=8", "data.limit=200", "data.holdout=100", "batch=20", "epochs=2", "log_every=1",
         "logger=none", "schedule.warmup_epochs=0.2")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden losses anew, on purpose")


@pytest.fixture
def run_small(tmp_path: Path):
    """Train a small network in this process: run_small(*overrides) -> (status, folder, rows, last checkpoint)."""
    from proxynorm.train import checkpoint
    from proxynorm.train.run import train
    from proxynorm.train.run_folder import read_metrics
    from proxynorm.train.settings import run_name

    def run(*overrides: str) -> SimpleNamespace:
        config = compose_config([*SMALL, f"runs_dir={tmp_path}", *overrides])
        settings = settings_from(config)
        status = train(settings, OmegaConf.to_container(config, resolve=True))
        folder = tmp_path / run_name(settings)
        last = folder / "checkpoints" / "last.pt"
        return SimpleNamespace(status=status, folder=folder, settings=settings, rows=read_metrics(folder / "metrics.jsonl"),
                               last=checkpoint.load(last) if last.exists() else None)

    return run


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
