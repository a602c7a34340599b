"""Everything that a run carries over an interruption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from proxynorm.train.finetune import restore_eps
from proxynorm.train.optimizer import load_optimizer

COUNTERS = ("step", "evaluated", "best_top1", "train_seconds", "skipped", "loss_steps", "stale")


@dataclass
class TrainState:
    """Model, optimizer and counters.

    step: weight updates made; evaluated: the step last evaluated; stale: evaluations since the one
    with the best top-1; loss_sum, loss_steps: over the steps since the last row of metrics.jsonl,
    the loss being the mean over all processes; start: what `finetune.carry` said of the weights
    that the run began with; extended: its starts under resume=extend.

    No random state: data order, crops, mixing and dropout are functions of (seed, step, rank).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    loss_sum: torch.Tensor  # on the device: reading it at each step would wait for the GPU
    step: int = 0
    evaluated: int = 0
    best_top1: float | None = None
    train_seconds: float = 0.0
    skipped: int = 0
    stale: int = 0
    loss_steps: int = 0
    last_result: dict[str, float] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    extended: list[dict[str, int]] = field(default_factory=list)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights to evaluate: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def state_dict(self, world_size: int) -> dict[str, Any]:
        """Return the tensors and counters for a checkpoint, which has losses summed over ranks."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum * world_size,
            "last_result": self.last_result,
            "counters": {name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Continue from a checkpoint's content; older ones lack some of it."""
        self.start, self.extended = content.get("start"), content.get("extended") or []
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        for model in (self.model, self.evaluated_model):
            restore_eps(model, self.start)
        load_optimizer(self.optimizer, content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.loss_sum.copy_(content["loss_sum"] / content["world_size"])
        self.last_result = content["last_result"]
        for name in COUNTERS:
            setattr(self, name, content["counters"].get(name, getattr(self, name)))
        self.scheduler.step_update(self.step)
