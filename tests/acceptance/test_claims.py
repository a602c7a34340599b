"""The poster's claims as tests on small networks.

Proxynorm/paper/claims.yaml says which test shows which claim.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from proxynorm import create_model, power_decomposition
from proxynorm.analysis.power import PowerRow
from proxynorm.analysis.power_monitor import mean_rows
from proxynorm.analysis.random_net import mean_field_p1, random_net
from proxynorm.nn import NormAct2d

BATCH_INDEPENDENT = ("ln", "gn", "in", "ln_pn", "gn_pn", "in_pn", "ln_ws", "gn_ws")
WIDTH, DEPTH, NETS = 256, 12, 3
GROUPS = {"gn": 32, "gn_pn": 4}


def inputs(count, channels=3, size=8, seed=0):
    """Images with an instance-dependent mean and scale in each channel, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    noise, scale, shift = (
        torch.randn(count, channels, side, side, generator=generator) for side in (size, 1, 1)
    )
    return noise * scale.exp() + shift


def decomposition(
    norm, groups=None, width=WIDTH, depth=DEPTH, nets=NETS, **kwargs
) -> list[PowerRow]:
    """The terms in random nets, averaged over `nets` of them."""
    return mean_rows(
        [
            power_decomposition(
                random_net(norm, width, depth, seed, groups=groups, **kwargs),
                inputs(16, seed=seed).split(8),
            )
            for seed in range(nets)
        ]
    )


@pytest.fixture(scope="module")
def powers():
    """Each norm's decomposition, made once."""
    return {
        norm: decomposition(norm, GROUPS.get(norm))
        for norm in ("bn", "in", "ln", "gn", "ln_pn", "gn_pn")
    }


@pytest.mark.parametrize("norm", ["bn", "in", "ln", "gn", "ln_pn", "gn_pn"])
def test_the_four_terms_sum_to_one(powers, norm):
    for row in powers[norm]:
        assert row.p1 + row.p2 + row.p3 + row.p4 == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("norm", ["bn", "in"])
def test_batch_and_instance_norm_are_channel_normalized(powers, norm):
    assert all(row.p1 < 1e-6 for row in powers[norm])


def test_instance_norm_has_no_instance_variability(powers):
    assert all(row.p2 < 1e-6 and row.p4 < 1e-4 for row in powers["in"])


def test_batch_norm_keeps_instance_variability(powers):
    assert all(row.p2 + row.p4 > 0.01 for row in powers["bn"])


def test_layer_norm_keeps_instance_variability(powers):
    """Of the power that is not the channels' constants, instances differ in a share as with BN.

    IN leaves nothing.
    """

    def shares(norm):
        return [(row.p2 + row.p4) / (1 - row.p1) for row in powers[norm]]

    assert all(ln > 0.5 * bn > 0.1 for ln, bn in zip(shares("ln"), shares("bn"), strict=True))
    assert max(shares("in")) < 1e-3


def test_layer_norm_follows_mean_field(powers):
    """P1 of a net of width 256, mean of 3.

    One net of finite width strays by about 1/sqrt(width).
    """
    expected = [0.0, *mean_field_p1(DEPTH - 1)]
    assert all(
        abs(row.p1 - wanted) < 0.06
        for row, wanted in zip(powers["ln"][1:], expected[1:], strict=True)
    )


def test_the_constant_term_dominates_layer_norm_in_deep_layers(powers):
    p1 = [row.p1 for row in powers["ln"]]
    assert p1[-1] > 0.8 and p1[1] < p1[5] < p1[-1]


def test_group_norm_is_between(powers):
    """With 32 groups of 8 channels.

    P1 less than LN's, more than BN's; an instance variability more than IN's, less than BN's.
    """
    gn, ln, bn, instance = (powers[norm][-1] for norm in ("gn", "ln", "bn", "in"))
    assert (
        bn.p1 + 0.1 < gn.p1 < ln.p1 - 0.1
        and instance.p2 + instance.p4 < gn.p2 + gn.p4 < bn.p2 + bn.p4
    )


@pytest.mark.parametrize("norm", ["ln_pn", "gn_pn"])
def test_proxy_norm_keeps_channels_normalized(powers, norm):
    assert all(row.p1 < 0.05 for row in powers[norm][1:])


@pytest.mark.parametrize("norm", ["ln_pn", "gn_pn"])
def test_proxy_norm_preserves_instance_variability(powers, norm):
    """What IN cuts to nothing and LN buries under P1 is there after 12 layers.

    Twice LN's and more, though not BN's.
    """
    ours, ln, instance = (powers[name][-1] for name in (norm, "ln", "in"))
    assert (
        ours.p2 + ours.p4 > 2 * (ln.p2 + ln.p4) > 1000 * (instance.p2 + instance.p4)
        and ours.p2 + ours.p4 > 0.02
    )


def test_the_activation_step_causes_the_denormalization():
    """LN alone leaves the channels of a deep linear net normalized.

    With affine and activation P1 grows.
    """
    linear = random_net("ln", WIDTH, DEPTH, seed=0, beta_std=0.0, gamma_std=0.0)
    for index in range(1, len(linear), 2):
        linear[index] = NormAct2d(WIDTH, "ln", apply_act=False)
    centred = inputs(64)
    centred -= centred.mean((0, 2, 3), keepdim=True)
    without = power_decomposition(linear, [centred])[-1].p1
    with_both = power_decomposition(random_net("ln", WIDTH, DEPTH), [centred])[-1].p1
    assert without < 0.05 and with_both > 0.8


def network(norm):
    """A small network in double precision, in training mode, with parameters away from their
    initial values.
    """
    torch.manual_seed(0)
    model = create_model(
        "resnet20v2", norm, 5, depth=8, width=4, stem_stride=2, in_chans=3, groups=2
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().train()


def gradients(model, images, targets, reduction="mean"):
    model.zero_grad()
    cross_entropy(model(images), targets, reduction=reduction).backward()
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


def batch_dependence(norm):
    """The largest relative change of one image's logits, and of the gradient of its loss, by the
    images beside it.
    """
    model, images, targets = network(norm), inputs(6, size=16).double(), torch.arange(6) % 5
    alone, within = model(images[:1]), model(images)[:1]
    logits = (alone - within).abs().max() / alone.abs().max()

    def gradient(batch):
        model.zero_grad()
        cross_entropy(model(batch)[:1], targets[:1]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    alone, within = gradient(images[:1]), gradient(images)
    return logits.item(), ((alone - within).norm() / alone.norm()).item()


@pytest.mark.parametrize("norm", BATCH_INDEPENDENT)
def test_outputs_and_gradients_do_not_depend_on_batch_mates(norm):
    assert max(batch_dependence(norm)) < 1e-9


@pytest.mark.parametrize("norm", ["bn", "bn_pn"])
def test_batch_norm_depends_on_batch_mates(norm):
    assert min(batch_dependence(norm)) > 0.05


def accumulation_error(norm):
    """Relative difference of the gradients of 32 images at once and of 4 × 8 accumulated."""
    model, images, targets = network(norm), inputs(32, size=16).double(), torch.arange(32) % 5
    whole = torch.cat([g.flatten() for g in gradients(copy.deepcopy(model), images, targets)])
    model.zero_grad()
    for part, labels in zip(images.split(8), targets.split(8), strict=True):
        (cross_entropy(model(part), labels) / 4).backward()
    parts = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return ((whole - parts).norm() / whole.norm()).item()


@pytest.mark.parametrize("norm", BATCH_INDEPENDENT)
def test_accumulation_equals_the_large_batch(norm):
    assert accumulation_error(norm) < 1e-9


def test_accumulation_is_not_the_large_batch_for_batch_norm():
    assert accumulation_error("bn") > 0.01


def test_training_and_inference_agree_without_batch_statistics():
    """LN+PN computes in evaluation what it computed in training; BN does not."""
    images = inputs(4, size=16).double()

    def gap(norm):
        model = network(norm)
        with torch.no_grad():
            trained = model(images)
            return (trained - model.eval()(images)).abs().max() / trained.abs().max()

    assert gap("ln_pn") < 1e-12 and gap("bn") > 0.01
