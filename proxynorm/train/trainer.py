"""The training loop: read it top to bottom."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from itertools import islice, repeat

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from proxynorm.analysis.power_files import to_metrics
from proxynorm.analysis.power_monitor import collapse_warning, measure
from proxynorm.data import Batch, Data
from proxynorm.data.mixing import Mixing
from proxynorm.nn import recompute
from proxynorm.train import checkpoint
from proxynorm.train.build import choose_dtype, choose_memory_format, seeded_model
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import Result, autocast, evaluate
from proxynorm.train.nonfinite import NonFiniteError, affected, describe
from proxynorm.train.optimizer import create_optimizer, create_schedule
from proxynorm.train.preemption import Preempted, StopRequest
from proxynorm.train.profiling import profiled
from proxynorm.train.progress import Display
from proxynorm.train.run_folder import RunFolder
from proxynorm.train.settings import Settings, identity
from proxynorm.train.state import TrainState, create_ema
from proxynorm.train.tracker import Tracker
from proxynorm.train.watch import Watch


class Trainer:
    """One run: `fit` goes on from `state.step` to the last step."""

    def __init__(
        self, settings: Settings, process: Process, data: Data, run: RunFolder, stop: StopRequest
    ) -> None:
        self.settings, self.process, self.data, self.run, self.stop = (
            settings,
            process,
            data,
            run,
            stop,
        )
        self.dtype = choose_dtype(settings, process.device)
        self.memory_format = choose_memory_format(settings, process.device)
        self.micro_batch = settings.micro_batch_for(process.world_size)
        self.accumulation = settings.batch // (process.world_size * self.micro_batch)
        self.loader = data.train_loader(
            settings.batch, self.micro_batch, settings.seed, process.rank, process.world_size
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, settings.max_steps or self.total_steps)
        self.mixing = self._mixing()
        self.state = self._fresh_state()
        self.network = self._wrap(self.state.model)
        self.watch = Watch(process.device)
        self.saved_at = time.monotonic()
        self.last_is_damaged = False
        self.last_training = {"loss": float("nan"), "images_per_second": float("nan")}

    # -- making ---------------------------------------------------------------------------------------------------

    def _mixing(self) -> Mixing | None:
        regularization = self.settings.regularization
        if not (
            regularization.mixup
            or regularization.cutmix
            or regularization.cutmix_lambda is not None
        ):
            return None
        return Mixing(
            regularization.mixup,
            regularization.cutmix,
            regularization.mix_probability,
            regularization.switch_probability,
            regularization.label_smoothing,
            len(self.data.info.classes),
            regularization.cutmix_lambda,
        )

    def _fresh_state(self) -> TrainState:
        settings, device = self.settings, self.process.device
        model = seeded_model(settings, self.data.info).to(device, memory_format=self.memory_format)
        optimizer = create_optimizer(model, settings)
        scheduler = create_schedule(optimizer, settings, self.steps_per_epoch)
        scheduler.step_update(0)
        scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        state = TrainState(
            model, optimizer, scheduler, scaler, create_ema(model, settings.regularization)
        )
        state.loss_sum = state.loss_sum.to(device)
        return state

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it: recomputing or compiled if asked for, with gradients averaged over the processes."""
        if self.settings.recompute:
            recompute(model)
        if self.settings.compile:
            model.compile()
        if self.process.world_size == 1:
            return model
        devices = [self.process.device] if self.process.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=devices,
            gradient_as_bucket_view=True,
            static_graph=self.accumulation == 1,
        )

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self, display: Display, tracker: Tracker) -> None:
        """Train to the last step. Raises Preempted after saving when asked to stop."""
        self.display, self.tracker = display, tracker
        display.header()
        if self.state.step == 0:
            self.log_power_if_due()
        self.evaluate_if_due()
        with profiled(
            self.settings.debug.profile_steps if self.process.is_main else 0, self.run.path
        ) as self.after_step:
            while self.state.step < self.last_step:
                self.train_epoch()
                self.evaluate_if_due()

    def train_epoch(self) -> None:
        """Train from the current step to the end of its epoch, or to the last step."""
        epoch, start = divmod(self.state.step, self.steps_per_epoch)
        self.network.train()
        self.watch.resume()
        with self.step_batches(epoch, start) as steps:
            for micro_batches in steps:
                self.watch.waited()
                self.train_step(micro_batches)
                self.after_step()
                if self.state.step == self.last_step:
                    break

    def step_batches(self, epoch: int, start: int) -> StepBatches:
        """The epoch's steps from `start`; to overfit, the first step of all in the place of each."""
        if self.settings.debug.overfit:
            return StepBatches(
                self.loader.epoch(0, 0), self.accumulation, repeat=self.steps_per_epoch - start
            )
        return StepBatches(self.loader.epoch(epoch, start), self.accumulation)

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One weight update, and what is due after it."""
        state, settings = self.state, self.settings
        buffers = self.copy_buffers()
        loss = self.forward_backward(micro_batches)
        norm = self.gradient_norm()
        finite = bool(torch.isfinite(loss)) and (
            state.scaler.is_enabled() or bool(torch.isfinite(norm))
        )
        nonfinite, stop, save = self.process.any(not finite, bool(self.stop), self.save_is_due())
        if nonfinite:
            self.handle_nonfinite(micro_batches, loss, norm, buffers)
        else:
            self.update_weights(norm)
            state.add_loss(loss)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.average_epoch()
        learning_rate = state.optimizer.param_groups[0]["lr"]
        state.scheduler.step_update(state.step)
        state.train_seconds += self.watch.stepped()
        if (
            state.step % settings.log_every == 0
            or self.at_epoch_end()
            or state.step == self.last_step
        ):
            self.log_training(learning_rate, norm)
        if stop or save:
            self.save()
        if stop:
            raise Preempted(f"stopped at step {state.step}")

    def forward_backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Gradients of the mean loss over the step's micro-batches; returns that loss, of this process."""
        total = torch.zeros((), device=self.process.device)
        self.seed_step()
        for index, batch in enumerate(micro_batches):
            images, targets = self.inputs(batch, index)
            last = index + 1 == len(micro_batches)
            waits = (
                nullcontext() if last or self.process.world_size == 1 else self.network.no_sync()
            )
            with waits:
                with autocast(self.process.device, self.dtype):
                    logits = self.network(images)
                loss = self.criterion(logits.float(), targets) / len(micro_batches)
                self.state.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def inputs(self, batch: Batch, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch on the device: normalized, mixed."""
        images, targets, *_ = self.prepare(batch)
        if self.mixing is not None:
            step = (
                self.state.step * self.accumulation + index
            ) * self.process.world_size + self.process.rank
            images, targets = self.mixing(images, targets, self.settings.seed, step)
        return images, targets

    def criterion(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        smoothing = 0.0 if self.mixing is not None else self.settings.regularization.label_smoothing
        return cross_entropy(logits, targets, label_smoothing=smoothing)

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of all gradients, unscaled."""
        self.state.scaler.unscale_(self.state.optimizer)
        return nn.utils.get_total_norm(
            [p.grad for p in self.state.model.parameters() if p.grad is not None]
        )

    def update_weights(self, norm: torch.Tensor) -> None:
        state, clip = self.state, self.settings.optim.clip_grad
        if clip is not None:
            nn.utils.clip_grads_with_norm_(state.model.parameters(), clip, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None and self.settings.regularization.ema_every == "step":
            state.ema.update(state.model, step=state.step + 1)

    def average_epoch(self) -> None:
        """At an epoch's end, take its weights into the authors' average over epochs; the first epoch's are its start."""
        ema = self.state.ema
        if (
            ema is not None
            and self.settings.regularization.ema_every == "epoch"
            and self.at_epoch_end()
        ):
            ema.update(self.state.model, step=self.state.step // self.steps_per_epoch)

    def copy_buffers(self) -> list[torch.Tensor]:
        """Batch Norm's running statistics, for a step that may have to be undone; empty where none is skipped."""
        return (
            [buffer.clone() for buffer in self.state.model.buffers()]
            if self.settings.nonfinite == "skip"
            else []
        )

    def handle_nonfinite(
        self,
        micro_batches: list[Batch],
        loss: torch.Tensor,
        norm: torch.Tensor,
        buffers: list[torch.Tensor],
    ) -> None:
        """Stop before the weights are touched, or skip this update on all processes, as configured.

        A skipped step leaves no trace in the running statistics: `buffers` are those from before it.
        """
        state = self.state
        state.scaler.update()
        state.skipped += 1
        if self.settings.nonfinite == "skip" and state.skipped <= self.settings.nonfinite_limit:
            self.display.say(
                f"step {state.step + 1}: loss or gradient is not finite; update skipped ({state.skipped})"
            )
            for buffer, former in zip(state.model.buffers(), buffers, strict=True):
                buffer.copy_(former)
            return
        images = [self.inputs(batch, index)[0] for index, batch in enumerate(micro_batches)]
        layers = self.process.gather(affected(state.model, images, self.dtype))
        raise NonFiniteError(describe(state, self.process.gather(loss.item()), layers, norm.item()))

    # -- what is due besides ----------------------------------------------------------------------------------------

    def evaluate_if_due(self) -> None:
        """At epoch ends (every eval_every-th) and at the last step: evaluate, log, save best and last."""
        state = self.state
        epochs_done = state.step // self.steps_per_epoch
        due = (
            self.at_epoch_end() and epochs_done % self.settings.eval_every == 0
        ) or state.step == self.last_step
        if state.step == 0 or state.evaluated == state.step:
            return
        if due:
            result = self.evaluate()
            state.evaluated = state.step
            if state.best_top1 is None or result.top1 > state.best_top1:
                state.best_top1 = result.top1
                self.save_best()
        self.log_power_if_due()
        self.save()

    def log_power_if_due(self) -> None:
        """Before training, every power.every_epochs epochs and at the end: P1 … P4 of each norm, and a warning on collapse."""
        state, power = self.state, self.settings.power
        epochs_done = state.step // self.steps_per_epoch
        if power.every_epochs is None or not self.process.is_main:
            return
        if (
            self.at_epoch_end() and epochs_done % power.every_epochs == 0
        ) or state.step == self.last_step:
            rows = measure(state.evaluated_model, self.data, power.images, self.settings.eval_batch)
            self.write({"event": "power", **self.position(), **to_metrics(rows)})
            if warning := collapse_warning(rows, power.threshold):
                self.display.say(warning)

    def evaluate(self) -> Result:
        data, process = self.data, self.process
        process.align_buffers(self.state.evaluated_model)
        loader = data.eval_loader(self.settings.eval_batch, process.rank, process.world_size)
        expected = data.info.eval_count if data.spec.on_bad == "raise" else None
        result = evaluate(
            self.state.evaluated_model,
            loader,
            self.prepare,
            process,
            self.dtype,
            expected=expected,
            each_batch=self.leave_if_stopped,
        )
        self.state.last_result = {
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "count": result.count,
        }
        row = {
            "event": "eval",
            **self.position(),
            **self.state.last_result,
            "seconds": round(self.state.train_seconds, 3),
        }
        self.write(row)
        self.display.epoch(
            row, self.last_training["loss"], self.last_training["images_per_second"], row["seconds"]
        )
        return result

    def leave_if_stopped(self) -> None:
        """Between two batches of an evaluation: save and leave it, to be made again, when asked to stop."""
        (stop,) = self.process.any(bool(self.stop))
        if stop:
            self.save()
            raise Preempted(f"stopped while evaluating step {self.state.step}")

    def log_training(self, learning_rate: float, norm: torch.Tensor) -> None:
        """A row of the mean loss since the last row (over the steps that were not skipped) and what one watches."""
        state = self.state
        loss = self.process.sum(state.loss_sum).item() / self.process.world_size
        loss = loss / state.loss_steps if state.loss_steps else float("nan")
        state.clear_loss()
        watched = self.watch.row(self.settings.batch, self.last_step - state.step)
        row = {
            "event": "train",
            **self.position(),
            "loss": loss,
            "lr": learning_rate,
            "gradient_norm": norm.item(),
            **watched,
        }
        if state.skipped:
            row["skipped"] = state.skipped
        self.last_training = {**self.last_training, **row}
        state.rows += 1
        self.write(row)
        self.display.update(row)

    def write(self, row: dict) -> None:
        if self.process.is_main:
            self.run.append(row)
            self.tracker.log(row)

    def position(self) -> dict[str, float]:
        step = self.state.step
        return {
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "images": step * self.settings.batch,
        }

    def at_epoch_end(self) -> bool:
        return self.state.step % self.steps_per_epoch == 0

    def prepare(self, batch: Batch) -> Batch:
        return self.data.prepare(batch, self.process.device, torch.float32, self.memory_format)

    def seed_step(self) -> None:
        """Makes dropout and stochastic depth functions of the seed, the step and the process."""
        seed = hash((self.settings.seed, self.state.step, self.process.rank)) & 0x7FFFFFFF
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would ask every kind of device
        if self.process.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_is_due(self) -> bool:
        saving = self.settings.checkpoint
        by_step = saving.every_steps is not None and (self.state.step + 1) % saving.every_steps == 0
        by_time = (
            saving.every_minutes is not None
            and time.monotonic() - self.saved_at > 60 * saving.every_minutes
        )
        return by_step or by_time

    def header(self) -> dict:
        """What a checkpoint says of itself: the run's identity and what the network is fed."""
        return {
            "identity": identity(self.settings),
            "world_size": self.process.world_size,
            "steps_per_epoch": self.steps_per_epoch,
            "inputs": inputs(self.data),
        }

    def save(self) -> None:
        """Save the state as last.pt, and the former one, unless it was found damaged, as previous.pt; the rows before it."""
        loss_sum = self.process.sum(self.state.loss_sum.clone())
        if self.process.is_main:
            self.run.sync_metrics()
            content = {**self.header(), **self.state.state_dict(), "loss_sum": loss_sum}
            checkpoint.save(
                self.run.last, content, None if self.last_is_damaged else self.run.previous
            )
            self.run.mark_saved()
        self.last_is_damaged = False
        self.saved_at = time.monotonic()
        self.watch.resume()

    def load(self, content: dict, last_is_damaged: bool) -> None:
        """Go on from a checkpoint. Its loss_sum is all processes' together: the first takes it over."""
        self.state.load_state_dict(content)
        self.state.loss_sum *= (
            self.process.world_size / content["world_size"] if self.process.is_main else 0
        )
        self.last_is_damaged = last_is_damaged

    def save_best(self) -> None:
        if self.process.is_main:
            weights = self.state.evaluated_model.state_dict()
            content = {
                **self.header(),
                "model": weights,
                "ema": None,
                "step": self.state.step,
                **self.state.last_result,
            }
            checkpoint.save(self.run.best, content)


def inputs(data: Data) -> dict:
    """What the network is fed and trained on, as a checkpoint keeps it.

    labels: a digest of the training labels, in order; images: see Data.fingerprints.
    """
    info, train = data.info, data.train
    labels = hashlib.sha256(
        np.asarray(train.reader.targets[train.rows], dtype="<i8").tobytes()
    ).hexdigest()[:16]
    return {
        "classes": list(info.classes),
        "channels": info.channels,
        "mean": list(info.mean),
        "std": list(info.std),
        "train_count": info.train_count,
        "eval_count": info.eval_count,
        "labels": labels,
        "images": data.fingerprints,
    }


class StepBatches:
    """An epoch's micro-batches, gathered into lists of one weight update each; closes the loader's iterator at the end.

    repeat: give the first list so often, instead.
    """

    def __init__(
        self, batches: Iterator[Batch], accumulation: int, repeat: int | None = None
    ) -> None:
        self.batches, self.accumulation, self.repeat = batches, accumulation, repeat

    def __enter__(self) -> Iterator[list[Batch]]:
        self.stack = ExitStack()
        if hasattr(self.batches, "close"):
            self.stack.callback(self.batches.close)
        return self.steps()

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def steps(self) -> Iterator[list[Batch]]:
        while micro_batches := list(islice(self.batches, self.accumulation)):
            if self.repeat is not None:
                yield from repeat(micro_batches, self.repeat)
                return
            yield micro_batches
