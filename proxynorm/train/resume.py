"""The state of a run across interruptions, and the checks before it is resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from proxynorm.data import Data
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train import checkpoint
from proxynorm.train.finetune import restore_eps
from proxynorm.train.optimizer import load_optimizer
from proxynorm.train.restore import different_classes, stored_settings
from proxynorm.train.run_folder import RunFolder, numeric_environment
from proxynorm.train.settings import Settings, differences, identity

if TYPE_CHECKING:
    from proxynorm.train.loop import Trainer

START_OVER = "choose another name=, or resume=never"
SUMMARY_KEYS = ("completed", "steps", "total_steps", "top1")  # what a finished run needs
COUNTERS = ("step", "evaluated", "best_top1", "train_seconds", "skipped", "loss_steps", "stale")


@dataclass
class TrainState:
    """Model, optimizer and counters.

    step: weight updates made; evaluated: the step last evaluated; stale: evaluations since the one
    with the best top-1; loss_sum, loss_steps: the sum of the losses of finite updates since the
    last row of metrics.jsonl, each a mean over all processes, and their number; start: the record
    of `finetune.carry_over`; extended: a record of each start under resume=extend.

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
        """The network to evaluate: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def state_dict(self, world_size: int) -> dict[str, Any]:
        """Return the state for a checkpoint, with loss_sum summed over the processes."""
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
        """Load a checkpoint's content; older checkpoints lack some of it."""
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


def record(trainer: Trainer) -> dict[str, Any]:
    """Return what a checkpoint records of its run, in addition to the state."""
    return {
        "identity": identity(trainer.settings),
        "settings": asdict(trainer.settings),  # so that the file is enough without its folder
        "world_size": trainer.process.world_size,
        "inputs": describe_data(trainer.data),
        "start": trainer.state.start,
        "extended": trainer.state.extended,
    }


def describe_data(data: Data) -> dict[str, Any]:
    """Return the classes, counts, normalization and digests of the data.

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


def finished(run: RunFolder, settings: Settings, data: Data) -> dict[str, Any] | None:
    """Return the summary of a run that is finished under `settings`, else None.

    Raises CheckpointError if the folder holds another run.
    """
    if settings.resume == "never" or not run.summary.exists():
        return None
    try:
        summary = json.loads(run.summary.read_text())
        completed, steps, total, _ = (summary[key] for key in SUMMARY_KEYS)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{run.summary} is damaged; remove it, and the run goes on from its checkpoint"
        ) from None
    # A run that ended early, by max_steps or patience, goes on if these now allow more steps.
    patient = settings.patience is None or summary.get("stale", 0) < settings.patience
    if not completed or (steps < min(total, settings.max_steps or total) and patient):
        return None
    content, _ = checkpoint.load_latest(run.checkpoints)
    if content is None:  # the user removed the checkpoints
        stored = identity(stored_settings(run.config))
        content = {"identity": stored, "inputs": describe_data(data)}
    if extends(content, settings):
        return None
    check_same_run(content, settings, data, run.path)
    return summary


def resume(trainer: Trainer, now: dict[str, Any]) -> bool:
    """Load the newest readable checkpoint and rewind the metrics to it; False if there is none.

    now: the environment. Raises CheckpointError if the run cannot continue, ConfigError if it is
    past max_steps.
    """
    run, settings, say = trainer.run, trainer.settings, trainer.display.print
    if settings.resume == "never":
        return False
    content, faults = checkpoint.load_latest(run.checkpoints)
    for fault in faults:
        say(fault)
    if content is None:
        if settings.resume in ("must", "extend"):
            raise CheckpointError(f"resume={settings.resume}: {run.path} holds no checkpoint")
        if run.summary.exists():
            raise CheckpointError(
                f"{run.path} holds a run, but neither last.pt nor previous.pt: "
                "restore one of them, or use resume=never to clear the folder and start over"
            )
        if run.metrics.exists():
            say(f"{run.path} has no checkpoint: the run starts over")
        return False
    check_same_run(content, settings, trainer.data, run.path)
    if (step := content["counters"]["step"]) > trainer.last_step:
        raise ConfigError(
            f"{run.path} is at step {step}, past max_steps={settings.max_steps}: "
            "raise it, or leave it out"
        )
    trainer.state.load_state_dict(content)
    trainer.settings = replace(settings, weights=content["identity"].get("weights"))
    if longer := extends(content, settings):
        before, epochs = content["identity"]["epochs"], settings.epochs
        trainer.state.extended.append({"step": step, "from_epochs": before, "epochs": epochs})
        trainer.state.stale = 0
        say(f"extended at step {step} from {before} to {epochs} epochs, with their schedule")
    if trainer.process.is_main:
        if faults:
            run.last.unlink(missing_ok=True)  # it is damaged and must not become previous.pt
        if longer:
            run.summary.unlink(missing_ok=True)  # or the run would count as finished
        run.rewind(step, trainer.state.evaluated)
        for line in resume_warnings(trainer, content, now):
            say(line)
    say(f"resumed at step {step} of {trainer.last_step}")
    return True


def extends(content: dict[str, Any], settings: Settings) -> bool:
    """Return whether resume=extend takes the checkpoint's run to more epochs."""
    return settings.resume == "extend" and content["identity"]["epochs"] < settings.epochs


def resume_warnings(trainer: Trainer, content: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the reasons why the resumed run may differ from an uninterrupted one."""
    lines, run, world_size = [], trainer.run, trainer.process.world_size
    if content["world_size"] != world_size:
        lines.append(f"resuming with {world_size} process(es), was {content['world_size']}")
    if not trainer.data.comparable(content["inputs"].get("images", {}), "train"):
        lines.append(
            "unknown whether the images are those that the run began with: "
            "they were read in another way then"
        )
    try:
        before = numeric_environment(json.loads(run.environment.read_text()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        lines.append(
            f"{run.environment} is missing or damaged: "
            "unknown whether the machine and the versions are the same"
        )
        return lines
    if changed := differences(before, numeric_environment(now)):
        lines.append(
            "resuming on another machine or version: the same images and steps, "
            f"not the same bits ({changed})"
        )
    return lines


def check_same_run(content: dict[str, Any], settings: Settings, data: Data, path: Path) -> None:
    """Raise CheckpointError if a checkpoint was trained with other settings or on other data."""
    stored, current = content["identity"], identity(settings)
    if settings.weights is None and "weights" in stored:  # a resumed run need not repeat weights=
        current["weights"] = stored["weights"]
    epochs = stored["epochs"]
    if extends(content, settings):
        current["epochs"] = epochs
    if changed := differences(stored, current):
        # True if nothing but the epochs differs, and more of them are requested.
        longer = stored == {**current, "epochs": epochs} and epochs < current["epochs"]
        go_on = ", or resume=extend to go on to more epochs" if longer else ""
        raise CheckpointError(f"{path} holds another run ({changed}); {START_OVER}{go_on}")
    check_same_data(content["inputs"], data, path)


def check_same_data(stored: dict[str, Any], data: Data, path: Path) -> None:
    """Raise CheckpointError if `data` are not those that a checkpoint describes as `stored`."""
    present = describe_data(data)
    for key in ("classes", "train_count", "eval_count", "mean", "std", "labels"):
        was, now = stored.get(key, present[key]), present[key]
        if was != now:
            change = "not the same" if key == "labels" else f"{was} → {now}"
            change = different_classes(was, now) if key == "classes" else change
            raise CheckpointError(
                f"{path} was trained on another data set ({key}: {change}); {START_OVER}"
            )
    if replaced := data.replaced(stored.get("images", {})):
        sources = " and ".join(dict.fromkeys(replaced.values()))
        raise CheckpointError(
            f"{path} was trained on other images than those now in {sources}; "
            f"restore the former images, or {START_OVER}"
        )
