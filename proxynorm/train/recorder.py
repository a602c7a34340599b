"""The files a run writes: rows of metrics and checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

from proxynorm.data import Data
from proxynorm.train import checkpoint
from proxynorm.train.distributed import Process
from proxynorm.train.finetune import Weights, carry, restore_eps
from proxynorm.train.progress import Display
from proxynorm.train.run_folder import RunFolder
from proxynorm.train.settings import Settings, identity
from proxynorm.train.state import TrainState, describe_data
from proxynorm.train.timing import StepTimer
from proxynorm.train.tracker import Tracker


class Recorder:
    """The part of a Trainer that writes, and reads back. Files are the first process's affair."""

    settings: Settings
    process: Process
    data: Data
    run: RunFolder
    state: TrainState
    timer: StepTimer
    steps_per_epoch: int
    display: Display
    tracker: Tracker

    def __init__(self) -> None:
        self.saved_at = time.monotonic()
        self.last_is_damaged = False
        self.start: dict | None = None  # the weights that the run began with, for its checkpoints
        self.extended: list[dict] = []  # the starts under resume=extend
        self.last_row = {"loss": math.nan, "images_per_second": math.nan}

    def settle(self) -> None:
        """Take in what the device is still computing, before state is read or saved."""
        raise NotImplementedError

    # Rows

    def write(self, row: dict) -> None:
        if self.process.is_main:
            self.run.append(row)
            self.tracker.log(row)

    def position(self) -> dict[str, float]:
        step = self.state.step
        epoch = round(step / self.steps_per_epoch, 4)
        return {"step": step, "epoch": epoch, "images": step * self.settings.batch}

    def log_training(self, loss_sum: float, norm: float, learning_rate: float, times: dict) -> None:
        """Log the mean loss since the last row, over the steps that were not skipped."""
        state = self.state
        row = {
            "event": "train",
            **self.position(),
            "loss": loss_sum / state.loss_steps if state.loss_steps else math.nan,
            "lr": learning_rate,
            "gradient_norm": norm,
            **times,
        }
        state.loss_steps = 0
        if state.skipped:
            row["skipped"] = state.skipped
        self.last_row = {**self.last_row, **row}
        self.write(row)
        self.display.update(row)

    # Checkpoints

    def save_is_due(self) -> bool:
        """Return whether checkpoint.every_steps or every_minutes asks for a save at this step."""
        steps, minutes = (
            self.settings.checkpoint.every_steps,
            self.settings.checkpoint.every_minutes,
        )
        by_step = steps is not None and (self.state.step + 1) % steps == 0
        by_time = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        return by_step or by_time

    def header(self) -> dict:
        """Return what a checkpoint records about the run: its identity and its data."""
        return {
            "identity": identity(self.settings),
            "settings": asdict(self.settings),  # so that the file is enough without its folder
            "world_size": self.process.world_size,
            "steps_per_epoch": self.steps_per_epoch,
            "inputs": describe_data(self.data),
            "start": self.start,
            "extended": self.extended,
        }

    def save(self) -> None:
        """Save the state as last.pt; keep the former last.pt, unless damaged, as previous.pt."""
        self.settle()
        if self.process.is_main:
            loss_sum = self.state.loss_sum * self.process.world_size  # over all processes
            self.run.sync_metrics()  # a checkpoint must not be ahead of its rows
            content = {**self.header(), **self.state.state_dict(), "loss_sum": loss_sum}
            previous = None if self.last_is_damaged else self.run.previous
            checkpoint.save(self.run.last, content, previous)
            self.run.mark_saved()
        self.last_is_damaged = False
        self.saved_at = time.monotonic()
        self.timer.restart()

    def save_best(self) -> None:
        if self.process.is_main:
            weights = {"model": self.state.evaluated_model.state_dict(), "ema": None}
            content = {**self.header(), **weights, "step": self.state.step}
            checkpoint.save(self.run.best, {**content, **self.state.last_result})

    def start_from(self, weights: Weights) -> list[str]:
        """Take over weights before the first step; return what was carried, in lines."""
        model = self.state.model
        self.start = carry(model, weights, self.settings, list(self.data.info.classes))
        if self.state.ema is not None:
            self.state.ema.set(model)
            restore_eps(self.state.ema.module, self.start)
        return self.start["notes"]

    def load(self, content: dict, last_is_damaged: bool) -> None:
        """Continue from a checkpoint's content."""
        self.start, self.extended = content.get("start"), content.get("extended") or []
        restore_eps(self.state.model, self.start)
        restore_eps(self.state.evaluated_model, self.start)
        self.state.load_state_dict(content)
        self.state.loss_sum /= content["world_size"]  # the checkpoint has the sum over processes
        self.last_is_damaged = last_is_damaged
