"""The training loop: read it top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy

from proxynorm.analysis.power_monitor import collapse_warning, measure, to_metrics
from proxynorm.data import Batch, Data
from proxynorm.data.loaders import on_device
from proxynorm.train import build, checkpoint
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import Result, autocast, evaluate, forward
from proxynorm.train.mixing import Mixing
from proxynorm.train.nonfinite import NonFiniteError, affected, describe
from proxynorm.train.optimizer import base_rate, create_optimizer, create_schedule
from proxynorm.train.parts import freeze_parts, train_mode
from proxynorm.train.preemption import Preempted, StopRequest, exit_at_once
from proxynorm.train.progress import Display, StepTimer, profiled
from proxynorm.train.readback import Readback, Snapshot, step_if
from proxynorm.train.resume import TrainState, record
from proxynorm.train.run_folder import RunFolder
from proxynorm.train.settings import Settings
from proxynorm.train.tracker import Tracker


@dataclass
class PendingStep:
    """A weight update whose metrics have not been read back from the device."""

    readback: Readback  # loss, gradient norm, sum of the losses since the last row
    micro_batches: list[Batch]
    learning_rate: float
    times: dict[str, float] | None = None  # for its row of metrics.jsonl, None: no row is due


class Trainer:
    """Trains one run: `fit` goes from `state.step` to the last step.

    Every process has a Trainer; the first one writes the files.
    """

    def __init__(
        self, settings: Settings, process: Process, data: Data, run: RunFolder, stop: StopRequest
    ) -> None:
        self.settings, self.process, self.data = settings, process, data
        self.run, self.stop = run, stop
        build.choose_kernels(settings, process.device)
        self.dtype = build.choose_dtype(settings, process.device)
        self.memory_format = build.choose_memory_format(settings, process.device)
        self.micro_batch = settings.micro_batch_for(process.world_size)
        self.accumulation = settings.batch // (process.world_size * self.micro_batch)
        self.loader = data.train_loader(
            settings.batch, self.micro_batch, settings.seed, process.rank, process.world_size
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, settings.max_steps or self.total_steps)
        given = settings.regularization
        self.mixing = Mixing(given, len(data.info.classes)) if given.mixes else None
        self.state = self.fresh_state()
        self.display = Display(self.last_step, settings.epochs, visible=process.is_main)
        self.tracker: Tracker | None = None  # in the first process, set by `fit`
        build.choose_execution(
            self.state.model, settings, process.device, self.accumulation, self.display.print
        )
        # no_sync() changes the graph between the forwards of an update.
        self.network = process.parallel(self.state.model, static_graph=self.accumulation == 1)
        self.pending: PendingStep | None = None
        self.timer = StepTimer(process.device)
        self.saved_at = time.monotonic()

    def fresh_state(self) -> TrainState:
        """Return the state before the first step, with weights drawn from the seed."""
        settings, device = self.settings, self.process.device
        model = build.seeded_model(settings, self.data.info).to(
            device, memory_format=self.memory_format
        )
        self.frozen = freeze_parts(model, settings.freeze)
        optimizer = create_optimizer(model, settings)
        scheduler = create_schedule(optimizer, settings, self.steps_per_epoch)
        scheduler.step_update(0)
        scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        decay, every = settings.regularization.ema_decay, settings.regularization.ema_every
        ema = ModelEmaV3(model, decay, use_warmup=every == "step") if decay is not None else None
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        return TrainState(model, optimizer, scheduler, scaler, ema, loss_sum)

    # The loop

    def fit(self, tracker: Tracker | None) -> None:
        """Train to the last step. Raises Preempted after saving when asked to stop."""
        self.tracker = tracker
        self.display.start()
        if self.state.step == 0:
            self.log_power_if_due()
        self.evaluate_if_due()  # a run that was stopped during an evaluation repeats it
        steps = self.settings.debug.profile_steps if self.process.is_main else 0
        with profiled(steps, self.run.path) as after_step:
            while self.state.step < self.last_step and not self.out_of_patience():
                train_mode(self.network, self.frozen)
                self.timer.restart()
                with closing(self.epoch_steps()) as batches:
                    for micro_batches in islice(batches, self.last_step - self.state.step):
                        self.timer.data_arrived()
                        self.train_step(micro_batches)
                        after_step()
                self.finish_pending()
                self.state.train_seconds += self.timer.since_step()
                self.evaluate_if_due()

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Make one weight update, read the metrics of the previous one, and save if due.

        Only `finish_pending` waits for the device, and only for the previous step, while the device
        works on this one. So the device itself decides whether an update is finite.
        """
        state = self.state
        snapshot = self.snapshot()
        loss = self.forward_backward(micro_batches)
        grad_norm = self.gradient_norm()
        # Every process must take the same branch. This comes before `finish_pending`, which would
        # wait for a lost process; this call notices one.
        stop, save = self.process.any(bool(self.stop), self.save_is_due())
        self.finish_pending()
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.update_weights(grad_norm, finite)
        if snapshot is not None:
            snapshot.restore_unless(finite)
        state.optimizer.zero_grad(set_to_none=True)
        state.loss_sum += torch.where(finite, loss, 0.0)
        # One tensor, and so one copy to the host.
        values = torch.stack([loss.double(), grad_norm.double(), state.loss_sum])
        self.pending = PendingStep(Readback(values), micro_batches, base_rate(state.optimizer))
        state.step += 1
        self.average_epoch()
        state.scheduler.step_update(state.step)
        state.train_seconds += self.timer.step_done()
        if self.is_due(1) or state.step % self.settings.log_every == 0:
            steps_left = self.last_step - state.step
            self.pending.times = self.timer.row(self.settings.batch, steps_left)
            state.loss_sum.zero_()
        if stop or save:
            self.save()
        if stop:
            raise Preempted(f"stopped at step {state.step}")

    def forward_backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Accumulate the gradients of the mean loss; return that loss, averaged over processes."""
        total = torch.zeros((), device=self.process.device)
        self.seed_step()
        for index, batch in enumerate(micro_batches):
            images, targets = self.inputs(batch, index)
            # Gradients are averaged over the processes once, in the last backward pass.
            last = index + 1 == len(micro_batches)
            sync = last or self.process.world_size == 1
            with nullcontext() if sync else self.network.no_sync():
                with autocast(self.process.device, self.dtype):
                    logits = self.network(images)
                loss = self.criterion(logits.float(), targets) / len(micro_batches)
                self.state.scaler.scale(loss).backward()
            total += loss.detach()
        return self.process.sum(total) / self.process.world_size

    def seed_step(self) -> None:
        """Seed dropout and stochastic depth from the run's seed, the step and the process."""
        # The hash of numbers, unlike that of strings, is the same in every process and run.
        seed = hash((self.settings.seed, self.state.step, self.process.rank)) & 0x7FFFFFFF
        # torch.manual_seed would query every kind of device at each step.
        torch.default_generator.manual_seed(seed)
        if self.process.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def inputs(self, batch: Batch, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a micro-batch's images and targets on the device, normalized and mixed."""
        images, targets, *_ = self.prepare(batch)
        if self.mixing is None:
            return images, targets
        # Each micro-batch of the run has its own number, and so its own draw.
        number = self.state.step * self.accumulation + index
        number = number * self.process.world_size + self.process.rank
        return self.mixing(images, targets, self.settings.seed, number)

    def prepare(self, batch: Batch) -> Batch:
        # Images are mixed in float32. Otherwise they get the type that autocast would cast them to.
        dtype = self.dtype if self.mixing is None else torch.float32
        return self.data.prepare(batch, self.process.device, dtype, self.memory_format)

    def criterion(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # Mixing smooths the labels itself.
        smoothing = 0.0 if self.mixing is not None else self.settings.regularization.label_smoothing
        return cross_entropy(logits, targets, label_smoothing=smoothing)

    def gradient_norm(self) -> torch.Tensor:
        """Return the L2 norm of all gradients, unscaled."""
        self.state.scaler.unscale_(self.state.optimizer)
        parameters = self.state.model.parameters()
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def update_weights(self, grad_norm: torch.Tensor, finite: torch.Tensor) -> None:
        """Update the weights if `finite` (the device decides), and their average."""
        state, clip = self.state, self.settings.optim.clip_grad
        if clip is not None:
            nn.utils.clip_grads_with_norm_(state.model.parameters(), clip, grad_norm)
        if state.scaler.is_enabled():
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            step_if(state.optimizer, finite)
        if state.ema is not None and self.settings.regularization.ema_every == "step":
            state.ema.update(state.model, step=state.step + 1)

    def average_epoch(self) -> None:
        """Update the average over epochs; like the authors', it starts after the first one."""
        ema, step = self.state.ema, self.state.step
        by_epoch = self.settings.regularization.ema_every == "epoch"
        if ema is not None and by_epoch and step % self.steps_per_epoch == 0:
            ema.update(self.state.model, step=step // self.steps_per_epoch)

    def epoch_steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step of the current epoch."""
        epoch, start = divmod(self.state.step, self.steps_per_epoch)
        overfit = self.settings.debug.overfit
        first = (0, 0) if overfit else (epoch, start)
        batches = self.loader.epoch(*first, self.stop_while_waiting)
        with closing(batches):  # ends the loader's threads when the epoch is left early
            arriving = on_device(batches, self.process.device)
            while micro_batches := list(islice(arriving, self.accumulation)):
                if overfit:
                    yield from repeat(micro_batches, self.steps_per_epoch - start)
                    return
                yield micro_batches

    # Updates that are not finite

    def snapshot(self) -> Snapshot | None:
        """Under nonfinite=skip, copy the buffers and the average, which a skipped step changes."""
        if self.settings.nonfinite != "skip":
            return None
        tensors = [*self.state.model.buffers()]  # Batch Norm's running statistics
        if self.state.ema is not None and self.settings.regularization.ema_every == "step":
            tensors += self.state.ema.module.state_dict().values()
        return Snapshot(tensors)

    def finish_pending(self) -> None:
        """Read the pending step's metrics, handle it if it was not finite, write its row if due."""
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        loss, grad_norm, loss_sum = step.readback.read()
        state, finite = self.state, math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            state.loss_steps += 1
        # Under fp16 gradients may overflow: the gradient scaler skips such an update.
        elif not (state.scaler.is_enabled() and math.isfinite(loss)):
            self.handle_nonfinite(step, loss, grad_norm)
        if step.times is None:
            return
        mean = loss_sum / state.loss_steps if state.loss_steps else math.nan
        state.loss_steps = 0
        metrics = {"loss": mean, "lr": step.learning_rate, "gradient_norm": grad_norm, **step.times}
        skipped = {"skipped": state.skipped} if state.skipped else {}
        self.display.update(self.write("train", **metrics, **skipped))

    def handle_nonfinite(self, step: PendingStep, loss: float, grad_norm: float) -> None:
        """Report an update that the device skipped, or raise NonFiniteError."""
        state = self.state
        state.skipped += 1
        if self.settings.nonfinite == "skip" and state.skipped <= self.settings.nonfinite_limit:
            self.display.print(
                f"step {state.step}: loss or gradient is not finite; "
                f"update skipped ({state.skipped})"
            )
            return
        state.step -= 1  # the weights are those before the update
        images = [self.inputs(batch, index)[0] for index, batch in enumerate(step.micro_batches)]
        layers = self.process.gather(affected(state.model, images, self.dtype))
        number, skipped, rate = state.step + 1, state.skipped - 1, step.learning_rate
        raise NonFiniteError(describe(number, skipped, loss, grad_norm, rate, layers))

    # Evaluation

    def evaluate_if_due(self) -> None:
        """At the end of an epoch or the run: evaluate and log the power if due, and save."""
        state = self.state
        if state.step == 0 or state.evaluated == state.step:
            return
        if self.is_due(self.settings.eval_every):
            result = self.evaluate()
            state.evaluated = state.step
            state.stale += 1
            if state.best_top1 is None or result.top1 > state.best_top1:
                state.best_top1, state.stale = result.top1, 0
                self.save_best()
        self.log_power_if_due()
        self.save()

    def is_due(self, every_epochs: int) -> bool:
        """Return whether this is the end of an every_epochs-th epoch, or the last step."""
        step = self.state.step
        return step % (every_epochs * self.steps_per_epoch) == 0 or step == self.last_step

    def out_of_patience(self) -> bool:
        """Return whether the last `patience` evaluations brought no better top-1."""
        patience = self.settings.patience
        return patience is not None and self.state.stale >= patience

    def evaluate(self) -> Result:
        """Evaluate over all processes, and write the row. Raises Preempted when asked to stop."""
        data, process, start = self.data, self.process, time.monotonic()
        batch, model = self.settings.eval_batch, self.state.evaluated_model
        process.align_buffers(model)
        batches = data.eval_loader(batch, process.rank, process.world_size, self.stop_while_waiting)
        result = evaluate(
            forward(model, batches, self.prepare, process.device, self.dtype),
            process,
            expected=data.info.eval_count if data.spec.on_bad == "raise" else None,
            damaged=data.failures,
            each_batch=self.stop_if_asked,
        )
        self.state.last_result = asdict(result)
        times = {"seconds": time.monotonic() - start, "train_seconds": self.state.train_seconds}
        times = {key: round(seconds, 3) for key, seconds in times.items()}
        self.display.epoch(self.write("eval", **asdict(result), **times))
        return result

    def stop_if_asked(self) -> None:
        """Save and stop during an evaluation, which the resumed run repeats."""
        (stop,) = self.process.any(bool(self.stop))
        if stop:
            self.save()
            raise Preempted(f"stopped while evaluating step {self.state.step}")

    def stop_while_waiting(self) -> None:
        """Stop while waiting for images, in the middle of a step.

        Several processes cannot save then, because they may be at different steps: they exit, and
        the run resumes from the last checkpoint.
        """
        if not self.stop:
            return
        if self.process.world_size > 1:
            exit_at_once(self.stop.received, None)
        self.save()
        raise Preempted(f"stopped at step {self.state.step}, waiting for images,")

    def log_power_if_due(self) -> None:
        """Log P1 … P4 of each norm before training, every power.every_epochs, and at the end."""
        power = self.settings.power
        if power.every_epochs is None or not self.process.is_main:
            return
        if self.is_due(power.every_epochs):
            model = self.state.evaluated_model
            rows = measure(model, self.data, power.images, self.settings.eval_batch)
            self.write("power", **to_metrics(rows))
            if warning := collapse_warning(rows, power.threshold):
                self.display.print(warning)

    # Files

    def write(self, event: str, **metrics: Any) -> dict[str, Any]:
        """Add a row to metrics.jsonl and to W&B; return it."""
        step = self.state.step
        epoch, images = round(step / self.steps_per_epoch, 4), step * self.settings.batch
        row = {"event": event, "step": step, "epoch": epoch, "images": images, **metrics}
        if self.process.is_main:
            self.run.append(row)
            self.tracker.log(row)
        return row

    def save_is_due(self) -> bool:
        """Return whether a save is due after this step."""
        given = self.settings.checkpoint
        by_step = given.every_steps is not None and (self.state.step + 1) % given.every_steps == 0
        minutes = (time.monotonic() - self.saved_at) / 60
        return by_step or (given.every_minutes is not None and minutes > given.every_minutes)

    def save(self) -> None:
        """Save the state as last.pt; the former last.pt becomes previous.pt."""
        self.finish_pending()
        if self.process.is_main:
            self.run.sync_metrics()  # the rows must be on disk before their checkpoint
            content = {**record(self), **self.state.state_dict(self.process.world_size)}
            checkpoint.save(self.run.last, content, self.run.previous)
        self.saved_at = time.monotonic()
        self.timer.restart()

    def save_best(self) -> None:
        """Save the evaluated weights and their result as best.pt."""
        if self.process.is_main:
            weights = {"model": self.state.evaluated_model.state_dict(), "ema": None}
            content = {**record(self), **weights, "step": self.state.step}
            checkpoint.save(self.run.best, {**content, **self.state.last_result})
