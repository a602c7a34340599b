"""Invariance to the batch and to the scale of a convolution; weight standardization and decay."""

import copy

import pytest
import torch
from timm.layers import CondConv2d
from torch import nn

from proxynorm.nn import NormAct2d, norm_spec, parameter_groups, standardize_weights

FREE = ["ln", "ln_pn", "gn", "gn_pn", "in", "in_pn", "ln_ws"]


def network(norm: str, bias: bool = False) -> nn.Module:
    """Three convolutions, each with norm and ReLU, and a classifier, in float64."""
    torch.manual_seed(0)
    spec, layers, channels = norm_spec(norm), [], 3
    for width in (8, 12, 8):
        act = NormAct2d(width, spec.kind, spec.proxy, groups=4 if spec.kind == "gn" else None)
        for p in act.parameters():
            nn.init.normal_(p, mean=p.mean().item(), std=0.2)
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=bias), act]
        channels = width
    net = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)
    ).double()
    return standardize_weights(net) if spec.weight_standardization else net


def outputs_and_gradients(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, size: int):
    """Logits, and each image's gradient of the first weight, forwarded `size` at a time."""
    logits, gradients = [], []
    for x, y in zip(images.split(size), labels.split(size)):
        out = net(x)
        logits.append(out.detach())
        losses = nn.functional.cross_entropy(out, y, reduction="none")
        first = next(net.parameters())
        gradients += [torch.autograd.grad(loss, first, retain_graph=True)[0] for loss in losses]
    return torch.cat(logits), torch.stack(gradients)


def differences(net: nn.Module) -> tuple[float, float]:
    """Maximum change of logits and of per-sample gradients between batches of 32, 2 and 1."""
    images, labels = torch.randn(32, 3, 6, 6, dtype=torch.float64), torch.arange(32) % 5
    whole = outputs_and_gradients(net, images, labels, 32)
    parts = [outputs_and_gradients(net, images, labels, size) for size in (1, 2)]
    return tuple(max((part[i] - whole[i]).abs().max().item() for part in parts) for i in (0, 1))


@pytest.mark.parametrize("norm", FREE)
def test_independent_of_the_batch(norm):
    assert max(differences(network(norm))) < 1e-12


@pytest.mark.parametrize("norm", ["bn", "bn_pn"])
def test_batch_norm_is_not(norm):
    logits, gradients = differences(network(norm))
    assert logits > 0.05 and gradients > 0.01


@pytest.mark.parametrize("norm", ["ln", "ln_pn"])
def test_accumulated_gradient_is_that_of_the_large_batch(norm):
    net = network(norm)
    images, labels = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.arange(8) % 5
    nn.functional.cross_entropy(net(images), labels).backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for x, y in zip(images.split(2), labels.split(2)):
        (nn.functional.cross_entropy(net(x), y) / 4).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], whole)


@pytest.mark.parametrize("norm", ["ln_pn", "gn_pn", "in_pn", "bn_pn"])
@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_invariant_to_a_rescaled_convolution(norm, factor):
    net = network(norm)
    for module in net:
        if isinstance(module, NormAct2d):
            module.eps = 1e-14
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before = net(x)
    with torch.no_grad():
        for module in net:
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(factor)
    torch.testing.assert_close(net(x), before)


def test_weight_standardization():
    """Filters have zero mean and unit power over their fan-in; a depthwise 1×1 stays as it is."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=8))
    plain = net[1].weight.detach().clone()
    assert standardize_weights(standardize_weights(net)) is net
    filters = net[0].weight.flatten(1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters.square().sum(1), torch.ones(8), atol=1e-4, rtol=0)
    assert torch.equal(net[1].weight, plain)
    copy.deepcopy(net)(torch.randn(1, 3, 5, 5)).sum().backward()


def test_weight_decay_groups():
    spec = norm_spec("ln_pn")
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3, bias=True),
            "act": NormAct2d(8, spec.kind, spec.proxy),
            "plain": NormAct2d(8, "bn", False),
            "transposed": nn.ConvTranspose2d(8, 8, 2),
            "head": nn.Linear(8, 5),
            "standardized": standardize_weights(nn.Conv2d(8, 8, 3)),
            "layer_norm": nn.LayerNorm(8),
            "prelu": nn.PReLU(8),
        }
    )
    net["tied"] = net["head"]
    net["frozen"] = nn.Linear(3, 3).requires_grad_(False)
    net.register_parameter("token", nn.Parameter(torch.zeros(1, 4, 8)))
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, kept = parameter_groups(net, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and kept["weight_decay"] == 0
    assert {names[id(p)] for p in decayed["params"]} == {
        "conv.weight",
        "act.proxy_weight",
        "act.proxy_bias",
        "transposed.weight",
        "head.weight",
        "standardized.parametrizations.weight.original",
    }
    everything = [id(p) for group in (decayed, kept) for p in group["params"]]
    trainable = [id(p) for p in net.parameters() if p.requires_grad]
    assert len(everything) == len(set(everything)) and set(everything) == set(trainable)
    torch.optim.SGD([decayed, kept], lr=0.1)


def test_weight_decay_groups_without_any_to_decay():
    assert [g["weight_decay"] for g in parameter_groups(nn.LayerNorm(3), 0.1)] == [0.0]


def test_weight_decay_goes_by_what_a_parameter_is():
    """CondConv2d keeps a kernel per expert as a row, and biases (experts, C)."""
    net = nn.ModuleDict(
        {
            "cond": CondConv2d(4, 8, 3, num_experts=2, bias=True),
            "norm": nn.LayerNorm((8, 4, 4)),
            "embedding": nn.Embedding(5, 8),
        }
    )
    decayed, kept = parameter_groups(net, 1e-4)
    assert [id(p) for p in decayed["params"]] == [id(net["cond"].weight)]
    assert len(kept["params"]) == 4
