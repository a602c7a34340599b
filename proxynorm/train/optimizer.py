"""Optimizer and learning-rate schedule: timm's, with the recipes' batch-size rules."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from proxynorm.errors import ConfigError
from proxynorm.nn import parameter_groups
from proxynorm.train.finetune import scale_rates
from proxynorm.train.settings import Settings


def create_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Create the optimizer over the model's decay groups. Raises ConfigError."""
    optim = settings.optim
    arguments = {"momentum": optim.momentum}
    if optim.eps is not None:
        arguments["eps"] = optim.eps
    if optim.alpha_per_image is not None:
        arguments["alpha"] = 1.0 - settings.batch * optim.alpha_per_image
    elif optim.alpha is not None:
        arguments["alpha"] = optim.alpha
    try:
        return create_optimizer_v2(
            scale_rates(model, parameter_groups(model, optim.weight_decay), optim),
            opt=optim.name,
            lr=settings.learning_rate,
            weight_decay=optim.weight_decay,
            **arguments,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"optim.name={optim.name}: timm cannot make it: {error}") from error


def create_schedule(
    optimizer: torch.optim.Optimizer, settings: Settings, steps_per_epoch: int
) -> Scheduler:
    """Create the schedule, a function of the number of updates alone: set it by `step_update`."""
    schedule = settings.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.name,
        num_epochs=settings.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        decay_rate=schedule.decay_rate,
        decay_epochs=schedule.decay_epochs,
        decay_milestones=schedule.milestones or [],
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
