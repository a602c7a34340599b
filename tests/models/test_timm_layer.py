"""NormAct2d as norm_layer= of timm's own constructors, and of torchvision's."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from proxynorm import NormAct2d, convert

SMALL = {
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
    "regnety_002": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "efficientnet_b0": {},
    "vovnet39a": {},
    "cspresnet50": {},
    "darknet53": {},
    "xception41p": {},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_constructor_and_convert_make_the_same(name: str) -> None:
    """The same parameters, activations and output, timm's own choice of activation included."""
    torch.manual_seed(0)
    built = timm.create_model(name, num_classes=5, norm_layer=NormAct2d, **SMALL[name]).eval()
    converted = convert(timm.create_model(name, num_classes=5, **SMALL[name]), "ln_pn").eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in built.modules())
    for layers in zip(
        *([m for m in net.modules() if isinstance(m, NormAct2d)] for net in (built, converted))
    ):
        layers[1].eps = layers[0].eps  # convert keeps the one that timm's model has
        assert layers[0].act_name == layers[1].act_name and layers[0].proxied == layers[1].proxied
    converted.load_state_dict(built.state_dict())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built(images), converted(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm, proxied", [("gn", True), ("bn_pn", True)])
def test_options_are_bound_by_partial(norm: str, proxied: bool) -> None:
    layer = partial(NormAct2d, norm=norm, proxy_eps=0.05)
    model = timm.create_model("regnetx_002", num_classes=5, norm_layer=layer).train()
    layers = [module for module in model.modules() if isinstance(module, NormAct2d)]
    assert {(module.kind, module.proxy_eps) for module in layers} == {(norm[:2], 0.05)}
    assert any(module.proxied for module in layers) == proxied
    model(torch.randn(2, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "xception41"])
def test_constructors_with_an_activation_of_their_own_are_refused(name: str) -> None:
    for layer in (NormAct2d, partial(NormAct2d, norm="gn")):
        with pytest.raises(
            ValueError,
            match=r"timm\.models\.\w+ has an activation of its own .* proxynorm\.convert",
        ):
            timm.create_model(name, norm_layer=layer)


def test_torchvisions_constructors_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"torchvision\.models\.resnet has an activation of its own"
    ):
        torchvision.models.resnet18(norm_layer=NormAct2d)


def test_a_norm_alone_serves_those_constructors() -> None:
    model = timm.create_model(
        "resnet18", num_classes=5, norm_layer=partial(NormAct2d, norm="gn", apply_act=False)
    )
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()


def test_the_public_name_is_nns_class_known_to_timm() -> None:
    code = """
import proxynorm.nn, timm.layers
plain, known = proxynorm.nn.NormAct2d, proxynorm.NormAct2d
assert plain is known
assert timm.layers.get_norm_act_layer(known, "silu")(3).act_name == "silu"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
