"""freeze: the same function with constants folded, and its ONNX export."""

from __future__ import annotations

import copy
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from proxynorm import convert, create_model, freeze
from proxynorm.nn import ACTIVATIONS, NORMS, NormAct2d, norms, recompute
from proxynorm.nn.freeze import FrozenNormAct2d
from proxynorm.nn.norms import NormSpec, affine
from tests.helpers import need_module

MODELS = {
    "resnet20v2": {"depth": 8},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "resnet50v2": {"layers": (1, 1, 1, 1)},
    "efficientnet_b0": {},
}


def trained_like(model: nn.Module) -> nn.Module:
    """Random parameters in every norm, and the running statistics of one batch."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, NormAct2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.4, 0.4),
                ("proxy_weight", -0.3, 0.3),
                ("proxy_bias", -0.3, 0.3),
            ):
                if getattr(layer, name) is not None:
                    nn.init.uniform_(getattr(layer, name), low, high)
            layer.momentum = 1.0
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64, dtype=dtype))
    return model.eval()


@torch.no_grad()
def assert_same(model: nn.Module, frozen: nn.Module, x: torch.Tensor) -> None:
    """Assert that the frozen copy computes the same as the model."""
    torch.testing.assert_close(frozen(x.clone()), model(x), atol=1e-4, rtol=1e-4)


def frozen_layers(model: nn.Module) -> list[FrozenNormAct2d]:
    return [module for module in model.modules() if isinstance(module, FrozenNormAct2d)]


def start_of_efficientnet(norm: str) -> nn.Module:
    """Stem and two blocks, with and without expansion."""
    model = create_model("efficientnet_b0", norm)
    return nn.Sequential(model.conv_stem, model.bn1, model.blocks[0], model.blocks[1][:1])


@pytest.mark.parametrize(
    "name, norm",
    [
        *(("resnet20v2", norm) for norm in NORMS),
        *((name, norm) for name in list(MODELS)[1:] for norm in ("ln_pn", "bn_pn")),
        ("resnet50", "bn"),
    ],
)
def test_frozen_equals_the_model(name: str, norm: str) -> None:
    model = trained_like(create_model(name, norm, num_classes=5, **MODELS[name]).double())
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    frozen = freeze(model)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-8, atol=1e-8)
    assert not any(isinstance(module, NormAct2d) for module in frozen.modules())
    assert (
        not any(parameter.requires_grad for parameter in frozen.parameters())
        and not frozen.training
    )
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["ln_pn", "bn_pn", "gn"])
@pytest.mark.parametrize("act", [*ACTIVATIONS, nn.ELU, nn.Hardtanh, nn.RReLU])
def test_passes_in_place_spare_input_and_gradients(norm: str, act: str) -> None:
    layer = trained_like(nn.Sequential(NormAct2d(3, norm, groups=3, act_layer=act)).double())
    frozen = freeze(layer)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    before, target = x.detach().clone(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        without_grad = frozen(x)
    outputs = frozen(x), layer(x)
    ours, theirs = (torch.autograd.grad((z * target).sum(), x)[0] for z in outputs)
    for z in (without_grad, outputs[0]):
        torch.testing.assert_close(z, outputs[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before)


def test_a_value_with_two_uses() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = NormAct2d(3, "ln_pn", act_layer="silu"), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.norm(x)
            return self.conv(z) + z

    model = trained_like(Residual().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    frozen = freeze(model)
    torch.testing.assert_close(frozen(images), model(images), rtol=1e-10, atol=1e-10)


def test_a_layer_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = NormAct2d(3, "bn_pn"), NormAct2d(3, "ln_pn", act_layer="silu")
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.second(self.conv(self.first(self.conv(x)))))

    model = trained_like(Twice().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(freeze(model)(images), model(images), rtol=1e-10, atol=1e-10)


def test_converted_networks_freeze() -> None:
    """torchvision's, with rewritten forwards, an untraceable part and dropout between norm and
    activation.
    """

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
    torch.testing.assert_close(
        torch.autograd.grad(freeze(model)(images).sum(), images)[0], expected
    )


def test_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match="no NormAct2d"):
        freeze(nn.Conv2d(3, 3, 1))


@need_module("onnxruntime")
@need_module("onnxscript")
@pytest.mark.parametrize(
    "make",
    [
        lambda: create_model("resnet20v2", "ln_pn", depth=8),
        lambda: create_model("resnet20v2", "bn_pn", depth=8),
        lambda: start_of_efficientnet("gn_pn"),
    ],
)
def test_onnx_runtime_computes_the_same(make, tmp_path: Path) -> None:
    import onnxruntime

    model = trained_like(make())
    images = torch.randn(2, 3, 64, 64)
    path = str(tmp_path / "model.onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(freeze(model), (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


class Reads(nn.Module):
    """A network in which `read` also uses one of the weights."""

    def __init__(self, read) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), NormAct2d(8, "bn_pn", act_layer="silu")
        self.merged, self.twin, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.twin.weight = self.merged.weight
        self.last, self.read = NormAct2d(8, act_layer="silu"), read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.last(self.merged(self.norm(self.conv(x)))).mean((2, 3))) + self.read(
            self
        )


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.merged.weight.sum(),
        lambda m: m.twin.weight.sum(),
        lambda m: m.fc.bias.mean(),
        lambda m: nn.functional.linear(m.conv.weight.mean((2, 3)), m.fc.weight[:, :3]).sum(),
    ],
)
def test_a_weight_that_is_read_elsewhere(read) -> None:
    assert_freezes(Reads(read))


def assert_freezes(model: nn.Module) -> None:
    model = trained_like(model.double())
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(freeze(model)(images), model(images), rtol=1e-9, atol=1e-9)


class SamePool(nn.AvgPool2d):
    """A pool with its own padding, like timm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2, divisor_override=3), SamePool(2), nn.AvgPool2d(2, ceil_mode=True)]
)
def test_pools_behind_a_norm(pool: nn.Module) -> None:
    assert_freezes(
        nn.Sequential(nn.Conv2d(3, 8, 3), NormAct2d(8, act_layer="silu"), pool, nn.Conv2d(8, 4, 1))
    )


def with_hook(place: int, before: bool) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        NormAct2d(8, "bn_pn", act_layer="silu"),
        nn.Identity(),
        nn.Conv2d(8, 8, 1),
        NormAct2d(8),
        nn.Conv2d(8, 4, 1),
    )
    if before:
        model[place].register_forward_pre_hook(lambda module, inputs: (inputs[0].relu(),))
    else:
        model[place].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("place", range(6))
def test_hooks_stay(place: int, before: bool) -> None:
    assert_freezes(with_hook(place, before))


def with_set_forward(place: int, act: str) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), NormAct2d(8, "ln", act_layer=act), nn.Conv2d(8, 4, 1)
    ).eval()
    inner = type(model[place]).forward.__get__(model[place])
    model[place].forward = lambda x: inner(x.abs())
    return model


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_forward_set_on_a_convolution_stays(act: str) -> None:
    model = with_set_forward(2, act)
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(freeze(model)(images), model(images))


def test_a_forward_set_on_a_norm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cannot freeze 1: a forward was set on this object"):
        freeze(with_set_forward(1, "relu"))


def test_a_layer_by_itself_freezes() -> None:
    assert_freezes(NormAct2d(3, act_layer="silu"))


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm, pruned])
def test_weights_that_hooks_compute_stay_computed(wrap) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct2d(8), wrap(nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # as a step, after which the computed weight is out of date
    assert_same(model.eval(), freeze(model), x)


@pytest.mark.parametrize("groups", [None, lambda channels, groups: 2])
def test_a_norm_of_a_user_is_not_taken_for_another(groups, monkeypatch) -> None:
    def normalize(x, groups, eps, weight, bias):
        power = x.square().mean(dim=(1, 2, 3), keepdim=True)
        return affine(x * torch.rsqrt(power + eps), weight, bias)

    spec = NormSpec("rms", normalize, groups=groups)
    monkeypatch.setitem(norms._SPECS, "rms", spec)
    monkeypatch.setitem(norms._SPECS, "rms_pn", replace(spec, proxy=True))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct2d(8, "rms_pn"), NormAct2d(8, "ln_pn"))
    frozen = freeze(trained_like(model))
    assert_same(model, frozen, torch.randn(2, 3, 8, 8))
    assert [type(layer) for layer in frozen[1:]] == [NormAct2d, FrozenNormAct2d]


def test_a_users_attribute_called_frozen_is_left_alone() -> None:
    net = nn.Sequential(NormAct2d(4), nn.Conv2d(4, 4, 1))
    net[1].frozen = True
    assert freeze(net)[1].frozen is True


def test_a_recomputing_network_scripts_once_it_is_frozen() -> None:
    net = recompute(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct2d(4, "ln")))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(torch.jit.script(freeze(net))(x), net.eval()(x))


def test_a_tensor_that_a_hook_keeps_on_a_layer_does_no_harm() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct2d(8)), torch.randn(2, 3, 8, 8)
    model[1].register_forward_hook(lambda layer, inputs, output: setattr(layer, "seen", output))
    model(x)
    assert_same(model.eval(), freeze(model), x)


def without_statistics() -> nn.Module:
    return NormAct2d(8, "bn", track_running_stats=False)


@pytest.mark.parametrize(
    "make, message",
    [
        (without_statistics, "cannot freeze 1: it has no running statistics"),
        (lambda: pruned(NormAct2d(8)), "cannot freeze 1: a hook computes its weight"),
    ],
)
def test_what_cannot_be_frozen_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(nn.Sequential(nn.Conv2d(3, 8, 3), make()))


def test_freezing_twice() -> None:
    with pytest.raises(ValueError, match="frozen already"):
        freeze(freeze(NormAct2d(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["ln_pn", "bn_pn"])
@pytest.mark.parametrize(
    "make", [lambda norm: create_model("resnet20v2", norm, depth=8), start_of_efficientnet]
)
def test_models_in_half_precision_freeze(make, norm: str, dtype: torch.dtype) -> None:
    model = trained_like(make(norm))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = model(images), freeze(model.to(dtype))(images.to(dtype))
    assert got.dtype == dtype and (got - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    "behind, size", [((nn.Flatten(2), nn.Linear(16, 5)), 6), ((nn.Linear(16, 5),), 18)]
)
def test_a_linear_layer_over_positions_is_left_alone(behind, size, activation):
    layers = [
        nn.Conv2d(3, 16, 3),
        NormAct2d(16, act_layer=activation),
        nn.AdaptiveAvgPool2d(size - 2),
        *behind,
    ]
    model = trained_like(nn.Sequential(*layers))
    assert_same(model, freeze(model), torch.randn(2, 3, size, size))


def test_a_dropout_of_a_class_of_its_own_may_drop_in_evaluation():
    class MonteCarlo(nn.Dropout):
        def forward(self, x):
            return x * torch.linspace(0, 1, x.shape[-1])

    model = trained_like(
        nn.Sequential(nn.Conv2d(3, 16, 3), NormAct2d(16), MonteCarlo(), nn.Conv2d(16, 5, 1))
    )
    assert_same(model, freeze(model), torch.randn(2, 3, 8, 8))


def test_a_forward_with_a_branch_on_data():
    class Block(nn.Sequential):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(nn.Conv2d(3, 8, 1), NormAct2d(8, "bn"))

        def forward(self, x):
            return self.block(x) + self.block[0](x) if x.mean() > -100 else x

    model = trained_like(Model())
    assert_same(model, freeze(model), torch.randn(2, 3, 8, 8))


def test_everything_is_in_evaluation_mode():
    assert not any(
        module.training
        for module in freeze(trained_like(create_model("resnet20v2", "ln_pn", depth=8))).modules()
    )
    assert not freeze(NormAct2d(4)).training


def test_constants_are_buffers_of_their_layer_alone() -> None:
    """A floor for ReLU, gain and offset for others; the keys of all other modules stay."""
    model = create_model("resnet20v2", "ln_pn", depth=8)
    names = {name for name, m in model.named_modules() if isinstance(m, NormAct2d)}
    state, frozen = model.state_dict(), freeze(model).state_dict()
    others = {key for key in state if key.rpartition(".")[0] not in names}
    assert all(torch.equal(frozen[key], state[key]) for key in others)
    added = {f"{name}.{buffer}" for name in names for buffer in ("scale", "shift", "offset")}
    assert set(frozen) == others | added
    layer = freeze(NormAct2d(4, "bn_pn", act_layer="silu"))
    assert list(layer.state_dict()) == ["scale", "shift", "gain", "offset"]


FROZEN = {
    "modules": lambda: create_model("resnet20v2", "ln_pn", depth=8),
    "squeeze_excite": lambda: start_of_efficientnet("bn_pn"),
    "rewritten": lambda: convert(torchvision.models.resnet18(num_classes=5), "gn_pn"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_networks_script_export_trace_and_save(name: str, tmp_path: Path) -> None:
    model = trained_like(FROZEN[name]())
    frozen, images = freeze(model), torch.randn(2, 3, 64, 64)
    torch.save(frozen, tmp_path / "frozen.pt")
    loaded = torch.load(tmp_path / "frozen.pt", weights_only=False)
    restored = freeze(FROZEN[name]())
    restored.load_state_dict(frozen.state_dict())
    for twin in (
        torch.jit.script(frozen),
        torch.export.export(frozen, (images,)).module(),
        torch.fx.symbolic_trace(frozen),
        loaded,
        restored,
        copy.deepcopy(frozen),
    ):
        assert_same(model, twin, images)


def test_threads_share_a_frozen_network() -> None:
    layers = [
        nn.Conv2d(3, 8, 3),
        NormAct2d(8, "bn_pn", act_layer="silu"),
        nn.Conv2d(8, 8, 3, padding=1),
    ]
    frozen = freeze(trained_like(nn.Sequential(*layers))).to(memory_format=torch.channels_last)
    inputs = [torch.randn(1, 3, size, size) for size in (9, 14, 23)]
    with torch.no_grad():
        expected = [frozen(x) for x in inputs]

    def compute(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(frozen(inputs[i]), expected[i]) for _ in range(100))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(compute, range(3)))
