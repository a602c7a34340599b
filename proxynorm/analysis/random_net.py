"""The random network of the paper's Fig. 2 (top row), and its P1 by mean-field theory."""

from __future__ import annotations

import math

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import nn

from proxynorm.nn import NormAct2d, norm_spec, standardize_weights
from proxynorm.nn.closed_forms import leaky_relu


def random_net(
    norm: str,
    width: int = 1024,
    depth: int = 50,
    seed: int = 0,
    beta_std: float = 0.2,
    gamma_std: float = 0.2,
    groups: int | None = None,
) -> nn.Sequential:
    """Build `depth` layers of convolution, norm and ReLU with random weights, β and γ.

    The convolutions are 3 × 3 with the paper's periodic padding, from 3 to `width` channels.

    Args:
        norm: one of proxynorm.nn.NORMS.
        beta_std, gamma_std: β ~ N(0, beta_std²), γ ~ N(1, gamma_std²).
        groups: of gn.

    Raises:
        ValueError: an unknown norm.
    """
    spec = norm_spec(norm)
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    shape = {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False}
    for channels in [3] + [width] * (depth - 1):
        # Skip torch's default initialization, which takes longer than this one.
        conv = nn.utils.skip_init(nn.Conv2d, channels, width, **shape)
        nn.init.normal_(conv.weight, std=1 / math.sqrt(9 * channels), generator=generator)
        if spec.weight_standardization:
            standardize_weights(conv)
        layer = NormAct2d(width, norm=spec.kind, proxy=spec.proxy, groups=groups)
        nn.init.normal_(layer.weight, 1.0, gamma_std, generator=generator)
        nn.init.normal_(layer.bias, 0.0, beta_std, generator=generator)
        layers += [conv, layer]
    return nn.Sequential(*layers)


def mean_field_p1(layers: int, beta_std: float = 0.2, gamma_std: float = 0.2) -> list[float]:
    """P1 after 1 … `layers` ReLU layers of an infinitely wide random net with LN.

    If P1 = p, a channel is y = m + sqrt(1 − p)·g with a constant m ~ N(0, p) and g ~ N(0, 1). The
    next P1 is the constant share of the power of φ(γy + β). The first input has P1 = 0.
    """
    points, weights = (torch.from_numpy(array) for array in hermegauss(10))
    weights = weights / math.sqrt(2 * math.pi)  # to integrate against the normal density
    # Gauss–Hermite quadrature over γ and β, a closed form over g. Trapezoids over m, because the
    # mean over g has ReLU's kink near P1 = 1.
    nodes = torch.linspace(-6, 6, 241, dtype=torch.float64)
    density = torch.exp(-0.5 * nodes**2)
    axes = (1 + gamma_std * points, beta_std * points, nodes)
    gamma, beta, m = torch.meshgrid(*axes, indexing="ij")
    share = weights[:, None, None] * weights[:, None] * (density / density.sum())
    curve, p = [], 0.0
    for _ in range(layers):
        shift, scale = gamma * math.sqrt(p) * m + beta, gamma.abs() * math.sqrt(1 - p)
        mean, var = leaky_relu(shift, scale, slope=0)
        constant = (share * mean**2).sum()
        p = (constant / (constant + (share * var).sum())).item()
        curve.append(p)
    return curve
