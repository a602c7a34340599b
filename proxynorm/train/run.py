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
from proxynorm.files import write_json, write_text
from proxynorm.train import checkpoint
from proxynorm.train.distributed import Process, environment_ranks, processes
from proxynorm.train.loop import Trainer
from proxynorm.train.preemption import REQUEUE, Preempted, StopRequest, stop_request
from proxynorm.train.progress import Display
from proxynorm.train.restore import different_classes, stored_settings
from proxynorm.train.run_folder import RunFolder, bits, environment
from proxynorm.train.settings import Settings, check, identity, run_name, uses_batch_norm
from proxynorm.train.state import describe_data
from proxynorm.train.tracker import Tracker


def train(settings: Settings, config: dict[str, Any]) -> int:
    """Train, or continue, the run that `settings` describes; `config` is stored as it is.

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
                accuracy = f"top-1 {done['top1']:.2f} % after {done['steps']} steps"
                print(f"{run.path} is finished: {accuracy}")
                if not run.curves.exists():
                    draw_curves(run, name)
            return 0
        if settings.resume == "must" and not run.checkpoints.is_dir():
            raise CheckpointError(f"resume=must: {run.path} holds no checkpoint")
        if process.is_main:
            run.acquire()
        try:
            process.barrier()  # the others read the folder only once it is locked
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
    """Train inside the locked run folder; return the exit status."""
    trainer = Trainer(settings, process, data, run, stop)
    display = Display(trainer.last_step, settings.epochs, visible=process.is_main)
    machine = {"device": str(process.device), "world_size": process.world_size}
    now = {**environment(), **machine} if process.is_main else {}
    resumed = resume(trainer, run, settings, display, now)
    process.barrier()  # all have read the checkpoint before the folder is cleared
    tracker = None
    if process.is_main:
        run.remove_leftovers() if resumed else run.clear()
        write_text(run.config, OmegaConf.to_yaml(OmegaConf.create(config)))
        run.write_environment(now, saved=resumed)
        tracker = Tracker(settings, run.path, name, config, resumed)
    display.print(overview(trainer, run))
    for line in data.warnings:
        display.print(f"warning: {line}")
    status = 0
    try:
        trainer.fit(display, tracker)
    except Preempted as reason:
        signal = stop.received.name if stop.received else "a signal to another process"
        display.print(f"{reason} by {signal}; saved; run again to go on")
        status = REQUEUE
    finally:
        display.close()
        trainer.loader.close()
    damaged = {image: why for part in process.gather(data.failures) for image, why in part.items()}
    if process.is_main:
        for image, why in list(damaged.items())[:10]:
            display.print(f"left out: {image}: {why}")
        summary = summarize(trainer, name, len(damaged))
        write_json(run.summary, summary)
        tracker.finish(summary, exit_code=status)
        draw_curves(run, name)
    return status


def finished(run: RunFolder, settings: Settings, data: Data) -> dict[str, Any] | None:
    """Return the summary of a run with nothing left to do under `settings`, else None.

    Raises CheckpointError if the folder holds another run.
    """
    if settings.resume == "never" or not run.summary.exists():
        return None
    summary = run.read_summary()
    target = min(summary["total_steps"], settings.max_steps or summary["total_steps"])
    if not summary["completed"] or summary["steps"] < target:
        return None
    content, _ = checkpoint.load_latest(run.checkpoints)
    if content is None:  # only the checkpoints were removed
        stored = identity(stored_settings(run.config))
        content = {"identity": stored, "inputs": describe_data(data)}
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
        if settings.resume == "must":
            raise CheckpointError(f"resume=must: {run.path} holds no checkpoint")
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
    if trainer.process.is_main:
        run.rewind(trainer.state.step, trainer.state.evaluated)
        for line in resume_warnings(trainer, content, run, now):
            display.print(line)
    display.print(f"resumed at step {trainer.state.step} of {trainer.last_step}")
    return True


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
    if changed := differences(content["identity"], identity(settings)):
        raise CheckpointError(
            f"{path} holds another run ({'; '.join(changed)}); "
            "choose another name=, or resume=never"
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


def summarize(trainer: Trainer, name: str, damaged_images: int) -> dict[str, Any]:
    """Return the content of summary.json."""
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
        **{key: state.last_result.get(key) for key in ("top1", "top5", "loss")},
        "best_top1": state.best_top1,
        "count": state.last_result.get("count"),
        "train_seconds": round(state.train_seconds, 3),
        "skipped_updates": state.skipped,
        "damaged_images": damaged_images,
        "completed": state.step == trainer.last_step == state.evaluated,
    }


def overview(trainer: Trainer, run: RunFolder) -> str:
    """Describe the run in two lines."""
    settings, data = trainer.settings, trainer.data
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    layout = "channels_last" if trainer.memory_format == torch.channels_last else "contiguous"
    return (
        f"{run.path}\n"
        f"{settings.model['name']} {settings.norm.name}, {parameters / 1e6:.2f} M parameters; "
        f"{data.info.train_count} + {data.info.eval_count} images by {data.backend}; "
        f"batch {settings.batch} = "
        f"{trainer.process.world_size} × {trainer.accumulation} × {trainer.micro_batch}; "
        f"{str(trainer.dtype).removeprefix('torch.')} {layout} on {trainer.process.device}; "
        f"{trainer.last_step} steps"
    )


def draw_curves(run: RunFolder, name: str) -> None:
    """Draw the curves, or warn: the next start of the finished run tries again."""
    try:
        plot_curves({name: [run.read_rows()]}, run.curves)
    except (DataError, FileError) as error:
        print(f"warning: the curves are not drawn: {error}", file=sys.stderr)
