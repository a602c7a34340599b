"""Classify images: python scripts/predict.py run=runs/NAME images=DIR output=FILE.csv

The file has a row for each image in and below the folder: its five likeliest classes with their
probabilities, or why it could not be read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from proxynorm.analysis.tables import csv_table
from proxynorm.cli import option
from proxynorm.data.opening import open_images
from proxynorm.errors import DataError
from proxynorm.files import write_text
from proxynorm.train.distributed import Process, choose_device
from proxynorm.train.restore import RunOptions, checkpoint_path, evaluation_specs, restore

TOP = 5


@dataclass
class Options(RunOptions):
    images: str = option("???", "folder of images, or one image")
    output: str = option("???", "FILE.csv")


def main(options: Options) -> int:
    path = checkpoint_path(options.run, options.checkpoint, options.weights)
    Path(options.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    restored = restore(path).with_options(options)
    data, names = open_images(*evaluation_specs(restored), Path(options.images))
    classes = restored.inputs["classes"]
    best: dict[int, list[tuple[int, float]]] = {}  # row → likeliest classes, their probabilities
    for batch, logits in restored.outputs(data, Process(0, 1, choose_device(options.device))):
        p, k = logits.float().softmax(1).topk(min(TOP, len(classes)))
        rows = zip(batch.indices.tolist(), batch.valid.tolist(), k.tolist(), p.tolist())
        best |= {row: list(zip(k, p)) for row, valid, k, p in rows if valid}
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
