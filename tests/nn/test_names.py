"""Names of norms and activations."""

import pytest
import torch
from torch import nn

from proxynorm.nn import ACTIVATIONS, NORMS, norm_spec
from proxynorm.nn.activations import activation_name, make_activation


def test_all_names():
    assert set(NORMS) == {
        "bn",
        "ln",
        "gn",
        "in",
        "bn_pn",
        "ln_pn",
        "gn_pn",
        "in_pn",
        "ln_ws",
        "gn_ws",
        "ln_ws_pn",
        "gn_ws_pn",
        "none",
    }
    parts = {
        name: (spec.kind, spec.proxy, spec.weight_standardization)
        for name, spec in ((name, norm_spec(name)) for name in NORMS)
    }
    assert parts["gn_pn"] == ("gn", True, False)
    assert parts["ln_ws"] == ("ln", False, True)
    assert parts["ln_ws_pn"] == ("ln", True, True)
    assert parts["none"] == ("none", False, False)


@pytest.mark.parametrize("wrong", ["ln_pm", "LN", "", None, "batchnorm"])
def test_a_wrong_name_is_one_line_with_the_list(wrong):
    with pytest.raises(ValueError, match="Choose one of: bn, ln, gn, in") as error:
        norm_spec(wrong)
    assert "\n" not in str(error.value)
    if wrong == "ln_pm":
        assert "Did you mean 'ln_pn'" in str(error.value)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_know_their_names(name):
    module = make_activation(name)
    assert activation_name(module) == name
    assert activation_name(make_activation(type(module))) == (
        name if name != "gelu_tanh" else "gelu"
    )
    assert module(torch.randn(3)).shape == (3,)


def test_other_libraries_activations_are_recognized():
    from timm.layers import create_act_layer

    names = ("hard_swish", "gelu_tanh", "mish", "leaky_relu", "relu6", "hard_sigmoid")
    for theirs, ours in {"swish": "silu", **{name: name for name in names}}.items():
        assert activation_name(create_act_layer(theirs)) == ours
    assert activation_name(make_activation(torch.sin)) == "callable"
    assert activation_name(nn.PReLU()) == "callable"
    assert isinstance(make_activation(None), nn.Identity)
