"""From one half of Fashion-MNIST to the other, as image files, and nothing else needed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from proxynorm.commands import eval as eval_command
from proxynorm.commands import predict as predict_command
from proxynorm.data.fashion_mnist import CLASSES, find_fashion_mnist, read_fashion_mnist
from proxynorm.errors import ConfigError, DataError
from proxynorm.export import export_run, load
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.run import train
from tests.data.conftest import needs_fashion_mnist

pytestmark = needs_fashion_mnist

SMALL = (
    "data=folder data.image_size=28 data.augmentation=none loader=torchvision loader.workers=0 "
    "model.depth=8 model.width=12 model.stem_stride=2 norm=ln_pn batch=20 optim.lr=0.1 "
    "logger=none device=cpu"
).split()

FIRST = (1, 3, 4, 6, 9)  # trousers, dresses, coats, shirts, boots
SECOND = (0, 2, 5, 7, 8)  # T-shirts, pullovers, sandals, sneakers, bags


def write_images(folder: Path, classes: tuple[int, ...], train_count: int, val_count: int) -> Path:
    """Write folder/train/CLASS/N.png and folder/val/CLASS/N.png of some classes."""
    source = find_fashion_mnist(None, folder)
    for part, split, count in (("train", "train", train_count), ("val", "t10k", val_count)):
        images, labels = read_fashion_mnist(source, split)
        for number in classes:
            place = folder / part / CLASSES[number].replace("/", "-")
            place.mkdir(parents=True)
            for index, image in enumerate(images[labels == number][:count]):
                Image.fromarray(image).save(place / f"{index}.png")
    return folder


def run(folder: Path, name: str, images: Path, *overrides: str) -> tuple[int, dict]:
    """Train in folder/name; return the exit status and the summary."""
    given = [*SMALL, f"runs_dir={folder}", f"name={name}", f"data.root={images}", *overrides]
    config = compose_config(given)
    status = train(settings_from(config), OmegaConf.to_container(config, resolve=True))
    return status, json.loads((folder / name / "summary.json").read_text())


def evaluate(capsys: pytest.CaptureFixture, **options) -> dict:
    capsys.readouterr()
    eval_command.main(eval_command.Options(device="cpu", **{k: options[k] for k in options}))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Image folders of the two halves, and a run trained on the first and tuned on the second."""
    folder = tmp_path_factory.mktemp("halves")
    first = write_images(folder / "first", FIRST, 240, 20)
    second = write_images(folder / "second", SECOND, 12, 40)
    run(folder, "base", first, "epochs=6", "batch=40")
    options = ("epochs=8", "seed=1")
    _, tuned = run(folder, "tuned", second, *options, f"weights={folder / 'base'}")
    _, scratch = run(folder, "scratch", second, *options)
    shutil.rmtree(folder / "base")
    return folder, tuned, scratch


def test_fine_tuning_is_ahead_of_training_from_scratch(halves):
    folder, tuned, scratch = halves
    assert tuned["steps"] == scratch["steps"] == 24
    assert tuned["top1"] > scratch["top1"] + 3
    start = OmegaConf.load(folder / "tuned/config.yaml")
    assert start.weights == tuned["weights"] == str(folder / "base")


def test_the_first_run_is_not_needed_again(halves, capsys):
    folder, tuned, _ = halves
    assert evaluate(capsys, run=str(folder / "tuned"))["top1"] == tuned["top1"]
    # nor is the rest of the run's own folder
    alone = shutil.copy(folder / "tuned/checkpoints/last.pt", folder / "tuned.pt")
    assert evaluate(capsys, checkpoint=str(alone))["top1"] == tuned["top1"]
    options = ("seed=1", f"weights={folder / 'base'}")
    status, longer = run(folder, "tuned", folder / "second", *options, "resume=extend", "epochs=9")
    assert status == 0 and longer["steps"] == 27
    export_run(folder / "tuned", folder / "exported")
    assert len(load(folder / "exported").inputs["classes"]) == 5
    # the exported weights start another run, with the classifier or a new one
    assert run(folder, "again", folder / "first", f"weights={folder / 'exported'}", "max_steps=1")


def test_validation_images_alone(halves, capsys, tmp_path):
    folder, _, scratch = halves
    options = {"run": str(folder / "scratch"), "output": str(tmp_path / "out")}
    shutil.copytree(folder / "second/val", tmp_path / "alone")
    assert evaluate(capsys, root=str(tmp_path / "alone"), **options)["top1"] == scratch["top1"]
    rows = list(csv.DictReader(open(tmp_path / "out/per_class.csv")))
    assert sum(int(row["correct"]) for row in rows) == scratch["top1"] * 2
    assert [row["class"] for row in rows] == sorted(row["class"] for row in rows)
    matrix = list(csv.reader(open(tmp_path / "out/confusion.csv")))
    assert [sum(map(int, row[1:])) for row in matrix[1:]] == [40] * 5
    assert [row[i + 1] for i, row in enumerate(matrix[1:])] == [row["correct"] for row in rows]
    assert Image.open(tmp_path / "out/confusion.png").size[0] > 300
    smaller = evaluate(capsys, root=str(tmp_path / "alone"), size=20, ratio=0.7, **options)
    assert smaller["count"] == 200 and smaller["loss"] != scratch["loss"]


def test_a_subset_of_the_classes(halves, capsys, tmp_path):
    folder, _, _ = halves
    name = str(folder / "scratch")
    for part in ("Bag", "Sandal"):
        shutil.copytree(folder / "second/val" / part, tmp_path / "two" / part)
    with pytest.raises(DataError, match=r"3 of the 5 classes are missing .* classes=subset"):
        evaluate(capsys, run=name, root=str(tmp_path / "two"))
    options = {"root": str(tmp_path / "two"), "output": str(tmp_path)}
    two = evaluate(capsys, run=name, classes="subset", **options)
    rows = list(csv.reader(open(tmp_path / "confusion.csv")))
    # over two logits, every image is one of the two
    assert rows[0] == ["class", "Bag", "Sandal"] and two["count"] == 80 and two["top5"] == 100
    assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == 80
    (tmp_path / "two/Hat").mkdir()
    shutil.copy(folder / "second/val/Bag/0.png", tmp_path / "two/Hat")
    with pytest.raises(DataError, match=r"knows no class Hat \(1 such of 3\)"):
        evaluate(capsys, run=name, classes="subset", root=str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="classes=subset needs root="):
        evaluate(capsys, run=name, classes="subset")


def test_numbered_folders(halves, capsys, tmp_path):
    """ImageNet-V2's folders are numbers of classes, which sort as text otherwise."""
    folder, _, scratch = halves
    for number, part in enumerate(sorted((folder / "second/val").iterdir())):
        shutil.copytree(part, tmp_path / "numbers" / str(number))
    options = {"run": str(folder / "scratch"), "root": str(tmp_path / "numbers")}
    assert evaluate(capsys, classes="index", **options)["top1"] == scratch["top1"]
    with pytest.raises(DataError, match="knows no class 0 .* classes=index takes folders as"):
        evaluate(capsys, **options)
    (tmp_path / "numbers/4").rename(tmp_path / "numbers/11")
    with pytest.raises(DataError, match="no class 11 .* numbers from 0 to 4"):
        evaluate(capsys, classes="index", **options)


def test_predictions_of_a_folder(halves, capsys, tmp_path):
    folder, _, scratch = halves
    images = shutil.copytree(folder / "second/val", tmp_path / "images")
    (images / "Bag/0.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("")
    output = str(tmp_path / "new/out.csv")
    options = {"run": str(folder / "scratch"), "device": "cpu", "workers": 0}
    predict_command.main(predict_command.Options(images=str(images), output=output, **options))
    printed = capsys.readouterr()
    assert "199 of 200 images\n" in printed.out
    assert f"warning: {images}: 1 of 201 files are left out: 1 .txt\n" in printed.err
    assert f"left out: {images}/Bag/0.png: " in printed.err
    rows = list(csv.DictReader(open(output)))
    assert len(rows) == 200 and [row["image"] for row in rows if row["error"]] == [
        f"{images}/Bag/0.png"
    ]
    right = sum(row["class_1"] == Path(row["image"]).parent.name for row in rows)
    assert abs(right - 2 * scratch["top1"]) <= 1
    good = [row for row in rows if not row["error"]]
    totals = [sum(float(row[f"p_{i}"]) for i in range(1, 6)) for row in good]
    assert totals == pytest.approx([1] * 199, abs=1e-3)
    with pytest.raises(DataError, match="none of 1 images could be read"):
        options["images"] = f"{images}/Bag/0.png"
        predict_command.main(predict_command.Options(output=output, **options))
