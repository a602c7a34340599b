"""create_model: every model with every norm, placement, parameter counts, equality with timm."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

from proxynorm import create_model
from proxynorm.errors import ConfigError
from proxynorm.models import MODELS
from proxynorm.models.small_resnet import PreActBlock
from proxynorm.nn import NORMS, NormAct2d

# The families, cut short where timm lets us, so that each takes every norm.
FAMILIES = {
    "resnet20v2": {"depth": 8, "width": 8},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "resnext50": {"layers": (1, 1, 1, 1)},
    "resnet50v2": {"layers": (1, 1, 1, 1)},
    "efficientnet_b0": {},
}


def layers(model: nn.Module) -> dict[str, NormAct2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NormAct2d)}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step(model: nn.Module, in_chans: int = 3, size: int = 64) -> torch.Tensor:
    """One SGD step; returns the loss after checking that everything has a finite gradient."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(
        model(torch.randn(2, in_chans, size, size)), torch.tensor([0, 1])
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()
    return loss


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_every_norm(name: str, norm: str) -> None:
    model = create_model(name, norm, num_classes=4, **FAMILIES[name])
    assert step(model).isfinite()
    assert not any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FAMILIES])
def test_every_other_model_is_built_with_pn(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, "ln_pn", num_classes=4)
    with torch.no_grad():
        logits = model.to_empty(device="cpu").eval()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 4)
    assert all(layer.proxied == layer.apply_act for layer in layers(model).values())


def test_the_efficientnet_of_our_own_trains() -> None:
    assert step(create_model("efficientnet_b0_g16", "gn_pn", num_classes=4)).isfinite()


def test_parameter_counts() -> None:
    with torch.device("meta"):
        b0, b0_pn = (count(create_model("efficientnet_b0", norm)) for norm in ("ln", "ln_pn"))
        v2, v2_pn = (count(create_model("resnet50v2", norm)) for norm in ("ln", "ln_pn"))
        small = count(create_model("resnet20v2", "bn", num_classes=10))
    assert b0 == 5_288_548 and b0_pn / b0 - 1 == pytest.approx(0.007, abs=2e-4)
    assert v2 == 25_549_352 and v2_pn / v2 - 1 == pytest.approx(0.0018, abs=5e-5)
    assert small == pytest.approx(0.27e6, rel=0.01)  # He et al., table 6


@pytest.mark.parametrize("depth, width", [(20, 16), (44, 16), (80, 4), (8, 10)])
def test_small_resnet_depth_and_width(depth: int, width: int) -> None:
    model = create_model("resnet20v2", "bn", num_classes=10, depth=depth, width=width)
    convolutions = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == depth and len(layers(model)) == depth - 1
    assert [stage[-1].conv2.out_channels for stage in model.stages] == [width, 2 * width, 4 * width]


def test_small_resnet_strides_no_1x1_convolution_of_few_channels() -> None:
    """oneDNN's backward of one writes past its memory; sampling before it gives the same."""
    block = PreActBlock(8, 16, 2, nn.BatchNorm2d)
    assert block.shortcut.stride == (1, 1)
    twin = copy.deepcopy(block)
    twin.shortcut.stride, twin.sample_stride = (2, 2), 1
    for side in (13, 14):
        x = torch.randn(2, 8, side, side)
        torch.testing.assert_close(block(x), twin(x))


@pytest.mark.parametrize("stride, side", [(1, 8), (2, 4)])
def test_small_resnet_stem_stride_and_channels(stride: int, side: int) -> None:
    model = create_model("resnet20v2", "ln_pn", num_classes=10, in_chans=1, stem_stride=stride)
    assert model.forward_features(torch.randn(2, 1, 32, 32)).shape == (2, 64, side, side)


@pytest.mark.parametrize(
    "name, timm_name, kwargs",
    [
        ("resnet50", "resnet50", {"layers": (1, 1, 1, 1)}),
        ("resnet50v2", "resnetv2_50", {"layers": (1, 1, 1, 1)}),
        ("efficientnet_b0", "efficientnet_b0", {}),
    ],
)
def test_bn_equals_timm(name: str, timm_name: str, kwargs: dict) -> None:
    model = create_model(name, "bn", num_classes=4, drop_path_rate=0.1, **kwargs).double()
    bn_eps = {"bn_eps": 1e-3} if "efficientnet" in name else {}
    other = timm.create_model(
        timm_name, num_classes=4, drop_path_rate=0.1, **bn_eps, **kwargs
    ).double()
    other.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        outputs = []
        for network in (model, other):
            torch.manual_seed(0)
            outputs.append(network.train(training)(images))
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_placement_in_v1() -> None:
    """No PN on the branch's last norm and on the shortcut's: scale, no shift."""
    model = create_model("resnet50", "ln_pn", layers=(2, 1, 1, 1))
    for name, layer in layers(model).items():
        bare = name.endswith("bn3") or "downsample" in name
        assert (
            layer.proxied != bare and (layer.bias is None) == bare and layer.weight is not None
        ), name
    assert (model.layer1[1].bn3.weight == 0).all()  # timm's zero-initialised branches stay possible


def test_placement_in_v2_is_everywhere() -> None:
    for name in ("resnet50v2", "resnet20v2"):
        model = create_model(name, "gn_pn")
        assert all(layer.proxied and (layer.weight == 1).all() for layer in layers(model).values())
        assert model.norm.proxied  # the one before pooling included


def test_placement_in_efficientnet() -> None:
    model = create_model("efficientnet_b0", "ln_pn")
    for name, layer in layers(model).items():
        projection = name.endswith("bn3") or name == "blocks.0.0.bn2"
        assert layer.proxied != projection and (layer.bias is None) == projection, name
        assert layer.eps == 1e-3 and layer.act_name == ("identity" if projection else "silu")
        deferred = (
            name == "bn2" or (name.endswith("bn2") and not projection) or name == "blocks.0.0.bn1"
        )
        assert layer.proxy_scale != deferred, name
    plain = create_model("efficientnet_b0", "ln_pn", se="plain")
    assert all(layer.proxy_scale for layer in layers(plain).values())
    assert list(model.state_dict()) == list(plain.state_dict())


def test_centred_squeeze_excite_is_the_authors_formula() -> None:
    """SE pools φ − m; the gate multiplies by 1/sqrt(v + ε)."""
    block = create_model("efficientnet_b0", "ln_pn").blocks[1][1]
    images = torch.randn(2, 144, 8, 8)
    norm, se = block.bn2, block.se
    mean, var = norm.proxy_statistics()
    activated = nn.functional.silu(norm.normalize(images) * norm.weight.view(1, -1, 1, 1))
    centred = activated - mean.view(1, -1, 1, 1)
    gate = se.conv_expand(se.act1(se.conv_reduce(centred.mean((2, 3), keepdim=True)))).sigmoid()
    expected = centred * gate / (var.view(1, -1, 1, 1) + 0.03).sqrt()
    torch.testing.assert_close(se(norm(images)), expected, rtol=1e-4, atol=1e-5)


def test_centred_squeeze_excite_survives_a_copy() -> None:
    model = create_model("efficientnet_b0", "ln_pn", num_classes=4).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(twin).values():
            layer.weight.mul_(2)
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(model(images), twin(images))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), twin(images))


@pytest.mark.parametrize("size", ["b0", "b1", "b2", "b3", "b4", "b5"])
def test_g16_groups_and_expansion(size: str) -> None:
    with torch.device("meta"):
        model = create_model(f"efficientnet_{size}_g16", "ln_pn")
    for i, stage in enumerate(model.blocks):
        for block in stage:
            inside, inputs = block.conv_dw.in_channels, next(block.children()).in_channels
            assert block.conv_dw.groups == max(inside // 16, 1)
            assert inside == (inputs if i == 0 else 4 * inputs)


def test_groups() -> None:
    assert create_model("resnet20v2", "gn").stages[0][0].norm1.groups == 4
    assert create_model("efficientnet_b0", "gn_pn").bn1.groups == 4
    assert create_model("resnet50", "gn", layers=(1, 1, 1, 1)).bn1.groups == 32
    assert create_model("resnet50", "gn", layers=(1, 1, 1, 1), groups=8).bn1.groups == 8


def test_options_reach_every_layer() -> None:
    options = {"norm_batch": 4, "proxy_eps": 0.1, "moments": "grid", "nodes": 200, "eps": 1e-4}
    for name, kwargs in (("resnet20v2", {}), ("resnet50", {"layers": (1, 1, 1, 1)})):
        for layer in layers(create_model(name, "bn_pn", **options, **kwargs)).values():
            assert {key: getattr(layer, key) for key in options} == options


@pytest.mark.parametrize("name", ["resnet20v2", "resnet50v2", "efficientnet_b0"])
def test_weight_standardization_spares_what_feeds_no_norm(name: str) -> None:
    model = create_model(name, "gn_ws")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not path.endswith("weight"):
            feeds_no_norm = ".se." in path or path == "head.fc"
            assert parametrize.is_parametrized(module) != feeds_no_norm, path


def test_any_timm_model() -> None:
    for name in ("resnet18", "timm/resnet18", "timm/resnet50"):
        kwargs = {"layers": (1, 1, 1, 1)}
        assert step(create_model(name, "ln_pn", num_classes=4, **kwargs)).isfinite()


def test_a_timm_model_without_stochastic_depth() -> None:
    assert step(create_model("densenet121", "ln_pn", num_classes=4, block_config=(1, 1))).isfinite()
    with pytest.raises(ConfigError, match="drop_path_rate"):
        create_model("densenet121", "ln_pn", num_classes=4, drop_path_rate=0.1)


def test_pretrained_weights_keep_the_eps_they_were_trained_with(tmp_path: Path) -> None:
    torch.save(
        timm.create_model("efficientnet_b0", num_classes=4).state_dict(), tmp_path / "weights.pth"
    )
    published = {"file": str(tmp_path / "weights.pth"), "num_classes": 4}
    for given, expected in ((None, 1e-5), (1e-4, 1e-4)):
        model = create_model(
            "efficientnet_b0",
            num_classes=4,
            eps=given,
            pretrained=True,
            pretrained_cfg_overlay=published,
        )
        assert {layer.eps for layer in model.modules() if isinstance(layer, NormAct2d)} == {
            expected
        }


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (
            ("resnet5O",),
            ["unknown model 'resnet5O'", "Did you mean 'resnet50'", "efficientnet_b5_g16"],
        ),
        (("resnet50", "ln_pm"), ["unknown norm 'ln_pm'", "'ln_pn'"]),
        (("resnet20v2", "ln", 10, {"depth": 21}), ["depth=21", "6n + 2"]),
        (("resnet20v2", "ln", 10, {"layer": 3}), ["layer"]),
        (("resnet50", "ln", 10, {"se": "plain"}), ["EfficientNet"]),
        (("efficientnet_b0", "ln", 10, {"se": "x"}), ["centred", "plain"]),
        (("resnet50", "gn", 10, {"groups": 7}), ["bn1", "groups=7"]),
        (("vit_tiny_patch16_224", "ln_pn"), ["nothing to convert"]),
        (("resnet20v2", "ln_pn", 10, {"proxy_eps": float("nan")}), ["proxy_eps=nan", "from 0 up"]),
        (("resnet50", "ln_pn", 10, {"eps": -1e-5}), ["eps=-1e-05", "from 0 up"]),
        (("resnet20v2", "gn", 10, {"groups": "4"}), ["groups='4'", "from 1 up"]),
        (("resnet50", "ln", 10, {"groups": 0}), ["groups=0", "from 1 up"]),
        (("resnet20v2", "ln", 10, {"in_chans": 0}), ["in_chans=0", "from 1 up"]),
        (("resnet50", "ln", 10, {"in_chans": 0}), ["in_chans=0", "from 1 up"]),
        (("resnet20v2", "ln", -1), ["num_classes=-1", "from 0 up"]),
        (("resnet18", "ln", 2.0), ["num_classes=2.0", "whole number"]),
        (("resnet20v2", "ln", 10, {"drop_rate": 1.0}), ["drop_rate=1.0", "not including, 1"]),
        (("resnet20v2", "ln", 10, {"drop_path_rate": -0.1}), ["drop_path_rate=-0.1", "from 0"]),
        (
            ("resnet50", "ln", 10, {"drop_block_rate": 1.5}),
            ["drop_block_rate=1.5", "not including, 1"],
        ),
        (
            ("resnet20v2", "ln", 10, {"pretrained": True}),
            ["pretrained=True", "no weights of this model"],
        ),
        (
            ("efficientnet_b0_g16", "bn", 10, {"pretrained": True}),
            ["pretrained=True", "no weights of this model"],
        ),
    ],
)
def test_wrong_requests_are_one_clear_line(arguments: tuple, parts: list[str]) -> None:
    kwargs = arguments[3] if len(arguments) > 3 else {}
    with pytest.raises(ConfigError) as caught:
        create_model(*arguments[:3], **kwargs)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_pixels_are_standardized_over_the_batch_before_the_stem():
    model = create_model("resnet20v2", "ln_pn", 5, depth=8, in_chans=1, standardize_pixels=8)
    images = 3 + 2 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, var = (moment(0) for moment in (model.pixels(images).mean, model.pixels(images).var))
    assert mean.abs().max() < 1e-5 and (var - 1).abs().max() < 0.05
    assert model.eval()(images).shape == (64, 5)
