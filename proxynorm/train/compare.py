"""Whether two runs are the same, to the last bit: what exact resumption is judged by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from proxynorm.train import checkpoint
from proxynorm.train.run_folder import read_metrics

TIMINGS = {
    "images_per_second",
    "data_wait",
    "step_ms_p50",
    "step_ms_p95",
    "gpu_memory_gib",
    "eta_seconds",
    "seconds",
    "train_seconds",
}


def differences(first: Path, second: Path) -> list[str]:
    """What differs between the run folders: weights, average, optimizer, counters, best checkpoint, metrics.

    Times may differ. An empty list means the same bits. Raises CheckpointError if a checkpoint cannot be read.
    """
    found = []
    for name in ("last.pt", "best.pt"):
        contents = [checkpoint.load(folder / "checkpoints" / name) for folder in (first, second)]
        found += [
            f"{name}: {key}"
            for key in different_keys(*map(flatten, contents))
            if key.split(".")[-1] not in TIMINGS
        ]
    rows = [
        [
            {k: v for k, v in row.items() if k not in TIMINGS}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (first, second)
    ]
    if len(rows[0]) != len(rows[1]):
        found.append(f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} rows")
    found += [f"metrics.jsonl: step {a['step']} ({a['event']})" for a, b in zip(*rows) if a != b]
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists, by dotted key."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    leaves = {}
    for key, item in items:
        leaves |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def different_keys(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The keys whose leaves are not the same bits."""
    return [
        key
        for key in sorted(first.keys() | second.keys())
        if key not in first or key not in second or not same(first[key], second[key])
    ]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    return type(first) is type(second) and first == second
