"""A run is not resumed silently on other images than it began with, even if their number, classes
and labels are the same."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxynorm.data import open_data
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.errors import CheckpointError
from proxynorm.train import checkpoint
from tests.data.conftest import needs_ffcv, remove_companions, write_folder
from tests.helpers import ROOT

EVAL = ROOT / "eval.py"
PARTS = ("train", "val")


def repaint(image: Path) -> None:
    """Replace an image by another one of the same size."""
    with Image.open(image) as former:
        sides = former.size
    Image.fromarray(np.full((*sides[::-1], 3), 99, dtype=np.uint8)).save(image, quality=95)


def photographs(folder: Path) -> Path:
    return write_folder(folder / "photos", 4, 2)


def betons(folder: Path) -> Path:
    for part in PARTS:
        prepare(list_source(folder / "photos" / part), folder / f"{part}.beton", StorageOptions())
    return folder


def overrides(folder: Path, data: str, loader: str, *more: str) -> list[str]:
    root = folder / "photos" if data == "folder" else folder
    return [
        "name=a",
        f"data={data}",
        f"data.root={root}",
        f"data.cache={folder}",
        f"loader={loader}",
        "loader.workers=0",
        "data.image_size=32",
        "data.limit=null",
        "data.holdout=0",
        "batch=4",
        "eval_batch=3",
        "model.depth=8",
        "model.width=8",
        "epochs=2",
        *more,
    ]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("data", "loader", "bare"),
    [
        ("folder", "torchvision", False),
        pytest.param("folder", "ffcv", False, marks=needs_ffcv),
        pytest.param("beton", "ffcv", False, marks=needs_ffcv),
        pytest.param("beton", "ffcv", True, marks=needs_ffcv),
    ],
)
def test_replaced_images_are_refused(run_small, tmp_path, data, loader, bare, part):
    """bare: files without checksums, as FFCV's writer makes them."""
    photos = photographs(tmp_path)

    def write() -> None:
        if data == "beton":
            betons(tmp_path)
            for name in PARTS if bare else ():
                remove_companions(tmp_path / f"{name}.beton")

    write()
    run_small(*overrides(tmp_path, data, loader, "max_steps=2"))
    write()  # the same images once more
    assert (
        run_small(*overrides(tmp_path, data, loader, "max_steps=3")).last["counters"]["step"] == 3
    )
    repaint(photos / part / "bee" / "001.jpg")
    write()
    for steps in ("max_steps=3", "max_steps=4"):  # finished, and to go on
        name = photos / part if data == "folder" else tmp_path / f"{part}.beton"
        with pytest.raises(
            CheckpointError, match=f"a was trained on other images than those now in {name};"
        ):
            run_small(*overrides(tmp_path, data, loader, steps))


def test_moved_data_are_the_same(run_small, tmp_path):
    photographs(tmp_path)
    run_small(*overrides(tmp_path, "folder", "torchvision", "max_steps=2"))
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    moved = run_small(
        *overrides(
            tmp_path, "folder", "torchvision", "max_steps=3", f"data.root={tmp_path / 'elsewhere'}"
        )
    )
    assert moved.last["counters"]["step"] == 3


@needs_ffcv
def test_images_that_cannot_be_compared_are_a_warning(run_small, tmp_path, capsys):
    told = "unknown whether the images are those that the run began with"
    photographs(tmp_path)
    run = run_small(*overrides(tmp_path, "folder", "torchvision", "max_steps=2"))
    run = run_small(*overrides(tmp_path, "folder", "ffcv", "max_steps=3"))
    assert capsys.readouterr().out.count(told) == 1
    inputs = {key: value for key, value in run.last["inputs"].items() if key != "images"}
    checkpoint.save(run.folder / "checkpoints" / "last.pt", dict(run.last, inputs=inputs))
    repaint(tmp_path / "photos" / "train" / "bee" / "001.jpg")
    assert (
        run_small(*overrides(tmp_path, "folder", "ffcv", "max_steps=4")).last["counters"]["step"]
        == 4
    )
    assert capsys.readouterr().out.count(told) == 1
    run_small(*overrides(tmp_path, "folder", "ffcv", "max_steps=5"))
    assert told not in capsys.readouterr().out


def test_a_file_edited_at_the_same_length_is_noticed(run_small, tmp_path):
    image = photographs(tmp_path) / "train" / "bee" / "001.jpg"
    run_small(*overrides(tmp_path, "folder", "torchvision", "max_steps=2"))
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.write_bytes(content)
    with pytest.raises(CheckpointError, match="other images than"):
        run_small(*overrides(tmp_path, "folder", "torchvision", "max_steps=3"))


@pytest.mark.parametrize("loader", ["torchvision", pytest.param("ffcv", marks=needs_ffcv)])
def test_only_images_that_are_read_count_and_a_file_is_named_once(run_small, tmp_path, loader):
    photos = photographs(tmp_path)
    run = run_small(
        *overrides(tmp_path, "folder", loader, "data.limit=5", "data.holdout=3", "max_steps=1")
    )
    data = open_data(run.settings.data, run.settings.loader)
    unread = sorted({*range(12)} - {*data.train.rows.tolist(), *data.evaluation.rows.tolist()})
    files = sorted((photos / "train").glob("*/*.jpg"))
    repaint(files[unread[0]])
    repaint(photos / "val" / "bee" / "001.jpg")
    words = ("data.limit=5", "data.holdout=3", "max_steps=2")
    assert run_small(*overrides(tmp_path, "folder", loader, *words)).last["counters"]["step"] == 2
    repaint(files[int(data.train.rows[0])]), repaint(files[int(data.evaluation.rows[0])])
    with pytest.raises(CheckpointError, match=f"other images than those now in {photos}/train;"):
        run_small(*overrides(tmp_path, "folder", loader, *words))


def test_fashion_mnist_is_compared_by_its_pixels():
    from proxynorm.data.readers import MemoryReader

    images, targets = np.zeros((3, 4, 4, 1), dtype=np.uint8), np.arange(3)
    first = MemoryReader(images, targets, ("a", "b", "c"), "here").fingerprint(targets)
    assert first == MemoryReader(images.copy(), targets, ("a", "b", "c"), "there").fingerprint(
        targets
    )
    images[2, 1, 1] = 1
    changed = MemoryReader(images, targets, ("a", "b", "c"), "here")
    assert first != changed.fingerprint(targets) and first != changed.fingerprint(targets[:2])


def test_evaluation_on_other_images_is_a_warning(run_small, tmp_path, monkeypatch, capsys):
    photos = photographs(tmp_path)
    run = run_small(*overrides(tmp_path, "folder", "torchvision", "max_steps=2"))

    def warnings() -> list[str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", f"run={run.folder}", "device=cpu"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EVAL), run_name="__main__")
        assert end.value.code == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]

    assert warnings() == []
    repaint(photos / "val" / "bee" / "001.jpg")
    assert warnings() == [
        f"warning: {photos}/val holds other images than those that the run was evaluated on"
    ]
