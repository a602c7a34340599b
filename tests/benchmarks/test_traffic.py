"""Bytes that a compiled step moves on a GPU, by the code that inductor makes for one."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import traffic
from proxynorm.errors import ConfigError

LAYER = traffic.Options(batch=8, channels=64)  # fewer elements; the bytes of each are the same


@cache
def total(norm: str, act: str) -> float:
    """Bytes an element, forward and backward, in bfloat16 and channels_last."""
    return traffic.measure(LAYER, norm, act, "channels_last")[-1]["total"]


@pytest.mark.parametrize(
    ("norm", "act", "bound"),
    [("ln_pn", "relu", 19), ("ln_pn", "silu", 20), ("gn_pn", "relu", 20), ("ln", "relu", 20)],
)
def test_a_compiled_layer_is_two_passes_forward_and_two_backward(norm, act, bound):
    """16 bytes: 2 + 4 forward (statistics; read and write), 4 + 6 backward (sums; gradient)."""
    assert 16 <= total(norm, act) <= bound


def test_torchs_batch_norm_moves_more():
    """Eager, 2 + 4 and 4 bytes forward, 6 and 8 + 2 backward."""
    eager, compiled = traffic.measure(LAYER, traffic.TORCH_BN, "relu", "channels_last")
    assert eager["total"] == pytest.approx(26, abs=0.5) and compiled["total"] < 23
    ours = total("ln_pn", "relu")
    assert ours <= compiled["total"] and ours <= 0.8 * eager["total"]


@pytest.mark.parametrize(
    "wrong", [{"norm": ["ln_pm"]}, {"act": ["rleu"]}, {"format": ["nhwc"]}, {"batch": 0}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        traffic.main(traffic.Options(**wrong))
