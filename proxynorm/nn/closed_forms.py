"""Mean and variance of φ(u), u ~ N(a, s²), by kind of activation, exact or nearly so.

The tensors a and s (see moments.py) have the same shape, and are float64 where the device has it.
All operations act elementwise and can be differentiated twice. Several forms use Stein's identity,
E[u·f(u)] = a·E[f] + s²·E[f'].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

_SQRT_2PI = math.sqrt(2 * math.pi)


def _legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gauss–Legendre nodes and weights on (0, 1), from the Jacobi matrix (Golub and Welsch)."""
    k = torch.arange(1, count, dtype=torch.float64)
    side = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return tuple(((nodes + 1) / 2).tolist()), tuple(vectors[0].square().tolist())


_OWENS_T = _legendre(12)
_BETWEEN_KINKS = _legendre(40)


def _vectors(values: Sequence[Sequence[float]], like: Tensor) -> list[Tensor]:
    """Tensors of these values on like's device. torch.tensor would copy, and so wait for a GPU."""
    return [torch.stack([like.new_full((), value) for value in row]) for row in values]


def _density(t: Tensor) -> Tensor:
    """The standard normal density."""
    return torch.exp(-0.5 * t * t) / _SQRT_2PI


def _from_raw(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance from E[φ] and E[φ²]."""
    return mean, (square - mean * mean).clamp_min(0)


def leaky_relu(a: Tensor, s: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """φ = max(u, 0) + slope·min(u, 0); ReLU for slope 0, the identity for slope 1.

    E[max(u, 0)] = aΦ + s·pdf and E[max(u, 0)²] = a·E[max(u, 0)] + s²Φ, both at a/s.
    """
    # Beyond ±38, Φ is 0 or 1 and pdf 0 in float64. Without the clamp, derivatives could overflow.
    t = (a / s.clamp_min(1e-30)).clamp(-38, 38)
    cdf = torch.special.ndtr(t)
    mean = torch.addcmul(s * _density(t), a, cdf)
    square = torch.addcmul(a * mean, s * s, cdf)
    if slope == 0:
        return _from_raw(mean, square)
    slope2 = slope * slope
    square = (1 - slope2) * square + slope2 * (a * a + s * s)
    return _from_raw((1 - slope) * mean + slope * a, square)


# The logistic distribution as a scale mixture of eight normals, σ(u) ≈ Σ p·Φ(λu), after Monahan and
# Stefanski. The measured maximum error is 2.1e-9.
_MIXTURE = (  # p, λ
    (0.003246343272134, 1.365340806296348),
    (0.051517477033972, 1.059523971016916),
    (0.195077912673858, 0.830791313765644),
    (0.315569823632818, 0.650732166639391),
    (0.274149576158423, 0.508135425366489),
    (0.131076880695470, 0.396313345166341),
    (0.027912418727972, 0.308904252267995),
    (0.001449567805354, 0.238212616409306),
)
_P, _LAMBDA = zip(*_MIXTURE)


def silu(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """φ = u·σ(u), by σ² = σ − σ' and the normal mixture for σ. Errors: see moments.py."""
    d = _sigmoid_derivatives(a, s)
    return _self_gated(a, s, d[:2], [before - after for before, after in pairwise(d)])


def sigmoid(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """φ = σ(u), by σ² = σ − σ' as in silu. Unlike quadrature's, its error is small for any s."""
    mean, slope, *_ = _sigmoid_derivatives(a, s)
    return _from_raw(mean, mean - slope)


def tanh(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """φ = tanh(u) = 2σ(2u) − 1."""
    mean, var = sigmoid(2 * a, 2 * s)
    return 2 * mean - 1, 4 * var


def gelu(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """φ = u·Φ(u); E[Φ(u)²] = Φ(h) − 2·T(h, r) with Owen's T.

    h = a/sqrt(1 + s²), r = 1/sqrt(1 + 2s²).
    """
    c, r = torch.rsqrt(1 + s * s), torch.rsqrt(1 + 2 * s * s)
    h = c * a
    cdf, d = torch.special.ndtr(h), c * _density(h)
    # the derivatives of E[Φ(u)²] with respect to a
    first = 2 * d * torch.special.ndtr(h * r)
    second = 2 * c * r * d * _density(h * r) - h * c * first
    return _self_gated(a, s, [cdf, d], [cdf - 2 * _owens_t(h, r), first, second])


def _self_gated(
    a: Tensor, s: Tensor, gate: Sequence[Tensor], squared_gate: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Moments of u·g(u) from E[g], E[g'] and E[g²], E[(g²)'], E[(g²)''], by Stein's identity."""
    v, (g0, g1), (t0, t1, t2) = s * s, gate, squared_gate
    return _from_raw(a * g0 + v * g1, (a * a + v) * t0 + 2 * a * v * t1 + v * v * t2)


def _owens_t(h: Tensor, r: Tensor) -> Tensor:
    """Owen's T(h, r) for 0 < r ≤ 1: its defining integral by Gauss–Legendre quadrature."""
    nodes, weights = (v.view(-1, *[1] * h.ndim) for v in _vectors(_OWENS_T, h))
    x2 = (r * nodes).square() + 1
    return (torch.exp(-0.5 * h.square() * x2) / x2 * weights).sum(0) * r / (2 * math.pi)


def _sigmoid_derivatives(a: Tensor, s: Tensor, count: int = 4) -> list[Tensor]:
    """E[σ⁽ᵏ⁾(u)] for k < count ≤ 6: derivatives in a of Σ p·Φ(h) with h = λa / sqrt(1 + λ²s²).

    With c = dh/da, h·c = c²a.
    """
    shape, a, s = a.shape, a.flatten(), s.flatten()
    scale, share = _vectors((_LAMBDA, _P), a)
    c2 = (scale.square().reciprocal()[:, None] + s * s).reciprocal()
    c, a2 = c2.sqrt(), a * a
    d = torch.exp(c2 * (-0.5 * a2)) * c / _SQRT_2PI
    # the terms of the Hermite polynomials in h
    k = [share @ d]
    for _ in range(count - 2):
        d = d * c2
        k.append(share @ d)
    # Φ(h) = ½ + ½·erf(h/√2), and Σ p = 1
    derivatives = [0.5 + 0.5 * (share @ torch.erf(c * (a * math.sqrt(0.5))))]
    derivatives += [k[0], -a * k[1], a2 * k[2] - k[1]]
    if count > 4:
        derivatives += [a * (3 * k[2] - a2 * k[3]), a2 * (a2 * k[4] - 6 * k[3]) + 3 * k[2]]
    return [derivative.view(shape) for derivative in derivatives]


def silu_with_derivatives(a: Tensor, s: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean and variance of silu, (2, C), and their derivatives in a and in s, each (2, C).

    This takes a sixth of autograd's time. E[f(u)] obeys the heat equation: its derivative in s is s
    times its second derivative in a.
    """
    g = _sigmoid_derivatives(a, s, 6)
    t, v, a2 = [before - after for before, after in pairwise(g)], s * s, a * a
    mean, var = _self_gated(a, s, g[:2], t[:3])
    mean_a = g[0] + a * g[1] + v * g[2]
    mean_s = s * (2 * g[1] + a * g[2] + v * g[3])
    square_a = 2 * a * t[0] + (a2 + 3 * v) * t[1] + 2 * a * v * t[2] + v * v * t[3]
    square_aa = 2 * t[0] + 4 * a * t[1] + (a2 + 5 * v) * t[2] + 2 * a * v * t[3] + v * v * t[4]
    by_a = torch.stack([mean_a, square_a - 2 * mean * mean_a])
    by_s = torch.stack([mean_s, s * square_aa - 2 * mean * mean_s])
    return torch.stack([mean, var]), (by_a, by_s)


def between_kinks(
    phi: Callable[[Tensor], Tensor], a: Tensor, s: Tensor, kinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Any φ that is smooth except at its kinks; φ takes u of shape (nodes, C), a and s are (C,).

    Gauss–Legendre quadrature with 40 nodes between neighbouring kinks, up to ±8.5 standard
    deviations. The limits depend on a and s, so derivatives include the motion of the kinks.
    """
    # The derivatives of the limits in a are −1/s and cancel. The clamp costs 1e-10 in the mean.
    s = s.clamp_min(1e-10)
    end = torch.full_like(a, 8.5)
    edges = torch.stack([-end, *(((kink - a) / s).clamp(-end, end) for kink in kinks), end])
    nodes, weights = (v[:, None, None] for v in _vectors(_BETWEEN_KINKS, a))
    width = edges.diff(dim=0)
    g = (edges[:-1] + width * nodes).flatten(0, 1)
    weights = (width * weights).flatten(0, 1) * _density(g)
    z = phi(a + s * g)
    mean = (weights * z).sum(0)
    return mean, (weights * (z - mean).square()).sum(0)
