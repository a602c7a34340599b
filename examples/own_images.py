"""From a folder of images to exported files: python examples/own_images.py [FOLDER [RUNS]]

FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg; if it does not exist, a toy set of coloured
squares is drawn there. Training, evaluation and export go to RUNS/own_images. The defaults are
runs/toy_images and runs.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"blue": (60, 80, 200), "green": (60, 180, 80), "red": (200, 60, 60)}


def draw_toy_images(folder: Path, train: int = 40, val: int = 10) -> None:
    """Write small images of coloured squares in the layout of data=folder."""
    generator = random.Random(0)
    for part, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", (40, 40), (120, 120, 120))
                x, y = generator.randrange(20), generator.randrange(20)
                ImageDraw.Draw(image).rectangle((x, y, x + 20, y + 20), fill=colour)
                image.save(folder / part / name / f"{index}.jpg")


def run(*command: str) -> None:
    """Run a Python program in the repository and print its command."""
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def main(folder: Path, runs: Path) -> None:
    if not folder.exists():
        draw_toy_images(folder)
    run(
        "train.py",
        "name=own_images",
        f"runs_dir={runs}",
        "data=folder",
        f"data.root={folder}",
        # A small network for small images. For photographs, give model=resnet50 instead of the next
        # three lines, and more epochs.
        "model=resnet20v2",
        "model.depth=8",
        "data.image_size=32",
        "loader=torchvision",
        "norm=ln_pn",
        "batch=16",
        "epochs=3",
        "logger=none",
    )
    run("eval.py", f"run={runs}/own_images")
    run("scripts/export.py", f"run={runs}/own_images")


if __name__ == "__main__":
    arguments = [Path(argument).absolute() for argument in sys.argv[1:]]
    main(*arguments, *[ROOT / "runs/toy_images", ROOT / "runs"][len(arguments) :])
