"""Evaluate a trained run: python eval.py run=runs/NAME, or checkpoint=FILE.

root=DIR evaluates on other images: a data set as in training, or validation images alone, a folder
of class folders or a .beton file. The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace

from proxynorm.cli import option, script
from proxynorm.files import finite


@dataclass
class Options:
    run: str | None = option(None, "run folder")
    checkpoint: str | None = option(None, "or a checkpoint file inside a run folder")
    weights: str = option("last", "with run=: last or best")
    root: str | None = option(None, "folder or .beton file of the images; default: as in training")
    classes: str = option(
        "all", "of root's folders: all; subset: logits of these alone; index: they are numbers"
    )
    size: int | None = option(None, "side of the images in pixels; default: as in training")
    ratio: float | None = option(None, "the crop's share of the shorter side; default: as trained")
    output: str | None = option(None, "folder for per_class.csv, confusion.csv and confusion.png")
    batch: int = option(0, "images per process and forward; 0: as in training")
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    precision: str | None = option(None, "fp32, bf16, fp16, auto; default: as in training")
    on_bad: str | None = option(None, "damaged images: raise, skip; default: as in training")
    cache: str | None = option(None, "folder of files made on the fly; default: as in training")
    loader: str | None = option(None, "ffcv, torchvision, auto; default: as in training")
    workers: int | None = option(None, "loader workers")


def main(options: Options) -> int:
    import torch

    from proxynorm.analysis.confusion import Counted, write_confusion
    from proxynorm.train.build import choose_dtype, choose_memory_format
    from proxynorm.train.distributed import processes
    from proxynorm.train.evaluate import evaluate
    from proxynorm.train.restore import (
        Source,
        checkpoint_path,
        open_evaluation_data,
        other_images,
        restore,
    )
    from proxynorm.train.settings import check

    path = checkpoint_path(options.run, options.checkpoint, options.weights)
    with processes(options.device) as process:
        restored = restore(path)
        trained = restored.settings
        settings = replace(
            trained,
            precision=options.precision or trained.precision,
            eval_batch=options.batch or trained.eval_batch,
        )
        check(settings)
        source = Source(**{key: getattr(options, key) for key in Source.__dataclass_fields__})
        data, columns = open_evaluation_data(restored, source)
        notes = () if options.root else other_images(restored, data)
        for line in (*data.warnings, *notes) if process.is_main else ():
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


def entry() -> None:
    script(Options, main, __doc__)
