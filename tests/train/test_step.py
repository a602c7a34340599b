"""The training step: what it waits for, and what a non-finite update leaves unchanged."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proxynorm.data import Batch
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import evaluate, forward
from proxynorm.train.loop import Trainer
from proxynorm.train.nonfinite import NonFiniteError
from proxynorm.train.readback import Readback, Snapshot

# What a GPU's host must wait for: a value read, or a size that depends on values. Not `equal`,
# with which shared moments are compared on the CPU alone (nn/fast/shared.py).
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2"}


class Waits(TorchDispatchMode):
    """Collects operations that would wait for a GPU, and reads of figures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def read_counting(monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    original = Readback.read

    def read(self: Readback) -> list[float]:
        waits.found.append("read")
        return original(self)

    monkeypatch.setattr(Readback, "read", read)


@pytest.mark.parametrize(
    "options",
    [
        ("norm=ln_pn",),
        ("norm=bn", "nonfinite=skip", "regularization.ema_decay=0.9", "log_every=1"),
        ("regularization=extra", "regularization.mixup=0.2", "optim.clip_grad=1", "micro_batch=10"),
    ],
)
def test_a_step_waits_for_nothing_but_the_last_steps_figures(run_small, monkeypatch, options):
    found = []
    original = Trainer.train_step

    def train_step(self: Trainer, micro_batches: list) -> None:
        waits = Waits()
        with monkeypatch.context() as patches, waits:
            read_counting(patches, waits)
            original(self, micro_batches)
        found.append(waits.found)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run_small(*options, "max_steps=6")
    assert found == [[]] + 5 * [["read"]]


def test_evaluation_waits_once_at_its_end(make_batches):
    waits = Waits()
    with waits:
        result = evaluate(forward(*make_batches), Process(0, 1, torch.device("cpu")), expected=60)
    assert waits.found == [] and result.count == 60, "its one read is a tolist() of the sums"


@pytest.fixture
def make_batches():
    valid = torch.ones(20, dtype=torch.bool)
    images = torch.randn(20, 1, 8, 8)
    batch = Batch(images, torch.arange(20) % 10, torch.arange(20), valid)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return model, [batch] * 3, lambda batch: batch, torch.device("cpu")


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    """Copy what an update changes: weights, statistics, average, optimizer."""
    state = trainer.state
    tensors = [*state.model.state_dict().values()]
    tensors += state.ema.module.state_dict().values() if state.ema is not None else []
    moments = state.optimizer.state.values()
    return copy.deepcopy([*tensors, *(v for part in moments for v in part.values())])


LONG = ("model.width=4", "batch=4", "data.limit=2000", "epochs=4", "log_every=500", "eval_every=4")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_an_infinite_gradient_in_2000_steps_leaves_the_weights_bit_for_bit(
    run_small, monkeypatch, mode
):
    bad, kept = random.Random(mode).randrange(1, 1990), {}
    original = Trainer.train_step

    def train_step(self: Trainer, micro_batches: list) -> None:
        step = self.state.step
        if step == bad:
            kept["before"], kept["trainer"] = weights_of(self), self
            weight = next(self.state.model.parameters())
            # In the gradient alone: the loss of this step is finite.
            hook = weight.register_hook(lambda grad: grad * float("inf"))
        original(self, micro_batches)
        if step == bad:
            hook.remove()
            kept["after"] = weights_of(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    options = (f"nonfinite={mode}", "norm=bn", "regularization.ema_decay=0.9", *LONG)
    if mode == "stop":
        with pytest.raises(NonFiniteError, match=f"step {bad + 1}: .*every activation is finite"):
            run_small(*options, "regularization.ema_decay=null")
        names = [name for name, _ in kept["trainer"].state.model.named_parameters()]
        now = dict(kept["trainer"].state.model.named_parameters())
        before = dict(zip(kept["trainer"].state.model.state_dict(), kept["before"]))
        assert all(torch.equal(now[name], before[name]) for name in names)
    else:
        run = run_small(*options)
        assert run.last["counters"]["step"] == 2000 and run.last["counters"]["skipped"] == 1
        assert all(map(torch.equal, kept["before"], kept["after"]))


def test_a_snapshot_restores_every_type_and_layout():
    floats = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = [floats, torch.randn(5), torch.tensor(7), torch.randn(())]
    before = copy.deepcopy(tensors)
    for finite in (True, False):
        snapshot = Snapshot(tensors)
        for tensor in tensors:
            tensor.mul_(float("nan")) if tensor.is_floating_point() else tensor.add_(1)
        snapshot.restore_unless(torch.tensor(finite))
        changed = [not torch.equal(a, b) for a, b in zip(tensors, before)]
        assert changed == [finite] * 4
        for tensor, former in zip(tensors, before):
            tensor.copy_(former)
    assert floats.is_contiguous(memory_format=torch.channels_last)
