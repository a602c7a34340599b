"""Classify images with a trained network: python examples/load_export.py PATH IMAGE...

PATH is whatever proxynorm.load takes: a folder that scripts/export.py wrote, a run folder, one of
its checkpoints, or hf-hub:OWNER/NAME.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import proxynorm


def main(path: str, files: list[str]) -> None:
    model = proxynorm.load(path)
    # The preprocessing for evaluation: timm reads it from model.pretrained_cfg.
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    images = torch.stack([transform(Image.open(file).convert(mode)) for file in files])

    frozen = proxynorm.freeze(model)  # constants folded: faster, the same answers
    with torch.no_grad():
        probabilities = frozen(images).softmax(dim=1)
    for file, row in zip(files, probabilities):
        best = int(row.argmax())
        print(f"{file}: {model.pretrained_cfg['label_names'][best]} ({row[best]:.1%})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
