"""Images a second of our training loop, of a bare loop, and of timm's parts, in turns.

  python scripts/benchmark.py engine model=resnet20v2 json=FILE                     # Fashion-MNIST
  python scripts/benchmark.py engine model=resnet18 source=DIR size=128 batch=64    # images

Timed are: a loop as anyone would write it, on a batch in memory; our training step on the same
batch; our loader alone; our training from the loader; timm's loader, model and optimizer joined as
in its training script, with its defaults (contiguous memory format; ours is chosen per norm, and
the bare loop has ours). Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.data import Batch, open_data
from proxynorm.data.cache import cache_folder
from proxynorm.data.fashion_mnist import find_fashion_mnist, read_fashion_mnist
from proxynorm.train.build import seeded_model
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.distributed import Process, choose_device
from proxynorm.train.evaluate import autocast
from proxynorm.train.loop import Trainer
from proxynorm.train.memory import keep_freed_memory
from proxynorm.train.preemption import StopRequest
from proxynorm.train.progress import Display
from proxynorm.train.run_folder import RunFolder
from proxynorm.train.settings import Settings
from proxynorm.train.tracker import Tracker

BARE, STEP = "bare loop, batch in memory", "our step, batch in memory"
LOADER, OURS, TIMM = "our loader alone", "our training", "timm's training"


@dataclass
class Options(common.Options):
    model: str = option("resnet20v2", "a model of proxynorm.create_model, or of timm")
    norm: str = option("bn", "the norm; timm's own model has bn where it is one of timm's")
    batch: int = option(128, "images a step")
    size: int = option(32, "side of the images, pixels; with source")
    source: str | None = option(None, "image folder; none given: Fashion-MNIST")
    workers: int = option(1, "loader workers")
    steps: int = option(20, "steps of a round")
    rounds: int = option(15, "rounds")
    device: str = option("auto", "auto, cpu, cuda")


def main(options: Options) -> None:
    common.require_positive(options, "batch", "size", "steps", "rounds")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    rows = compare(figures)
    cells = [
        (what, f"{speed:.0f}", f"{ratio:.3f}" if ratio else "", of)
        for what, speed, ratio, of in map(dict.values, rows)
    ]
    print(text_table(("what", "images/s", "ratio", "of"), cells))
    common.write_figures(options, {"rows": rows, "rounds": figures})


def measure(options: Options, folder: Path) -> dict[str, list[float]]:
    """Images a second of every contender, a figure a round."""
    device = choose_device(options.device)
    keep_freed_memory(device)  # as in training
    trainer = make_trainer(settings_for(options, folder), device, folder)
    batches = endless(trainer.loader.epoch)
    held = next(batches)
    prepared = trainer.prepare(held)
    contenders = {
        BARE: lambda: bare_loop(trainer, prepared, options.steps),
        STEP: lambda: our_loop(trainer, iter([held] * options.steps)),
        LOADER: lambda: [trainer.prepare(batch) for batch in islice(batches, options.steps)],
        OURS: lambda: our_loop(trainer, islice(batches, options.steps)),
        TIMM: timm_loop(options, trainer, device),
    }
    times = common.take_turns(contenders, options.rounds, device)
    images = options.steps * options.batch
    return {name: [images / elapsed for elapsed in values] for name, values in times.items()}


def settings_for(options: Options, folder: Path) -> Settings:
    """The settings of the training run that is measured."""
    model = [f"model={options.model}"]
    if options.model != "resnet20v2":
        model = ["model=timm", f"model.name={options.model}"]
    data = ["data=fashion_mnist"]
    if options.source is not None:
        data = ["data=folder", f"data.root={options.source}", f"data.image_size={options.size}"]
    overrides = [f"{name}={getattr(options, name)}" for name in ("norm", "batch", "device")]
    overrides += [f"loader.workers={options.workers}", f"runs_dir={folder}"]
    overrides += ["epochs=1000", "logger=none", "regularization=none"]
    return settings_from(compose_config([*model, *data, *overrides]))


def make_trainer(settings: Settings, device: torch.device, folder: Path) -> Trainer:
    """A trainer outside of train(): no lock, no resumption, a silent display."""
    run, data = RunFolder(folder), open_data(settings.data, settings.loader)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, Process(0, 1, device), data, run, StopRequest())
    trainer.display = Display(1, 1, visible=False)
    trainer.tracker = Tracker(settings, folder, "benchmark", {}, False)
    trainer.network.train()
    return trainer


def bare_loop(trainer: Trainer, batch: Batch, steps: int) -> None:
    """Forward, loss, backward, step, as anyone would write it."""
    model, optimizer = trainer.state.model, trainer.state.optimizer
    for _ in range(steps):
        with autocast(trainer.process.device, trainer.dtype):
            logits = model(batch.images)
        cross_entropy(logits.float(), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def our_loop(trainer: Trainer, batches: Iterator[Batch]) -> None:
    """Our training step on every batch."""
    for batch in batches:
        trainer.timer.data_arrived()
        trainer.train_step([batch])


def endless(epoch: Callable[[int], Iterator]) -> Iterator:
    """The batches of epoch after epoch."""
    for number in count():
        yield from epoch(number)


class Pictures(torch.utils.data.Dataset):
    """Fashion-MNIST as PIL images, as torchvision's data sets give them; timm sets transform."""

    def __init__(self) -> None:
        folder = find_fashion_mnist(None, cache_folder(None))
        self.images, self.targets = read_fashion_mnist(folder, "train")
        self.transform: Callable = np.asarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def timm_loop(options: Options, trainer: Trainer, device: torch.device) -> Callable[[], None]:
    """Steps of timm's loader, model and optimizer, as its train.py joins them."""
    info, side = trainer.data.info, trainer.settings.data.image_size
    if options.source is None:
        dataset, model = Pictures(), seeded_model(trainer.settings, info)
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
    batches = endless(lambda _: iter(loader))

    def loop() -> None:
        for images, targets in islice(batches, options.steps):
            with autocast(device, trainer.dtype):
                loss = loss_function(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # timm waits for the loss here as well.
            meter.update(loss.item(), len(images))

    return loop


def compare(figures: dict[str, list[float]]) -> list[dict]:
    """A row a contender and ratio: what, images_per_second (median), ratio, of what."""
    bare_or_loader = list(map(min, figures[LOADER], figures[BARE]))
    step_or_loader = list(map(min, figures[LOADER], figures[STEP]))
    rows = [
        (BARE, None, ""),
        (STEP, figures[BARE], "bare loop"),
        (LOADER, None, ""),
        (OURS, bare_or_loader, "min(loader, bare loop)"),
        (TIMM, None, ""),
        (OURS, step_or_loader, "min(loader, our step)"),
        (OURS, figures[TIMM], "timm's training"),
    ]
    return [
        {
            "what": name,
            "images_per_second": median(figures[name]),
            "ratio": base and common.ratio(figures[name], base),
            "of": of,
        }
        for name, base, of in rows
    ]
