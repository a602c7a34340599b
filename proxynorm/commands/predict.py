"""Classify images: python scripts/predict.py run=runs/NAME images=DIR output=FILE.csv

The file has a row for each image in and below the folder: its five likeliest classes with their
probabilities, or why it could not be read.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from proxynorm.cli import option, script

TOP = 5


@dataclass
class Options:
    images: str = option("???", "folder of images, or one image")
    output: str = option("???", "FILE.csv")
    run: str | None = option(None, "run folder")
    checkpoint: str | None = option(None, "or a checkpoint file inside a run folder")
    weights: str = option("last", "with run=: last or best")
    size: int | None = option(None, "side of the images in pixels; default: as in training")
    ratio: float | None = option(None, "the crop's share of the shorter side; default: as trained")
    batch: int = option(0, "images per forward; 0: as in training")
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    precision: str | None = option(None, "fp32, bf16, fp16, auto; default: as in training")
    workers: int | None = option(None, "loader workers")


def main(options: Options) -> int:
    from proxynorm.data.opening import open_images
    from proxynorm.errors import DataError
    from proxynorm.files import write_text
    from proxynorm.train.restore import Source, checkpoint_path, evaluation_specs, restore

    restored = restore(checkpoint_path(options.run, options.checkpoint, options.weights))
    source = Source(size=options.size, ratio=options.ratio, workers=options.workers)
    data, names = open_images(*evaluation_specs(restored, source), Path(options.images))
    classes = restored.content["inputs"]["classes"]
    best = dict(predictions(options, restored, data))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [
        f"{word}_{i}" for i in range(1, 1 + min(TOP, len(classes))) for word in ("class", "p")
    ]
    table.writerow(["image", *columns, "error"])
    for row, name in enumerate(names):
        ranked = [cell for k, p in best.get(row, ()) for cell in (classes[k], f"{p:.4f}")]
        error = data.failures.get(name, "")
        table.writerow([name, *(ranked or [""] * len(columns)), error])
    write_text(Path(options.output), text.getvalue())
    for line in data.warnings:
        print(f"warning: {line}", file=sys.stderr)
    for name, reason in data.failures.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if not best:
        raise DataError(f"{options.images}: none of {len(names)} images could be read")
    print(f"{options.output}: {len(best)} of {len(names)} images")
    return 0


def predictions(options: Options, restored, data) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield the row of each readable image, and its likeliest classes with their probabilities."""
    import torch

    from proxynorm.train.build import choose_dtype, choose_memory_format
    from proxynorm.train.distributed import choose_device
    from proxynorm.train.evaluate import autocast
    from proxynorm.train.settings import check

    device, settings = choose_device(options.device), restored.settings
    settings = check(replace(settings, precision=options.precision or settings.precision))
    dtype = choose_dtype(settings, device)
    memory_format = choose_memory_format(settings, device)
    model = restored.model.to(device, memory_format=memory_format)
    with torch.inference_mode():
        for batch in data.eval_loader(options.batch or settings.eval_batch):
            batch = data.prepare(batch, device, torch.float32, memory_format)
            with autocast(device, dtype):
                probabilities = model(batch.images).float().softmax(1)
            p, k = probabilities.topk(min(TOP, probabilities.shape[1]))
            rows = zip(batch.indices.tolist(), batch.valid.tolist(), k.tolist(), p.tolist())
            yield from ((row, list(zip(k, p))) for row, valid, k, p in rows if valid)


def entry() -> None:
    script(Options, main, __doc__)
