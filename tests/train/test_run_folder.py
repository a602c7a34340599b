"""The small files of a run folder: a full disk, damage, loss."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from proxynorm import files
from proxynorm.errors import CheckpointError, FileError
from proxynorm.train import run as run_module
from proxynorm.train import run_folder
from proxynorm.train.restore import restore
from proxynorm.train.run_folder import RunFolder
from tests.acceptance.test_resume import Killed, at_step, kill
from tests.helpers import file_size_limit


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(name): the disk is full for a file of that name."""

    def fill(full: str) -> None:
        def no_room(path, *arguments, **options):
            if Path(path).name.startswith(f".{full}."):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return open(path, *arguments, **options)

        monkeypatch.setattr(files, "open", no_room, raising=False)

    return fill


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "metrics.jsonl", "last.pt", "summary.json"]
)
def test_a_full_disk_is_one_line_and_loses_nothing(run_small, full_disk, monkeypatch, name):
    """For every file; metrics.jsonl is rewritten when a run is resumed."""
    if name != "config.yaml":
        run_small("name=a", "max_steps=3")
    full_disk(name)
    with pytest.raises(
        (FileError, CheckpointError),
        match=rf"cannot write .*{name}: No space left on device; make room and run again",
    ):
        run_small("name=a")
    monkeypatch.undo()
    assert [row["step"] for row in run_small("name=a").rows if row["event"] == "train"] == list(
        range(1, 21)
    )


def test_a_full_disk_at_the_lock(tmp_path):
    with (
        file_size_limit(0),
        pytest.raises(FileError, match=r"cannot write .*\.lock: File too large"),
        RunFolder(tmp_path / "a").lock(),
    ):
        pass


def test_curves_that_could_not_be_drawn_are_drawn_at_the_next_start(
    run_small, full_disk, monkeypatch, capsys
):
    finished = []
    monkeypatch.setattr(
        run_module.Tracker,
        "finish",
        lambda self, summary, exit_code: finished.append(summary["completed"]),
    )
    full_disk("curves.png")
    run = run_small("name=a", "epochs=1")
    assert run.status == 0 and finished == [True] and not (run.folder / "curves.png").exists()
    assert "warning: the curves are not drawn: cannot write" in capsys.readouterr().err
    monkeypatch.undo()
    assert run_small("name=a", "epochs=1").status == 0 and "is finished" in capsys.readouterr().out
    assert (run.folder / "curves.png").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("a: [", "flow node"),
        ("- 1", ""),
        ("", "'name'"),
        ("foo: 1", "no key 'foo'"),
        ("\0", "special characters"),
        ("5", ""),
        ("model: null", ""),
        ("model: 3", ""),
    ],
)
def test_a_damaged_configuration_is_named(run_small, text, words):
    """It is read if a finished run's checkpoints were removed; otherwise they are enough."""
    run = run_small("name=a", "max_steps=2")
    config, last = run.folder / "config.yaml", run.folder / "checkpoints" / "last.pt"
    config.unlink() if text is None else config.write_text(text)
    assert restore(last).settings == run.settings
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"config\.yaml.*cannot be read .*{words}") as told:
        run_small("name=a", "max_steps=2")
    assert "\n" not in str(told.value) and "put the run's own back" in str(told.value)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"completed": true}'])
def test_a_summary_without_its_keys_is_damaged(run_small, text):
    run = run_small("name=a", "max_steps=2")
    (run.folder / "summary.json").write_text(text)
    with pytest.raises(CheckpointError, match="summary.json is damaged"):
        run_small("name=a", "max_steps=2")
    (run.folder / "summary.json").unlink()
    assert run_small("name=a", "max_steps=2").status == 0 and (run.folder / "summary.json").exists()


def test_a_run_killed_before_its_first_save_starts_over(run_small, monkeypatch, tmp_path, capsys):
    at_step(monkeypatch, 2, kill)
    with pytest.raises(Killed):
        run_small("name=a")
    assert (tmp_path / "a" / "metrics.jsonl").exists()
    assert [row["step"] for row in run_small("name=a", "max_steps=3").rows] == [1, 2, 3, 3]
    assert "has no checkpoint: the run starts over" in capsys.readouterr().out


def test_other_versions_are_a_warning(run_small, capsys, monkeypatch):
    """The environment is collected once per start."""
    run = run_small("name=a", "max_steps=2")
    environment = json.loads((run.folder / "environment.json").read_text())
    packages = {key: value for key, value in environment["packages"].items() if key != "timm"}
    changed = {
        **environment,
        "python": "3.0.0",
        "packages": {**packages, "numpy": "0.1", "torchvision": "0.2", "wandb": "0"},
    }
    (run.folder / "environment.json").write_text(json.dumps(changed))
    collected = []
    monkeypatch.setattr(
        run_module, "environment", lambda: collected.append(1) or run_folder.environment()
    )
    capsys.readouterr()
    run_small("name=a", "max_steps=3")
    said = capsys.readouterr().out
    for words in ("numpy: 0.1 → ", "python: 3.0.0 → ", "torchvision: 0.2 → ", "timm: null → "):
        assert words in said
    assert "wandb" not in said and collected == [1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"packages": null}'])
def test_a_damaged_environment_is_a_warning(run_small, capsys, text):
    run = run_small("name=a", "max_steps=2")
    (run.folder / "environment.json").write_text(text)
    capsys.readouterr()
    run_small("name=a", "max_steps=3")
    assert (
        "environment.json is missing or damaged: unknown whether the machine and the versions are "
        "the same" in capsys.readouterr().out
    )
