"""Proxy Normalization for PyTorch: norms, moments of the proxy, the norm+activation layer."""

from proxynorm.nn.activations import ACTIVATIONS
from proxynorm.nn.fast.precision import inductor_options
from proxynorm.nn.fast.recompute import recompute
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.moments import proxy_moments
from proxynorm.nn.norm_act import NormAct2d, pn_act
from proxynorm.nn.norms import NORMS, NormSpec, batch_normalize, group_normalize, norm_spec
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weights import parameter_groups, standardize_weights

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "NormAct2d",
    "NormOptions",
    "NormSpec",
    "batch_normalize",
    "group_normalize",
    "inductor_options",
    "norm_spec",
    "parameter_groups",
    "pn_act",
    "proxy_moments",
    "recompute",
    "share_moments",
    "standardize_weights",
]
