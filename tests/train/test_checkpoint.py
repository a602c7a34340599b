"""Checkpoints: written atomically, verified, safe to load."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from proxynorm.errors import CheckpointError, FileError
from proxynorm.train import checkpoint
from proxynorm.train.run_folder import RunFolder, read_metrics
from tests.helpers import file_size_limit


def test_round_trip_keeps_the_previous(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2):
        checkpoint.save(last, {"weight": torch.full((3,), float(step))}, previous)
    assert checkpoint.load(last)["weight"][0] == 2
    assert checkpoint.load(previous)["weight"][0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(last, {"step": 1}, previous)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(last, {"step": 2}, previous)
    assert checkpoint.load(last)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path):
    """torch's archive writer hides the system's error behind one of its own."""
    last = tmp_path / "last.pt"
    with (
        file_size_limit(100_000),
        pytest.raises(CheckpointError, match=r"cannot write .*last.pt: File too large$"),
    ):
        checkpoint.save(last, {"weight": torch.zeros(1 << 20)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damage_is_found(tmp_path, damage):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"weight": torch.zeros(10000)})
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "flip": content,
            "empty": b"",
            "text": b"no checkpoint",
        }[damage]
    )
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value) and "last.pt" in str(error.value)


def test_pickled_code_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "last.pt"
    torch.save({"format": 1, "weight": Harmful()}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of proxynorm"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere.pt")


def test_a_row_cut_short_by_a_full_disk_is_dropped_at_the_next_start(tmp_path):
    run = RunFolder(tmp_path)
    run.append({"event": "train", "step": 1})
    with (
        file_size_limit(run.metrics.stat().st_size + 4),
        pytest.raises(FileError, match="metrics.jsonl: File too large"),
    ):
        run.append({"event": "train", "step": 2})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1]
    run.rewind(1, 1)
    run.append({"event": "train", "step": 3})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 3]


def test_a_run_that_stopped_before_its_first_step_measures_its_power_again(tmp_path):
    run = RunFolder(tmp_path)
    run.append({"event": "power", "step": 0})
    run.rewind(0, 0)
    assert read_metrics(run.metrics) == []
