"""An interrupted and resumed run equals the unbroken one, to the last bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from proxynorm.errors import CheckpointError, ConfigError, FileError
from proxynorm.train import checkpoint
from proxynorm.train import resume as resume_module
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.loop import Trainer
from proxynorm.train.run import train
from proxynorm.train.run_folder import RunFolder
from tests.helpers import SMALL, assert_same_run

EVERYTHING = (
    "micro_batch=10",
    "regularization=extra",
    "regularization.ema_decay=0.9",
    "regularization.dropout=0.1",
    "checkpoint.every_steps=3",
)


class Killed(BaseException):
    """Stands for kill -9: nothing of ours runs after it."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Call `action` in place of the training step after weight update `step`, once."""
    original = Trainer.train_step

    def train_step(self: Trainer, micro_batches: list) -> None:
        if self.state.step == step:
            monkeypatch.setattr(Trainer, "train_step", original)
            action()
        original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("loader", ["ffcv", "torchvision"])
@pytest.mark.parametrize("step", [1, 8, 10, 17])
def test_killed_run_equals_unbroken(run_small, monkeypatch, loader, step):
    options = (*EVERYTHING, f"loader={loader}")
    whole = run_small(*options, "name=whole")
    at_step(monkeypatch, step, kill)
    with pytest.raises(Killed):
        run_small(*options, "name=cut")
    cut = run_small(*options, "name=cut")
    assert cut.status == 0
    assert_same_run(whole, cut)


@pytest.mark.parametrize("norm", ["bn", "ln_pn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_resumes(run_small, monkeypatch, norm, number):
    options = (f"norm={norm}", "regularization.ema_decay=0.9")
    whole = run_small(*options, "name=whole")
    at_step(monkeypatch, 13, lambda: signal.raise_signal(number))
    cut = run_small(*options, "name=cut")
    assert cut.status == 75
    assert cut.last["counters"]["step"] == 14
    assert not json.loads((cut.folder / "summary.json").read_text())["completed"]
    cut = run_small(*options, "name=cut")
    assert cut.status == 0
    assert_same_run(whole, cut)


def test_signal_during_evaluation_makes_it_again(run_small, monkeypatch):
    whole = run_small("name=whole", "eval_batch=10")
    original = Trainer.stop_if_asked

    def interrupted(self: Trainer) -> None:
        monkeypatch.setattr(Trainer, "stop_if_asked", original)
        signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(Trainer, "stop_if_asked", interrupted)
    cut = run_small("name=cut", "eval_batch=10")
    assert cut.status == 75
    assert cut.last["counters"]["evaluated"] == 0
    assert_same_run(whole, run_small("name=cut", "eval_batch=10"))


def test_kill_between_evaluation_and_save(run_small, monkeypatch):
    whole = run_small("name=whole")
    original = Trainer.save_best

    def dies(self: Trainer) -> None:
        original(self)
        monkeypatch.setattr(Trainer, "save_best", original)
        raise Killed

    monkeypatch.setattr(Trainer, "save_best", dies)
    with pytest.raises(Killed):
        run_small("name=cut")
    assert_same_run(whole, run_small("name=cut"))


def test_kill_between_evaluation_and_save_writes_its_row_once(run_small, monkeypatch):
    """The checkpoint is of the evaluated step, but was saved before the evaluation."""
    options = ("checkpoint.every_steps=1", "power.every_epochs=1", "power.images=20")
    whole = run_small("name=whole", *options)
    original = Trainer.save_best
    monkeypatch.setattr(Trainer, "save_best", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run_small("name=cut", *options)
    monkeypatch.setattr(Trainer, "save_best", original)
    assert_same_run(whole, run_small("name=cut", *options))


def test_a_damaged_last_does_not_replace_a_good_previous(run_small, monkeypatch):
    """Falling back, then killed between the two renames of the next save: previous.pt is left."""
    whole = run_small("name=whole")
    folder = (
        run_small("name=cut", "max_steps=13", "checkpoint.every_steps=5").folder / "checkpoints"
    )
    (folder / "last.pt").write_bytes(b"")
    original = os.replace

    def dies(source, target) -> None:
        if Path(target).name == "last.pt":
            raise Killed
        original(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Killed):
        run_small("name=cut")
    monkeypatch.undo()
    assert_same_run(whole, run_small("name=cut"))


def test_a_finished_run_with_a_damaged_last_is_still_finished(run_small, capsys):
    folder = run_small("name=a", "checkpoint.every_steps=5").folder
    (folder / "checkpoints" / "last.pt").write_bytes(b"")
    settings = settings_from(
        compose_config([*SMALL, f"runs_dir={folder.parent}", "name=a", "checkpoint.every_steps=5"])
    )
    assert train(settings, {}) == 0
    assert "is finished" in capsys.readouterr().out
    (folder / "summary.json").write_text("")
    with pytest.raises(CheckpointError, match="summary.json is damaged"):
        run_small("name=a")


def test_finished_run_is_left_alone(run_small, capsys):
    first = run_small("name=a")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert run_small("name=a").status == 0
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_max_steps_goes_on_later(run_small):
    part = run_small("name=a", "max_steps=7")
    assert part.last["counters"]["step"] == 7
    whole = run_small("name=a")
    assert whole.last["counters"]["step"] == 20
    assert run_small("name=a", "max_steps=3").status == 0


def test_max_steps_below_the_step_reached_is_one_line(run_small, monkeypatch):
    """Of a run that is under way; one that ended there, or later, is finished."""
    at_step(monkeypatch, 13, lambda: signal.raise_signal(signal.SIGTERM))
    part = run_small("name=a")
    with pytest.raises(
        ConfigError, match=r"a is at step 14, past max_steps=8: raise it, or leave it out"
    ):
        run_small("name=a", "max_steps=8")
    assert run_small("name=a", "max_steps=14").rows[:14] == part.rows[:14]


def test_changed_run_is_refused_by_name_of_what_differs(run_small):
    run_small("name=a", "max_steps=2")
    with pytest.raises(CheckpointError, match=r"norm.name: ln_pn → bn"):
        run_small("name=a", "norm=bn")
    with pytest.raises(CheckpointError, match=r"seed: 0 → 1"):
        run_small("name=a", "seed=1")
    with pytest.raises(CheckpointError, match=r"\(optim.lr: null → 0.5; recompute: false → true\)"):
        run_small("name=a", "optim.lr=0.5", "recompute=true")
    assert run_small("name=a", "norm=bn", "resume=never").rows[-1]["step"] == 20


def test_resume_must_needs_a_checkpoint(run_small):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_small("name=new", "resume=must")


def test_unreadable_last_falls_back_to_previous(run_small, capsys):
    whole = run_small("name=whole", "checkpoint.every_steps=4")
    cut = run_small("name=cut", "checkpoint.every_steps=4", "max_steps=19")
    last = cut.folder / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    again = run_small("name=cut", "checkpoint.every_steps=4")
    assert "falling back" in capsys.readouterr().out
    for key in ("model", "optimizer"):
        assert str(whole.last[key]) == str(again.last[key])


def test_second_process_is_refused(run_small, tmp_path):
    with RunFolder(tmp_path / "a").lock():
        with pytest.raises(FileError, match=r"in use by .* pid \d+"):
            run_small("name=a")
    assert run_small("name=a").status == 0


def test_metrics_survive_a_cut_line(run_small):
    part = run_small("name=a", "max_steps=5")
    with open(part.folder / "metrics.jsonl", "a") as stream:
        stream.write('{"event": "train", "st')
    rows = run_small("name=a").rows
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 21))


def test_foreign_files_survive_a_fresh_start(run_small, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run_small("name=a", "max_steps=1")
    run_small("name=a", "max_steps=1", "resume=never")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_signal_during_the_last_evaluation_is_not_the_end(run_small, monkeypatch):
    whole = run_small("name=whole")
    original = Trainer.stop_if_asked

    def interrupted(self: Trainer) -> None:
        if self.state.step == 20:
            monkeypatch.setattr(Trainer, "stop_if_asked", original)
            signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(Trainer, "stop_if_asked", interrupted)
    cut = run_small("name=cut")
    assert (
        cut.status == 75 and not json.loads((cut.folder / "summary.json").read_text())["completed"]
    )
    monkeypatch.setattr(Trainer, "stop_if_asked", original)
    cut = run_small("name=cut")
    assert cut.status == 0 and json.loads((cut.folder / "summary.json").read_text())["completed"]
    assert_same_run(whole, cut)


def test_another_data_set_is_refused(run_small):
    run_small("name=a", "max_steps=2")
    run = run_small("name=a", "max_steps=2")
    content = dict(run.last, inputs=dict(run.last["inputs"], train_count=7))
    checkpoint.save(run.folder / "checkpoints" / "last.pt", content)
    for steps in ("max_steps=2", "max_steps=4"):
        with pytest.raises(CheckpointError, match="another data set"):
            run_small("name=a", steps)


def test_unwritable_runs_dir_is_one_line(run_small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run folder"):
        run_small(f"runs_dir={tmp_path / 'file'}")


def test_a_run_whose_checkpoints_are_gone_is_not_cleared(run_small):
    """Best weights and rows are kept; a finished run stays finished, under its own name."""
    run = run_small("name=a", "max_steps=13", "checkpoint.every_steps=5", "eval_every=1")
    for name in ("last.pt", "previous.pt"):
        (run.folder / "checkpoints" / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="another run"):
        run_small("name=a", "max_steps=13", "seed=5")
    assert run_small("name=a", "max_steps=13").rows == run.rows
    with pytest.raises(CheckpointError, match="neither last.pt nor previous.pt"):
        run_small("name=a", "max_steps=20")
    assert (run.folder / "checkpoints" / "best.pt").exists() and run_small(
        "name=a", "resume=never", "max_steps=2"
    ).rows


def test_another_machine_is_told(run_small, capsys):
    run = run_small("name=a", "max_steps=5")
    environment = json.loads((run.folder / "environment.json").read_text())
    (run.folder / "environment.json").write_text(
        json.dumps({**environment, "processor": "an abacus"})
    )
    capsys.readouterr()
    run_small("name=a", "max_steps=7")
    said = capsys.readouterr().out
    assert "an abacus → " in said and "not the same bits" in said
    run_small("name=a", "max_steps=9")
    assert "not the same bits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"labels": "other"}, r"\(labels: not the same\)"),
        (
            {"classes": ["T-shirt/top", "Skirt"]},
            r"\(classes: 10 → 2, first difference: Trouser → Skirt\)",
        ),
    ],
)
def test_other_labels_and_classes_are_another_data_set(run_small, monkeypatch, other, words):
    run_small("name=a", "max_steps=5")
    original = resume_module.describe_data
    changed = lambda data: {**original(data), **other}  # noqa: E731
    monkeypatch.setattr(resume_module, "describe_data", changed)
    with pytest.raises(CheckpointError, match=f"another data set {words}"):
        run_small("name=a", "max_steps=7")
