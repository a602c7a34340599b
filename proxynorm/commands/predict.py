"""Classify images: python scripts/predict.py run=runs/NAME images=DIR output=FILE.csv

The file has a row for each image in and below the folder: its five likeliest classes with their
probabilities, or why it could not be read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from proxynorm.analysis.tables import csv_table
from proxynorm.cli import option
from proxynorm.data import Data
from proxynorm.data.opening import open_images
from proxynorm.errors import DataError
from proxynorm.files import write_text
from proxynorm.train.build import choose_dtype, choose_memory_format
from proxynorm.train.distributed import choose_device
from proxynorm.train.evaluate import autocast
from proxynorm.train.restore import Restored, RunOptions, checkpoint_path, evaluation_specs, restore

TOP = 5


@dataclass
class Options(RunOptions):
    images: str = option("???", "folder of images, or one image")
    output: str = option("???", "FILE.csv")


def main(options: Options) -> int:
    path = checkpoint_path(options.run, options.checkpoint, options.weights)
    restored = restore(path).with_options(options)
    data, names = open_images(*evaluation_specs(restored), Path(options.images))
    classes = restored.inputs["classes"]
    best = dict(predictions(restored, data, choose_device(options.device)))
    ranks = range(1, 1 + min(TOP, len(classes)))
    columns = [f"{word}_{rank}" for rank in ranks for word in ("class", "p")]
    table = [["image", *columns, "error"]]
    for row, name in enumerate(names):
        ranked = [cell for k, p in best.get(row, ()) for cell in (classes[k], f"{p:.4f}")]
        table.append([name, *(ranked or [None] * len(columns)), data.failures.get(name)])
    write_text(Path(options.output), csv_table(table))
    for line in data.warnings:
        print(f"warning: {line}", file=sys.stderr)
    for name, reason in data.failures.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if not best:
        raise DataError(f"{options.images}: none of {len(names)} images could be read")
    print(f"{options.output}: {len(best)} of {len(names)} images")
    return 0


def predictions(
    restored: Restored, data: Data, device: torch.device
) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield the row of each readable image, with its likeliest classes and their probabilities."""
    settings = restored.settings
    dtype = choose_dtype(settings, device)
    memory_format = choose_memory_format(settings, device)
    model = restored.model.to(device, memory_format=memory_format)
    with torch.inference_mode():
        for batch in data.eval_loader(settings.eval_batch):
            batch = data.prepare(batch, device, torch.float32, memory_format)
            with autocast(device, dtype):
                probabilities = model(batch.images).float().softmax(1)
            p, k = probabilities.topk(min(TOP, probabilities.shape[1]))
            rows = zip(batch.indices.tolist(), batch.valid.tolist(), k.tolist(), p.tolist())
            yield from ((row, list(zip(k, p))) for row, valid, k, p in rows if valid)
