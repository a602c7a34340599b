"""Evaluate a trained run: python eval.py run=runs/NAME, or checkpoint=FILE.

root=DIR evaluates on other images: a data set as in training, or validation images alone (a folder
of class folders, or a .beton file). The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import torch

from proxynorm.analysis.confusion import Counted, write_confusion
from proxynorm.cli import option
from proxynorm.files import finite
from proxynorm.train.build import choose_dtype, choose_memory_format
from proxynorm.train.distributed import processes
from proxynorm.train.evaluate import evaluate
from proxynorm.train.restore import (
    RunOptions,
    checkpoint_path,
    open_evaluation_data,
    other_images,
    restore,
)

CLASSES = "all: root has all classes; subset: some, only their logits count; index: by number"


@dataclass
class Options(RunOptions):
    root: str | None = option(None, "folder or .beton file of the images; default: as in training")
    classes: str = option("all", CLASSES, choices=("all", "subset", "index"))
    output: str | None = option(None, "folder for per_class.csv, confusion.csv and confusion.png")
    on_bad: str | None = option(None, "damaged images: raise, skip; default: as in training")
    cache: str | None = option(None, "folder of files made on the fly; default: as in training")
    loader: str | None = option(None, "ffcv, torchvision, auto; default: as in training")


def main(options: Options) -> int:
    path = checkpoint_path(options.run, options.checkpoint, options.weights)
    with processes(options.device) as process:
        restored = restore(path).with_options(
            options, options.loader, on_bad=options.on_bad, cache=options.cache
        )
        settings = restored.settings
        data, columns = open_evaluation_data(restored, options.root, options.classes)
        notes = () if options.root else other_images(restored, data)
        if process.is_main:
            for line in (*data.warnings, *notes):
                print(f"warning: {line}", file=sys.stderr)
        memory_format = choose_memory_format(settings, process.device)
        model = restored.model.to(process.device, memory_format=memory_format)
        counted = Counted(model, columns, process.device)
        result = evaluate(
            counted,
            data.eval_loader(settings.eval_batch, process.rank, process.world_size),
            lambda batch: counted.see(
                data.prepare(batch, process.device, torch.float32, memory_format)
            ),
            process,
            choose_dtype(settings, process.device),
            expected=data.info.eval_count if data.spec.on_bad == "raise" else None,
            damaged=data.failures,
        )
        for name, reason in data.failures.items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        matrix = process.sum(counted.matrix)
        if process.is_main:
            if options.output:
                write_confusion(options.output, data.info.classes, matrix.cpu().numpy())
            print(json.dumps(finite(asdict(result))))
    return 0
