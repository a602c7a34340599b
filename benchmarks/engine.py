"""Images per second of our training loop, of a bare loop, and of timm's components.

  python scripts/benchmark.py engine model=resnet20v2 json=FILE                     # Fashion-MNIST
  python scripts/benchmark.py engine model=resnet18 source=DIR size=128 batch=64    # images

These take turns, and a ratio is the median over rounds of the ratio within a round:

  - a bare training loop, on a batch in memory
  - our training step on the same batch
  - our loader alone
  - our training, with the loader
  - timm's loader, model and optimizer, combined as in its training script, with its defaults

timm's memory format is contiguous; ours is chosen per norm, and the bare loop uses ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from proxynorm.cli import option
from proxynorm.data import Batch, open_data
from proxynorm.data.readers import MemoryReader
from proxynorm.train.build import seeded_model
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.distributed import Process, choose_device
from proxynorm.train.evaluate import autocast
from proxynorm.train.loop import Trainer
from proxynorm.train.memory import keep_freed_memory
from proxynorm.train.preemption import StopRequest
from proxynorm.train.progress import Display
from proxynorm.train.run_folder import RunFolder
from proxynorm.train.tracker import Tracker

BARE, STEP = "bare loop, batch in memory", "our step, batch in memory"
LOADER, OURS, TIMM = "our loader alone", "our training", "timm's training"


@dataclass
class Options(common.Options):
    model: str = option("resnet20v2", "a model of proxynorm.create_model, or of timm")
    norm: str = option("bn", "the norm; with source, timm's model keeps its own norm")
    batch: int = option(128, "images a step", "at least 1")
    size: int = option(32, "side of the images, pixels; with source", "at least 1")
    source: str | None = option(None, "image folder; none given: Fashion-MNIST")
    workers: int = option(1, "loader workers", "at least 1")
    steps: int = option(20, "steps of a round", "at least 1")
    rounds: int = option(15, "rounds", "at least 1")
    device: str = option("auto", "auto, cpu, cuda")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, folder)
    rows = compare(figures)
    common.show(rows)
    common.write_results(options, {"rows": rows, "rounds": figures})


def measure(options: Options, folder: str) -> dict[str, list[float]]:
    """Images per second of every contender, in every round."""
    keep_freed_memory(choose_device(options.device))  # as in training
    trainer = make_trainer(options, folder)
    batches = endless(trainer.loader.epoch)
    held = next(batches)
    prepared, theirs = trainer.prepare(held), timm_steps(options, trainer)
    contenders = {
        BARE: lambda: bare_loop(trainer, prepared, options.steps),
        STEP: lambda: our_loop(trainer, [held] * options.steps),
        LOADER: lambda: [trainer.prepare(batch) for batch in islice(batches, options.steps)],
        OURS: lambda: our_loop(trainer, islice(batches, options.steps)),
        TIMM: lambda: [next(theirs) for _ in range(options.steps)],
    }
    times = common.take_turns(contenders, options.rounds)
    images = options.steps * options.batch
    return {name: [images / elapsed for elapsed in values] for name, values in times.items()}


def make_trainer(options: Options, folder: str) -> Trainer:
    """A trainer without the rest of train(): no lock, no resuming, and a silent display."""
    model, data = [f"model={options.model}"], ["data=fashion_mnist"]
    if options.model != "resnet20v2":
        model = ["model=timm", f"model.name={options.model}"]
    if options.source is not None:
        data = ["data=folder", f"data.root={options.source}", f"data.image_size={options.size}"]
    keys = [f"{name}={getattr(options, name)}" for name in ("norm", "batch", "device")]
    keys += [f"loader.workers={options.workers}", f"runs_dir={folder}"]
    keys += ["epochs=1000", "logger=none", "regularization=none"]
    settings = settings_from(compose_config([*model, *data, *keys]))
    run, process = RunFolder(Path(folder)), Process(0, 1, choose_device(options.device))
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        settings, process, open_data(settings.data, settings.loader), run, StopRequest()
    )
    trainer.display = Display(1, 1, visible=False)
    trainer.tracker = Tracker(settings, run.path, "benchmark", {}, False)
    trainer.network.train()
    return trainer


def endless(epoch: Callable[[int], Iterator]) -> Iterator:
    """The batches of epoch after epoch."""
    return chain.from_iterable(map(epoch, count()))


def bare_loop(trainer: Trainer, batch: Batch, steps: int) -> None:
    """Forward, loss, backward and optimizer step, without anything else."""
    model, optimizer = trainer.state.model, trainer.state.optimizer
    for _ in range(steps):
        with autocast(trainer.process.device, trainer.dtype):
            logits = model(batch.images)
        cross_entropy(logits.float(), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def our_loop(trainer: Trainer, batches: Iterable[Batch]) -> None:
    """Our training step for every batch."""
    for batch in batches:
        trainer.timer.data_arrived()
        trainer.train_step([batch])


class Pictures(torch.utils.data.Dataset):
    """Fashion-MNIST as PIL images, like torchvision's data sets. timm sets `transform`."""

    def __init__(self, reader: MemoryReader) -> None:
        self.reader = reader
        self.transform: Callable = np.asarray

    def __len__(self) -> int:
        return len(self.reader.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = Image.fromarray(self.reader.images[index, :, :, 0])
        return self.transform(image), int(self.reader.targets[index])


def timm_steps(options: Options, trainer: Trainer) -> Iterator[None]:
    """Training steps with timm's loader, model and optimizer, as in its train.py."""
    info, side = trainer.data.info, trainer.settings.data.image_size
    device = trainer.process.device
    if options.source is None:
        dataset = Pictures(trainer.data.train.reader)
        model = seeded_model(trainer.settings, info)
    else:
        dataset = timm.data.create_dataset("", f"{options.source}/train")
        classes = {"num_classes": len(info.classes), "in_chans": info.channels}
        model = timm.create_model(options.model, **classes)
    loader = timm.data.create_loader(
        dataset,
        input_size=(info.channels, side, side),
        batch_size=options.batch,
        is_training=True,
        num_workers=options.workers,
        device=device,
        mean=info.mean,
        std=info.std,
        color_jitter=None,
    )
    model = model.to(device).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=1e-4)
    loss_function, meter = nn.CrossEntropyLoss(), timm.utils.AverageMeter()
    for images, targets in endless(lambda _: iter(loader)):
        with autocast(device, trainer.dtype):
            loss = loss_function(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # timm waits for the loss here, too.
        meter.update(loss.item(), len(images))
        yield


def compare(figures: dict[str, list[float]]) -> list[dict]:
    """A row per contender and ratio: what, images_per_second (median), ratio, and of what."""
    bare, step, loader = figures[BARE], figures[STEP], figures[LOADER]
    pairs = [
        (BARE, None, ""),
        (STEP, bare, "bare loop"),
        (LOADER, None, ""),
        (OURS, list(map(min, loader, bare)), "min(loader, bare loop)"),
        (TIMM, None, ""),
        (OURS, list(map(min, loader, step)), "min(loader, our step)"),
        (OURS, figures[TIMM], "timm's training"),
    ]
    return [
        {
            "what": what,
            "images_per_second": median(figures[what]),
            "ratio": base and common.ratio(figures[what], base),
            "of": of,
        }
        for what, base, of in pairs
    ]
