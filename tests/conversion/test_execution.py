"""convert keeps a forward as written: its control flow, draws, attributes and caches."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import random
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models._features_fx import FeatureGraphNet
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.feature_extraction import create_feature_extractor

from proxynorm import conversion_report, convert, freeze
from proxynorm.conversion import rewrite
from proxynorm.nn import NormAct2d
from tests.helpers import with_random_norms

IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """A convolution, a norm and a functional activation, with attributes to change and to store."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.scale, self.cache, self.drop_rate = 1.0, None, 0.0

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and random.random() < self.drop_rate:
            return x
        if not torch.is_tensor(x) or torch.is_grad_enabled() != self.training:
            x = x + 100
        if self.cache is None:
            self.cache = torch.ones_like(x)
        x = F.relu(self.bn(self.conv(x * self.cache)))
        return x * self.scale if mask is None else x * mask


def make(drop_rate: float = 0.0) -> Block:
    torch.manual_seed(0)
    block = with_random_norms(Block())
    block.drop_rate = drop_rate
    return block


def test_branches_and_attributes_stay_alive() -> None:
    original = make().eval()
    model = convert(copy.deepcopy(original), "bn")
    for net in (model, freeze(model)):
        for scale, mask in ((1.0, None), (3.0, None), (3.0, torch.zeros(1))):
            net.scale = original.scale = scale
            torch.testing.assert_close(net(IMAGES, mask), original(IMAGES, mask))


def test_random_draws_stay() -> None:
    model = convert(make(drop_rate=0.5))
    random.seed(0)
    skipped = [torch.equal(model(IMAGES), IMAGES) for _ in range(20)]
    assert 0 < sum(skipped) < 20


def test_nothing_of_the_trial_runs_stays_behind() -> None:
    model, python, cpu = make(), random.getstate(), torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no norm of this Block"):
        convert(model, keep=["bm"])
    convert(model, "bn")
    assert model.cache is None and model.training
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), cpu)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model(IMAGES)
    torch.save(model, io.BytesIO())


def test_the_buffers_of_parametrizations_stay_as_they_were() -> None:
    layers = [spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers)
    state = copy.deepcopy(model[0].state_dict())
    convert(model)
    assert all(torch.equal(value, state[key]) for key, value in model[0].state_dict().items())


def test_a_network_can_be_converted_in_inference_mode() -> None:
    model = make()
    with torch.inference_mode():
        convert(model)
    model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.bn.parameters())


@pytest.mark.filterwarnings("ignore")  # torch.jit announces its end
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.jit.trace(model.eval(), IMAGES),
        torch.jit.script,
    ],
)
def test_compiled_and_scripted_networks_are_refused(wrap) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match="convert the network before torch.jit or torch.compile"):
        convert(nn.Sequential(wrap(model), nn.Conv2d(4, 4, 1)))


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.Mish()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


def test_what_runs_through_a_norm_decides_and_not_its_class() -> None:
    model = Vectors()
    with pytest.raises(
        ValueError, match=r"norm \(GroupNorm\): it normalizes no maps .*\(2, 8, 62\)"
    ):
        convert(model)
    assert isinstance(model.norm, nn.GroupNorm) and isinstance(model.act, nn.Mish)


def test_other_libraries_trace_a_converted_network() -> None:
    model = convert(torchvision.models.resnet18(num_classes=5)).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))
    features = create_feature_extractor(model, ["layer2"])(images)["layer2"]
    assert features.shape == (1, 128, 8, 8)
    assert any(isinstance(module, NormAct2d) for module in model.modules())


def test_timms_feature_graphs_are_extracted_from_a_converted_network() -> None:
    model = convert(timm.create_model("resnet18", num_classes=5)).eval()
    images = torch.randn(1, 3, 64, 64)
    (features,) = FeatureGraphNet(model, out_indices=(2,))(images)
    assert features.shape == (1, 128, 8, 8)


@pytest.mark.filterwarnings("ignore")  # torch.ao announces its end
@pytest.mark.parametrize("make", [lambda: nn.Sequential(NormAct2d(3)), lambda: NormAct2d(3, "bn")])
def test_a_layer_by_itself_is_traced_and_prepared_for_quantization(make) -> None:
    layer = make().eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(IMAGES), layer(IMAGES))
    quantize = importlib.import_module("torch.ao.quantization")
    mapping = quantize.get_default_qconfig_mapping("fbgemm")
    prepared = importlib.import_module("torch.ao.quantization.quantize_fx").prepare_fx(
        layer, mapping, (IMAGES,)
    )
    torch.testing.assert_close(prepared(IMAGES), layer(IMAGES))


def test_every_norm_is_reported() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        torchvision.ops.FrozenBatchNorm2d(8),
        nn.SiLU(),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.LayerNorm(64),
    )
    rows = {row.module: row.action for row in conversion_report(convert(model, keep=["6"]))}
    assert rows["1"] == "LN + ReLU + PN" and rows["4"] == "LN + SiLU + PN"
    assert rows["6"].startswith("left as it is: keep") and rows["8"].startswith("left as it is")
    assert model[4].weight.requires_grad


def test_a_norm_without_an_activation_by_the_users_word() -> None:
    class Written(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn(self.conv(x))
            return F.relu(x) + x

    model = nn.Sequential(Written(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match=r"no_activation=\['0.bn'\]"):
        convert(model)
    convert(model, no_activation=["0.*"])
    assert not model[0].bn.apply_act and model[2].proxied


class Detector(nn.Module):
    """Takes a list of images, and targets in training, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, images: list[torch.Tensor], targets: list[dict] | None = None) -> dict:
        if self.training and targets is None:
            raise ValueError("targets are needed")
        return {"features": self.body(torch.stack(images))}


@pytest.mark.parametrize(
    "inputs",
    [
        {"images": [IMAGES[0], IMAGES[1]], "targets": [{}, {}]},
        ([IMAGES[0], IMAGES[1]], [{}, {}]),
        ([IMAGES[0], IMAGES[1]],),
        lambda model: model([IMAGES[0]], [{}] if model.training else None),
    ],
)
def test_example_inputs_of_every_form(inputs: object) -> None:
    assert convert(Detector(), example_inputs=inputs).body[1].proxied
    with pytest.raises(ValueError, match="cannot run this Detector on random images: pass example"):
        convert(Detector())


class Residual(nn.Module):
    """The input is part of a sum in front of an activation, whose kind the input's size decides."""

    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x: torch.Tensor, is_sized: bool = False) -> torch.Tensor:
        y = self.bns[0](x)
        y = F.silu(y) if is_sized and x.shape[-1] < 8 else F.relu(y)
        return F.relu(self.bns[1](y) + x)


def test_a_function_may_call_the_model_several_times() -> None:
    images = [IMAGES, IMAGES[..., :6]]
    model = convert(Residual(), example_inputs=lambda model: [model(x) for x in images])
    assert model.bns[0].proxied and not model.bns[1].proxied
    with pytest.raises(ValueError, match="its calls, .* differ in the activation behind it"):
        convert(Residual(), example_inputs=lambda model: [model(x, True) for x in images])


class Output:
    """An output whose tensors convert does not find."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    class Returns(Block):
        def forward(self, x: torch.Tensor) -> Output:
            return Output(super().forward(x))

    with pytest.raises(ValueError, match="no tensors are found in its output.* pass example_in"):
        convert(nn.Sequential(Block(), Returns()))
    model = nn.Sequential(Block(), Returns())
    convert(model, example_inputs=lambda model: model(IMAGES).logits, keep=["1.bn"])
    assert model[0].bn.proxied


def rectified(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)


def twice(act, x: torch.Tensor) -> torch.Tensor:
    return 2 * act(x)


def norm_and_relu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.relu(norm(x))


class Helped(Block):
    """Its activation is called by a function."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call, self.conv2 = call, nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.helped(self.conv(x)))

    def helped(self, x: torch.Tensor) -> torch.Tensor:
        if self.call is rectified:
            x = rectified(self.bn(x))
        elif self.call is twice:
            x = twice(rectified, self.bn(x))
        else:
            x = norm_and_relu(self.bn, x)
        return rectified(x + 1)


RELU = nn.ReLU()


class Unregistered(Block):
    """Its activations are modules that are not part of the network."""

    acts = (RELU,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.acts[0](self.bn(self.conv(x)))
        return nn.ReLU()(x - 1)


def test_an_activation_that_is_not_part_of_the_network_is_taken_out() -> None:
    original = with_random_norms(Unregistered())
    model = convert(copy.deepcopy(original), "bn")
    assert type(model.bn.act) is nn.ReLU
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(IMAGES), original.train(training)(IMAGES))


def test_an_activation_in_a_helper_function_is_taken_out_where_it_is_called() -> None:
    original = with_random_norms(Helped(rectified))
    model = convert(copy.deepcopy(original), "bn")
    assert type(model.bn.act) is nn.ReLU
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(IMAGES), original.train(training)(IMAGES))
    assert (
        conversion_report(model)[0].action == "1 activation call of its forward joined with norms"
    )


@pytest.mark.parametrize(
    "call, reason",
    [
        (twice, "computes something else, first in the model itself"),
        (
            norm_and_relu,
            r"computes something else.*called at .*test_execution\.py:\d+ modules of their own",
        ),
    ],
)
def test_a_helper_that_does_more_is_refused(call, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert(Helped(call))


def test_a_call_that_cannot_be_taken_out_is_refused_by_file_and_line() -> None:
    class Decorated(Block):
        @functools.lru_cache  # noqa: B019
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.bn(self.conv(x)))

    with pytest.raises(ValueError, match=r"test_execution\.py:\d+ .*Make the activation a module"):
        convert(Decorated())


def test_a_source_that_changed_later_does_not_matter(monkeypatch) -> None:
    model = convert(make()).eval()
    monkeypatch.setattr(rewrite, "_source_node", None)
    rewrite.rewritten_class.cache_clear()
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is not type(model)
    assert torch.equal(twin(IMAGES), model(IMAGES))


class Locked(Block):
    """A module with a lock, which can only be copied by its own __getstate__."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, lock=threading.Lock())


def test_a_rewritten_module_keeps_its_own_way_of_copying() -> None:
    model = convert(Locked()).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES)) and twin.lock is not model.lock


def test_a_norm_without_parameters_takes_the_dtype_of_the_network() -> None:
    norms = nn.InstanceNorm2d(4), nn.GroupNorm(2, 4, affine=False)
    for norm in norms:
        model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()).double())
        assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
        model(IMAGES.double())


def test_meta_devices_are_converted() -> None:
    with torch.device("meta"):
        model = convert(torchvision.models.resnet18())
    assert model.bn1.proxied and all(p.is_meta for p in model.parameters())


class MixesImages(nn.Module):
    """In training, an image's output depends on the others, with any norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return x - x.mean(0, keepdim=True) if self.training else x


def test_batch_dependence_that_stays_is_refused() -> None:
    model = MixesImages()
    with pytest.raises(ValueError, match="still depends on the others. Pass verify=False"):
        convert(model, "ln_pn")
    assert isinstance(model.body[1], nn.BatchNorm2d)
    assert isinstance(convert(model, "bn_pn").body[1], NormAct2d)


def test_a_norm_that_fails_on_the_maps_it_gets_is_refused() -> None:
    """Such as gn with a channel a group behind a global pool, in split attention."""
    body = [nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
    model = nn.Sequential(*body, nn.ReLU())
    with pytest.raises(ValueError, match="converted, it fails in training: gn over a 1×1 map"):
        convert(model, "gn_pn")
    assert isinstance(model[3], nn.BatchNorm2d)
    assert convert(model, "gn_pn", groups=2)[3].proxied
