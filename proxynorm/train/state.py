"""Everything that a run carries over an interruption."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from proxynorm.data import Data
from proxynorm.train.optimizer import load_optimizer
from proxynorm.train.settings import RegularizationSettings

COUNTERS = ("step", "evaluated", "best_top1", "train_seconds", "skipped", "loss_steps", "stale")


@dataclass
class TrainState:
    """Model, optimizer and counters.

    step: weight updates made; evaluated: the step last evaluated; stale: evaluations since the one
    with the best top-1; loss_sum, loss_steps: over the steps since the last row of metrics.jsonl,
    the loss being the mean over all processes.

    No random state: data order, crops, mixing and dropout are functions of (seed, step, rank).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    step: int = 0
    evaluated: int = 0
    best_top1: float | None = None
    train_seconds: float = 0.0
    skipped: int = 0
    stale: int = 0
    loss_steps: int = 0
    # A sum on the device: reading it at each step would wait for the GPU.
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    last_result: dict[str, float] = field(default_factory=dict)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights to evaluate: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "last_result": self.last_result,
            "counters": {name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        load_optimizer(self.optimizer, content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.loss_sum.copy_(content["loss_sum"])
        self.last_result = content["last_result"]
        for name in COUNTERS:  # older checkpoints lack some
            setattr(self, name, content["counters"].get(name, getattr(self, name)))
        self.scheduler.step_update(self.step)


def create_ema(model: nn.Module, regularization: RegularizationSettings) -> ModelEmaV3 | None:
    """Create timm's moving average of weights and buffers, if configured."""
    if regularization.ema_decay is None:
        return None
    warmup = regularization.ema_every == "step"
    return ModelEmaV3(model, decay=regularization.ema_decay, use_warmup=warmup)


def describe_data(data: Data) -> dict:
    """Return what a checkpoint records about its data: classes, counts, normalization, digests.

    labels: a digest of the training labels, in order; images: see Data.fingerprints.
    """
    info, train = data.info, data.train
    labels = np.asarray(train.reader.targets[train.rows], dtype="<i8").tobytes()
    return {
        "classes": list(info.classes),
        "channels": info.channels,
        "mean": list(info.mean),
        "std": list(info.std),
        "train_count": info.train_count,
        "eval_count": info.eval_count,
        "labels": hashlib.sha256(labels).hexdigest()[:16],
        "images": data.fingerprints,
    }
