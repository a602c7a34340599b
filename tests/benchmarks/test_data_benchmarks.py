"""The benchmarks of the data path, on few and small images."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import damage, loader, storage
from benchmarks.children import Child, cpu_seconds_of, memory_of
from benchmarks.contenders import CONTENDERS, Work
from benchmarks.photographs import SIZE, STAMPS, find_photographs, make_photographs
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.images import StorageOptions
from proxynorm.errors import DataError, ProxynormError
from tests.data.conftest import needs_ffcv, photograph
from tests.helpers import ROOT, need

SCRIPT = ROOT / "scripts" / "benchmark.py"


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
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loadr",), "did you mean 'loader'?"),
        (("loader", "round=3"), "did you mean 'rounds'?"),
        (("loader", "rounds=0"), "rounds=0: give at least 1"),
        (("loader", "source=/none"), "/none: no such folder"),
        (("storage", "images=3"), "images at least batch"),
        (("damage", "share=0.7"), "at most half"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    assert run_script(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@needs_ffcv
@pytest.mark.parametrize("same_bytes", [False, True])
def test_all_loaders_are_given_the_same_images(source, tmp_path, same_bytes):
    listing = loader.photographs(str(source), 20)
    sizes = loader.lay_out(listing, tmp_path / "work", StorageOptions(), 1, same_bytes)
    samples = read_beton(tmp_path / "work" / "val.beton")
    files = sorted((tmp_path / "work" / "train").rglob("*.jpg"), key=lambda path: path.name)
    assert len(samples) == len(files) == 20
    assert [path.parent.name for path in files] == [
        listing.classes[target] for target in samples.target
    ]
    bytes_there = [path.stat().st_size for path in files]
    assert bytes_there == (
        samples.size.tolist() if same_bytes else [os.stat(i.path).st_size for i in listing.images]
    )
    assert sizes == {"beton": round(samples.size.mean()), "folder": round(np.mean(bytes_there))}


@needs_ffcv
def test_a_round_measures_every_loader(source, tmp_path, monkeypatch):
    """Of the two that need not compile anything first."""
    names = ["proxynorm torchvision", "torchvision DataLoader"]
    monkeypatch.setattr(loader, "CONTENDERS", {name: CONTENDERS[name] for name in names})
    loader.lay_out(
        loader.photographs(str(source), 24), tmp_path / "work", StorageOptions(), 1, False
    )
    figures = loader.measure(Work(str(tmp_path / "work"), 64, 8, 0), 2, tmp_path)
    for name in names:
        assert (
            len(figures[name]["images_per_second"]) == 2
            and min(figures[name]["images_per_second"]) > 10
        )
        assert len(figures[name]["first_batch"]) == 2 and figures[name]["memory"] > 1e7


def test_ratios_are_taken_round_by_round_and_goals_judged():
    speeds = {
        loader.OURS: [100, 50, 10],
        loader.FREE: [100, 50, 10],
        loader.BARE: [100, 50, 8],
        loader.TORCHVISION: [40, 20, 5],
        loader.TIMM: [50, 25, 5],
    }
    figures = {
        name: {
            "images_per_second": value,
            "images_per_cpu_second": value,
            "first_batch": [9.0, 2.0],
            "memory": 1e8,
        }
        for name, value in speeds.items()
    }
    aims = loader.goals(figures)
    assert [aim["met"] for aim in aims] == [True, True, False, True, True]
    assert [aim["found"] for aim in aims] == [1.0, 2.5, 2.0, 0.0, 2.0]
    table = loader.rows(figures)
    assert table[3]["loader"] == loader.TORCHVISION and table[3]["ours_over_it"] == 2.5


def test_a_loader_that_fails_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with (
        Child(command, dict(os.environ), tmp_path / "errors") as child,
        pytest.raises(ProxynormError, match="no such thing"),
    ):
        child.ask()


@need(Path("/proc/self/smaps_rollup").exists(), "Linux only")
def test_memory_and_time_of_a_process_tree(tmp_path):
    program = (
        "import sys, json; x = None\nfor _ in sys.stdin:\n"
        " x = bytearray(b'1' * 50_000_000); sum(range(5_000_000)); print(json.dumps({}), flush=True)"
    )
    with Child([sys.executable, "-c", program], dict(os.environ), tmp_path / "errors") as child:
        before = memory_of(child.process.pid)
        answer = child.ask()
        assert 40e6 < memory_of(child.process.pid) - before < 120e6
        assert 0 < answer["cpu_seconds"] <= cpu_seconds_of(child.process.pid)


@needs_ffcv
def test_damage_is_found_and_nothing_else(source, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "HUGE", (1500, 1000))
    options = damage.Options(
        source=str(source), images=120, share=0.1, workers=1, json=str(tmp_path / "found.json")
    )
    assert damage.main(options) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["planted"]) == set(damage.DAMAGED) | set(damage.UNUSUAL)
    assert sum(found["planted"].values()) == 24 and found["written"] == 108
    assert found["missed"] == found["wrongly_named"] == [] and found["changed_missed"] == 0


@needs_ffcv
def test_storage_is_measured(source, tmp_path, capsys):
    options = storage.Options(
        source=str(source),
        images=16,
        size=32,
        batch=8,
        workers=1,
        rounds=1,
        json=str(tmp_path / "s.json"),
    )
    assert storage.main(options) == 0
    table = json.loads((tmp_path / "s.json").read_text())["table"]
    assert len(table) == len(storage.STORED) and all(row["images_per_second"] > 0 for row in table)
    by_way = {
        (row["max_side"], row["jpeg_quality"], row["jpeg_probability"]): row["bytes_per_image"]
        for row in table
    }
    assert by_way[500, 80, 1.0] < by_way[500, 90, 1.0] < by_way[500, 90, 0.5]


@need(STAMPS.is_dir(), "tuxpaint-stamps-default is not installed")
def test_photographs_are_made_once_and_alike(tmp_path):
    for name in ("one", "two"):
        make_photographs(tmp_path / name, 3)
    first, second = (sorted((tmp_path / name).rglob("*.jpg")) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert Image.open(first[0]).size == SIZE and len({path.read_bytes() for path in first}) == 3


def test_without_photographs_the_package_is_named(tmp_path):
    with pytest.raises(DataError, match="apt-get install tuxpaint-stamps-default"):
        find_photographs(tmp_path)
