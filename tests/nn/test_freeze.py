"""freeze: the same function with constants folded, and its ONNX export."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from proxynorm import convert, create_model, freeze
from proxynorm.nn import NORMS, NormAct2d
from proxynorm.nn.freeze import FrozenNormAct2d
from tests.helpers import need_module

MODELS = {"resnet20v2": {"depth": 8}, "resnet50": {"layers": (1, 1, 1, 1)}, "resnet50v2": {"layers": (1, 1, 1, 1)},
          "efficientnet_b0": {}}  # fmt: skip


def trained_like(model: nn.Module) -> nn.Module:
    """Random parameters in every norm, and the running statistics of one batch."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, NormAct2d):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.4, 0.4), ("proxy_weight", -0.3, 0.3),
                                    ("proxy_bias", -0.3, 0.3)):  # fmt: skip
                if getattr(layer, name) is not None:
                    nn.init.uniform_(getattr(layer, name), low, high)
            layer.momentum = 1.0
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64, dtype=dtype))
    return model.eval()


def frozen_layers(model: nn.Module) -> list[FrozenNormAct2d]:
    return [module for module in model.modules() if isinstance(module, FrozenNormAct2d)]


@pytest.mark.parametrize("name, norm, merge", [
    *(("resnet20v2", norm, merge) for norm in NORMS for merge in ("fast", "full")),
    *((name, "ln_pn", merge) for name in list(MODELS)[1:] for merge in ("fast", "full")),
    *((name, "bn_pn", "full") for name in list(MODELS)[1:]), ("resnet50", "bn", "fast"),
])  # fmt: skip
def test_frozen_equals_the_model(name: str, norm: str, merge: str) -> None:
    model = trained_like(create_model(name, norm, num_classes=5, **MODELS[name]).double())
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    frozen = freeze(model, merge)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-8, atol=1e-8)
    assert not any(isinstance(module, NormAct2d) for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters()) and not frozen.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_is_left_of_pn() -> None:
    """ReLU: a floor at most; SiLU before a padded convolution: the mean; nothing before 1×1 convolutions."""
    v2 = freeze(create_model("resnet50v2", "ln_pn", layers=(1, 1, 1, 1)), merge="full")
    for name, layer in v2.named_modules():
        if isinstance(layer, FrozenNormAct2d):
            assert (layer.floor is not None) == name.endswith("norm2") and layer.gain is layer.offset is None, name
    fast = freeze(create_model("resnet50v2", "ln_pn", layers=(1, 1, 1, 1)))
    assert all(layer.gain is layer.offset is None for layer in frozen_layers(fast))
    b0 = freeze(create_model("efficientnet_b0", "ln_pn"))
    for name, layer in b0.named_modules():
        if isinstance(layer, FrozenNormAct2d):
            before_depthwise = name == "bn1" or (name.endswith("bn1") and not name.startswith("blocks.0"))
            assert (layer.offset is not None) == before_depthwise and layer.gain is layer.floor is None, name


def test_batch_norm_is_folded_into_its_convolution() -> None:
    frozen = freeze(trained_like(create_model("resnet50", "bn", layers=(1, 1, 1, 1))))
    assert {layer.kind for layer in frozen_layers(frozen)} == {"folded"}
    assert isinstance(frozen.layer1[0].bn3, nn.Identity) and frozen.layer1[0].conv3.bias is not None
    pre_activation = freeze(create_model("resnet50v2", "bn", layers=(1, 1, 1, 1)))
    assert pre_activation.stages[0].blocks[0].norm1.kind == "bn"  # behind a pool, no convolution to fold into


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.3), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Tanh()])
@pytest.mark.parametrize("convolution", [
    {"kernel_size": 1}, {"kernel_size": 1, "groups": 4, "stride": 2}, {"kernel_size": 1, "padding": 1},
    {"kernel_size": 3, "padding": 1, "groups": 8}, {"kernel_size": 3}, {"kernel_size": 3, "padding": "same"},
])  # fmt: skip
def test_merging_is_exact(act: nn.Module, convolution: dict) -> None:
    for out_channels, bias in ((8, False), (16, True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct2d(8, "ln_pn", act_layer=act),
                              nn.Conv2d(8, out_channels, bias=bias, **convolution))  # fmt: skip
        model = trained_like(model.double())
        images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
        for merge in ("fast", "full"):
            torch.testing.assert_close(freeze(model, merge)(images), model(images), rtol=1e-10, atol=1e-10)


def test_a_value_with_two_uses_is_not_merged() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = NormAct2d(3, "ln_pn", act_layer="silu"), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.norm(x)
            return self.conv(z) + z

    model = trained_like(Residual().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    frozen = freeze(model, "full")
    torch.testing.assert_close(frozen(images), model(images), rtol=1e-10, atol=1e-10)
    assert frozen.norm.gain is not None


def test_a_layer_called_twice_is_not_merged() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = NormAct2d(3, "bn_pn"), NormAct2d(3, "ln_pn", act_layer="silu")
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.second(self.conv(self.first(self.conv(x)))))

    model = trained_like(Twice().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(freeze(model, "full")(images), model(images), rtol=1e-10, atol=1e-10)


def test_converted_networks_freeze() -> None:
    """torchvision's, with rewritten forwards, an untraceable part and dropout between norm and activation."""

    class Untraceable(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if x.sum() < 1e9 else x

    model = convert(torchvision.models.resnet18(num_classes=5), "bn_pn")
    model.layer3 = Untraceable(model.layer3)
    model.bn1.drop = nn.Dropout2d(0.5)
    model = trained_like(model.double())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model)(images), model(images), rtol=1e-8, atol=1e-8)


def test_gradients_to_the_input_still_flow() -> None:
    model = trained_like(create_model("resnet20v2", "bn_pn", depth=8, num_classes=5).double())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(images).sum(), images)[0]
    torch.testing.assert_close(torch.autograd.grad(freeze(model)(images).sum(), images)[0], expected)


def test_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match="no NormAct2d"):
        freeze(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="'fast' nor 'full'"):
        freeze(create_model("resnet20v2"), merge="all")


def start_of_efficientnet(norm: str) -> nn.Module:
    """Stem and two blocks, with and without expansion."""
    model = create_model("efficientnet_b0", norm)
    return nn.Sequential(model.conv_stem, model.bn1, model.blocks[0], model.blocks[1][:1])


@need_module("onnxruntime")
@need_module("onnxscript")
@pytest.mark.parametrize("make", [
    lambda: create_model("resnet20v2", "ln_pn", depth=8), lambda: create_model("resnet20v2", "bn_pn", depth=8),
    lambda: start_of_efficientnet("gn_pn"),
])  # fmt: skip
def test_onnx_runtime_computes_the_same(make, tmp_path: Path) -> None:
    import onnxruntime

    model = trained_like(make())
    images = torch.randn(2, 3, 64, 64)
    path = str(tmp_path / "model.onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(freeze(model, "full"), (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
