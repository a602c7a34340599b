"""The benchmarks of the data path, on few and small images."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from benchmarks import loader, startup, storage
from benchmarks.loader import CONTENDERS, measure
from benchmarks.photographs import HEIGHT, WIDTH, make_images, photographs
from proxynorm import commands
from proxynorm.data.ffcv.beton import read_beton
from tests.data.conftest import needs_ffcv, photograph, write_folder


@pytest.fixture
def source(tmp_path):
    """A folder of class folders with 24 photographs of 240x180 pixels."""
    for number in range(24):
        path = tmp_path / "source" / f"class{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(number, 180, 240)).save(path, quality=90)
    return tmp_path / "source"


def run_script(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.run("benchmark")
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loadr",), "did you mean 'loader'?"),
        (("loader", "round=3"), "did you mean 'rounds'?"),
        (("loader", "rounds=0"), "rounds=0: must be at least 1"),
        (("loader", "source=/proc/none"), "/proc/none: no such folder"),
        (("storage", "images=3"), "images=3: give at least batch=64"),
        (("startup", "json=/proc/none/startup.json"), "/proc/none: No such file"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    assert run_script(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@needs_ffcv
def test_all_loaders_are_given_the_same_images(source, tmp_path):
    listing = photographs(str(source), 20)
    size = loader.lay_out(listing, tmp_path / "work", 1)
    samples = read_beton(tmp_path / "work" / "val.beton")
    files = sorted((tmp_path / "work" / "train").rglob("*.jpg"), key=lambda path: path.name)
    assert len(samples) == len(files) == 20
    classes = [listing.classes[target] for target in samples.targets]
    assert [path.parent.name for path in files] == classes
    assert [path.stat().st_size for path in files] == samples.size.tolist()
    assert size == round(samples.size.mean())


@needs_ffcv
def test_loaders_are_measured(source, tmp_path):
    """Two of them, which need no compilation."""
    folder, threads = tmp_path / "work", torch.get_num_threads()
    loader.lay_out(photographs(str(source), 24), folder, 1)
    options = loader.Options(size=64, batch=8, workers=0)
    names = ["proxynorm torchvision", "torchvision DataLoader"]
    speeds = measure({name: CONTENDERS[name](folder, options) for name in names}, 2)
    torch.set_num_threads(threads)
    assert all(len(speeds[name]) == 2 and min(speeds[name]) > 10 for name in names)


def test_ratios_are_taken_round_by_round():
    speeds = {loader.OURS: [100, 50, 10], "torchvision DataLoader": [40, 20, 5]}
    ours, other = loader.rows(speeds)
    assert other["loader"] == "torchvision DataLoader" and other["ours_over_it"] == 2.5
    assert ours["ours_over_it"] == 1


@needs_ffcv
def test_storage_is_measured(source, tmp_path, capsys):
    numbers = {"images": 16, "size": 32, "batch": 8, "workers": 1, "rounds": 1}
    file = tmp_path / "storage.json"
    storage.main(storage.Options(source=str(source), json=str(file), **numbers))
    table = json.loads(file.read_text())["table"]
    assert len(table) == len(storage.STORED) and all(row["images_per_second"] > 0 for row in table)
    sizes = {
        (row["max_side"], row["jpeg_quality"], row["jpeg_probability"]): row["bytes_per_image"]
        for row in table
    }
    assert sizes[500, 80, 1.0] < sizes[500, 90, 1.0] < sizes[500, 90, 0.5]


def test_generated_images_are_always_the_same(tmp_path):
    for name in ("one", "two"):
        make_images(tmp_path / name, 3)
    first, second = (sorted((tmp_path / name).rglob("*.jpg")) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert Image.open(first[0]).size == (WIDTH, HEIGHT)
    assert len({path.read_bytes() for path in first}) == 3


@pytest.mark.slow
def test_startup_ends_at_the_first_weight_update(tmp_path):
    source = write_folder(tmp_path / "photos", 4, 2)
    keys = ["data=folder", f"data.root={source}", "model.depth=8", "batch=4", "logger=none"]
    file = tmp_path / "startup.json"
    startup.main(startup.Options(str(file), keys, rounds=1))
    seconds = json.loads(file.read_text())["seconds"]
    assert 0 < seconds["minimum"] == seconds["median"] == seconds["maximum"]
