"""One training run from settings to summary: folder, resumption, loop, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from proxynorm.analysis.plots import plot_curves
from proxynorm.data import Data, open_data
from proxynorm.errors import CheckpointError, ConfigError, DataError, FileError
from proxynorm.files import write_json
from proxynorm.train import checkpoint
from proxynorm.train.distributed import Process, environment_ranks, processes
from proxynorm.train.preemption import REQUEUE, Preempted, StopRequest, stop_request
from proxynorm.train.progress import Display
from proxynorm.train.restore import different_classes, stored_settings
from proxynorm.train.run_folder import RunFolder, bits, environment
from proxynorm.train.settings import Settings, check, identity, run_name, uses_batch_norm
from proxynorm.train.tracker import Tracker
from proxynorm.train.trainer import Trainer, inputs


def shown(value: Any) -> str:
    """A value as one writes it in a configuration: null, true, a word."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The keys in which two dictionaries differ, as 'key: stored → current'."""
    return [
        f"{key}: {shown(stored.get(key))} → {shown(current.get(key))}"
        for key in sorted(stored.keys() | current.keys())
        if stored.get(key) != current.get(key)
    ]


def check_identity(content: dict[str, Any], settings: Settings, path: Path) -> None:
    """Raises CheckpointError naming what differs between the stored run and `settings`."""
    changed = differences(content["identity"], identity(settings))
    if changed:
        raise CheckpointError(
            f"{path} holds another run ({'; '.join(changed)}); choose another name=, or resume=never"
        )


def check_data(content: dict[str, Any], data: Data, path: Path) -> None:
    """Raises CheckpointError if the run was trained on other classes, labels, images or another number of them than `data`'s."""
    stored, present = content["inputs"], inputs(data)
    for key in ("classes", "train_count", "eval_count", "mean", "std", "labels"):
        was, now = stored.get(key, present[key]), present[key]
        if was != now:
            words = (
                different_classes(was, now)
                if key == "classes"
                else "not the same"
                if key == "labels"
                else f"{was} → {now}"
            )
            raise CheckpointError(
                f"{path} was trained on another data set ({key}: {words}); choose another name=, or resume=never"
            )
    if replaced := data.replaced(stored.get("images", {})):
        raise CheckpointError(
            f"{path} was trained on other images than {' and '.join(dict.fromkeys(replaced.values()))} "
            "hold(s) now; put the former back, or choose another name=, or resume=never"
        )


def finished(run: RunFolder, settings: Settings, data: Data) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do under `settings`, else None. Raises CheckpointError as resume does."""
    if settings.resume == "never" or not run.summary.exists():
        return None
    summary = run.read_summary()
    target = min(summary["total_steps"], settings.max_steps or summary["total_steps"])
    if not summary["completed"] or summary["steps"] < target:
        return None
    content, _ = checkpoint.load_latest(run.checkpoints)
    if content is None:  # only the checkpoints were removed
        content = {"identity": identity(stored_settings(run.config)), "inputs": inputs(data)}
    check_identity(content, settings, run.path)
    check_data(content, data, run.path)
    return summary


def resume(
    trainer: Trainer, run: RunFolder, settings: Settings, display: Display, now: dict[str, Any]
) -> bool:
    """Load the newest readable checkpoint into the trainer and rewind the metrics to it; False if there is none.

    now: the environment. Raises CheckpointError where there is no going on, ConfigError past max_steps.
    """
    content, messages = (
        checkpoint.load_latest(run.checkpoints) if settings.resume != "never" else (None, [])
    )
    for message in messages:
        display.say(message)
    if content is None:
        if settings.resume == "must":
            raise CheckpointError(f"resume=must: {run.path} holds no checkpoint")
        if settings.resume == "auto" and run.lost_checkpoint():
            raise CheckpointError(
                f"{run.path} holds a run, but neither last.pt nor previous.pt to go on from: put one back, "
                "or let resume=never clear the folder and start anew"
            )
        return False
    check_identity(content, settings, run.path)
    check_data(content, trainer.data, run.path)
    if (step := content["counters"]["step"]) > trainer.last_step:
        raise ConfigError(
            f"{run.path} is at step {step}, past max_steps={settings.max_steps}: raise it, or leave it out"
        )
    trainer.load(content, last_is_damaged=bool(messages))
    if trainer.process.is_main:
        run.rewind(trainer.state.step, trainer.state.evaluated)
    say_what_differs(trainer, content, run, display, now)
    display.say(f"resumed at step {trainer.state.step} of {trainer.last_step}")
    return True


def say_what_differs(
    trainer: Trainer, content: dict[str, Any], run: RunFolder, display: Display, now: dict[str, Any]
) -> None:
    """Tell of what keeps the run resumed from the checkpoint's content from the unbroken one's bits, and of rows that are lost."""
    if not trainer.process.is_main:
        return
    state = trainer.state
    if content["world_size"] != trainer.process.world_size:
        display.say(
            f"resuming with {trainer.process.world_size} process(es), was {content['world_size']}"
        )
    if not trainer.data.comparable(content["inputs"].get("images", {}), "train"):
        display.say(
            "whether the images are those that the run began on cannot be told: they were read in another way then"
        )
    before = run.read_environment()
    if before is None:
        display.say(
            f"{run.environment} is missing or damaged: whether machine and versions are the same is not known"
        )
    elif changed := differences(bits(before), bits(now)):
        display.say(
            f"resuming on another machine or version: the same images and steps, not the same bits ({'; '.join(changed)})"
        )
    steps = [row["step"] for row in run.read_rows() if row["event"] == "train"]
    state.rows = state.rows or len(steps)
    if state.rows > len(steps):
        display.say(
            f"{run.metrics} has lost {state.rows - len(steps)} of its {state.rows} rows of training; the last left is of "
            f"step {max(steps, default=0)}"
        )


def summarize(trainer: Trainer, name: str, damaged: dict[str, str]) -> dict[str, Any]:
    """What summary.json says; `damaged` are the images left out under data.on_bad=skip, with the reasons."""
    settings, state = trainer.settings, trainer.state
    norm_batch = (settings.norm_batch or trainer.micro_batch) if uses_batch_norm(settings) else None
    return {
        "name": name,
        "model": settings.model["name"],
        "norm": settings.norm.name,
        "batch": settings.batch,
        "norm_batch": norm_batch,
        "regularization": settings.regularization.name,
        "data": settings.data.name,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "steps": state.step,
        "total_steps": trainer.total_steps,
        "top1": state.last_result.get("top1"),
        "top5": state.last_result.get("top5"),
        "loss": state.last_result.get("loss"),
        "best_top1": state.best_top1,
        "count": state.last_result.get("count"),
        "train_seconds": round(state.train_seconds, 3),
        "skipped_updates": state.skipped,
        "damaged_images": len(damaged),
        "completed": state.step == trainer.last_step == state.evaluated,
    }


def describe(trainer: Trainer, run: RunFolder) -> str:
    """What was chosen, in two lines."""
    settings, data = trainer.settings, trainer.data
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    layout = "channels_last" if trainer.memory_format == torch.channels_last else "contiguous"
    return (
        f"{run.path}\n{settings.model['name']} {settings.norm.name}, {parameters / 1e6:.2f} M parameters; "
        f"{data.info.train_count} + {data.info.eval_count} images by {data.backend}; batch {settings.batch} = "
        f"{trainer.process.world_size} × {trainer.accumulation} × {trainer.micro_batch}; "
        f"{str(trainer.dtype).removeprefix('torch.')} {layout} on {trainer.process.device}; "
        f"{trainer.last_step} steps"
    )


def train(settings: Settings, config: dict[str, Any]) -> int:
    """Train, or go on training, the run that `settings` describes; `config` is written down as it is.

    Returns the exit status: 0 done, 75 stopped by a signal after saving.
    """
    check(settings)
    name = run_name(settings)
    run = RunFolder(Path(settings.runs_dir) / name)
    settings.micro_batch_for(environment_ranks()[2])
    with processes(settings.device) as process, stop_request() as stop:
        data = open_data(settings.data, settings.loader)
        done = process.share(finished(run, settings, data) if process.is_main else None)
        if done:
            if process.is_main:
                print(
                    f"{run.path} is finished: top-1 {done['top1']:.2f} % after {done['steps']} steps"
                )
                if not run.curves.exists():
                    draw(run, name)
            return 0
        if settings.resume == "must" and not run.checkpoints.is_dir():
            raise CheckpointError(f"resume=must: {run.path} holds no checkpoint")
        if process.is_main:
            run.acquire()
        try:
            process.barrier()
            return train_in(run, name, settings, config, process, data, stop)
        finally:
            run.release()


def train_in(
    run: RunFolder,
    name: str,
    settings: Settings,
    config: dict[str, Any],
    process: Process,
    data: Data,
    stop: StopRequest,
) -> int:
    """The run inside its locked folder."""
    trainer = Trainer(settings, process, data, run, stop)
    display = Display(trainer.last_step, settings.epochs, visible=process.is_main)
    now = (
        {**environment(), "device": str(process.device), "world_size": process.world_size}
        if process.is_main
        else {}
    )
    resumed = resume(trainer, run, settings, display, now)
    process.barrier()
    if process.is_main:
        run.remove_leftovers() if resumed else run.clear()
        run.write_config(OmegaConf.to_yaml(OmegaConf.create(config)))
        run.write_environment(now, saved=resumed)
    tracker = Tracker(settings, run.path, name, config, resumed) if process.is_main else None
    display.say(describe(trainer, run))
    for line in data.warnings:
        display.say(f"warning: {line}")
    status = 0
    try:
        trainer.fit(display, tracker)
    except Preempted as signal:
        display.say(
            f"{signal} by {stop.received.name if stop.received else 'a signal to another process'}; saved; run again to go on"
        )
        status = REQUEUE
    finally:
        display.close()
        trainer.loader.close()
    damaged = process.union(data.failures)
    if process.is_main:
        finish(trainer, run, name, tracker, status, damaged)
    return status


def finish(
    trainer: Trainer,
    run: RunFolder,
    name: str,
    tracker: Tracker,
    status: int,
    damaged: dict[str, str],
) -> None:
    """Write the summary, close the W&B run, draw the curves."""
    for image, reason in list(damaged.items())[:10]:
        trainer.display.say(f"left out: {image}: {reason}")
    summary = summarize(trainer, name, damaged)
    write_json(run.summary, summary)
    tracker.finish(summary, exit_code=status)
    draw(run, name)


def draw(run: RunFolder, name: str) -> None:
    """Draw the curves. Where they cannot be drawn that is told, and no more: the next start of the finished run draws them."""
    try:
        plot_curves({name: run.read_rows()}, run.curves)
    except (DataError, FileError) as error:
        print(f"warning: the curves are not drawn: {error}", file=sys.stderr)
