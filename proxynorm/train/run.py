"""One training run from settings to summary: folder, resumption, loop, files."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import OmegaConf

from proxynorm.analysis.plots import curves_figure
from proxynorm.analysis.style import save_figure
from proxynorm.data import open_data
from proxynorm.errors import DataError, FileError
from proxynorm.files import write_json, write_text
from proxynorm.nn import norm_spec
from proxynorm.train.distributed import environment_ranks, processes
from proxynorm.train.finetune import carry_over, read_weights, restore_eps, source_of
from proxynorm.train.loop import Trainer
from proxynorm.train.preemption import REQUEUE, Preempted, stop_request
from proxynorm.train.resume import finished, resume
from proxynorm.train.run_folder import RunFolder, environment, read_metrics
from proxynorm.train.settings import Settings, folder_of
from proxynorm.train.tracker import Tracker


def train(settings: Settings, config: dict[str, Any]) -> int:
    """Train or resume the run that `settings` describes; `config` goes to its config.yaml.

    Returns the exit status: 0 done, 75 stopped by a signal after saving.
    """
    settings.micro_batch_for(environment_ranks().world_size)  # raises before the processes join
    with processes(settings.device) as process:
        # Before stop_request: a signal ends the conversion of a folder at once.
        data, run = open_data(settings.data, settings.loader), RunFolder(folder_of(settings))
        with stop_request() as stop:
            done = process.share(finished(run, settings, data) if process.is_main else None)
            if done:
                if process.is_main:
                    accuracy = f"top-1 {done['top1']:.2f} % after {done['steps']} steps"
                    print(f"{run.path} is finished: {accuracy}")
                    if not run.curves.exists():
                        draw_curves(run)
                return 0
            with run.lock() if process.is_main else nullcontext():
                process.barrier()  # the others read the folder once it is locked
                return train_in(Trainer(settings, process, data, run, stop), config)


def train_in(trainer: Trainer, config: dict[str, Any]) -> int:
    """Train inside the locked run folder; return the exit status."""
    run, process, say = trainer.run, trainer.process, trainer.display.print
    tracker = begin(trainer, config)
    status = fit(trainer, tracker)
    failures = process.gather(trainer.data.failures)
    damaged = {image: reason for part in failures for image, reason in part.items()}
    if process.is_main:
        for image, reason in list(damaged.items())[:10]:
            say(f"left out: {image}: {reason}")
        summary = summarize(trainer, len(damaged))
        write_json(run.summary, summary)
        tracker.finish(summary, exit_code=status)
        draw_curves(run)
    return status


def begin(trainer: Trainer, config: dict[str, Any]) -> Tracker | None:
    """Resume or start the run, write its first files and print what it is."""
    run, process, tracker = trainer.run, trainer.process, None
    machine = {"device": str(process.device), "world_size": process.world_size}
    now = {**environment(), **machine} if process.is_main else {}
    resumed = resume(trainer, now)
    notes = [] if resumed else start_from_weights(trainer)
    process.barrier()  # the folder is cleared once all have read the checkpoint
    if process.is_main:
        if not resumed:
            run.clear()
        config = {**config, "weights": trainer.settings.weights}
        write_text(run.config, OmegaConf.to_yaml(OmegaConf.create(config)))
        write_json(run.environment, now)
        tracker = Tracker(trainer.settings, run.path, run.path.name, config, resumed)
    warnings = [f"warning: {line}" for line in trainer.data.warnings]
    for line in (overview(trainer), *notes, *warnings):
        trainer.display.print(line)
    return tracker


def fit(trainer: Trainer, tracker: Tracker | None) -> int:
    """Train; if that ends before the last step, print why. Return the exit status."""
    state, say = trainer.state, trainer.display.print
    try:
        trainer.fit(tracker)
    except Preempted as reason:
        received = trainer.stop.received
        signal = received.name if received else "a signal to another process"
        say(f"{reason} by {signal}; saved; run again to go on")
        return REQUEUE
    finally:
        trainer.display.close()
    if trainer.out_of_patience() and state.step < trainer.last_step:
        say(
            f"stopped early, at step {state.step} of {trainer.last_step}: {state.stale} "
            f"evaluation{'s' if state.stale > 1 else ''} without a better top-1 than "
            f"{state.best_top1:.2f} %; the learning rate had not reached its end"
        )
    return 0


def start_from_weights(trainer: Trainer) -> list[str]:
    """Load the weights that a new run starts from, if any; return notes for the user."""
    settings, state, process = trainer.settings, trainer.state, trainer.process
    if (source := source_of(settings)) is None:
        return []
    info = trainer.data.info
    for main in (True, False):  # the first process downloads; the others find the file in the cache
        if process.is_main is main:
            weights = read_weights(source, settings, len(info.classes), info.channels)
        process.barrier()
    state.start = carry_over(state.model, weights, settings, list(info.classes))
    if state.ema is not None:
        state.ema.set(state.model)
        restore_eps(state.ema.module, state.start)
    return state.start["notes"]


def summarize(trainer: Trainer, damaged_images: int) -> dict[str, Any]:
    """Return the content of summary.json."""
    settings, state = trainer.settings, trainer.state
    shared = norm_spec(settings.norm.name).batch_statistics
    norm_batch = (settings.norm_batch or trainer.micro_batch) if shared else None
    ended = state.step == trainer.last_step or trainer.out_of_patience()
    return {
        "name": trainer.run.path.name,
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
        "completed": ended and state.evaluated == state.step,
        "stale": state.stale,
        **({"weights": state.start["weights"]} if state.start else {}),
        **({"extended": state.extended} if state.extended else {}),
    }


def overview(trainer: Trainer) -> str:
    """Describe the run in three lines."""
    settings, data = trainer.settings, trainer.data
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    layout = "channels_last" if trainer.memory_format == torch.channels_last else "contiguous"
    return (
        f"{trainer.run.path}\n"
        f"{settings.model['name']} {settings.norm.name}, {parameters / 1e6:.2f} M parameters; "
        f"{data.info.train_count} + {data.info.eval_count} images by {data.backend}\n"
        f"batch {settings.batch} = "
        f"{trainer.process.world_size} × {trainer.accumulation} × {trainer.micro_batch}; "
        f"{str(trainer.dtype).removeprefix('torch.')} {layout} on {trainer.process.device}; "
        f"{trainer.last_step} steps"
    )


def draw_curves(run: RunFolder) -> None:
    """Draw the curves, or warn; the next start of the finished run tries again."""
    try:
        save_figure(curves_figure({run.path.name: [read_metrics(run.metrics)]}), run.curves)
    except (DataError, FileError) as error:
        print(f"warning: the curves are not drawn: {error}", file=sys.stderr)
