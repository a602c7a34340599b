"""Training learns, the same way each time, for every norm."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from proxynorm.analysis.confusion import counted
from proxynorm.data import Batch
from proxynorm.nn import NORMS
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import evaluate
from proxynorm.train.loop import Trainer
from proxynorm.train.nonfinite import NonFiniteError
from proxynorm.train.restore import RunOptions, open_evaluation_data, restore
from tests.helpers import assert_same_run


def test_short_training_learns(run_small):
    run = run_small(
        "data.limit=3000",
        "data.holdout=500",
        "batch=50",
        "epochs=3",
        "model.width=16",
        "log_every=20",
    )
    losses = [row["loss"] for row in run.rows if row["event"] == "train"]
    final = run.rows[-1]
    assert losses[-1] < 0.75 * losses[0]
    assert (
        final["event"] == "eval"
        and final["count"] == 500
        and final["top1"] > 50
        and final["top5"] > 90
    )


def test_rerun_gives_the_same_bits(run_small):
    options = ("regularization=extra", "regularization.ema_decay=0.9")
    assert_same_run(run_small(*options, "name=a"), run_small(*options, "name=b"))


@pytest.mark.parametrize("norm", ["ln_pn", "gn_pn"])
def test_recompute_gives_the_same_losses(run_small, norm):
    kept, rebuilt = (
        run_small(f"norm={norm}", "max_steps=5", f"name={flag}", f"recompute={flag}")
        for flag in ("false", "true")
    )
    assert [row["loss"] for row in rebuilt.rows] == pytest.approx(
        [row["loss"] for row in kept.rows], rel=1e-5
    )


def test_seeds_differ(run_small):
    assert run_small("seed=1").rows[0]["loss"] != run_small("seed=2").rows[0]["loss"]


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_a_step(run_small, norm):
    row = run_small(f"norm={norm}", "max_steps=1").rows[0]
    assert row["step"] == 1 and 1.5 < row["loss"] < 4


def test_accumulation_is_the_large_batch(run_small):
    """Without batch statistics, 4 micro-batches of 5 are a batch of 20, to rounding."""
    whole, parts = run_small("name=whole"), run_small("name=parts", "micro_batch=5")
    for first, second in zip(whole.rows, parts.rows, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=2e-4)


def test_overfitting_one_batch(run_small):
    run = run_small(
        "debug=overfit",
        "epochs=8",
        "regularization=none",
        "optim.lr=0.1",
        "data.augmentation=none",
        "model.width=16",
    )
    losses = [row["loss"] for row in run.rows if row["event"] == "train"]
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_restored_from_the_folder_alone(run_small):
    run = run_small("regularization.ema_decay=0.5", "norm=bn_pn")
    restored = restore(run.folder / "checkpoints" / "last.pt")
    restored = restored.with_options(RunOptions(batch=33, workers=0), "torchvision")
    data = open_evaluation_data(restored)
    process = Process(0, 1, torch.device("cpu"))
    result = evaluate(restored.outputs(data, process), process, expected=100)
    assert result.top1 == run.rows[-1]["top1"] and result.loss == pytest.approx(
        run.rows[-1]["loss"], rel=1e-5
    )


def test_evaluation_masks_padding_and_counts():
    """Padding rows count neither as hits nor as images; a wrong number of images is refused."""
    targets = torch.arange(6) % 3
    valid = torch.tensor([True] * 5 + [False])
    batch = Batch(torch.eye(3)[targets][:, :, None, None], targets, torch.arange(6), valid)
    process = Process(0, 1, torch.device("cpu"))
    outputs = [(batch, torch.eye(3)[targets]), (replace_valid(batch, False), torch.eye(3)[targets])]
    result = evaluate(outputs, process, expected=5)
    assert (result.top1, result.count) == (100.0, 5)
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    assert evaluate(counted(outputs, torch.arange(3), matrix), process) == result
    assert matrix.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 1]]
    with pytest.raises(Exception, match="evaluation saw 5 images, the data set has 6"):
        evaluate(outputs, process, expected=6)


def replace_valid(batch: Batch, value: bool) -> Batch:
    return batch._replace(valid=torch.full_like(batch.valid, value))


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the network's last layer produce NaN at one step."""
    original = Trainer.forward_backward

    def forward_backward(self: Trainer, micro_batches: list[Batch]) -> torch.Tensor:
        if self.state.step == step:
            with torch.no_grad():
                kept = self.state.model.fc.bias.clone()
                self.state.model.fc.bias.fill_(float("nan"))
                self.restore_bias = lambda: self.state.model.fc.bias.data.copy_(kept)
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)


def test_nonfinite_stops_and_names_the_layer(run_small, monkeypatch):
    poison(monkeypatch, 12)
    with pytest.raises(
        NonFiniteError, match=r"step 13: loss nan, .* learning rate 0\.\d+: not finite, first in fc"
    ):
        run_small("name=a")
    monkeypatch.undo()
    resumed = run_small("name=a")
    assert resumed.status == 0 and resumed.rows[-1]["step"] == 20
    assert json.dumps(resumed.rows, allow_nan=False)


def test_nonfinite_skip_leaves_the_weights(run_small, monkeypatch):
    original = Trainer.gradient_norm

    def gradient_norm(self: Trainer) -> torch.Tensor:
        norm = original(self)
        return norm * float("inf") if self.state.step in (3, 4) else norm

    monkeypatch.setattr(Trainer, "gradient_norm", gradient_norm)
    run = run_small("nonfinite=skip", "log_every=1")
    assert run.last["counters"]["skipped"] == 2 and run.rows[-1]["step"] == 20
    training = [row for row in run.rows if row["event"] == "train"]
    assert [row["step"] for row in training if row["loss"] is None] == [4, 5]
    assert [row["step"] for row in training if row["gradient_norm"] is None] == [4, 5]
    with pytest.raises(NonFiniteError):
        run_small("nonfinite=skip", "nonfinite_limit=1", "name=b")


def test_nonfinite_skip_leaves_the_running_statistics(run_small, monkeypatch):
    """Non-finite images enter Batch Norm's running statistics before the loss shows them."""
    original = Trainer.inputs

    def inputs(self: Trainer, batch: Batch, index: int):
        images, targets = original(self, batch, index)
        return (images * float("nan"), targets) if self.state.step == 5 else (images, targets)

    monkeypatch.setattr(Trainer, "inputs", inputs)
    run = run_small("norm=bn", "nonfinite=skip")
    assert run.last["counters"]["skipped"] == 1
    assert all(math.isfinite(row["loss"]) for row in run.rows if row["event"] == "eval")
    assert all(torch.isfinite(tensor).all() for tensor in run.last["model"].values())


def test_overfit_sees_one_batch(run_small, monkeypatch):
    """In every epoch, and after resuming in the middle of one."""
    seen = []
    original = Trainer.train_step
    monkeypatch.setattr(
        Trainer,
        "train_step",
        lambda self, batches: (seen.append(batches[0].indices.tolist()), original(self, batches)),
    )
    run_small("debug=overfit", "name=a", "max_steps=13", "epochs=2")
    run_small("debug=overfit", "name=a", "epochs=2")
    assert len(seen) == 20 and all(indices == seen[0] for indices in seen)


def test_small_settings_are_what_was_asked(run_small):
    settings = run_small("max_steps=1").settings
    assert replace(settings, seed=0) == settings


def test_profile_leaves_a_trace(run_small):
    trace = json.loads(
        (run_small("debug.profile_steps=2", "max_steps=6").folder / "trace.json").read_text()
    )
    assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])


def test_three_steps(run_small):
    rows = run_small("debug=three_steps").rows
    assert [row["event"] for row in rows] == ["train"] * 3 + ["eval"]
    assert "eta_seconds" not in rows[0] and "images_per_second" not in rows[0]
    assert (
        rows[1]["eta_seconds"] > rows[2]["eta_seconds"] == 0
        and rows[1]["step_ms_p95"] >= rows[1]["step_ms_p50"] > 0
    )
