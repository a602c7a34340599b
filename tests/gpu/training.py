"""Checks of training runs on a device; they need what training needs, proxynorm[train]."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu_speed import Machine, Skipped

RUN = ["model.depth=8", "model.width=8", "batch=20", "epochs=4", "log_every=1", "logger=none"]
RUN += ["data=folder", "data.image_size=32", "loader=torchvision", "loader.workers=0"]
RUN += ["regularization=none", "eval_batch=30", "deterministic=true"]


def make_images(folder: Path, train: int = 60, held_out: int = 101, side: int = 40) -> None:
    """Write class folders of noise, each class of another brightness."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", held_out)):
        for number in range(count):
            path = folder / split / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 150, (side, side, 3)) + 50 * (number % 3)
            Image.fromarray(noise.astype(np.uint8)).save(path)


class Runs:
    """Small runs on the machine's device, in a folder of their own."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        make_images(folder / "data")

    def __call__(self, name: str, *overrides: str) -> list[dict]:
        """Train or resume; return the rows of metrics.jsonl."""
        from omegaconf import OmegaConf

        from proxynorm.train.config import compose_config, settings_from
        from proxynorm.train.run import train
        from proxynorm.train.run_folder import read_metrics

        device = f"device={self.machine.device.type}"
        config = compose_config([*RUN, device, *self.places(name), *overrides])
        with redirect_stdout(io.StringIO()):
            train(settings_from(config), OmegaConf.to_container(config, resolve=True))
        return read_metrics(self.folder / name / "metrics.jsonl")

    def places(self, name: str) -> list[str]:
        return [f"data.root={self.folder}/data", f"runs_dir={self.folder}", f"name={name}"]


@contextmanager
def runs(machine: Machine) -> Iterator[Runs]:
    try:
        from proxynorm.train import run  # noqa: F401
    except ImportError as error:
        raise Skipped(f"needs {error.name}") from None
    with tempfile.TemporaryDirectory() as folder:
        yield Runs(machine, Path(folder))


def waits(run: Runs) -> tuple[str, bool]:
    from proxynorm.train.loop import Trainer

    original, on_gpu = Trainer.train_step, run.machine.on_gpu

    def train_step(self: Trainer, micro_batches: list) -> None:
        if on_gpu and self.state.step > 3:  # the first ones compile and allocate
            torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, micro_batches)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")

    with patch.object(Trainer, "train_step", train_step):
        rows = run("waits")
    return "a step waits for nothing but the last step's figures", rows[-1]["step"] == 12


def resumption(run: Runs) -> tuple[str, bool]:
    from tests.same_run import differences

    run("whole", "checkpoint.every_steps=2")
    run("cut", "checkpoint.every_steps=2", "max_steps=6")
    run("cut", "checkpoint.every_steps=2", "max_steps=null")
    different = [
        d for d in differences(run.folder / "whole", run.folder / "cut") if "eval" not in d
    ]
    return "stopped at step 6 and resumed, the same bits as unbroken", not different


def evaluation(run: Runs) -> tuple[str, bool]:
    rows = [row for row in run("evaluated", "epochs=1") if row["event"] == "eval"]
    return "evaluation counts each of 101 images once", all(row["count"] == 101 for row in rows)


def other_device(run: Runs) -> tuple[str, bool]:
    run("moved", "max_steps=4")
    there = run("moved", "max_steps=8", "device=cpu")[-1]["step"]
    rows = run("moved")
    return "a checkpoint continues on the CPU, and here again", (there, rows[-1]["step"]) == (8, 12)


def not_finite(run: Runs) -> tuple[str, bool]:
    from proxynorm.train.loop import Trainer
    from proxynorm.train.nonfinite import NonFiniteError

    original, seen = Trainer.inputs, {}

    def inputs(self: Trainer, batch: object, index: int) -> tuple:
        images, targets = original(self, batch, index)
        seen.setdefault("model", self.state.model)
        if self.state.step == 5:
            weights = self.state.model.named_parameters()
            seen.setdefault("before", {name: weight.detach().clone() for name, weight in weights})
            images = images * float("inf")
        return images, targets

    try:
        with patch.object(Trainer, "inputs", inputs):
            run("infinite")
    except NonFiniteError:
        weights = seen["model"].named_parameters()
        same = all(torch.equal(weight, seen["before"][name]) for name, weight in weights)
    else:
        same = False
    return "a step that is not finite ends the run, its weights untouched", same


def overflow(run: Runs) -> tuple[str, bool]:
    from proxynorm.train.loop import Trainer

    original, scales = Trainer.fresh_state, []

    def fresh_state(self: Trainer) -> object:
        state = original(self)
        state.scaler = torch.amp.GradScaler(self.process.device.type, init_scale=2.0**40)
        scales.append(state.scaler)
        return state

    with patch.object(Trainer, "fresh_state", fresh_state):
        rows = run("overflow", "precision=fp16")
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    lowered = scales[0].get_scale() < 2.0**40
    return "fp16: an overflow lowers the scale and training goes on", lowered and losses[0] is None


CHECKS = (waits, resumption, evaluation, other_device, not_finite, overflow)


def training(machine: Machine) -> Iterator[dict]:
    """Stop, resume, change the device, meet infinities: what must hold of a run here."""
    with runs(machine) as run:
        for check in CHECKS:
            what, holds = check(run)
            yield {"of a run": what, "holds": machine.expect(holds, what)}


def processes(machine: Machine) -> Iterator[dict]:
    """Compare two GPUs with one; kill one of two."""
    if machine.on_gpu and torch.cuda.device_count() < 2:
        raise Skipped("needs a second GPU")
    if not machine.on_gpu:
        raise Skipped("tests/train/test_distributed.py has it for CPUs")
    with runs(machine) as run:
        for norm, more in (("ln_pn", []), ("bn", ["norm_batch=global"])):
            one = run(f"one-{norm}", f"norm={norm}", "precision=fp32", "max_steps=3")
            start(run, f"two-{norm}", f"norm={norm}", "precision=fp32", "max_steps=3", *more)
            two = run(f"two-{norm}", f"norm={norm}", "precision=fp32", "max_steps=3", *more)
            pairs = [(a["loss"], b["loss"]) for a, b in zip(one, two) if a["event"] == "train"]
            close = all(abs(a - b) <= 1e-3 * abs(a) for a, b in pairs) and len(pairs) == 3
            what = f"two GPUs train {norm} {' '.join(more)} as one"
            yield {"of two GPUs": what, "holds": machine.expect(close, what)}
        killed = start(run, "killed", "epochs=1000", kill=True)
        what = "a killed process ends the run within a minute"
        yield {"of two GPUs": what, "holds": machine.expect(killed, what)}


def start(run: Runs, name: str, *overrides: str, kill: bool = False) -> bool:
    """Train with torchrun on two GPUs; return whether it ended, where `kill`, by a process lost."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command = [sys.executable, *launcher, *RUN, "device=cuda", *run.places(name), *overrides]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) as process:
        try:
            if kill:
                process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            children = ["pgrep", "-P", str(process.pid)]
            found = subprocess.run(children, capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-9", found[-1]], check=True)
        try:
            return process.wait(timeout=60 if kill else 300) != 0 if kill else not process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            return False
