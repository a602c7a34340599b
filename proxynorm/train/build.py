"""From settings to the objects of a run: model, precision, memory format."""

from __future__ import annotations

import torch
from torch import nn

from proxynorm.data import DataInfo
from proxynorm.data.mixing import Mixing
from proxynorm.models import create_model
from proxynorm.nn import norm_spec
from proxynorm.train.finetune import LOADING
from proxynorm.train.settings import RegularizationSettings, Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(settings: Settings, num_classes: int, channels: int) -> nn.Module:
    """Create the configured network, with random weights. Raises ConfigError."""
    arguments = {key: value for key, value in settings.model.items() if key not in LOADING}
    norm, eps = settings.norm, settings.norm.eps
    if (
        eps is None
        and settings.model.get("pretrained")
        and "efficientnet" in settings.model["name"]
    ):
        eps = 1e-5  # timm's, not the paper's: runs of version 0.1 do not record it
    return create_model(
        arguments.pop("name"),
        norm=norm.name,
        num_classes=num_classes,
        in_chans=channels,
        groups=norm.groups,
        eps=eps,
        proxy_eps=norm.proxy_eps,
        moments=norm.moments,
        nodes=norm.nodes,
        norm_batch=settings.norm_batch,
        drop_rate=settings.regularization.dropout,
        drop_path_rate=settings.regularization.stochastic_depth,
        **arguments,
    )


def seeded_model(settings: Settings, info: DataInfo) -> nn.Module:
    """Create the network with weights drawn from the run's seed."""
    torch.manual_seed(settings.seed)
    return build_model(settings, len(info.classes), info.channels)


def create_mixing(regularization: RegularizationSettings, classes: int) -> Mixing | None:
    """Create mixup and CutMix, if configured."""
    given = regularization
    if not given.mixes:
        return None
    return Mixing(
        given.mixup,
        given.cutmix,
        given.mix_probability,
        given.switch_probability,
        given.label_smoothing,
        classes,
        given.cutmix_lambda,
    )


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Return the compute precision; auto is bf16 on GPUs that have it, else fp16, fp32 on CPU."""
    if settings.precision != "auto":
        return DTYPES[settings.precision]
    if device.type == "cpu":
        return torch.float32
    # Emulated, as before Ampere, bf16 is slower than float32.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def choose_memory_format(settings: Settings, device: torch.device) -> torch.memory_format:
    """Return the memory format; auto is the faster one for the norm.

    On CPU by measurement (scripts/benchmark.py step): oneDNN convolves in channels_last, but
    Instance Norm's sums over one channel's pixels then stride over memory. On GPUs tensor cores
    convolve in channels_last, and our norms, unlike torch's group norm, keep it.
    """
    name = settings.memory_format
    if name == "auto":
        strides = device.type == "cpu" and norm_spec(settings.norm.name).kind == "in"
        name = "contiguous" if strides else "channels_last"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format
