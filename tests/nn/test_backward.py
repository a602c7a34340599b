"""Backward passes: after changes of modes and tensors, of second order, and with recompute."""

import copy
import weakref

import pytest
import torch
from torch import nn

from proxynorm.models import create_model
from proxynorm.nn import NormAct2d, recompute
from proxynorm.nn.fast.recompute import is_recomputing


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(activation: str, norm: str) -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 8, 3),
        NormAct2d(8, norm, act_layer=activation),
        nn.Conv2d(8, 8, 3),
        NormAct2d(8, norm, act_layer=activation),
        nn.Conv2d(8, 4, 1),
    ]
    return nn.Sequential(*layers).double()


def gradients(net: nn.Module, x: torch.Tensor, between=lambda net: None) -> list[torch.Tensor]:
    """Gradients of a copy of net, which `between` changes between forward and backward."""
    net = copy.deepcopy(net)
    loss = net(x).square().sum()
    between(net)
    return list(torch.autograd.grad(loss, list(net.parameters())))


def use_otherwise(net: nn.Module) -> None:
    """Update BN's running statistics, and leave the net in the other mode."""
    training = net.training
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64) * 3 + 1)
    net.train(not training)


def change_options(net: nn.Module) -> None:
    for module in net:
        if isinstance(module, NormAct2d):
            module.eps, module.groups, module.norm_batch = 0.5, 2, 1


@pytest.mark.parametrize("with_recompute", [False, True])
@pytest.mark.parametrize("between", [use_otherwise, change_options])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["bn_pn", "gn_pn"])
@pytest.mark.parametrize("activation", ["relu", "silu", "hard_swish"])
def test_the_norm_of_the_forward_pass_counts(activation, norm, training, between, with_recompute):
    net, x = network(activation, norm).train(training), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = gradients(net, x)
    net = recompute(net) if with_recompute else net
    torch.testing.assert_close(gradients(net, x, between), expected)


class Net(nn.Module):
    """A layer between two convolutions, with edit() called inside forward."""

    def __init__(self, edit=None) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 4, 1), NormAct2d(4), nn.Conv2d(4, 4, 1)
        self.edit = edit

    def forward(self, x):
        z = self.act(self.first(x))
        gate = torch.sigmoid(self.second(z))
        out = gate * 1
        if self.edit is not None:
            self.edit(z, gate)
        return out


def double_weights(net: nn.Module) -> None:
    with torch.no_grad():
        net.second.weight.mul_(2)


def double_gamma(net: nn.Module) -> None:
    with torch.no_grad():
        net.act.weight.mul_(2)


@pytest.mark.parametrize("with_recompute", [False, True])
def test_changes_in_place_are_noticed(with_recompute):
    """Changes of weights, and of tensors that other operations keep, with and without recompute."""
    x = torch.randn(2, 3, 4, 4)
    for between in (double_weights, double_gamma):
        net = recompute(Net()) if with_recompute else Net()
        with pytest.raises(
            RuntimeError, match="modified by an inplace operation.*expected version 0 instead"
        ):
            gradients(net, x, between)
    net = Net(edit=lambda z, gate: gate.mul_(2))
    with pytest.raises(RuntimeError, match="is at version 1; expected version 0 instead"):
        gradients(recompute(net) if with_recompute else net, x)


def test_recompute_allows_a_changed_output_of_a_layer():
    net, x = Net(), torch.randn(2, 3, 4, 4)
    expected = gradients(net, x)
    net.edit = lambda z, gate: z.mul_(2)
    torch.testing.assert_close(gradients(recompute(net), x), expected)


def second_order(layer: nn.Module, function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    first = torch.autograd.grad(function(x).square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("weight",),
        ("bias",),
        ("weight", "bias"),
        ("proxy_weight", "proxy_bias"),
        ("weight", "bias", "proxy_weight", "proxy_bias"),
    ],
)
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_second_order_with_constants(activation, scale, frozen):
    layer = NormAct2d(4, "ln_pn", act_layer=activation, proxy_scale=scale).double()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    ours = second_order(layer, layer, x)
    torch.testing.assert_close(
        ours, second_order(layer, lambda x: layer.activate(layer.normalize(x)), x)
    )


@pytest.mark.parametrize("with_recompute", [False, True])
def test_second_order_of_centred_squeeze_excite(with_recompute):
    model = create_model("efficientnet_b0", "ln_pn", num_classes=5)
    model = recompute(model) if with_recompute else model
    parameters = list(model.parameters())
    first = torch.autograd.grad(
        model(torch.randn(1, 3, 32, 32)).square().sum(), parameters, create_graph=True
    )
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("proxy_scale", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "hard_swish", "identity"])
@pytest.mark.parametrize("norm", ["ln", "gn", "in", "bn"])
def test_first_and_second_derivatives_are_those_of_the_formula(
    norm, activation, proxy_scale, layout
):
    layer = NormAct2d(8, norm, act_layer=activation, proxy_scale=proxy_scale, groups=2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, direction = (
        torch.randn(3, 8, 4, 5, dtype=torch.float64).to(memory_format=memory_format)
        for _ in range(2)
    )
    x = torch.randn(3, 8, 4, 10, dtype=torch.float64)[..., ::2] if layout == "strided" else x
    x.requires_grad_()
    grads = []
    for forward in (
        layer,
        recompute(copy.deepcopy(layer)),
        lambda x: layer.activate(layer.normalize(x)),
    ):
        module = forward if isinstance(forward, nn.Module) else layer
        inputs = [x, *module.parameters()]
        z = forward(x)
        assert z.is_contiguous(memory_format=memory_format)
        first = torch.autograd.grad(z, inputs, direction, retain_graph=True)
        again = torch.autograd.grad(z, inputs, direction, create_graph=True)
        torch.testing.assert_close(again, first)
        grads.append(
            [z.detach(), *first, *torch.autograd.grad(sum(g.square().sum() for g in again), inputs)]
        )
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["relu", "silu", "hard_swish", "identity"])
def test_the_incoming_gradient_may_lie_in_memory_as_it_likes(activation, memory_format):
    layer = NormAct2d(8, "gn", act_layer=activation, groups=2).double()
    x = (
        torch.randn(3, 8, 4, 5, dtype=torch.float64)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    grad, inputs = torch.randn(3, 8, 4, 10, dtype=torch.float64), [x, *layer.parameters()]
    directions = {
        "contiguous": grad[..., :5].contiguous(),
        "strided": grad[..., ::2],
        "expanded": grad[:1, :1, :1, :1].expand(x.shape),
        "channels_last": grad[..., 5:].contiguous(memory_format=torch.channels_last),
    }
    for direction in directions.values():
        before = direction.clone()
        ours = torch.autograd.grad(layer(x), inputs, direction)
        torch.testing.assert_close(
            ours, torch.autograd.grad(layer.activate(layer.normalize(x)), inputs, direction)
        )
        assert torch.equal(direction, before)


def test_a_layer_leaves_the_inputs_gradient_out_where_none_is_asked():
    layer = NormAct2d(8, "ln", act_layer="silu")
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    layer(x).sum().backward()
    assert x.grad is None and all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("norm", ["ln", "gn", "in", "bn"])
@pytest.mark.parametrize("activation", ["relu", "silu", "elu"])
def test_create_graph_changes_no_gradient_of_a_layer_used_twice(activation, norm):
    layer = NormAct2d(8, norm, act_layer=activation).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    wanted, found = (
        torch.autograd.grad(layer(layer(x)), [x, *layer.parameters()], grad, create_graph=again)
        for again in (False, True)
    )
    for one, other in zip(wanted, found):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("norm", ["ln", "bn"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "elu"])
def test_batched_backward(activation, norm):
    layer = NormAct2d(8, norm, act_layer=activation).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(3, *x.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(layer(x), x, grads, is_grads_batched=True)
    torch.testing.assert_close(
        batched, torch.stack([torch.autograd.grad(layer(x), x, grad)[0] for grad in grads])
    )


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_recompute_of_a_frozen_layer_whose_output_is_changed_in_place(activation):
    norm = NormAct2d(8, act_layer=activation).requires_grad_(False)
    net = nn.Sequential(norm, nn.Dropout(0.5, inplace=True), nn.Conv2d(8, 8, 1))
    x, found = torch.randn(2, 8, 4, 4), []
    for change in (lambda net: net, recompute):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(change(net)(x).square().sum(), net[2].weight)[0])
    torch.testing.assert_close(found[1], found[0])


def test_recompute_after_an_interrupt_begins_anew():
    net, x = recompute(network("silu", "ln")), torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = net[4].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            net(x)
    hook.remove()
    net(x)
    assert not is_recomputing()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_recompute_keeps_no_input_after_backward(activation):
    net = recompute(
        nn.Sequential(nn.Conv2d(8, 8, 1), NormAct2d(8, act_layer=activation), nn.Conv2d(8, 8, 1))
    )
    seen = []
    net[1].register_forward_pre_hook(lambda layer, inputs: seen.append(weakref.ref(inputs[0])))
    loss = net(torch.randn(2, 8, 4, 4)).sum()
    loss.backward()
    assert seen[0]() is None


def test_recompute_beside_sparse_and_inference_tensors():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.weight = NormAct2d(8), nn.Parameter(torch.randn(5, 3))

        def forward(self, x, a):
            return self.norm(x).sum() + torch.sparse.mm(a, self.weight).sum()

    with torch.inference_mode():
        x = torch.randn(2, 8, 4, 4)
    recompute(Net())(x.clone(), torch.eye(5).to_sparse()).backward()
    recompute(nn.Sequential(NormAct2d(8).requires_grad_(False), nn.Conv2d(8, 8, 1)))(
        x
    ).sum().backward()
