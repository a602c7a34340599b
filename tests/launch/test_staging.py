"""Staging: .beton files are copied to a node once, checked, and never half."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxynorm.cli import guard
from proxynorm.data.ffcv.beton import FIELD, HEADER, RECORD, manifest_path, read_beton, sums_path
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.errors import DataError
from proxynorm.launch import job
from tests.data.conftest import write_folder

FILES = {f"{p}.beton{end}" for p in ("train", "val") for end in ("", ".json", ".sums.npy")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """train.beton and val.beton of a few photographs, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("packed") / "the data"
    photos = write_folder(folder / "photos", 3, 2)
    for part in ("train", "val"):
        prepare(list_source(photos / part), folder / f"{part}.beton", StorageOptions())
    return folder


@pytest.fixture
def root(packed, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(packed, tmp_path / "data")


@pytest.fixture
def node(tmp_path):
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def test_the_copy_is_made_once_and_is_complete(root, node, monkeypatch):
    target = job.copy_data(root, node)
    assert {path.name for path in target.iterdir()} == FILES
    assert (read_beton(target / "train.beton").sums == read_beton(root / "train.beton").sums).all()
    monkeypatch.setattr(shutil, "copyfile", None)
    assert job.copy_data(root, node) == target


def test_jobs_that_come_at_once_wait_for_one_copy(root, node, monkeypatch):
    copies, copy = [], shutil.copyfile
    monkeypatch.setattr(
        shutil, "copyfile", lambda source, target: copies.append(source) or copy(source, target)
    )
    with ThreadPoolExecutor(4) as pool:
        targets = set(pool.map(lambda _: job.copy_data(root, node), range(4)))
    assert len(targets) == 1 and len(copies) == len(FILES)


def test_other_data_has_another_copy(root, node):
    first = job.copy_data(root, node)
    os.utime(root / "val.beton", ns=(1, 1))
    assert job.copy_data(root, node) != first


@pytest.mark.parametrize(
    ("where", "message"), [("label", "not match its manifest"), ("image", "1 images are damaged")]
)
def test_damage_is_found_and_no_copy_remains(root, node, where, message):
    """The first image's class, or a byte of an image, is another than when the file was written."""
    samples = read_beton(root / "train.beton")
    label = HEADER.itemsize + 2 * FIELD.itemsize + RECORD.fields["label"][1]
    with open(root / "train.beton", "r+b") as file:
        file.seek(label if where == "label" else int(samples.pointer[4]) + 99)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=message):
        job.copy_data(root, node)
    assert all(path.suffix == ".lock" for path in job.own_folder(node).iterdir())


def test_files_of_another_writer_are_copied_too(root, node):
    for part in ("train", "val"):
        manifest_path(root / f"{part}.beton").unlink()
        sums_path(root / f"{part}.beton").unlink()
    copy = job.copy_data(root, node) / "val.beton"
    assert copy.read_bytes() == (root / "val.beton").read_bytes()


def test_the_leftovers_of_a_killed_job_are_removed(root, node):
    target = job.copy_data(root, node)
    (target / "val.beton").unlink()
    target.rename(target.with_name(f".{target.name}"))
    assert job.copy_data(root, node) == target and (target / "val.beton").is_file()
    assert not list(job.own_folder(node).glob(".*"))


def test_a_full_disk_and_a_missing_folder_are_errors_before_copying(root, node, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DataError, match=r"0.00 GB free, the .beton files take"):
        job.copy_data(root, node)
    with pytest.raises(DataError, match="cannot be written"):
        job.copy_data(root, node / "nowhere")
    with pytest.raises(DataError, match="write_ffcv"):
        job.copy_data(root / "photos", node)


def test_the_command_prints_the_override(root, node, capsys, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(node))
    job.stage("$NODE_DISK", "data=beton", f"data.root={root}")
    assert capsys.readouterr().out == f"data.root={job.copy_data(root, node)}\n"
    job.stage(str(node))
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as ended:
        guard(lambda: job.stage(str(node), "data=folder", f"data.root={root}/photos"))
    assert ended.value.code == 2
