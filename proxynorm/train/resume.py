"""Check that a run folder holds this run, how far it got, and that it may go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxynorm.data import Data
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train import checkpoint
from proxynorm.train.progress import Display
from proxynorm.train.restore import different_classes, stored_settings
from proxynorm.train.run_folder import RunFolder, bits
from proxynorm.train.settings import Settings, identity
from proxynorm.train.state import describe_data

if TYPE_CHECKING:
    from proxynorm.train.loop import Trainer


def finished(run: RunFolder, settings: Settings, data: Data) -> dict[str, Any] | None:
    """Return the summary of a run with nothing left to do under `settings`, else None.

    Raises CheckpointError if the folder holds another run.
    """
    if settings.resume == "never" or not run.summary.exists():
        return None
    summary = run.read_summary()
    target = min(summary["total_steps"], settings.max_steps or summary["total_steps"])
    patient = settings.patience is None or summary.get("stale", 0) < settings.patience
    if not summary["completed"] or (summary["steps"] < target and patient):
        return None
    content, _ = checkpoint.load_latest(run.checkpoints)
    if content is None:  # only the checkpoints were removed
        stored = identity(stored_settings(run.config))
        content = {"identity": stored, "inputs": describe_data(data)}
    if extends(content, settings):
        return None
    check_identity(content, settings, run.path)
    check_data(content, data, run.path)
    return summary


def resume(
    trainer: Trainer, run: RunFolder, settings: Settings, display: Display, now: dict[str, Any]
) -> bool:
    """Load the newest readable checkpoint and rewind the metrics to it; False if there is none.

    now: the environment. Raises CheckpointError if the run cannot continue, ConfigError if it is
    past max_steps.
    """
    if settings.resume == "never":
        return False
    content, messages = checkpoint.load_latest(run.checkpoints)
    for message in messages:
        display.print(message)
    if content is None:
        require_checkpoint(settings, run)
        if run.lost_checkpoint():
            raise CheckpointError(
                f"{run.path} holds a run, but neither last.pt nor previous.pt: "
                "restore one of them, or use resume=never to clear the folder and start anew"
            )
        return False
    check_identity(content, settings, run.path)
    check_data(content, trainer.data, run.path)
    if (step := content["counters"]["step"]) > trainer.last_step:
        raise ConfigError(
            f"{run.path} is at step {step}, past max_steps={settings.max_steps}: "
            "raise it, or leave it out"
        )
    trainer.load(content, last_is_damaged=bool(messages))
    if extends(content, settings):
        display.print(extend(trainer, content))
    if trainer.process.is_main:
        run.rewind(trainer.state.step, trainer.state.evaluated)
        if extends(content, settings):
            run.summary.unlink(missing_ok=True)  # it says that the run is finished
        for line in resume_warnings(trainer, content, run, now):
            display.print(line)
    display.print(f"resumed at step {trainer.state.step} of {trainer.last_step}")
    return True


def require_checkpoint(settings: Settings, run: RunFolder) -> None:
    """Raise CheckpointError if the run must continue, but there is nothing to continue."""
    if settings.resume in ("must", "extend") and not (run.last.exists() or run.previous.exists()):
        raise CheckpointError(f"resume={settings.resume}: {run.path} holds no checkpoint")


def extends(content: dict[str, Any], settings: Settings) -> bool:
    """Return whether the checkpoint's run is to go on to more epochs than it was given."""
    return settings.resume == "extend" and content["identity"]["epochs"] < settings.epochs


def extend(trainer: Trainer, content: dict[str, Any]) -> str:
    """Record that the run goes on to more epochs; return a line that says so."""
    before, now, step = content["identity"]["epochs"], trainer.settings.epochs, trainer.state.step
    trainer.extended.append({"step": step, "from_epochs": before, "epochs": now})
    trainer.state.stale = 0
    return f"extended from {before} to {now} epochs: from step {step} on their schedule holds"


def resume_warnings(
    trainer: Trainer, content: dict[str, Any], run: RunFolder, now: dict[str, Any]
) -> list[str]:
    """Return the reasons why the resumed run may differ from the unbroken one."""
    lines = []
    world_size = trainer.process.world_size
    if content["world_size"] != world_size:
        lines.append(f"resuming with {world_size} process(es), was {content['world_size']}")
    if not trainer.data.comparable(content["inputs"].get("images", {}), "train"):
        lines.append(
            "whether the images are those that the run began on is unknown: "
            "they were read in another way then"
        )
    before = run.read_environment()
    if before is None:
        lines.append(
            f"{run.environment} is missing or damaged: "
            "whether machine and versions are the same is unknown"
        )
    elif changed := differences(bits(before), bits(now)):
        lines.append(
            "resuming on another machine or version: the same images and steps, "
            f"not the same bits ({'; '.join(changed)})"
        )
    return lines


def shown(value: Any) -> str:
    """Format a value as it is written in a configuration: null, true, a word."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the keys in which two dictionaries differ, as 'key: stored → current'."""
    return [
        f"{key}: {shown(stored.get(key))} → {shown(current.get(key))}"
        for key in sorted(stored.keys() | current.keys())
        if stored.get(key) != current.get(key)
    ]


def check_identity(content: dict[str, Any], settings: Settings, path: Path) -> None:
    """Raise CheckpointError if the stored run has other settings."""
    stored, now = content["identity"], identity(settings)
    if extends(content, settings):
        now["epochs"] = stored["epochs"]
    if changed := differences(stored, now):
        longer = stored == {**now, "epochs": stored["epochs"]} and stored["epochs"] < now["epochs"]
        go_on = ", or resume=extend to go on to more epochs" if longer else ""
        raise CheckpointError(
            f"{path} holds another run ({'; '.join(changed)}); "
            f"choose another name=, or resume=never{go_on}"
        )


def check_data(content: dict[str, Any], data: Data, path: Path) -> None:
    """Raise CheckpointError if the run was trained on other classes, labels, counts or images."""
    stored, present = content["inputs"], describe_data(data)
    for key in ("classes", "train_count", "eval_count", "mean", "std", "labels"):
        was, now = stored.get(key, present[key]), present[key]
        if was == now:
            continue
        words = {"classes": different_classes, "labels": lambda *_: "not the same"}
        change = words[key](was, now) if key in words else f"{was} → {now}"
        raise CheckpointError(
            f"{path} was trained on another data set ({key}: {change}); "
            "choose another name=, or resume=never"
        )
    if replaced := data.replaced(stored.get("images", {})):
        sources = " and ".join(dict.fromkeys(replaced.values()))
        raise CheckpointError(
            f"{path} was trained on other images than those now in {sources}; "
            "restore the former images, or choose another name=, or resume=never"
        )
