"""Optimizer and learning-rate schedule: timm's, with the batch-size rules of the recipes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from inspect import signature
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from proxynorm.errors import ConfigError
from proxynorm.nn import parameter_groups
from proxynorm.train.parts import check_pattern, classifier_names, matches, under
from proxynorm.train.settings import OptimSettings, Settings

LAYER_PARAMETERS = 12  # per layer, for a network without group_matcher; timm's number


def create_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """Create the optimizer, which decays only what the paper decays. Raises ConfigError."""
    optim = settings.optim
    arguments = {"momentum": optim.momentum}
    if optim.eps is not None:
        arguments["eps"] = optim.eps
    if optim.alpha_per_image is not None:
        arguments["alpha"] = alpha = 1.0 - settings.batch * optim.alpha_per_image
        if alpha < 0:
            raise ConfigError(
                f"batch={settings.batch} optim.alpha_per_image={optim.alpha_per_image}: "
                f"α = 1 − batch · alpha_per_image is {alpha:.3g}, below 0; reduce either"
            )
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


def load_optimizer(optimizer: Optimizer, content: dict[str, Any]) -> None:
    """Load a state_dict, but keep the optimizer's own choice of kernels."""
    own = [
        {key: group[key] for key in ("fused", "foreach") if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(content)
    for group, kernels in zip(optimizer.param_groups, own, strict=True):
        group.update(kernels)


def create_schedule(optimizer: Optimizer, settings: Settings, steps_per_epoch: int) -> Scheduler:
    """Create the schedule, a function of the number of updates, which `step_update` sets."""
    given = asdict(settings.schedule)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=given.pop("name"),
        num_epochs=settings.epochs,
        decay_milestones=given.pop("milestones") or [],
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
        **given,
    )
    return scheduler


def scale_rates(
    model: nn.Module, groups: list[dict[str, Any]], optim: OptimSettings
) -> list[dict[str, Any]]:
    """Split optimizer groups so that each has one factor on the learning rate, timm's lr_scale.

    A parameter that matches several patterns gets the product. Raises ConfigError.
    """
    if not optim.lr_scale and optim.layer_decay is None:
        return groups
    names = dict(model.named_parameters())
    layers = layers_of(model)
    decay, top = optim.layer_decay or 1.0, max(layers.values())
    scales = {id(names[name]): decay ** (top - layer) for name, layer in layers.items()}
    for pattern, scale in (optim.lr_scale or {}).items():
        check_pattern(model, "optim.lr_scale", pattern)
        for name, parameter in names.items():
            if matches(name, pattern):
                scales[id(parameter)] *= scale
    split = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(scales[id(parameter)], []).append(parameter)
        split += [{**group, "params": part, "lr_scale": scale} for scale, part in parts.items()]
    return split


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return each parameter's layer, counted from the stem as timm does for layer decay."""
    if hasattr(model, "group_matcher"):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    head, names = classifier_names(model), [name for name, _ in model.named_parameters()]
    trunk = [name for name in names if not under(name, head)]
    top = len(trunk) // LAYER_PARAMETERS + 1
    return dict.fromkeys(names, top) | {n: i // LAYER_PARAMETERS for i, n in enumerate(trunk)}


def base_rate(optimizer: Optimizer) -> float:
    """Return the learning rate without lr_scale, computed from the group of the largest one."""
    group = max(optimizer.param_groups, key=lambda group: group.get("lr_scale", 1.0))
    return group["lr"] / group.get("lr_scale", 1.0)


class RMSpropTF(Optimizer):
    """timm's RMSpropTF, the EfficientNet recipe's optimizer, for all tensors at once.

    Unlike timm's, it can skip a step without waiting for the device.

    s ← s + (1 − α)(g² − s);  b ← μb + lr · g / sqrt(s + ε);  p ← p − b, where the gradient g
    includes the weight decay (L2), s starts at one and b at zero. The state has timm's keys.
    """

    _step_supports_amp_scaling = True  # GradScaler and step_if set found_inf instead of waiting
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None  # unused: the loop unscales gradients before it clips them

    def __init__(
        self,
        params: Iterable,
        lr: float,
        alpha: float = 0.9,
        eps: float = 1e-10,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"alpha": alpha, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **options})

    def step(self, closure: None = None) -> None:
        """Make one update, unless found_inf is one."""
        keep = None if self.found_inf is None else 1.0 - self.found_inf
        if keep is not None and keep.device.type == "cpu":  # the host knows: nothing to compute
            if not keep:
                return
            keep = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, keep)

    @torch.no_grad()
    def _update(self, group: dict, params: list[Tensor], keep: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["square_avg"] = torch.ones_like(p)
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        squares = [self.state[p]["square_avg"] for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        rate, rest, momentum = group["lr"], 1.0 - group["alpha"], group["momentum"]
        if keep is not None:
            # To skip: zero times NaN is NaN, so the gradients are set to zero as integers. The
            # rates become zero and the momentum one, so that every sum below adds an exact zero.
            torch._foreach_mul_([g.view(torch.int32) for g in grads], keep.int())
            rate, rest, momentum = rate * keep, rest * keep, 1.0 - (1.0 - momentum) * keep
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        change = torch._foreach_mul(grads, grads)
        torch._foreach_sub_(change, squares)
        torch._foreach_mul_(change, rest)
        torch._foreach_add_(squares, change)
        root = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(root)
        torch._foreach_mul_(buffers, momentum)
        update = torch._foreach_div(grads, root)
        torch._foreach_mul_(update, rate)
        torch._foreach_add_(buffers, update)
        update = buffers if keep is None else torch._foreach_mul(buffers, keep)
        torch._foreach_sub_(params, update)
