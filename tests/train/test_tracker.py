"""Training goes on without Weights & Biases if it fails."""

from __future__ import annotations

import pytest

from proxynorm.train.settings import LoggerSettings, Settings
from proxynorm.train.tracker import Tracker, choose_mode

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


def test_the_key_is_that_of_the_server(monkeypatch, tmp_path):
    keys = tmp_path / ".netrc"
    keys.write_text("machine wandb.lab.org login user password secret\n")
    keys.chmod(0o600)  # netrc refuses a file that others may read
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.org:8080")
    assert choose_mode("auto") == "online"
