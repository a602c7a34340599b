"""Training goes on without Weights & Biases if it fails."""

from __future__ import annotations

import pytest

from proxynorm.train.settings import LoggerSettings, Settings
from proxynorm.train.tracker import Tracker

wandb = pytest.importorskip("wandb")


@pytest.mark.parametrize("fault", [ValueError, wandb.errors.UsageError, TypeError, OSError])
def test_training_goes_on_whatever_wandb_raises(fault, monkeypatch, tmp_path, capsys):
    def init(**arguments):
        raise fault("first line\nsecond line")

    monkeypatch.setattr(wandb, "init", init)
    tracker = Tracker(Settings(model={"name": "resnet20v2"}), tmp_path, "name", {}, resumed=False)
    assert capsys.readouterr().err == (
        f"warning: name is not on W&B: {fault.__name__}: first line second line\n"
    )
    tracker.log({"event": "train", "step": 1, "loss": 2.0})
    tracker.finish({})


def test_a_bogus_mode_in_the_environment_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    tracker = Tracker(
        Settings(model={"name": "resnet20v2"}, logger=LoggerSettings()),
        tmp_path,
        "name",
        {},
        resumed=False,
    )
    assert tracker.run is None
    shown = capfd.readouterr().err
    assert (
        shown.startswith("warning: name is not on W&B: ")
        and "'online'" in shown
        and shown.count("\n") == 1
    )
