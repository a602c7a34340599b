"""Proxy Normalization for PyTorch: the norms, the moments of the proxy, the norm-and-activation layer."""

from proxynorm.nn.activations import ACTIVATIONS
from proxynorm.nn.decay import parameter_groups
from proxynorm.nn.fast.recompute import recompute
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.moments import proxy_moments
from proxynorm.nn.names import KINDS, NORMS, NormSpec, norm_spec
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.norms import batch_normalize, group_normalize
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weight_standardization import standardize_weights

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "NORMS",
    "NormAct2d",
    "NormOptions",
    "NormSpec",
    "batch_normalize",
    "group_normalize",
    "norm_spec",
    "parameter_groups",
    "proxy_moments",
    "recompute",
    "share_moments",
    "standardize_weights",
]
