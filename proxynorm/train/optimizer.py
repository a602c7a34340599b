"""Optimizer and learning-rate schedule: timm's, with the recipes' batch-size rules."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from proxynorm.errors import ConfigError
from proxynorm.nn import parameter_groups
from proxynorm.train.finetune import scale_rates
from proxynorm.train.rmsprop import RMSpropTF
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
    groups = scale_rates(model, parameter_groups(model, optim.weight_decay), optim)
    common = {"lr": settings.learning_rate, "weight_decay": optim.weight_decay}
    try:
        if optim.name == "rmsproptf":
            return RMSpropTF(groups, **common, **arguments)
        if "fused" in signature(get_optimizer_class(optim.name, bind_defaults=False)).parameters:
            arguments["fused"] = True
        optimizer = create_optimizer_v2(groups, opt=optim.name, **common, **arguments)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"optim.name={optim.name}: timm cannot make it: {error}") from error
    if isinstance(optimizer, torch.optim.SGD) and optim.momentum:
        # torch's fused kernel leaves the buffers uninitialized if it skips the very first step.
        for parameter in model.parameters():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load a state_dict. Which kernels compute the step stays this optimizer's own choice."""
    own = [
        {key: group[key] for key in ("fused", "foreach") if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(content)
    for group, kernels in zip(optimizer.param_groups, own, strict=True):
        group.update(kernels)


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
