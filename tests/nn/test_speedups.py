"""Shared moments, recomputation and cells give the same results as the plain layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import bytes_kept
from proxynorm.nn import NormAct2d, proxy_moments, recompute, share_moments
from proxynorm.nn.fast import shared as shared_module
from proxynorm.nn.fast.fused import NormAct
from proxynorm.nn.fast.kernels import CellGroupNorm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(
    activation: str = "relu", norm: str = "ln_pn", depth: int = 4, width: int = 16
) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(depth):
        layers += [
            NormAct2d(width, norm, act_layer=activation),
            nn.Conv2d(width, width, 3, padding=1),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("norm", ["ln_pn", "bn_pn"])
@pytest.mark.parametrize("activation", ["relu", "silu", "mish"])
def test_same_results(activation, norm):
    net, x = network(activation, norm), torch.randn(4, 3, 8, 8)
    expected = gradients(net, x)
    for change in (share_moments, recompute, lambda n: recompute(share_moments(n))):
        other = change(change(copy.deepcopy(net)))  # twice is once
        torch.testing.assert_close(gradients(other, x), expected)
        torch.testing.assert_close(gradients(copy.deepcopy(other), x), expected)
        assert list(other.state_dict()) == list(net.state_dict())


def test_moments_are_shared_in_one_evaluation(monkeypatch):
    net, calls = share_moments(network()), []
    evaluate = shared_module.evaluate_constants
    monkeypatch.setattr(
        shared_module, "evaluate_constants", lambda *args: calls.append(1) or evaluate(*args)
    )
    monkeypatch.setattr(
        "proxynorm.nn.norm_act.evaluate_constants",
        lambda *args: pytest.fail("a layer folded by itself"),
    )
    x = torch.randn(2, 3, 8, 8)
    net(x).sum().backward()
    net(x).sum().backward()  # another micro-batch of the same update
    with torch.no_grad():
        net(x)
    assert len(calls) == 1
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net(x)
    copy.deepcopy(net)(x)
    assert len(calls) == 2
    net.load_state_dict(net.state_dict())  # the same values
    net(x)
    assert len(calls) == 2


def test_parameters_that_a_hook_computes_are_never_stale():
    net, x = share_moments(network()), torch.randn(2, 3, 8, 8)
    prune.l1_unstructured(net[1], "weight", 0.5)
    net(x)
    nn.init.constant_(net[1].weight_orig, 2.0)
    shared, out = net(x), x
    for module in net:
        out = module(out)  # each layer by itself
    torch.testing.assert_close(shared, out)


@pytest.mark.parametrize("change", ["data", "in place", "load", "swap", "dtype"])
def test_shared_moments_are_never_stale(change):
    net, x = share_moments(network()), torch.randn(2, 3, 8, 8)
    net(x)
    act = net[1]
    if change == "data":
        act.bias.data.fill_(0.7)
    elif change == "in place":
        with torch.no_grad():
            act.bias.fill_(0.7)
    elif change == "load":
        net.load_state_dict(
            {
                k: torch.full_like(v, 0.7) if k == "1.bias" else v
                for k, v in net.state_dict().items()
            }
        )
    elif change == "swap":
        act.bias = nn.Parameter(torch.full((16,), 0.7))
    else:
        net, x, act = net.double(), x.double(), net[1]
        nn.init.constant_(act.bias, 0.7)
    plain = network().to(x.dtype)
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), plain(x))
    torch.testing.assert_close(net[1](net[0](x)), plain[1](plain[0](x)))  # an inner module alone


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    net, x = share_moments(network()), torch.randn(2, 3, 8, 8)
    expected = gradients(copy.deepcopy(net), x)
    with torch.inference_mode():
        net(x)
    torch.testing.assert_close(gradients(net, x), expected)


@pytest.mark.parametrize("change", ["act", "proxy_eps", "slope"])
def test_shared_moments_follow_options_changed_later(change):
    net, x = share_moments(network("leaky_relu")), torch.randn(2, 3, 8, 8)
    net(x)
    if change == "act":
        net[3].act = nn.SiLU()
    elif change == "slope":
        net[3].act.negative_slope = 0.5
    else:
        net[3].proxy_eps = 0.5
    out = x
    for module in net:
        out = module(out)  # each layer by itself
    torch.testing.assert_close(net(x), out)
    assert len(next(iter(net._forward_pre_hooks.values())).__self__.evaluated) <= 2


@pytest.mark.parametrize(
    "options", [{"act_layer": "relu"}, {"act_layer": "hard_swish"}, {"moments": "grid"}]
)
@pytest.mark.parametrize("part", ["whole", "part"])
def test_checkpointing_with_shared_moments(part, options):
    layers = [NormAct2d(8, **options) for _ in range(3)]
    net, x = share_moments(nn.Sequential(*layers)), torch.randn(2, 8, 4, 4, requires_grad=True)
    expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    if part == "part":
        inner = net[1].forward
        net[1].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    z = net(x) if part == "part" else checkpoint(net, x, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum(), [x, *net.parameters()]), expected
    )


def test_fake_tensors_pass_twice():
    with torch._subclasses.FakeTensorMode():
        net = share_moments(network())
        for _ in range(2):
            assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("first", [False, True])
def test_a_real_forward_goes_on_after_one_of_fake_tensors(first):
    net, x = share_moments(network()), torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(net)(x)
    if first:
        net(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        net(torch.empty(2, 3, 8, 8))
    torch.testing.assert_close(net(x), expected)


def test_shared_constants_do_not_outlive_a_failed_forward():
    net = share_moments(network())
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 8, 8))
    assert net[1].shared_constants is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.init.constant_(layer.weight, 2.0),
        lambda layer: layer.load_state_dict(
            {name: v + 1 for name, v in layer.state_dict().items()}
        ),
        lambda layer: layer.double().float() and nn.init.constant_(layer.bias, 0.5),
        lambda layer: setattr(layer, "proxy_eps", 0.5),
        lambda layer: setattr(layer, "act", nn.SiLU()),
    ],
)
def test_shared_constants_that_an_interrupted_forward_leaves_are_not_used_when_stale(change):
    def interrupt(*_):
        raise KeyboardInterrupt

    net, x = share_moments(network()), torch.randn(2, 16, 8, 8)
    parametrize.register_parametrization(net[3], "weight", nn.Softplus())
    net[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(x[:, :3])
    change(net[1])
    nn.init.constant_(net[3].parametrizations.weight.original, 2.0)
    for layer in (net[1], net[3]):
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


def test_layers_of_different_kinds_share_apart():
    options = [
        {},
        {"act_layer": "silu"},
        {"proxy_eps": 0.1},
        {},
        {"act_layer": "silu"},
        {"proxy": False},
        {"act_layer": torch.sin},
        {"act_layer": torch.cos},
        {"act_layer": nn.LeakyReLU(0.1)},
        {"act_layer": nn.LeakyReLU(0.2)},
        {"act_layer": nn.Hardtanh(-2, 1)},
        {"act_layer": "hard_tanh"},
    ]
    net = share_moments(nn.Sequential(*(NormAct2d(4, **option) for option in options)))
    x = torch.randn(2, 4, 3, 3)
    out = x
    for module in net:
        out = module(out)
    torch.testing.assert_close(net(x), out)


def batch_norm_network() -> nn.Sequential:
    """The same network with torch's BN and in-place ReLU."""
    layers = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def test_bytes_kept_for_backward():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    batch_norm = bytes_kept(batch_norm_network(), images, labels)
    for activation in ("relu", "silu", "gelu"):
        kept = bytes_kept(network(activation), images, labels)
        assert (
            kept / batch_norm < 1.01
        )  # the hundredth: constants per channel, on maps as small as these
        assert bytes_kept(recompute(network(activation)), images, labels) / batch_norm < 0.57


def test_recompute_with_other_uses_of_the_output():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.one, self.two = (
                NormAct2d(4),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 4, 3, padding=1),
            )

        def forward(self, x):
            z = self.act(x)
            later = z * 2
            later += self.one(z) * self.two(z)
            return later * F.max_pool2d(z, 3, 1, 1)

    net, x = Net(), torch.randn(2, 4, 6, 6)
    expected = gradients(net, x)
    torch.testing.assert_close(gradients(recompute(net), x), expected)


def test_recompute_twice_backward_and_without_gradients():
    net, x = recompute(network()), torch.randn(2, 3, 8, 8)
    loss = net(x).square().sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, list(net.parameters())), first)
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)


def test_recompute_notices_a_changed_input():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.conv = NormAct2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = x * 1
            out = self.conv(self.act(x))
            x.add_(1)
            return out

    net = recompute(Net())
    with pytest.raises(RuntimeError, match="changed in place"):
        net(torch.randn(2, 4, 3, 3)).sum().backward()


def test_proxy_statistics_are_float32_under_autocast():
    act = NormAct2d(8)
    with torch.autocast("cpu", torch.bfloat16):
        mean, var = act.proxy_statistics()
        assert act.normalize(torch.randn(2, 8, 3, 3).bfloat16()).dtype == torch.bfloat16
    four = (act.weight, act.bias, act.proxy_weight, act.proxy_bias)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close((mean, var), proxy_moments(*four))


def cells(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, groups: int) -> torch.Tensor:
    norm, act = CellGroupNorm(groups, 1e-5), nn.Identity()
    return NormAct.apply(x, norm, act, None, None, scale, shift)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_cells_are_group_norm(groups, memory_format):
    """The path of half precision and channels_last on CUDA, run here on CPU."""
    x = (
        (torch.randn(3, 12, 5, 4, dtype=torch.float64) + 2)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    scale, shift = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs, grad = (x, scale, shift), torch.randn(3, 12, 5, 4, dtype=torch.float64)
    ours, theirs = cells(*inputs, groups), F.group_norm(x, groups, scale, shift)
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad)
    )
    assert torch.autograd.gradgradcheck(lambda *t: cells(*t, groups), inputs, fast_mode=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cells_in_half_precision(dtype, memory_format):
    x = (
        (torch.randn(3, 12, 5, 4) * 3 + 40)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    scale, shift = (torch.randn(12, requires_grad=True) for _ in range(2))
    wide = [t.detach().double().requires_grad_() for t in (x, scale, shift)]
    z, reference = (cells(x, scale, shift, 4), F.group_norm(wide[0], 4, wide[1], wide[2]))
    torch.testing.assert_close(z.double(), reference, atol=0.02, rtol=0.01)
    grad = torch.randn_like(z)
    ours = torch.autograd.grad(z, (x, scale, shift), grad)
    theirs = torch.autograd.grad(reference, wide, grad.double())
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for one, other in zip(ours, theirs):
        assert (one.double() - other).norm() < 0.02 * other.norm()
