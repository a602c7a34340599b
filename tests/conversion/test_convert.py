"""convert on timm's and torchvision's ConvNets: only activations behind norms are removed."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BlurPool2d
from torch import nn

from proxynorm import conversion_report, convert
from proxynorm.nn import NormAct2d
from tests.helpers import with_random_norms

TIMM = {
    "resnet26d": {},  # deep stem, average-pool shortcuts
    "resnet26": {"drop_block_rate": 0.2, "aa_layer": BlurPool2d, "drop_path_rate": 0.1},
    "seresnet50": {"layers": (1, 1, 1, 1)},
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
    "mobilenetv3_small_050": {},
    "regnety_002": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "dla34": {},  # optional tensors among the arguments of the rewritten forward
    "cspresnet50": {},
    "skresnet18": {},
    "ecaresnet26t": {
        "layers": (1, 1, 1, 1)
    },  # a gate without an activation between, expanded like the norm's value
}
TORCHVISION = {
    "resnet18": {},
    "resnext50_32x4d": {},  # one ReLU, called three times
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "densenet121": {},  # a functional ReLU in the root's forward
    "shufflenet_v2_x0_5": {},
    "regnet_y_400mf": {},
    "efficientnet_b0": {},
    "googlenet": {"init_weights": False, "aux_logits": False},
}


def network(library: str, name: str, kwargs: dict) -> nn.Module:
    """A network with random weights, norms included, in float64."""
    torch.manual_seed(0)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    return with_random_norms(make(name, num_classes=5, **kwargs).double())


def outputs(model: nn.Module, size: int = 64) -> list[torch.Tensor]:
    """The output in training and in evaluation mode; running statistics move in between."""
    results = []
    for training in (True, False):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(
                model.train(training)(torch.randn(2, 3, size, size, dtype=torch.float64))
            )
    return results


def assert_same_outputs(first: nn.Module, second: nn.Module, size: int = 64) -> None:
    for a, b in zip(outputs(first, size), outputs(second, size)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "library, name", [("timm", n) for n in TIMM] + [("torchvision", n) for n in TORCHVISION]
)
def test_bn_computes_what_the_original_did(library: str, name: str) -> None:
    original = network(library, name, (TIMM if library == "timm" else TORCHVISION)[name])
    model = copy.deepcopy(original)
    assert convert(model, "bn") is model and type(model).__name__ == type(original).__name__
    assert list(model.state_dict()) == list(original.state_dict())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert_same_outputs(model, original)
    convert(model, "ln_pn")
    assert outputs(model)[1].isfinite().all() and any(
        m.proxied for m in model.modules() if isinstance(m, NormAct2d)
    )


class SharedAct(nn.Module):
    """One in-place ReLU: behind a norm, and behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + x) * scale


class DiscardedAct(nn.Module):
    """An in-place activation whose result is discarded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        self.act(x)
        return 2 * x


class FunctionalAct(nn.Module):
    """Functional activations with arguments, one of them in place, and an activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv3, self.bn3, self.act3 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act3(self.bn3(F.leaky_relu(self.conv1(x), 0.5).roll(1, 1)))
        x = F.leaky_relu(self.bn1(x), 0.2, inplace=True)
        x = F.dropout(x, 0.5, training=self.training)
        return torch.tanh(self.bn2(self.conv2(x)))


def shared_in_sequential() -> nn.Module:
    """One ReLU at three places of a Sequential, the last one behind a convolution."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        relu,
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        relu,
        nn.Conv2d(8, 8, 1),
        relu,
    )


def with_things_between() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout2d(0.2),
        nn.Identity(),
        BlurPool2d(8, stride=2),
        nn.SiLU(),
    )


@pytest.mark.parametrize(
    "make, placed",
    [
        (SharedAct, {"bn1": "ReLU", "bn2": None}),
        (DiscardedAct, {"bn": "ReLU"}),
        (FunctionalAct, {"bn1": "LeakyReLU", "bn2": "Tanh", "bn3": "ReLU"}),
        (shared_in_sequential, {"1": "ReLU", "4": "ReLU"}),
        (with_things_between, {"1": "SiLU"}),
    ],
)
def test_activations_in_every_guise(make, placed: dict[str, str | None]) -> None:
    torch.manual_seed(0)
    original = with_random_norms(make().double())
    model = convert(copy.deepcopy(original), "bn")
    assert_same_outputs(model, original, size=16)
    found = {
        n: type(m.act).__name__
        for n, m in model.named_modules()
        if isinstance(m, NormAct2d) and m.apply_act
    }
    assert found == {name: act for name, act in placed.items() if act}


def test_the_activation_behind_a_sum_stays() -> None:
    model = convert(SharedAct(), "ln_pn").eval()
    assert (model(torch.randn(2, 3, 16, 16)) >= 0).all()
    assert model(torch.randn(2, 3, 16, 16), 1.0).shape == (2, 8, 14, 14)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images, 2.0), 2 * model(images))


@pytest.mark.parametrize("make", [SharedAct, FunctionalAct, lambda: torchvision.models.resnet18()])
def test_rewritten_modules_copy_pickle_and_keep_their_class(make) -> None:
    original = make()
    kind = type(original)
    model = convert(original, "ln_pn").eval()
    assert model is original and isinstance(model, kind)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(copy.deepcopy(model)),
    ):
        torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)
        assert conversion_report(twin) == conversion_report(model)


def test_rewritten_modules_compile() -> None:
    model = convert(SharedAct(), "ln_pn")
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(x)
        return self.block(F.relu(x) if x.sum() > 0 else x)


class TwoUses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.spare = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) + x


class BehindJoin(TwoUses):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        return F.relu(torch.cat([x, x], 1))


class InDisguise(TwoUses):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).clamp(min=0)


class Unused(TwoUses):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    "kind, name, reason",
    [
        (DataDependent, "bn", "feeds an activation and something else"),
        (TwoUses, "bn", "something else as well"),
        (BehindJoin, "bn", "cat"),
        (InDisguise, "bn", "clamp"),
    ],
)
def test_refusal_names_the_module_and_changes_nothing(kind: type, name: str, reason: str) -> None:
    model = kind().eval()
    original = copy.deepcopy(model)
    with pytest.raises(ValueError) as caught:
        convert(model)
    message = str(caught.value)
    assert (
        f"cannot place {name} (BatchNorm2d)" in message
        and reason in message
        and f"keep=['{name}']" in message
    )
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), original(images), rtol=0, atol=0)


def test_a_norm_that_never_runs_is_left_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="leaves spare of this Unused as it is: no call"):
        model = convert(Unused())
    assert isinstance(model.spare, nn.BatchNorm2d) and model.bn.proxied
    rows = {row.module: row.action for row in conversion_report(model)}
    assert rows["spare"].startswith("left as it is: no call of it was seen")


def test_keep_leaves_a_norm_alone() -> None:
    model = convert(DataDependent(), "ln_pn", keep=["bn"])
    assert isinstance(model.bn, nn.BatchNorm2d) and model.block[1].proxied
    with pytest.raises(ValueError, match="'nothing_such', which is no norm"):
        convert(DataDependent(), keep=["nothing_such"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("convnext_atto", "nothing to convert: this ConvNeXt"),
        ("repvgg_a0", "PN has no place"),
        ("levit_128s", "normalizes no maps"),
    ],
)
def test_networks_without_a_place_for_pn(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(timm.create_model(name), "ln_pn")


def test_wrong_norm() -> None:
    with pytest.raises(ValueError, match="'ln_pn'"):
        convert(SharedAct(), "ln_pm")


@pytest.mark.parametrize(
    "option",
    [
        {"groups": 0},
        {"groups": "4"},
        {"eps": -1.0},
        {"proxy_eps": float("nan")},
        {"norm_batch": 0},
        {"nodes": 0},
    ],
)
def test_wrong_options_are_no_module_s_fault(option: dict) -> None:
    model = SharedAct()
    with pytest.raises(ValueError, match=f"^{next(iter(option))}") as caught:
        convert(model, "gn_pn", **option)
    assert repr(next(iter(option.values()))) in str(caught.value) and isinstance(
        model.bn1, nn.BatchNorm2d
    )


def test_parameters_statistics_and_modes_are_carried_over() -> None:
    original = with_random_norms(torchvision.models.resnet18()).eval()
    original.bn1.momentum, original.bn1.eps = 0.03, 1e-4
    original.layer1[0].bn1.weight.requires_grad_(False)
    before = copy.deepcopy(original.state_dict())
    model = convert(original, "bn_pn")
    after = model.state_dict()
    for key, value in before.items():
        if key.endswith(("bn2.bias", "downsample.1.bias")):
            assert key not in after  # no activation behind: the shift is dropped
        else:
            torch.testing.assert_close(after[key], value, rtol=0, atol=0)
    assert (model.bn1.momentum, model.bn1.eps, model.bn1.training) == (0.03, 1e-4, False)
    assert not model.layer1[0].bn1.weight.requires_grad
    assert (
        convert(torchvision.models.resnet18().half(), "bn").bn1.running_mean.dtype == torch.float32
    )


def test_zero_initialised_scale_under_pn_is_set_to_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.zeros_(model[1].weight)
    assert (convert(copy.deepcopy(model), "ln_pn")[1].weight == 1).all()
    assert (convert(copy.deepcopy(model), "ln")[1].weight == 0).all()


def test_group_norms_are_converted_too() -> None:
    model = convert(timm.create_model("resnetv2_50x1_bit", num_classes=5), "gn_pn")
    assert all(layer.groups == 32 for layer in model.modules() if isinstance(layer, NormAct2d))
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())


def test_gates_are_no_activations() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.gate = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sigmoid()
            self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x * self.gate(self.bn(self.conv(x))))

    model = convert(Gated(), "ln_pn")
    assert not model.bn.proxied and model.block[1].proxied


def test_report() -> None:
    model = convert(torchvision.models.resnet18(), "ln_pn")
    report = conversion_report(model)
    rows = {row.module: (row.kind, row.action) for row in report}
    assert rows["bn1"] == ("BatchNorm2d", "LN + ReLU + PN")
    assert rows["layer1.0.bn2"] == (
        "BatchNorm2d",
        "LN, no activation behind it: scale kept, shift dropped",
    )
    assert rows["relu"] == ("ReLU", "joined with its norm; replaced by the identity")
    assert rows["layer1.0"] == ("BasicBlock", "1 activation call of its forward joined with norms")
    table = str(report).splitlines()
    assert table[0].split() == ["module", "kind", "action"]
    assert len({line.index("BatchNorm2d") for line in table if "BatchNorm2d" in line}) == 1
    with pytest.raises(ValueError, match="was not converted"):
        conversion_report(torchvision.models.resnet18())


def silu_instead(block, x):
    return F.silu(block.bn1(block.conv1(x)))


@pytest.mark.parametrize("name", ["bn1", "relu", "layer1.0", ""])
def test_a_forward_set_on_an_object_is_refused_by_name(name):
    net = torchvision.models.resnet18()
    module = net.get_submodule(name)
    module.forward = type(module).forward.__get__(module)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=f"a forward was set on the object {name or 'the model itself'}, "
    ):
        convert(net, "ln_pn")
    assert isinstance(net.bn1, nn.BatchNorm2d) and list(net.state_dict()) == list(state)


def test_a_forward_set_on_a_convolution_is_no_hindrance():
    net = torchvision.models.resnet18()
    net.conv1.forward = type(net.conv1).forward.__get__(net.conv1)
    assert isinstance(convert(net, "ln_pn").bn1, NormAct2d)


class Behind(nn.Module):
    """Two norms: a ReLU behind the first, `behind` behind the second."""

    def __init__(self, behind):
        super().__init__()
        self.n1, self.c, self.n2, self.behind = (
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            behind,
        )

    def forward(self, x):
        return self.behind(self.n2, self.c(torch.relu(self.n1(x))))


@pytest.mark.parametrize(
    "behind",
    [
        lambda n, x: torch.atan(n(x)),
        lambda n, x: torch.hypot(*2 * (n(x),)),
        lambda n, x: 1 / (n(x) + 20),
        lambda n, x: n(x).reciprocal(),
        lambda n, x: n(x) % 1,
        lambda n, x: torch.round(n(x)),
        lambda n, x: torch.tan(n(x)).sum(),
    ],
)
def test_further_curves_written_by_hand_are_refused(behind):
    with pytest.raises(ValueError, match=r"n2.*(written by hand|cannot be joined)"):
        convert(Behind(behind), "ln_pn")


@pytest.mark.parametrize(
    "behind",
    [
        lambda n, x: n(x) / 2,
        lambda n, x: 3 * n(x) - 1,
        lambda n, x: n(x).mean((2, 3)),
        lambda n, x: torch.nan_to_num(n(x)),
    ],
)
def test_what_is_linear_is_none(behind):
    assert convert(Behind(behind), "ln_pn").n2.act_name != "relu"


def test_a_norm_may_be_called_by_keyword():
    class ByKeyword(Behind):
        def forward(self, x):
            return torch.relu(self.n2(input=self.c(torch.relu(self.n1(x)))))

    original = ByKeyword(None).eval()
    model, x = convert(copy.deepcopy(original), "bn"), torch.randn(2, 3, 8, 8)
    assert model.n2.act_name == "relu"
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("activation", [nn.PReLU, nn.ReLU])
def test_an_activation_under_two_names(activation):
    shared = activation()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), shared, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), shared
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    wanted = model(x)
    torch.testing.assert_close(convert(model, "bn")(x), wanted)
    assert [row.module for row in conversion_report(model)] == ["1", "2", "4", "5"]
    assert (model[1].act is model[4].act) == (
        activation is nn.PReLU
    )  # parameters that were shared stay shared
    assert not any(module.training for module in model.modules())
