"""Each regularizer has its own key and does what it says, in the trainer that uses it."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch.nn.functional import cross_entropy, one_hot

from proxynorm.data import Batch, open_data
from proxynorm.errors import ConfigError
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.distributed import Process
from proxynorm.train.loop import Trainer
from proxynorm.train.preemption import StopRequest
from proxynorm.train.run_folder import RunFolder
from tests.data.conftest import needs_ffcv
from tests.helpers import SMALL, assert_same_run

NONE = settings_from(compose_config(["regularization=none"])).regularization
KEYS = {
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "cutmix_lambda": 0.9,
    "mix_probability": 0.5,
    "switch_probability": 0.3,
    "dropout": 0.2,
    "stochastic_depth": 0.1,
    "randaugment": "rand-m9-mstd0.5",
    "random_erasing": 0.25,
    "ema_decay": 0.99,
    "ema_every": "epoch",
}


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(*overrides): a Trainer of the small run without any other regularizers."""

    def make(*overrides: str) -> Trainer:
        settings = settings_from(
            compose_config([*SMALL, "regularization=none", f"runs_dir={tmp_path}", *overrides])
        )
        process = Process(0, 1, torch.device("cpu"))
        return Trainer(
            settings,
            process,
            open_data(settings.data, settings.loader),
            RunFolder(tmp_path),
            StopRequest(),
        )

    return make


def flat_images(count: int) -> Batch:
    """Image n has brightness n + 1 everywhere, and class n modulo 10."""
    images = (
        (torch.arange(count, dtype=torch.uint8) + 1)
        .view(-1, 1, 1, 1)
        .expand(count, 1, 32, 32)
        .contiguous()
    )
    numbers = torch.arange(count)
    return Batch(images, numbers % 10, numbers, torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize("key", KEYS)
def test_each_regularizer_has_its_own_key(key):
    overrides = ["regularization=none", f"regularization.{key}={KEYS[key]}"]
    if key == "randaugment":
        overrides += ["data=folder", "data.root=x"]
    assert settings_from(compose_config(overrides)).regularization == dataclasses.replace(
        NONE, **{key: KEYS[key]}
    )
    assert set(KEYS) == {field.name for field in dataclasses.fields(NONE)} - {"name"}


def test_without_regularizers_images_and_loss_are_plain(make_trainer):
    trainer = make_trainer()
    batch = next(trainer.loader.epoch(0))
    images, targets = trainer.inputs(batch, 0)
    assert torch.equal(images, trainer.prepare(batch).images) and torch.equal(
        targets, batch.targets
    )
    logits = torch.randn(20, 10)
    assert trainer.criterion(logits, targets) == cross_entropy(logits, targets)
    assert trainer.state.ema is None
    assert not [
        m for m in trainer.state.model.modules() if isinstance(m, DropPath) or getattr(m, "p", 0)
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("mixup=0.4",),
        ("cutmix=1",),
        ("mixup=0.4", "cutmix=1"),
        ("mixup=0.4", "label_smoothing=0.1"),
    ],
)
def test_mixed_targets_sum_to_one(make_trainer, overrides):
    trainer = make_trainer(*(f"regularization.{override}" for override in overrides))
    for step in range(5):
        trainer.state.step = step
        _, targets = trainer.inputs(flat_images(20), 0)
        assert targets.shape == (20, 10) and targets.min() >= 0
        assert targets.sum(dim=1).numpy() == pytest.approx(np.ones(20), abs=1e-6)


def test_cutmix_area_is_its_weight_and_mixup_mixes_as_its_targets(make_trainer):
    batch = flat_images(10)
    areas = []
    for kind in ("cutmix", "mixup"):
        trainer = make_trainer(f"regularization.{kind}=1")
        plain = trainer.prepare(batch).images
        for step in range(8):
            trainer.state.step = step
            images, targets = trainer.inputs(batch, 0)
            own = targets[torch.arange(10), batch.targets]
            expected = own.view(-1, 1, 1, 1) * plain + (1 - own).view(-1, 1, 1, 1) * plain.flip(0)
            # The image's mean is weighted like the targets; CutMix's pixels come from one image.
            assert images.mean(dim=(1, 2, 3)).numpy() == pytest.approx(
                expected.mean(dim=(1, 2, 3)).numpy(), abs=1e-5
            )
            pure = ((images == plain) | (images == plain.flip(0))).all()
            assert pure if kind == "cutmix" else torch.allclose(images, expected, atol=1e-5)
            areas.append(float(own[0]))
    assert min(areas) < 0.3 and max(areas) > 0.7


@needs_ffcv
def test_the_authors_cutmix_is_the_same_in_both_backends(make_trainer):
    cut = []
    for backend in ("ffcv", "torchvision"):
        trainer = make_trainer(
            "regularization.cutmix_lambda=0.8", "regularization.mixup=0.1", f"loader={backend}"
        )
        cut.append(
            [trainer.inputs(batch, index) for index, batch in enumerate(trainer.loader.epoch(0))]
        )
    assert all(
        torch.equal(a, b) for pair in zip(*cut, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_label_smoothing_enters_once(make_trainer):
    logits, targets = torch.randn(20, 10), torch.arange(20) % 10
    soft = 0.9 * one_hot(targets, 10) + 0.1 / 10
    trainer = make_trainer("regularization.label_smoothing=0.1")
    assert float(trainer.criterion(logits, targets)) == pytest.approx(
        float(cross_entropy(logits, soft)), rel=1e-6
    )
    mixing = make_trainer(
        "regularization.label_smoothing=0.1",
        "regularization.mixup=0.2",
        "regularization.mix_probability=0",
    )
    _, mixed = mixing.inputs(flat_images(20), 0)
    assert mixed.numpy() == pytest.approx(soft.numpy(), abs=1e-6)
    assert float(mixing.criterion(logits, mixed)) == pytest.approx(
        float(cross_entropy(logits, soft)), rel=1e-6
    )


def test_dropout_drops_its_share_in_training_only(make_trainer):
    model = make_trainer("regularization.dropout=0.3").state.model
    seen = {}
    model.fc.register_forward_pre_hook(lambda module, inputs: seen.update(features=inputs[0]))
    images = torch.randn(1, 1, 32, 32).expand(4000, 1, 32, 32)
    with torch.no_grad():
        model.eval()(images[:1])
        whole = seen["features"]
        torch.manual_seed(0)
        model.train()(images)
    kept = seen["features"]
    assert float((kept == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert (kept.mean(0) / whole[0]).numpy() == pytest.approx(np.ones(kept.shape[1]), abs=0.06)


def test_stochastic_depth_grows_with_depth_and_keeps_the_expectation(make_trainer):
    model = make_trainer(
        "model.depth=14", "norm=ln_pn", "regularization.stochastic_depth=0.4"
    ).state.model
    blocks = [block for stage in model.stages for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.4) and rates == sorted(rates)
    block = blocks[-1]
    one = torch.randn(1, 32, 4, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = block.eval()(one)[0]
        each = block.train()(one.expand(4000, -1, -1, -1))
    branch = expected - one[0]
    skipped = (each - one).flatten(1).abs().amax(1) == 0
    assert float(skipped.float().mean()) == pytest.approx(0.4, abs=0.03)
    assert torch.allclose(each[~skipped][0] - one[0], branch / 0.6, atol=1e-4)
    # Five standard errors of the mean of branch · Bernoulli(0.6) / 0.6 over 4000 samples.
    allowed = 5 * branch.abs() * (0.4 / 0.6 / 4000) ** 0.5 + 1e-5
    assert bool(((each.mean(0) - expected).abs() <= allowed).all())


def test_random_erasing_erases_its_share_of_training_images_only(make_trainer):
    plain, erasing = make_trainer(), make_trainer("regularization.random_erasing=0.5")
    before = torch.cat([batch.images for batch in plain.loader.epoch(0)])
    after = torch.cat([batch.images for batch in erasing.loader.epoch(0)])
    changed = (before != after).flatten(1).any(1)
    assert 0.35 < float(changed.float().mean()) < 0.6
    evaluations = [
        torch.cat([batch.images for batch in t.data.eval_loader(50)]) for t in (plain, erasing)
    ]
    assert torch.equal(*evaluations)


def test_randaugment_reaches_the_images_or_is_refused(make_trainer):
    settings = settings_from(
        compose_config(["data=folder", "data.root=x", "regularization.randaugment=rand-m9-mstd0.5"])
    )
    assert settings.data.randaugment == "rand-m9-mstd0.5"
    with pytest.raises(ConfigError, match="randaugment"):
        make_trainer("regularization.randaugment=rand-m9-mstd0.5")


def recorded_weights(monkeypatch) -> list[torch.Tensor]:
    """A list that collects the classifier's weights after every update of the runs that follow."""
    weights = []
    update = Trainer.update_weights

    def recording(self, norm, good):
        update(self, norm, good)
        weights.append(self.state.model.fc.weight.detach().clone())

    monkeypatch.setattr(Trainer, "update_weights", recording)
    return weights


def test_average_per_step(run_small, monkeypatch):
    """timm's decay of update t is min(d, 1 − t^(−2/3)), counted from the second update."""
    weights = recorded_weights(monkeypatch)
    run = run_small("regularization.ema_decay=0.6", "max_steps=8")
    average = weights[0]
    for number, weight in enumerate(weights[1:], start=1):
        decay = min(0.6, 1 - (1 + number) ** (-2 / 3))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(run.last["ema"]["fc.weight"], average, atol=1e-6)
    assert not torch.equal(run.last["ema"]["fc.weight"], run.last["model"]["fc.weight"])


def test_average_over_epochs(run_small, monkeypatch):
    """The authors' average of each epoch's last weights starts at those of the first epoch."""
    weights = recorded_weights(monkeypatch)
    run = run_small("regularization.ema_decay=0.97", "regularization.ema_every=epoch", "epochs=4")
    ends = weights[9::10]
    average = ends[0]
    for weight in ends[1:]:
        average = 0.97 * average + 0.03 * weight
    assert len(weights) == 40
    assert torch.allclose(run.last["ema"]["fc.weight"], average, atol=1e-6)


def test_the_average_is_what_is_evaluated(run_small):
    """With a decay of 1 − 1e-9 the average, and its accuracy, stay at the first epoch's."""
    run = run_small(
        "regularization.ema_decay=0.999999999", "regularization.ema_every=epoch", "epochs=3"
    )
    rows = [row["loss"] for row in run.rows if row["event"] == "eval"]
    assert rows == pytest.approx([rows[0]] * 3, abs=1e-5)


def assert_stopping_changes_nothing(run_small, monkeypatch, step, *options):
    """A run that is stopped after `step` steps and resumed equals an uninterrupted one exactly."""
    whole = run_small(*options, "name=whole")
    take_step = Trainer.train_step

    def stopped(self, micro_batches):
        if self.state.step == step - 1:
            self.stop.received = signal.SIGTERM
        take_step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        assert run_small(*options, "name=stopped").status == 75
    assert_same_run(whole, run_small(*options, "name=stopped"))


@pytest.mark.parametrize("step", [10, 13])
def test_stopping_at_an_epochs_end_keeps_the_average(run_small, monkeypatch, step):
    options = ("regularization.ema_decay=0.5", "regularization.ema_every=epoch", "epochs=3")
    assert_stopping_changes_nothing(run_small, monkeypatch, step, *options)


def test_the_authors_cutmix_resumes_exactly(run_small, monkeypatch):
    options = ("regularization.cutmix_lambda=0.8", "regularization.mixup=0.1", "micro_batch=10")
    assert_stopping_changes_nothing(run_small, monkeypatch, 7, *options)
