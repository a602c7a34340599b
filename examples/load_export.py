"""Classify images with an exported model: python examples/load_export.py EXPORT IMAGE...

EXPORT is a folder that scripts/export.py wrote.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image
from torchvision.transforms import v2

import proxynorm
from proxynorm.export import load


def main(folder: str, files: list[str]) -> None:
    exported = load(folder)
    inputs = exported.inputs
    # The preprocessing of data=folder in evaluation: the centre crop takes data.eval_ratio = 0.875
    # of the shorter side.
    transform = v2.Compose(
        [
            v2.Resize(round(inputs["size"] / 0.875)),
            v2.CenterCrop(inputs["size"]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(inputs["mean"], inputs["std"]),
        ]
    )
    mode = "L" if inputs["channels"] == 1 else "RGB"
    images = torch.stack([transform(Image.open(file).convert(mode)) for file in files])

    model = proxynorm.freeze(exported.model)
    with torch.no_grad():
        probabilities = model(images).softmax(dim=1)
    for file, row in zip(files, probabilities):
        best = int(row.argmax())
        print(f"{file}: {inputs['classes'][best]} ({row[best]:.1%})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
