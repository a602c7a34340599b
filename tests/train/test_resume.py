"""Extending a run, stopping early, and a terminal that closes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train.loop import Trainer
from tests.acceptance.test_resume import Killed, at_step, kill
from tests.helpers import ROOT, SMALL, assert_same_run

LONGER = ("epochs=4", "resume=extend")


def summary(run) -> dict:
    return json.loads((run.folder / "summary.json").read_text())


@pytest.mark.parametrize("step", [20, 23, 37])
def test_an_extended_run_that_is_killed_equals_an_uninterrupted_one(run_small, monkeypatch, step):
    """Also before the first save of the extension, when the checkpoint is that of 2 epochs."""
    options = ("regularization.ema_decay=0.9", "checkpoint.every_steps=3")
    run_small("name=whole", *options)
    whole = run_small("name=whole", *options, *LONGER)
    run_small("name=cut", *options)
    at_step(monkeypatch, step, kill)
    with pytest.raises(Killed):
        run_small("name=cut", *options, *LONGER)
    cut = run_small("name=cut", *options, *LONGER)
    assert cut.status == 0
    assert_same_run(whole, cut)
    record = [{"step": 20, "from_epochs": 2, "epochs": 4}]
    assert cut.last["extended"] == summary(cut)["extended"] == record


def test_an_extended_run_differs_from_as_many_epochs_at_once(run_small):
    """The rate had already reached its end; then it follows the schedule of four epochs."""
    run_small("name=a")
    extended = run_small("name=a", *LONGER)
    at_once = run_small("name=b", "epochs=4")
    rates = [
        [row["lr"] for row in run.rows if row["event"] == "train"] for run in (extended, at_once)
    ]
    assert rates[0][20:] == rates[1][20:]
    assert rates[0][:20] != rates[1][:20]


def test_a_stopped_run_and_a_derived_name_are_extended_too(run_small, monkeypatch):
    at_step(monkeypatch, 13, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = run_small()
    extended = run_small(*LONGER)
    assert extended.status == 0 and not extended.folder.exists()
    assert summary(stopped)["steps"] == 40
    assert summary(stopped)["extended"] == [{"step": 14, "from_epochs": 2, "epochs": 4}]


def test_an_impossible_extension_is_one_line(run_small, tmp_path):
    with pytest.raises(CheckpointError, match="resume=extend: .*a holds no checkpoint"):
        run_small("name=a", *LONGER)
    with pytest.raises(ConfigError, match="holds no such run of fewer epochs than epochs=4"):
        run_small(*LONGER)
    run_small("name=a")
    with pytest.raises(CheckpointError, match=r"\(seed: 0 → 1\)"):
        run_small("name=a", *LONGER, "seed=1")
    with pytest.raises(CheckpointError, match=r"\(epochs: 2 → 1\)"):
        run_small("name=a", "resume=extend", "epochs=1")
    with pytest.raises(CheckpointError, match=r"\(epochs: 2 → 4\).* or resume=extend"):
        run_small("name=a", "epochs=4")
    assert run_small("name=a").rows  # as it was


def test_an_extended_run_is_finished_under_its_new_length(run_small, capsys):
    run_small("name=a")
    run_small("name=a", *LONGER)
    for options in (LONGER, ("epochs=4",)):
        assert run_small("name=a", *options).status == 0
        assert "is finished" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"epochs: 4 → 2"):
        run_small("name=a")


@pytest.fixture
def falling(monkeypatch):
    """Evaluations whose top-1 falls: 50, 49, 48 …, by the epoch."""
    original = Trainer.evaluate

    def evaluate(self: Trainer):
        result = original(self)
        top1 = 51.0 - self.state.step // self.steps_per_epoch
        return type(result)(top1, result.top5, result.loss, result.count)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_a_run_without_a_better_accuracy_stops_early(run_small, falling, monkeypatch, capsys):
    options = ("epochs=6", "patience=2")
    whole = run_small("name=whole", *options)
    assert "stopped early, at step 30 of 60: 2 evaluations without" in capsys.readouterr().out
    assert summary(whole)["completed"] and summary(whole)["steps"] == 30
    assert summary(whole)["best_top1"] == 50
    assert run_small("name=whole", *options).rows == whole.rows
    assert "is finished" in capsys.readouterr().out
    at_step(monkeypatch, 25, kill)
    with pytest.raises(Killed):
        run_small("name=cut", *options)
    assert_same_run(whole, run_small("name=cut", *options))
    longer = run_small("name=whole", "epochs=6", "patience=3")
    assert summary(longer)["steps"] == 40


def test_one_evaluation_is_written_in_the_singular(run_small, falling, capsys):
    run_small("epochs=3", "patience=1")
    assert ": 1 evaluation without a better top-1" in capsys.readouterr().out


def test_a_better_accuracy_resets_the_count(run_small, capsys):
    run = run_small("epochs=3", "patience=3")
    assert summary(run)["steps"] == 30
    assert "stopped early" not in capsys.readouterr().out


def test_a_run_whose_terminal_closes_is_saved(tmp_path):
    """When the shell ends, the terminal closes, and every write to it is an error."""
    arguments = [
        *SMALL,
        "epochs=2000",
        f"runs_dir={tmp_path}",
        "name=a",
        "checkpoint.every_steps=5",
    ]
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    while not (tmp_path / "a/checkpoints/last.pt").exists():
        time.sleep(0.2)
        assert run.poll() is None
        os.read(ours, 65536)
    os.close(ours)
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 75
    assert json.loads((tmp_path / "a/summary.json").read_text())["steps"] > 0
