"""From settings to the objects of a run: model, precision, memory format."""

from __future__ import annotations

import torch
from torch import nn

from proxynorm.data import DataInfo
from proxynorm.models import create_model
from proxynorm.nn import norm_spec
from proxynorm.train.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(settings: Settings, num_classes: int, channels: int) -> nn.Module:
    """The configured network, with fresh weights. Raises ConfigError for an unknown name or argument."""
    arguments = dict(settings.model)
    norm = settings.norm
    return create_model(
        arguments.pop("name"),
        norm=norm.name,
        num_classes=num_classes,
        in_chans=channels,
        groups=norm.groups,
        eps=norm.eps,
        proxy_eps=norm.proxy_eps,
        moments=norm.moments,
        nodes=norm.nodes,
        norm_batch=settings.norm_batch,
        drop_rate=settings.regularization.dropout,
        drop_path_rate=settings.regularization.stochastic_depth,
        **arguments,
    )


def seeded_model(settings: Settings, info: DataInfo) -> nn.Module:
    """`build_model` with weights drawn from the run's seed."""
    torch.manual_seed(settings.seed)
    return build_model(settings, len(info.classes), info.channels)


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The compute precision; auto is bf16 on GPUs that have it, else fp16 on GPUs, fp32 on CPU."""
    if settings.precision != "auto":
        return DTYPES[settings.precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def choose_memory_format(settings: Settings, device: torch.device) -> torch.memory_format:
    """auto: the faster format for the norm, by measurement on CPU (scripts/benchmark.py step) and by timm's table on GPUs.

    On CPU channels_last, in which oneDNN's convolutions work, except for Instance Norm, whose sums over one channel's pixels
    then stride over memory. On GPUs channels_last for Batch Norm and for no norm, contiguous where torch's group norm would leave channels_last.
    """
    name = settings.memory_format
    if name == "auto":
        kind = norm_spec(settings.norm.name).kind
        suits = kind != "in" if device.type == "cpu" else kind in ("bn", "none")
        name = "channels_last" if suits else "contiguous"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format
