"""The training loop: read it top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice, repeat

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from proxynorm.analysis.power_files import to_metrics
from proxynorm.analysis.power_monitor import collapse_warning, measure
from proxynorm.data import Batch, Data
from proxynorm.data.loaders import on_device
from proxynorm.nn import recompute
from proxynorm.train.build import choose_dtype, choose_memory_format, create_mixing, seeded_model
from proxynorm.train.compiling import compile_mode, compile_network, fixed_shapes, set_switches
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import Result, autocast, evaluate
from proxynorm.train.finetune import base_rate, freeze_parts, train_mode
from proxynorm.train.nonfinite import NonFiniteError, affected, describe
from proxynorm.train.optimizer import create_optimizer, create_schedule
from proxynorm.train.preemption import Preempted, StopRequest, leave_at_once
from proxynorm.train.progress import Display
from proxynorm.train.readback import Readback, Undo, step_if
from proxynorm.train.recorder import Recorder
from proxynorm.train.run_folder import RunFolder
from proxynorm.train.settings import Settings
from proxynorm.train.state import TrainState, create_ema
from proxynorm.train.timing import StepTimer, profiled
from proxynorm.train.tracker import Tracker


@dataclass
class LastStep:
    """A weight update whose figures the device is still computing; times: of its row, if due."""

    figures: Readback  # loss, gradient norm, sum of the losses since the last row
    micro_batches: list[Batch]
    learning_rate: float
    times: dict[str, float] | None = None


class Trainer(Recorder):
    """One run: `fit` trains from `state.step` to the last step."""

    def __init__(
        self, settings: Settings, process: Process, data: Data, run: RunFolder, stop: StopRequest
    ) -> None:
        super().__init__()
        self.settings, self.process, self.data = settings, process, data
        self.run, self.stop = run, stop
        set_switches(settings, process.device)
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
        self.mixing = create_mixing(settings.regularization, len(data.info.classes))
        self.state = self.fresh_state()
        self.network = self.wrap(self.state.model)
        self.last: LastStep | None = None
        self.timer = StepTimer(process.device)

    def fresh_state(self) -> TrainState:
        settings, device = self.settings, self.process.device
        model = seeded_model(settings, self.data.info).to(device, memory_format=self.memory_format)
        self.frozen = freeze_parts(model, settings.freeze)
        optimizer = create_optimizer(model, settings)
        scheduler = create_schedule(optimizer, settings, self.steps_per_epoch)
        scheduler.step_update(0)
        scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        ema = create_ema(model, settings.regularization)
        state = TrainState(model, optimizer, scheduler, scaler, ema)
        state.loss_sum = state.loss_sum.to(device)
        return state

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as the loop calls it: with recomputation or compiled, distributed."""
        settings, device = self.settings, self.process.device
        mode, self.notice = compile_mode(settings, device, self.accumulation)
        if settings.recompute:
            recompute(model)
        if mode is not None:
            # The display is there when the first forward pass compiles.
            say = lambda line: self.display.print(line)  # noqa: E731
            compile_network(model, mode, fixed_shapes(settings), say)
        if self.process.world_size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            static_graph=self.accumulation == 1,  # no_sync() changes the graph between forwards
        )

    # The loop

    def fit(self, display: Display, tracker: Tracker | None) -> None:
        """Train to the last step. Raises Preempted after saving when asked to stop."""
        self.display, self.tracker = display, tracker
        if self.notice:
            display.print(self.notice)
        display.header()
        if self.state.step == 0:
            self.log_power_if_due()
        self.evaluate_if_due()  # a run that was stopped while evaluating evaluates first
        steps = self.settings.debug.profile_steps if self.process.is_main else 0
        with profiled(steps, self.run.path) as self.after_step:
            while self.state.step < self.last_step and not self.out_of_patience():
                self.train_epoch()
                self.evaluate_if_due()

    def train_epoch(self) -> None:
        """Train from the current step to the end of its epoch, or to the last step."""
        train_mode(self.network, self.frozen)
        self.timer.restart()
        with closing(self.epoch_steps()) as steps:
            for micro_batches in islice(steps, self.last_step - self.state.step):
                self.timer.data_arrived()
                self.train_step(micro_batches)
                self.after_step()
        self.settle()
        self.state.train_seconds += self.timer.since_step()

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Make one weight update, take in the figures of the one before, then save if due.

        Nothing here waits for the device but `settle`, and it for the step before: meanwhile the
        device has this step's work. So the device itself decides whether an update is finite.
        """
        state = self.state
        undo = self.undo()
        loss = self.forward_backward(micro_batches)
        norm = self.gradient_norm()
        # Every process must take the same branch. Asked before `settle`, as it notices a lost
        # process, for which the device would wait.
        stop, save = self.process.any(bool(self.stop), self.save_is_due())
        self.settle()
        good = torch.isfinite(loss) & torch.isfinite(norm)
        self.update_weights(norm, good)
        if undo is not None:
            undo.unless(good)
        state.optimizer.zero_grad(set_to_none=True)
        state.loss_sum += torch.where(good, loss, 0.0)
        figures = torch.stack([loss.double(), norm.double(), state.loss_sum])
        learning_rate = base_rate(state.optimizer)
        self.last = LastStep(Readback(figures), micro_batches, learning_rate)
        state.step += 1
        self.average_epoch()
        state.scheduler.step_update(state.step)
        state.train_seconds += self.timer.step_done()
        if self.is_due(1) or state.step % self.settings.log_every == 0:
            self.last.times = self.timer.row(self.settings.batch, self.last_step - state.step)
            state.loss_sum.zero_()
        if stop or save:
            self.save()
        if stop:
            raise Preempted(f"stopped at step {state.step}")

    def undo(self) -> Undo | None:
        """Under nonfinite=skip, keep what a forward pass and the average change beside weights."""
        if self.settings.nonfinite != "skip":
            return None
        tensors = [*self.state.model.buffers()]  # Batch Norm's running statistics
        if self.state.ema is not None and self.settings.regularization.ema_every == "step":
            tensors += self.state.ema.module.state_dict().values()
        return Undo(tensors)

    def settle(self) -> None:
        """Take in the last step's figures: count it, skip it or stop; write its row if due."""
        if self.last is None:
            return
        step, self.last = self.last, None
        loss, norm, loss_sum = step.figures.read()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.state.loss_steps += 1
        # An overflow under fp16 is the gradient scaler's to handle: it skips the update itself.
        elif not (self.state.scaler.is_enabled() and math.isfinite(loss)):
            self.handle_nonfinite(step, loss, norm)
        if step.times is not None:
            self.log_training(loss_sum, norm, step.learning_rate, step.times)

    def handle_nonfinite(self, step: LastStep, loss: float, norm: float) -> None:
        """Report an update that the device has skipped, or raise NonFiniteError."""
        state = self.state
        state.skipped += 1
        if self.settings.nonfinite == "skip" and state.skipped <= self.settings.nonfinite_limit:
            self.display.print(
                f"step {state.step}: loss or gradient is not finite; "
                f"update skipped ({state.skipped})"
            )
            return
        state.step -= 1  # as the weights are: those from before it
        images = [self.inputs(batch, index)[0] for index, batch in enumerate(step.micro_batches)]
        layers = self.process.gather(affected(state.model, images, self.dtype))
        raise NonFiniteError(describe(state, loss, norm, step.learning_rate, layers))

    def epoch_steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step of the current epoch."""
        epoch, start = divmod(self.state.step, self.steps_per_epoch)
        overfit = self.settings.debug.overfit
        place = (0, 0) if overfit else (epoch, start)
        batches = self.loader.epoch(*place, self.leave_while_waiting)
        with closing(batches):  # ends the loader's threads when the epoch is left early
            arriving = on_device(batches, self.process.device)
            while micro_batches := list(islice(arriving, self.accumulation)):
                if overfit:
                    yield from repeat(micro_batches, self.steps_per_epoch - start)
                    return
                yield micro_batches

    def forward_backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Add the gradients of the micro-batches' mean loss; return the mean over all processes."""
        total = torch.zeros((), device=self.process.device)
        self.seed_step()
        for index, batch in enumerate(micro_batches):
            images, targets = self.inputs(batch, index)
            # Gradients are averaged over the processes once, in the last backward pass.
            last = index + 1 == len(micro_batches)
            alone = last or self.process.world_size == 1
            with nullcontext() if alone else self.network.no_sync():
                with autocast(self.process.device, self.dtype):
                    logits = self.network(images)
                loss = self.criterion(logits.float(), targets) / len(micro_batches)
                self.state.scaler.scale(loss).backward()
            total += loss.detach()
        return self.process.sum(total) / self.process.world_size

    def seed_step(self) -> None:
        """Make dropout and stochastic depth functions of seed, step and process."""
        seed = hash((self.settings.seed, self.state.step, self.process.rank)) & 0x7FFFFFFF
        # torch.manual_seed would query every kind of device, at each step.
        torch.default_generator.manual_seed(seed)
        if self.process.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def inputs(self, batch: Batch, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a micro-batch's images and targets on the device, normalized and mixed."""
        images, targets, *_ = self.prepare(batch)
        if self.mixing is None:
            return images, targets
        forward = self.state.step * self.accumulation + index
        number = forward * self.process.world_size + self.process.rank
        return self.mixing(images, targets, self.settings.seed, number)

    def prepare(self, batch: Batch) -> Batch:
        # Mixed in float32. Otherwise the first convolution's type, which autocast would make it.
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

    def update_weights(self, norm: torch.Tensor, good: torch.Tensor) -> None:
        """Update weights and average; the device leaves the weights alone unless `good`."""
        state, clip = self.state, self.settings.optim.clip_grad
        if clip is not None:
            nn.utils.clip_grads_with_norm_(state.model.parameters(), clip, norm)
        if state.scaler.is_enabled():
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            step_if(state.optimizer, good)
        if state.ema is not None and self.settings.regularization.ema_every == "step":
            state.ema.update(state.model, step=state.step + 1)

    def average_epoch(self) -> None:
        """Update the authors' average over epochs, which starts at the first epoch's weights."""
        ema, every = self.state.ema, self.settings.regularization.ema_every
        if ema is not None and every == "epoch" and self.at_epoch_end():
            ema.update(self.state.model, step=self.state.step // self.steps_per_epoch)

    # Evaluation and logging

    def evaluate_if_due(self) -> None:
        """At epoch ends (every eval_every-th) and at the last step: evaluate, log, save."""
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

    def out_of_patience(self) -> bool:
        """Return whether `patience` evaluations in a row brought no better top-1."""
        patience = self.settings.patience
        return patience is not None and self.state.stale >= patience

    def evaluate(self) -> Result:
        data, process, start = self.data, self.process, time.monotonic()
        process.align_buffers(self.state.evaluated_model)
        result = evaluate(
            self.state.evaluated_model,
            data.eval_loader(
                self.settings.eval_batch, process.rank, process.world_size, self.leave_while_waiting
            ),
            self.prepare,
            process,
            self.dtype,
            expected=data.info.eval_count if data.spec.on_bad == "raise" else None,
            each_batch=self.leave_if_stopped,
        )
        self.state.last_result = asdict(result)
        seconds = round(self.state.train_seconds, 3)
        times = {"seconds": round(time.monotonic() - start, 3), "train_seconds": seconds}
        row = {"event": "eval", **self.position(), **asdict(result), **times}
        self.write(row)
        self.display.epoch(row, self.last_row["loss"], self.last_row["images_per_second"], seconds)
        return result

    def leave_if_stopped(self) -> None:
        """Save and leave an evaluation when asked to stop; the resumed run repeats it."""
        (stop,) = self.process.any(bool(self.stop))
        if stop:
            self.save()
            raise Preempted(f"stopped while evaluating step {self.state.step}")

    def leave_while_waiting(self) -> None:
        """Heed a stop signal in the middle of a step, while images are waited for.

        Several processes cannot save then, as the others may be anywhere: the run goes on from
        the last checkpoint.
        """
        if not self.stop:
            return
        if self.process.world_size > 1:
            leave_at_once(self.stop.received, None)
        self.settle()
        self.save()
        raise Preempted(f"stopped at step {self.state.step}, waiting for images,")

    def log_power_if_due(self) -> None:
        """Log P1 … P4 of each norm, before training, every power.every_epochs and at the end."""
        power = self.settings.power
        if power.every_epochs is None or not self.process.is_main:
            return
        if self.is_due(power.every_epochs):
            model = self.state.evaluated_model
            rows = measure(model, self.data, power.images, self.settings.eval_batch)
            self.write({"event": "power", **self.position(), **to_metrics(rows)})
            if warning := collapse_warning(rows, power.threshold):
                self.display.print(warning)

    def at_epoch_end(self) -> bool:
        return self.state.step % self.steps_per_epoch == 0

    def is_due(self, every_epochs: int) -> bool:
        """Return whether this is the end of an every_epochs-th epoch, or the last step."""
        step = self.state.step
        return step % (every_epochs * self.steps_per_epoch) == 0 or step == self.last_step
