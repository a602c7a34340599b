"""The settings of a training run: typed values with their choices and ranges.

proxynorm.train.config turns Hydra's configuration into these. The comments in configs/ explain the
keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from proxynorm.cli import check_fields, choice, number
from proxynorm.data import DataSpec, LoaderSpec
from proxynorm.errors import ConfigError
from proxynorm.nn import NORMS, norm_spec

START_FROM = "; a run goes on from its own folder (name=), weights=FILE starts from a file"


@dataclass(frozen=True)
class NormSettings:
    """The norm by name (proxynorm.nn.NORMS) and its options; None is the model's default."""

    name: str = choice("ln_pn", *NORMS)
    groups: int | None = number(None, "at least 1")
    eps: float | None = number(None, "at least 0 and finite")
    proxy_eps: float = number(0.03, "at least 0 and finite")
    moments: str = "auto"
    nodes: int = number(256, "from 1 to 65535")


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer (a timm name), and lr = base_lr · batch / base_batch unless lr is given."""

    name: str = "momentum"
    lr: float | None = number(None, "above 0 and finite")
    base_lr: float = number(0.1, "above 0 and finite")
    base_batch: int = number(128, "at least 1")
    momentum: float = number(0.9, "at least 0 and below 1")
    weight_decay: float = number(1e-4, "at least 0 and finite")
    decay_per_image: float | None = None  # unused, but part of the names of older runs
    eps: float | None = number(None, "at least 0 and finite")
    alpha: float | None = number(None, "at least 0 and below 1")
    alpha_per_image: float | None = number(None, "at least 0 and finite")
    clip_grad: float | None = number(None, "above 0 and finite")
    lr_scale: dict[str, float] | None = number(None, "above 0 and finite")
    layer_decay: float | None = number(None, "above 0 and at most 1")


@dataclass(frozen=True)
class ScheduleSettings:
    """A timm schedule by name, advanced at each update; lengths in epochs."""

    name: str = choice("cosine", "step", "multistep", "poly", "tanh", "constant")
    warmup_epochs: float = number(0.0, "at least 0 and finite")
    warmup_lr: float = number(0.0, "at least 0 and finite")
    min_lr: float = number(0.0, "at least 0 and finite")
    decay_epochs: float | None = number(None, "above 0 and finite")
    decay_rate: float = number(0.1, "at least 0 and finite")
    milestones: list[float] | None = number(None, "at least 0 and finite")


@dataclass(frozen=True)
class RegularizationSettings:
    """Every regularizer, each a key of its own; zero or None is off."""

    name: str = "baseline"
    label_smoothing: float = number(0.0, "from 0 to 1")
    mixup: float = number(0.0, "at least 0 and finite")
    cutmix: float = number(0.0, "at least 0 and finite")
    cutmix_lambda: float | None = None
    mix_probability: float = number(1.0, "from 0 to 1")
    switch_probability: float = number(0.5, "from 0 to 1")
    dropout: float = number(0.0, "at least 0 and below 1")
    stochastic_depth: float = number(0.0, "at least 0 and below 1")
    randaugment: str | None = None
    random_erasing: float = number(0.0, "from 0 to 1")
    ema_decay: float | None = number(None, "at least 0 and below 1")
    ema_every: str = choice("step", "epoch")

    @property
    def mixes(self) -> bool:
        """Return whether mixup or CutMix is on."""
        return bool(self.mixup or self.cutmix or self.cutmix_lambda is not None)


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save, in addition to epoch ends and signals."""

    every_steps: int | None = number(None, "at least 1")
    every_minutes: float | None = number(None, "above 0 and finite")


@dataclass(frozen=True)
class LoggerSettings:
    """Weights & Biases; mode auto is online with a key and offline without."""

    mode: str = choice("auto", "online", "offline", "disabled")
    project: str = "proxynorm"
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None


@dataclass(frozen=True)
class DebugSettings:
    """overfit: every step sees the first batch; profile_steps: steps in a profiler trace."""

    name: str = "none"
    overfit: bool = False
    profile_steps: int = number(0, "at least 0 and finite")


@dataclass(frozen=True)
class PowerSettings:
    """The power decomposition of every norm during training.

    every_epochs: epochs between two decompositions, None: never; images: number of evaluation
    images; threshold: warn of a channel collapse if P1 exceeds it.
    """

    every_epochs: int | None = number(None, "at least 1")
    images: int = number(256, "at least 1")
    threshold: float = number(0.9, "from 0 to 1")


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
    batch: int = number(128, "at least 1")
    micro_batch: int | None = number(None, "at least 1")
    norm_batch: int | str | None = None
    epochs: int = number(5, "at least 1")
    max_steps: int | None = number(None, "at least 1")
    seed: int = number(0, "at least 0 and finite")
    weights: str | None = None
    freeze: list[str] | None = None
    patience: int | None = number(None, "at least 1")
    name: str | None = None
    runs_dir: str = "runs"
    resume: str = choice("auto", "never", "must", "extend", hint=START_FROM)
    device: str = "auto"
    precision: str = choice("auto", "fp32", "bf16", "fp16")
    memory_format: str = choice("auto", "contiguous", "channels_last")
    compile: bool | str = choice("auto", True, False)
    compile_mode: str = choice("default", "reduce-overhead", "max-autotune-no-cudagraphs")
    deterministic: bool = False
    recompute: bool = False
    nonfinite: str = choice("stop", "skip")
    nonfinite_limit: int = number(10, "at least 0 and finite")
    log_every: int = number(20, "at least 1")
    eval_every: int = number(1, "at least 1")
    eval_batch: int = number(250, "at least 1")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: optim.lr, or else scaled with the batch."""
        if self.optim.lr is not None:
            return self.optim.lr
        return self.optim.base_lr * self.batch / self.optim.base_batch

    def micro_batch_for(self, world_size: int) -> int:
        """Return the number of images per process and forward pass.

        Raises ConfigError if the batch, or Batch Norm's batch, does not divide evenly.
        """
        micro, norm_batch = self.micro_batch or max(1, self.batch // world_size), self.norm_batch
        if self.batch % (world_size * micro):
            processes = f"{world_size} processes × " if world_size > 1 else ""
            words = f"is not divisible by {processes}micro_batch={micro}"
            raise ConfigError(f"batch={self.batch} {words}")
        if micro == 1 and self.regularization.mixes:
            raise ConfigError(
                "mixup and CutMix mix the images of a micro-batch, and micro_batch is 1; give a "
                "larger one, or regularization.mixup=0 and regularization.cutmix=0"
            )
        shared = norm_spec(self.norm.name).batch_statistics
        if shared and isinstance(norm_batch, int) and micro % norm_batch:
            raise ConfigError(
                f"norm_batch={norm_batch} does not divide the {micro} images of a process's "
                "forward (micro_batch); choose a divisor of it, or another batch, micro_batch or "
                "number of processes"
            )
        return micro


def _declared(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield each setting's dotted key and its declaration."""
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _declared(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


DECLARED = dict(_declared(Settings))

# Keys that do not change what is trained. They may change when a run is resumed, and are not part
# of its name.
INCIDENTAL = ("power", "name", "runs_dir", "resume", "device", "logger", "loader", "checkpoint")
INCIDENTAL += ("debug.profile_steps", "debug.name", "max_steps", "log_every", "eval_batch")
INCIDENTAL += ("data.root", "data.cache", "patience", "compile_mode", "deterministic")

# Not part of the identity while they are null: they were added later, and older runs keep their
# names.
OPTIONAL = ("weights", "freeze", "optim.lr_scale", "optim.layer_decay")

# Incidental, but part of the identities of older runs: always recorded as the default.
FIXED = {key: getattr(Settings, key) for key in ("nonfinite", "nonfinite_limit")}
FIXED["compile"] = False


def check(settings: Settings) -> Settings:
    """Return `settings` if its values make sense together; raise ConfigError otherwise."""
    name, norm_batch, warmup = settings.name, settings.norm_batch, settings.schedule.warmup_epochs
    check_fields(settings)
    if norm_batch not in (None, "global") and (isinstance(norm_batch, str) or norm_batch < 1):
        raise ConfigError(
            f"norm_batch={norm_batch}: valid: a number of images, 'global' (all processes) or null"
        )
    if warmup > settings.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={warmup:g} is longer than the {settings.epochs} epochs"
        )
    settings.micro_batch_for(1)  # again with the number of processes when the run starts
    if name is not None and (name.strip() in ("", "..") or name != Path(name).name):
        raise ConfigError(f"name={name}: must be a plain folder name; runs_dir= is its parent")
    return settings


def identity(settings: Settings) -> dict[str, Any]:
    """Return the part of the settings that decides what is trained, as flat key → value."""

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and name not in INCIDENTAL:
                yield from flat(value, f"{name}.")
            elif name not in INCIDENTAL and not (name in OPTIONAL and value is None):
                yield name, list(value) if isinstance(value, tuple) else value

    return dict(flat(dataclasses.asdict(dataclasses.replace(settings, **FIXED))))


def differences(stored: dict[str, Any], current: dict[str, Any]) -> str:
    """Return the keys in which two dictionaries differ, as 'key: stored → current; …'."""

    def shown(value: Any) -> str:  # as in a configuration: null, true, text
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    pairs = {key: (stored.get(key), current.get(key)) for key in {**stored, **current}}
    changed = {key: pair for key, pair in sorted(pairs.items()) if pair[0] != pair[1]}
    return "; ".join(f"{key}: {shown(was)} → {shown(now)}" for key, (was, now) in changed.items())


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
    """Return the run's folder; under resume=extend that of the run to extend.

    A derived name depends on the epochs, so the run to extend is looked up under the name for every
    smaller number of epochs. Raises ConfigError if no or several runs are found.
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
