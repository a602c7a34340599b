"""Evaluate a trained run: python eval.py run=runs/NAME, or checkpoint=FILE.

root=DIR evaluates on other images: a data set as in training, or validation images alone (a folder
of class folders, or a .beton file). The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from proxynorm.analysis.confusion import counted, write_confusion
from proxynorm.cli import option
from proxynorm.files import finite
from proxynorm.train.distributed import processes
from proxynorm.train.evaluate import evaluate
from proxynorm.train.restore import (
    RunOptions,
    checkpoint_path,
    open_evaluation_data,
    other_images,
    restore,
)

CLASSES = (
    "all: root has all classes; subset: only some, and only their logits count; "
    "index: its folders are class numbers"
)

ON_BAD = "damaged images: raise, skip; default: as in training"
LOADER = "ffcv, torchvision, auto; default: as in training"


@dataclass
class Options(RunOptions):
    root: str | None = option(None, "folder or .beton file of the images; default: as in training")
    classes: str = option("all", CLASSES, choices=("all", "subset", "index"))
    output: str | None = option(None, "folder for per_class.csv, confusion.csv and confusion.png")
    on_bad: str | None = option(None, ON_BAD, choices=("raise", "skip"))
    cache: str | None = option(None, "folder of converted files; default: as in training")
    loader: str | None = option(None, LOADER, choices=("auto", "ffcv", "torchvision"))


def main(options: Options) -> int:
    path = checkpoint_path(options.run, options.checkpoint, options.weights)
    if options.output:  # if the folder cannot be made, fail before evaluating
        Path(options.output).mkdir(parents=True, exist_ok=True)
    with processes(options.device) as process:
        restored = restore(path).with_options(
            options, options.loader, on_bad=options.on_bad, cache=options.cache
        )
        data = open_evaluation_data(restored, options.root, options.classes)
        notes = () if options.root else other_images(restored, data)
        if process.is_main:
            for line in (*data.warnings, *notes):
                print(f"warning: {line}", file=sys.stderr)
        column = {name: number for number, name in enumerate(restored.inputs["classes"])}
        columns = torch.tensor([column[name] for name in data.info.classes], device=process.device)
        matrix = columns.new_zeros(len(columns), len(columns))
        outputs = restored.outputs(data, process)
        result = evaluate(
            counted(outputs, columns, matrix),
            process,
            expected=data.info.eval_count if data.spec.on_bad == "raise" else None,
            damaged=data.failures,
        )
        for name, reason in data.failures.items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        process.sum(matrix)
        if process.is_main:
            if options.output:
                write_confusion(options.output, data.info.classes, matrix.cpu().numpy())
            print(json.dumps(finite(asdict(result))))
    return 0
