"""The settings of a training run, as plain typed values.

proxynorm.train.config turns Hydra's configuration into these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from proxynorm.analysis.power_monitor import PowerSettings
from proxynorm.cli import nearest
from proxynorm.data import DataSpec, LoaderSpec
from proxynorm.errors import ConfigError
from proxynorm.nn import NORMS, norm_spec


@dataclass(frozen=True)
class NormSettings:
    """The norm by name (proxynorm.nn.NORMS) and its options; None is the model's default."""

    name: str = "ln_pn"
    groups: int | None = None
    eps: float | None = None
    proxy_eps: float = 0.03
    moments: str = "auto"
    nodes: int = 256


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer (a timm name), and lr = base_lr · batch / base_batch unless lr is given."""

    name: str = "momentum"
    lr: float | None = None
    base_lr: float = 0.1
    base_batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_per_image: float | None = None
    eps: float | None = None
    alpha: float | None = None
    alpha_per_image: float | None = None
    clip_grad: float | None = None
    lr_scale: dict[str, float] | None = None
    layer_decay: float | None = None


@dataclass(frozen=True)
class ScheduleSettings:
    """A timm schedule by name, advanced at each update; lengths in epochs."""

    name: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    milestones: list[float] | None = None


@dataclass(frozen=True)
class RegularizationSettings:
    """Every regularizer, each a key of its own; zero or None is off."""

    name: str = "baseline"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_lambda: float | None = None
    mix_probability: float = 1.0
    switch_probability: float = 0.5
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    randaugment: str | None = None
    random_erasing: float = 0.0
    ema_decay: float | None = None
    ema_every: str = "step"

    @property
    def mixes(self) -> bool:
        """Return whether mixup or CutMix is on."""
        return bool(self.mixup or self.cutmix or self.cutmix_lambda is not None)


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save besides at epoch ends and on signals."""

    every_steps: int | None = None
    every_minutes: float | None = None


@dataclass(frozen=True)
class LoggerSettings:
    """Weights & Biases; mode auto is online with a key and offline without."""

    mode: str = "auto"
    project: str = "proxynorm"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DebugSettings:
    """overfit: every step sees the first batch; profile_steps: steps in a profiler trace."""

    name: str = "none"
    overfit: bool = False
    profile_steps: int = 0


@dataclass(frozen=True)
class Settings:
    """One training run. `model` holds the model's name and its own arguments."""

    model: dict[str, Any] = field(default_factory=dict)
    norm: NormSettings = field(default_factory=NormSettings)
    data: DataSpec = field(default_factory=lambda: DataSpec(name="fashion_mnist"))
    loader: LoaderSpec = field(default_factory=LoaderSpec)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    regularization: RegularizationSettings = field(default_factory=RegularizationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    debug: DebugSettings = field(default_factory=DebugSettings)
    power: PowerSettings = field(default_factory=PowerSettings)
    batch: int = 128
    micro_batch: int | None = None
    norm_batch: int | str | None = None
    epochs: int = 5
    max_steps: int | None = None
    seed: int = 0
    weights: str | None = None
    freeze: list[str] | None = None
    patience: int | None = None
    name: str | None = None
    runs_dir: str = "runs"
    resume: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    memory_format: str = "auto"
    compile: bool | str = "auto"
    compile_mode: str = "default"
    deterministic: bool = False
    recompute: bool = False
    nonfinite: str = "stop"
    nonfinite_limit: int = 10
    log_every: int = 20
    eval_every: int = 1
    eval_batch: int = 250

    @property
    def learning_rate(self) -> float:
        """Peak learning rate from the recipe's rule."""
        if self.optim.lr is not None:
            return self.optim.lr
        return self.optim.base_lr * self.batch / self.optim.base_batch

    def micro_batch_for(self, world_size: int) -> int:
        """Return the images per process and forward.

        Raises ConfigError if the batch, or Batch Norm's batch, does not divide evenly.
        """
        if self.batch % world_size:
            raise ConfigError(f"batch={self.batch} is not divisible by the {world_size} processes")
        share = self.batch // world_size
        micro = self.micro_batch or share
        if share % micro:
            raise ConfigError(
                f"batch={self.batch} over {world_size} process(es) is {share} images each, "
                f"not divisible by micro_batch={micro}"
            )
        if micro == 1 and self.regularization.mixes:
            raise ConfigError(
                "mixup and CutMix mix the images of a micro-batch, and micro_batch is 1; give a "
                "larger one, or regularization.mixup=0 and regularization.cutmix=0"
            )
        check_norm_batch(self, micro)
        return micro


CHOICES = {
    "resume": ("auto", "never", "must", "extend"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "memory_format": ("auto", "contiguous", "channels_last"),
    "compile": ("auto", True, False),
    "compile_mode": ("default", "reduce-overhead", "max-autotune-no-cudagraphs"),
    "nonfinite": ("stop", "skip"),
    "schedule.name": ("cosine", "step", "multistep", "poly", "tanh", "constant"),
    "regularization.ema_every": ("step", "epoch"),
    "logger.mode": ("auto", "online", "offline", "disabled"),
}

# The range in words, its test, and the keys it holds for. null is left to the type.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        "batch micro_batch epochs max_steps patience log_every eval_every eval_batch norm.groups "
        "norm.nodes checkpoint.every_steps optim.base_batch power.every_epochs power.images",
    ),
    (
        "at least 0 and finite",
        lambda value: 0 <= value < math.inf,
        "seed nonfinite_limit debug.profile_steps norm.eps norm.proxy_eps "
        "optim.weight_decay optim.eps optim.alpha_per_image regularization.mixup "
        "regularization.cutmix schedule.warmup_epochs schedule.warmup_lr schedule.min_lr "
        "schedule.decay_rate",
    ),
    (
        "above 0 and finite",
        lambda value: 0 < value < math.inf,
        "optim.lr optim.base_lr optim.clip_grad schedule.decay_epochs checkpoint.every_minutes",
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        "regularization.label_smoothing regularization.mix_probability "
        "regularization.switch_probability regularization.random_erasing power.threshold",
    ),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "optim.layer_decay"),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "optim.momentum optim.alpha regularization.dropout regularization.stochastic_depth "
        "regularization.ema_decay",
    ),
)

# Keys that do not change what is trained: they may change when a run is resumed, and are no part
# of its name.
INCIDENTAL = ("power", "name", "runs_dir", "resume", "device", "logger", "loader", "checkpoint")
INCIDENTAL += ("debug.profile_steps", "debug.name", "max_steps", "log_every", "eval_batch")
INCIDENTAL += ("data.root", "data.cache", "patience", "compile_mode", "deterministic")

# No part of the identity while they are null: they came later, and older runs keep their names.
OPTIONAL = ("weights", "freeze", "optim.lr_scale", "optim.layer_decay")

# Incidental too, but part of older runs' identities: always recorded as the default.
FIXED = {key: getattr(Settings, key) for key in ("nonfinite", "nonfinite_limit")}
FIXED["compile"] = False


def check(settings: Settings) -> Settings:
    """Return `settings` if its values make sense together; raise ConfigError otherwise."""
    check_values(settings)
    name, norm_batch, warmup = settings.name, settings.norm_batch, settings.schedule.warmup_epochs
    if norm_batch not in (None, "global") and (isinstance(norm_batch, str) or norm_batch < 1):
        raise ConfigError(
            f"norm_batch={norm_batch}: valid: a number of images, 'global' (all processes) or null"
        )
    if settings.norm.name not in NORMS:
        raise ConfigError(f"norm.name={settings.norm.name}: {nearest(settings.norm.name, NORMS)}")
    if warmup > settings.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={warmup:g} is longer than the {settings.epochs} epochs"
        )
    if settings.batch % (settings.micro_batch or 1):
        raise ConfigError(
            f"batch={settings.batch} is not divisible by micro_batch={settings.micro_batch}"
        )
    check_norm_batch(settings, settings.micro_batch or settings.batch)
    if name is not None and (name in ("", "..") or name != Path(name).name):
        raise ConfigError(f"name={name}: must be a plain folder name; runs_dir= is its parent")
    return settings


def check_values(settings: Settings) -> None:
    """Raise ConfigError if a value is outside CHOICES or RANGES."""
    for key, choices in CHOICES.items():
        value = attrgetter(key)(settings)
        if value not in choices:
            words = (str(choice).lower() for choice in choices)  # true, as YAML writes it
            raise ConfigError(f"{key}={value}: valid: {', '.join(words)}")
    for words, holds, keys in RANGES:
        for key in keys.split():
            value = attrgetter(key)(settings)
            if value is not None and not holds(value):
                raise ConfigError(f"{key}={value:g}: must be {words}")
    for pattern, scale in (settings.optim.lr_scale or {}).items():
        if not 0 < scale < math.inf:
            raise ConfigError(f"optim.lr_scale.{pattern}={scale:g}: must be above 0 and finite")


def uses_batch_norm(settings: Settings) -> bool:
    """Return whether images share the norm's statistics, so that norm_batch matters."""
    return norm_spec(settings.norm.name).batch_statistics


def check_norm_batch(settings: Settings, micro_batch: int) -> None:
    """Raise ConfigError unless norm_batch divides Batch Norm's micro-batches."""
    norm_batch = settings.norm_batch
    if uses_batch_norm(settings) and isinstance(norm_batch, int) and micro_batch % norm_batch:
        raise ConfigError(
            f"norm_batch={norm_batch} does not divide the {micro_batch} images of a process's "
            "forward (micro_batch); choose a divisor of it, or another batch, micro_batch or "
            "number of processes"
        )


def identity(settings: Settings) -> dict[str, Any]:
    """Return the part of the settings that decides what is trained, as flat key → value."""

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name in INCIDENTAL or (name in OPTIONAL and value is None):
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{name}.")
            else:
                yield name, list(value) if isinstance(value, tuple) else value

    return dict(flat(dataclasses.asdict(dataclasses.replace(settings, **FIXED))))


def run_name(settings: Settings) -> str:
    """Return the run folder's name: the main settings and a digest of the identity."""
    if settings.name:
        return settings.name
    text = json.dumps(identity(settings), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    model = str(settings.model["name"]).replace("/", "_")
    main = f"{settings.data.name}-{model}-{settings.norm.name}-b{settings.batch}-s{settings.seed}"
    return f"{main}-{digest}"


def folder_of(settings: Settings) -> Path:
    """Return the run's folder; under resume=extend that of the run of fewer epochs.

    A derived name depends on the epochs. Raises ConfigError if none, or several, could be meant.
    """
    parent, name = Path(settings.runs_dir), run_name(settings)
    if settings.resume == "extend" and settings.name is None:
        shorter = (dataclasses.replace(settings, epochs=n) for n in range(1, settings.epochs))
        names = [run_name(run) for run in shorter]
        found = [name for name in names if (parent / name / "checkpoints").is_dir()]
        if len(found) != 1:
            raise ConfigError(
                f"resume=extend: {parent} holds {' and '.join(found) or 'no such run'} of fewer "
                f"epochs than epochs={settings.epochs}; choose the run by name="
            )
        name = found[0]
    return parent / name
