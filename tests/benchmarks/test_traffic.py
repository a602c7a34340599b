"""Bytes that a compiled step moves on a GPU, from inductor's fused kernels."""

from __future__ import annotations

import re
from functools import cache

import pytest
from torch import nn

from benchmarks import traffic
from proxynorm.cli import parse_options
from proxynorm.errors import ConfigError

LAYER = traffic.Options(batch=8, channels=64)  # fewer elements; the bytes of each are the same


@cache
def compiled(norm: str, act: str) -> dict:
    """The figures of forward and backward, in bfloat16 and channels_last."""
    return traffic.measure(LAYER, norm, act, "channels_last")[-1]


@pytest.mark.parametrize(
    ("norm", "act", "bound"),
    [("ln_pn", "relu", 19), ("ln_pn", "silu", 20), ("gn_pn", "relu", 20), ("ln", "relu", 20)],
)
def test_a_compiled_layer_is_two_passes_forward_and_two_backward(norm, act, bound):
    """16 bytes: 2 + 4 forward (statistics; read and write), 4 + 6 backward (sums; gradient)."""
    assert 16 <= compiled(norm, act)["total"] <= bound


def test_torchs_batch_norm_moves_more():
    """Eager, 2 + 4 and 4 bytes forward, 6 and 8 + 2 backward."""
    eager, fused = traffic.measure(LAYER, traffic.TORCH_BN, "relu", "channels_last")
    assert eager["total"] == pytest.approx(26, abs=0.5) and fused["total"] < 23
    ours = compiled("ln_pn", "relu")["total"]
    assert ours <= fused["total"] and ours <= 0.8 * eager["total"]


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_constants_of_a_channel_are_not_computed_at_every_element(act):
    """With the moments' erf and exp inlined into the kernels of the map, ReLU would take 2,300."""
    plain, proxied = compiled("ln", act)["operations"], compiled("ln_pn", act)["operations"]
    assert proxied < plain + 50


def test_torchs_layer_norm_is_torchs():
    norm, _ = traffic._layer("torch ln", "relu", 4)[1]
    assert isinstance(norm, nn.GroupNorm)


@pytest.mark.parametrize("norm", ["ln_pn+recompute", "ln_ws"])
def test_what_a_layer_alone_cannot_have_is_refused(norm):
    with pytest.raises(ConfigError, match=f"norm={re.escape(norm)} model=layer"):
        traffic.measure(LAYER, norm, "relu", "channels_last")


@pytest.mark.parametrize("wrong", ["norm=ln_pm", "act=[rleu]", "format=nhwc", "batch=0"])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        parse_options(traffic.Options, [wrong])
