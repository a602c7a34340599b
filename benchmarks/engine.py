"""The engine's own cost, in interleaved rounds on one model, optimizer and batch.

  python scripts/benchmark.py engine model=resnet20v2 json=FILE                     # Fashion-MNIST
  python scripts/benchmark.py engine model=resnet18 source=DIR size=128 batch=64    # a folder of images

A round times, one after another: a bare loop of twenty lines on a batch in memory; our training step on the same batch;
our loader alone; our whole training from the loader; timm's loader, model and optimizer joined as its training script joins
them, in its own defaults (contiguous memory format; ours is chosen per norm, and the bare loop has ours). Figures are images/s (medians over rounds); ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.data import Batch, Data, open_data
from proxynorm.data.cache import cache_folder
from proxynorm.data.fashion_mnist import find_fashion_mnist, read_fashion_mnist
from proxynorm.files import write_json
from proxynorm.train.build import seeded_model
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.distributed import Process, choose_device
from proxynorm.train.memory import keep_freed_memory
from proxynorm.train.preemption import StopRequest
from proxynorm.train.progress import Display
from proxynorm.train.run_folder import RunFolder, environment
from proxynorm.train.settings import Settings
from proxynorm.train.tracker import Tracker
from proxynorm.train.loop import Trainer

HEADER = ("what", "images/s", "ratio", "of")


@dataclass
class Options:
    model: str = option("resnet20v2", "a model of proxynorm.create_model, or of timm")
    norm: str = option("bn", "the norm; timm's own model has bn where it is one of timm's")
    batch: int = option(128, "images a step")
    size: int = option(32, "side of the images, pixels; with source")
    source: str | None = option(None, "image folder; none given: Fashion-MNIST")
    workers: int = option(1, "loader workers")
    steps: int = option(20, "steps of a round")
    rounds: int = option(15, "rounds")
    device: str = option("auto", "auto, cpu, cuda")
    json: str | None = option(None, "file for the figures, with the machine's description")


def settings_for(options: Options, folder: Path) -> Settings:
    """The training run that is measured."""
    known = (
        ["model=resnet20v2"]
        if options.model == "resnet20v2"
        else ["model=timm", f"model.name={options.model}"]
    )
    data = (
        ["data=fashion_mnist"]
        if options.source is None
        else ["data=folder", f"data.root={options.source}", f"data.image_size={options.size}"]
    )
    return settings_from(
        compose_config(
            [
                *known,
                *data,
                f"norm={options.norm}",
                f"batch={options.batch}",
                "epochs=1000",
                "logger=none",
                f"runs_dir={folder}",
                f"loader.workers={options.workers}",
                f"device={options.device}",
                "regularization=none",
            ]
        )
    )


def make_trainer(settings: Settings, data: Data, device: torch.device, folder: Path) -> Trainer:
    """A trainer outside train(): no lock, no resumption, a silent display."""
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, Process(0, 1, device), data, run, StopRequest())
    trainer.display, trainer.tracker = (
        Display(1, 1, visible=False),
        Tracker(settings, folder, "benchmark", {}, False),
    )
    trainer.network.train()
    return trainer


def bare_loop(trainer: Trainer, batch: Batch, steps: int) -> None:
    """What anyone would write: forward, loss, backward, step."""
    model, optimizer = trainer.state.model, trainer.state.optimizer
    for _ in range(steps):
        loss = cross_entropy(model(batch.images), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def engine_loop(trainer: Trainer, batches: Iterator[Batch], steps: int) -> None:
    """Our training step, `steps` times."""
    for batch in islice(batches, steps):
        trainer.timer.data_arrived()
        trainer.train_step([batch])


def endless(epoch: Callable[[int], Iterator]) -> Iterator:
    number = 0
    while True:
        yield from epoch(number)
        number += 1


class Pictures(torch.utils.data.Dataset):
    """Gray images (N, H, W) as PIL images, the way torchvision's Fashion-MNIST gives them."""

    def __init__(
        self, images: np.ndarray, targets: np.ndarray, transform: Callable | None = None
    ) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, int(self.targets[index])


def timm_dataset(options: Options) -> torch.utils.data.Dataset:
    """The same images as timm's script would read them."""
    if options.source is not None:
        return timm.data.create_dataset("", f"{options.source}/train")
    return Pictures(*read_fashion_mnist(find_fashion_mnist(None, cache_folder(None)), "train"))


def timm_loop(options: Options, trainer: Trainer, device: torch.device) -> Callable[[int], None]:
    """timm's loader, model and optimizer, stepped as its train.py does: forward, loss, backward, step, loss meter."""
    channels, classes = trainer.data.info.channels, len(trainer.data.info.classes)
    dataset = timm_dataset(options)
    side = trainer.settings.data.image_size
    loader = timm.data.create_loader(
        dataset,
        input_size=(channels, side, side),
        batch_size=options.batch,
        is_training=True,
        use_prefetcher=True,
        num_workers=options.workers,
        device=device,
        mean=trainer.data.info.mean,
        std=trainer.data.info.std,
        hflip=0.5,
        color_jitter=None,
        auto_augment=None,
    )
    own = options.source is not None
    if own:
        model = timm.create_model(options.model, num_classes=classes, in_chans=channels)
    else:
        model = seeded_model(trainer.settings, trainer.data.info)
    model = model.to(device)
    optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=1e-4)
    loss_function, meter = nn.CrossEntropyLoss(), timm.utils.AverageMeter()
    batches = endless(lambda _: iter(loader))

    def loop(steps: int) -> None:
        model.train()
        for images, targets in islice(batches, steps):
            loss = loss_function(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(loss.item(), len(images))

    return loop


def seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(options: Options, folder: Path) -> dict[str, list[float]]:
    """images/s of every contender, a figure a round."""
    device = choose_device(options.device)
    keep_freed_memory(device)  # as in training
    settings = settings_for(options, folder)
    data = open_data(settings.data, settings.loader)
    trainer = make_trainer(settings, data, device, folder)
    stream = endless(trainer.loader.epoch)
    held = next(stream)
    prepared = trainer.prepare(held)
    join_timm = timm_loop(options, trainer, device)
    contenders = {
        "bare loop, batch in memory": lambda: bare_loop(trainer, prepared, options.steps),
        "our step, batch in memory": lambda: engine_loop(
            trainer, iter([held] * options.steps), options.steps
        ),
        "our loader alone": lambda: [
            trainer.prepare(batch) for batch in islice(stream, options.steps)
        ],
        "our training": lambda: engine_loop(trainer, stream, options.steps),
        "timm's training": lambda: join_timm(options.steps),
    }
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(options.rounds + 1):
        for name, action in contenders.items():
            elapsed = seconds(action, device)
            if round_number:  # the first warms up
                figures[name].append(options.steps * options.batch / elapsed)
    return figures


def ratios(figures: dict[str, list[float]]) -> list[dict]:
    """Each contender's median images/s and the ratios that the goals name."""
    bare, step, loader, ours, other = figures.values()
    goals = {
        "our step, batch in memory": (bare, "bare loop"),
        "our training": ([min(pair) for pair in zip(loader, bare)], "min(loader, bare loop)"),
    }
    rows = []
    for name, values in figures.items():
        base, of = goals.get(name, (None, ""))
        ratio = median(a / b for a, b in zip(values, base)) if base else None
        rows.append({"what": name, "images_per_second": median(values), "ratio": ratio, "of": of})
    for of, base in (
        ("min(loader, our step)", [min(pair) for pair in zip(loader, step)]),
        ("timm's training", other),
    ):
        ratio = median(a / b for a, b in zip(ours, base))
        rows.append(
            {"what": "our training", "images_per_second": median(ours), "ratio": ratio, "of": of}
        )
    return rows


def main(options: Options) -> int:
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    rows = ratios(figures)
    print(
        text_table(
            HEADER,
            [
                (
                    row["what"],
                    f"{row['images_per_second']:.0f}",
                    f"{row['ratio']:.3f}" if row["ratio"] else "",
                    row["of"],
                )
                for row in rows
            ],
        )
    )
    if options.json:
        write_json(
            Path(options.json),
            {
                "options": vars(options),
                "environment": environment(),
                "rows": rows,
                "rounds": figures,
            },
        )
    return 0
