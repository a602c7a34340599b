"""Optimizers: our RMSprop against timm's, and steps skipped on the device."""

from __future__ import annotations

import copy

import pytest
import timm.optim
import torch
from torch import nn

from proxynorm.errors import ConfigError
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.optimizer import RMSpropTF, create_optimizer, load_optimizer
from proxynorm.train.readback import step_if

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))


def set_gradients(net: nn.Module, seed: int, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if value is not None:
            parameter.grad.view(-1)[0] = value


def tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return [*net.parameters(), *state]


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_rmsprop_equals_timms(weight_decay):
    ours, theirs = network(), network()
    options = {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9}
    options["weight_decay"] = weight_decay
    first = RMSpropTF(ours.parameters(), **options)
    second = timm.optim.RMSpropTF(theirs.parameters(), **options)
    for step in range(10):
        for net, optimizer in ((ours, first), (theirs, second)):
            set_gradients(net, step)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for key in ("square_avg", "momentum_buffer"):
            torch.testing.assert_close(first.state[a][key], second.state[b][key])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_the_masked_step_of_rmsprop_changes_nothing_or_equals_the_plain_one(value):
    """As on a GPU, where the host does not know whether the gradient is finite."""
    nets, optimizers = [network(), network()], []
    for net in nets:
        optimizers.append(RMSpropTF(net.parameters(), lr=0.02, eps=1e-3, weight_decay=1e-2))
    for step in range(4):
        set_gradients(nets[0], step)
        optimizers[0].step()
        set_gradients(nets[1], step)
        for group in optimizers[1].param_groups:
            optimizers[1]._update(group, group["params"], torch.tensor(1.0))
    for first, second in zip(*map(tensors, nets, optimizers), strict=True):
        torch.testing.assert_close(first, second)
    before = copy.deepcopy(tensors(nets[1], optimizers[1]))
    set_gradients(nets[1], 4, value)
    for group in optimizers[1].param_groups:
        optimizers[1]._update(group, group["params"], torch.tensor(0.0))
    assert all(map(torch.equal, before, tensors(nets[1], optimizers[1])))


@pytest.mark.parametrize("name", ["momentum", "sgd", "rmsproptf", "adamw", "lamb", "lion"])
def test_a_skipped_step_changes_neither_weights_nor_later_steps(name):
    """Also the very first step, after which torch's fused SGD had uninitialized momentum."""
    settings = settings_from(compose_config([f"optim.name={name}", "optim.lr=0.01"]))
    runs = []
    for bad_steps in ((), (0, 2)):
        net = network()
        optimizer = create_optimizer(net, settings)
        for step in range(3):
            if step in bad_steps:
                before = [parameter.detach().clone() for parameter in net.parameters()]
                set_gradients(net, 0, float("nan"))
                step_if(optimizer, BAD)
                assert all(map(torch.equal, before, net.parameters()))
            set_gradients(net, step)
            step_if(optimizer, GOOD)
        runs.append(list(net.parameters()))
    assert all(map(torch.equal, *runs))


def test_loading_a_checkpoint_keeps_the_optimizers_kernel():
    """Older checkpoints name no kernel. Without fused=True, found_inf would be ignored."""
    settings = settings_from(compose_config([]))
    net = network()
    optimizer = create_optimizer(net, settings)
    content = optimizer.state_dict()
    for group in content["param_groups"]:
        group.update(fused=None, foreach=None)
    load_optimizer(optimizer, content)
    assert all(group["fused"] for group in optimizer.param_groups)
    before = copy.deepcopy(tensors(net, optimizer))
    set_gradients(net, 0, float("nan"))
    step_if(optimizer, BAD)
    assert all(map(torch.equal, before, tensors(net, optimizer)))


def test_a_batch_too_large_for_the_decay_of_the_mean_square_is_refused():
    settings = settings_from(compose_config(["optim=rmsprop", "batch=16640"]))
    with pytest.raises(ConfigError, match=r"batch=16640 optim.alpha_per_image=.* is -0.0156"):
        create_optimizer(network(), settings)
