"""convert tells activations, gates and linear calls apart; in-place operations behind a norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from proxynorm import conversion_report, convert, freeze
from proxynorm.nn import NormAct2d


class Behind(nn.Module):
    """A convolution, a norm, `function`, and another convolution."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LazyConv2d(4, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.function = function
        self.level, self.images = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, 3, 8, 8))
        self.placed = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.train()(torch.randn(2, 3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.placed(self.last(self.behind(self.bn(self.conv(x)))))

    def behind(self, y: torch.Tensor) -> torch.Tensor:
        return self.function(y) if isinstance(self.function, nn.Module) else self.function(self, y)


class BehindAFunction(Behind):
    """Like Behind, but its function takes only the norm's value."""

    def behind(self, y: torch.Tensor) -> torch.Tensor:
        return self.function(y)


def times_itself(z: torch.Tensor) -> torch.Tensor:
    return z * z


def squashed(z: torch.Tensor) -> torch.Tensor:
    return z


IMAGES = torch.randn(2, 3, 8, 8)  # what every Behind can take

BY_HAND = {
    "silu": lambda m, y: y * torch.sigmoid(y),
    "silu_in_a_method": lambda m, y: y.sigmoid().mul(y),
    "hard_swish": lambda m, y: y * F.relu6(y + 3) / 6,
    "elu": lambda m, y: torch.where(y > 0, y, torch.expm1(y)),
    "glu": lambda m, y: y[:, :4] * y[:, 4:].sigmoid(),
    "square": lambda m, y: y.square(),
    "squared_relu": lambda m, y: F.relu(y) ** 2,
    "relu_times_itself": lambda m, y: times_itself(F.relu(y)),
    "softmax_of_itself": lambda m, y: y * y.softmax(1),
    "clip": lambda m, y: torch.clip(y, 0, 6),
    "max": lambda m, y: torch.max(y, torch.zeros_like(y)),
    "max_with_a_tensor": lambda m, y: torch.maximum(y, torch.tensor(0.1)),
    "max_with_a_parameter": lambda m, y: torch.max(y, m.level),
    "softplus_with_a_tensor": lambda m, y: torch.logaddexp(y, torch.zeros(1)),
    "hypot_with_a_parameter": lambda m, y: torch.hypot(y, m.level) + y,
    "with_another_value": lambda m, y: torch.logaddexp(y, m.conv(m.images)),
    "where_with_a_tensor": lambda m, y: torch.where(y > m.level, y, m.level),
    "product_by_another_name": lambda m, y: torch.multiply(y, y),
    "product_behind_a_sum_with_a_parameter": lambda m, y: (
        y * (y + m.level).mean((2, 3), keepdim=True)
    ),
    "one_over_it": lambda m, y: m.conv(m.images) / (y + m.level),
    "special": lambda m, y: y * torch.special.ndtr(y),
    "logit": lambda m, y: torch.special.expit(y) * m.level,
    "standardized": lambda m, y: y / y.std((2, 3), keepdim=True),
    "rounded_quotient": lambda m, y: torch.div(y, 2, rounding_mode="floor"),
    "relu_of_a_scaled_value": lambda m, y: F.relu(y * m.level + m.level),
    "relu_of_a_centred_value": lambda m, y: F.relu(y - y.mean((2, 3), keepdim=True)),
    "cdist": lambda m, y: torch.cdist(y, y),
    "rank": lambda m, y: y.argsort(1).float(),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_activation_by_hand_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot place bn \(BatchNorm2d\).*keep=\['bn'") as caught:
        convert(Behind(BY_HAND[name]), example_inputs=IMAGES)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("name", ["clip", "square", "with_another_value", "rounded_quotient"])
def test_an_activation_by_hand_of_a_norm_whose_weight_starts_at_0_is_refused(name: str) -> None:
    model = Behind(BY_HAND[name])
    nn.init.zeros_(model.bn.weight)
    with pytest.raises(ValueError, match=r"cannot place bn \(BatchNorm2d\)"):
        convert(model, example_inputs=IMAGES)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("kept", [0.0, 2.0])
def test_a_branch_that_is_dropped_while_observed(weight: float, kept: float) -> None:
    """Its norm has no activation, whatever the draw and the norm's weight."""
    model = Behind(lambda m, y: (y * kept if m.training else y) + m.conv(m.images))
    nn.init.constant_(model.bn.weight, weight)
    assert not convert(model, example_inputs=IMAGES).bn.proxied


def test_a_refusal_names_norm_function_and_forward() -> None:
    said = (
        r"cannot place bn \(BatchNorm2d\): .* \(add, logaddexp at .*test_followers\.py:\d+\), "
        "since logaddexp is not linear"
    )
    with pytest.raises(ValueError, match=said):
        convert(Behind(lambda m, y: torch.logaddexp(y + m.level, torch.zeros(1))))


def test_a_value_that_no_torch_function_takes_in_the_end_is_refused() -> None:
    def by_numpy(m: Behind, y: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy((y + 1).detach().numpy().clip(0))

    with pytest.raises(ValueError, match="cannot place bn .*no torch function was seen to take"):
        convert(Behind(by_numpy))


def test_a_norm_behind_a_norm() -> None:
    model = convert(Behind(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())))
    assert not model.bn.proxied and model.function[0].proxied


class Undecided(nn.Module):
    """Its branch depends on the data; `inner` may be anything."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.relu(x)) if x.sum() > 0 else self.inner(x)


@pytest.mark.parametrize("inner", [nn.Identity(), nn.Conv2d(8, 8, 1)])
def test_a_branch_that_depends_on_the_value_is_refused(inner: nn.Module) -> None:
    reason = "feeds an activation and something else|gt is not linear"
    with pytest.raises(ValueError, match=f"cannot place bn .*({reason})"):
        convert(Behind(Undecided(inner)))


LINEAR = {
    "layer_scale": lambda m, y: m.gate[1](F.relu(m.last_but_one(y) * m.level)) + y * m.level,
    "shape_of_it": lambda m, y: (
        F.relu(m.gate[1](y).reshape(y.size(0), y.shape[1], 6, 6)).view_as(y) + y
    ),
    "mask": lambda m, y: torch.where(torch.rand_like(y) > 0.5, y, 0.0),
    "drop_path": lambda m, y: y * y.new_empty(y.size(0), 1, 1, 1).bernoulli_(0.9).div_(0.9),
    "mean": lambda m, y: (y - y.mean((2, 3), keepdim=True)).transpose(2, 3).mT / 2,
    "largest": lambda m, y: y.amax((2, 3), keepdim=True).max(2, keepdim=True).values,
    "normalized": lambda m, y: F.normalize(y),
    "helper": lambda m, y: squashed(y),
    "efficient_channel_attention": lambda m, y: (
        y * m.gate[2](m.gate[1](y.mean((2, 3), keepdim=True))).expand_as(y)
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_is_passed(name: str) -> None:
    model = Behind(lambda m, y: y)
    model.last_but_one, model.function = nn.Conv2d(8, 8, 1), LINEAR[name]
    convert(model, example_inputs=IMAGES)
    assert not model.bn.proxied and model.placed[1].proxied


def test_a_sigmoid_that_gates_nothing_is_refused() -> None:
    for function in (
        nn.Sigmoid(),
        lambda m, y: F.hardsigmoid(y),
        lambda m, y: F.max_pool2d(y.sigmoid(), 2),
    ):
        with pytest.raises(ValueError, match=r"cannot place bn .*gates no other value"):
            convert(Behind(function))


class HardSigmoidByHand(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(x + 3) / 6


GATES = {
    "squeeze_excite": lambda m, y: y * m.gate(y),
    "interpolated": lambda m, y: m.gate[1](y) * F.interpolate(y.sigmoid(), scale_factor=1),
    "complement": lambda m, y: m.gate[1](y) * (1 - torch.sigmoid(y)),
    "by_hand": lambda m, y: m.gate[1](y) * m.spare(y),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_no_activation(name: str) -> None:
    model = Behind(lambda m, y: y)
    model.function, model.spare = GATES[name], HardSigmoidByHand()
    convert(model)
    assert not model.bn.proxied and model.bn.bias is None and model.placed[1].proxied


class Swish(nn.Module):
    """A class of a known name, but with a slope."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.slope * x)


class StarReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.relu = (
            nn.Parameter(torch.ones(1)),
            nn.Parameter(torch.zeros(1)),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.relu(x) ** 2 + self.shift


class SiLU(nn.Module):
    """The same as torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class ByHand(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, torch.expm1(x))


@pytest.mark.parametrize(
    "act, name",
    [
        (Swish(2.0), "callable"),
        (StarReLU(), "callable"),
        (SiLU(), "silu"),
        (ByHand(), "callable"),
        (nn.LogSigmoid(), "callable"),
        (nn.Threshold(0.5, 0.1), "callable"),
    ],
)
def test_a_module_that_acts_on_each_element_is_an_activation(act: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    original = Behind(act).double()
    for tensor in (original.bn.weight, original.bn.bias):
        nn.init.uniform_(tensor, 0.5, 1.5)
    model = convert(copy.deepcopy(original), "bn")
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(images), original(images), rtol=1e-9, atol=1e-9)
    model = convert(original, "ln_pn").float()
    assert (
        model.bn.proxied and model.bn.act_name == name and isinstance(model.function, nn.Identity)
    )
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.bn.parameters())
    rows = {row.module: row.action for row in conversion_report(model)}
    assert rows["bn"] == f"LN + {type(act).__name__} + PN"


class Centre(nn.Module):
    """Not elementwise, though without weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean((2, 3), keepdim=True)


class Halve(nn.Module):
    """Elementwise, but linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


@pytest.mark.parametrize("module", [Centre(), Halve()])
def test_other_modules_without_weights_are_no_activations(module: nn.Module) -> None:
    assert not convert(Behind(module)).bn.proxied


@pytest.mark.parametrize(
    "function, place",
    [
        (F.logsigmoid, nn.LogSigmoid),
        (F.tanhshrink, nn.Tanhshrink),
        (F.softshrink, nn.Softshrink),
        (lambda y: F.hardshrink(y, 0.3), nn.Hardshrink),
        (lambda y: F.threshold(input=y, threshold=0.1, value=0.2), nn.Threshold),
    ],
)
def test_functions_with_a_module_of_their_own(function, place: type[nn.Module]) -> None:
    model = BehindAFunction(function).double()
    twin, images = convert(copy.deepcopy(model), "bn"), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert isinstance(twin.bn.act, place)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-9, atol=1e-9)


class ByMethod(Behind):
    def behind(self, y: torch.Tensor) -> torch.Tensor:
        return F.silu(y).add_(1.0)


class ByOperator(Behind):
    def behind(self, y: torch.Tensor) -> torch.Tensor:
        y = F.silu(y)
        y += 1.0
        return y


class ByActivation(Behind):
    def behind(self, y: torch.Tensor) -> torch.Tensor:
        return F.relu(F.silu(y).flatten(2), inplace=True).unflatten(2, (6, 6))


class ByUnknownFunction(Behind):
    def behind(self, y: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.stochastic_depth(F.silu(y), 0.0, "row").mul_(2.0)


@pytest.mark.parametrize("kind", [ByMethod, ByOperator, ByActivation, ByUnknownFunction])
def test_a_result_that_is_changed_in_place_can_be_trained(kind: type[Behind]) -> None:
    model = convert(kind(None), "ln_pn", IMAGES)
    rows = {row.module: row.action for row in conversion_report(model)}
    assert rows["bn"] == "LN + SiLU + PN, output copied because it is changed in place"
    images = torch.randn(2, 3, 8, 8)
    reference = copy.deepcopy(model)
    reference.bn.forward = lambda x: reference.bn.activate(reference.bn.normalize(x))
    for net in (model, reference):
        net(images).square().sum().backward()
    torch.testing.assert_close(
        model.conv.weight.grad, reference.conv.weight.grad, rtol=1e-4, atol=1e-4
    )
    frozen = freeze(model.eval())
    assert not frozen.bn._forward_hooks
    torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-4)


def test_nothing_is_copied_without_need() -> None:
    for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"):
        model = convert(torchvision.models.get_model(name), "ln_pn")
        assert not any(
            layer._forward_hooks for layer in model.modules() if isinstance(layer, NormAct2d)
        ), name


def test_the_residual_of_torchvisions_fused_blocks_can_be_trained() -> None:
    model = torchvision.models.efficientnet_v2_s(num_classes=3).features[:3]
    convert(model, "ln_pn")(torch.randn(2, 3, 32, 32)).sum().backward()


class Several(nn.Module):
    """Norms whose activation is written by hand, one over vectors, and one over maps."""

    def __init__(self) -> None:
        super().__init__()
        self.by_hand = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.one = nn.BatchNorm1d(3)
        self.used = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.used(x)
        for norm in self.by_hand:
            x = norm(x).square()
        return self.one(x.mean((2, 3)))


def test_all_refusals_come_at_once_and_patterns_keep_them() -> None:
    model = Several()
    with pytest.raises(ValueError) as caught:
        convert(model)
    for part in (
        "by_hand.0, by_hand.1, by_hand.2 (BatchNorm2d): an activation written by hand",
        "one (BatchNorm1d): it normalizes no maps",
        "keep=['by_hand.0', 'by_hand.1', 'by_hand.2', 'one']",
    ):
        assert part in str(caught.value)
    assert convert(model, keep=["by_hand.*", "one"]).used[1].proxied
    with pytest.raises(ValueError, match=r"'other\.\*', which is no norm"):
        convert(model, keep=["other.*"])


def test_hooks_are_not_lost_without_a_word() -> None:
    for name in ("bn", "function"):
        model = Behind(nn.ReLU())
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(ValueError, match="cannot place bn .*hooks .*, which would be lost"):
            convert(model)


class Positive(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return F.softplus(weight)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrized_norm_is_refused(name: str) -> None:
    model = Behind(nn.ReLU())
    parametrize.register_parametrization(model.bn, name, Positive())
    with pytest.raises(ValueError, match="cannot place bn .*parametrizations, which would be lost"):
        convert(model)
    assert parametrize.is_parametrized(model.bn, name)
    assert convert(model, keep=["bn"]).placed[1].proxied


def test_a_norm_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(
        ValueError, match="cannot place 1 .Doubled.: its class has a forward of its own"
    ):
        convert(nn.Sequential(nn.Conv2d(3, 4, 1), Doubled(4), nn.ReLU()))


def test_batch_norm_without_running_statistics_stays_so() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()
    ).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(convert(copy.deepcopy(net), "bn")(x), net(x))


def test_tied_norms_stay_tied() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()
    )
    net[3].weight = net[1].weight
    convert(net)
    assert net[3].weight is net[1].weight and net[3].bias is not net[1].bias
    net(torch.randn(2, 3, 4, 4)).sum().backward()


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="takes a network, an nn.Module, not 'resnet50'"):
        convert("resnet50")
    with pytest.raises(TypeError, match=r"keep=\['bn'\]"):
        convert(Behind(nn.ReLU()), keep="bn")
    with pytest.raises(ValueError, match="this BatchNorm2d in place, since it is a norm itself"):
        convert(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="PN has no place: no norm of this Sequential"):
        convert(nn.Sequential(nn.BatchNorm2d(3)))
