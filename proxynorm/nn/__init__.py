"""Proxy Normalization for PyTorch: the norms, the moments of the proxy, the norm-and-activation layer."""
from .activations import ACTIVATIONS
from .decay import parameter_groups
from .moments import proxy_moments
from .names import KINDS, NORMS, NormSpec, norm_spec
from .norm_act import NormAct2d
from .norms import batch_normalize, group_normalize
from .recompute import recompute
from .shared import share_moments
from .weight_standardization import standardize_weights

__all__ = ["ACTIVATIONS", "KINDS", "NORMS", "NormAct2d", "NormSpec", "batch_normalize", "group_normalize", "norm_spec",
           "parameter_groups", "proxy_moments", "recompute", "share_moments", "standardize_weights"]
