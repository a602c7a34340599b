"""Evaluate a trained run: python eval.py run=runs/NAME, or checkpoint=FILE.

The last line of the output is one JSON object.
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
    batch: int = option(0, "images per process and forward; 0: as in training")
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    precision: str | None = option(None, "fp32, bf16, fp16, auto; default: as in training")
    root: str | None = option(None, "folder of the data; default: as in training")
    cache: str | None = option(None, "folder of files made on the fly; default: as in training")
    loader: str | None = option(None, "ffcv, torchvision, auto; default: as in training")
    workers: int | None = option(None, "loader workers")


def main(options: Options) -> int:
    import torch

    from proxynorm.train.build import choose_dtype, choose_memory_format
    from proxynorm.train.distributed import processes
    from proxynorm.train.evaluate import evaluate
    from proxynorm.train.restore import checkpoint_path, open_evaluation_data, other_images, restore
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
        data = open_evaluation_data(
            restored, options.root, options.cache, options.loader, options.workers
        )
        for line in (*data.warnings, *other_images(restored, data)) if process.is_main else ():
            print(f"warning: {line}", file=sys.stderr)
        memory_format = choose_memory_format(settings, process.device)
        model = restored.model.to(process.device, memory_format=memory_format)
        loader = data.eval_loader(settings.eval_batch, process.rank, process.world_size)
        result = evaluate(
            model,
            loader,
            lambda batch: data.prepare(batch, process.device, torch.float32, memory_format),
            process,
            choose_dtype(settings, process.device),
            expected=data.info.eval_count if data.spec.on_bad == "raise" else None,
        )
        if process.is_main:
            print(json.dumps(finite(asdict(result))))
    return 0


def entry() -> None:
    script(Options, main, __doc__)
