"""Mean and variance of φ(u), u ~ N(a, s²), for piecewise φ: polynomials, and ELU and its kin.

Differentiable float64 operations on a and s as moments.py makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from proxynorm.nn.gaussian import standardized

Polynomial = tuple[float, ...]  # coefficients of 1, u, u², …


def hard_tanh(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """u clamped to [min_val, max_val]; ReLU6 is the one on [0, 6]."""
    low, high = getattr(module, "min_val", -1.0), getattr(module, "max_val", 1.0)
    return piecewise_polynomial(a, s, (low, high), ((low,), (0, 1), (high,)))


def relu6(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """u clamped to [0, 6]."""
    return piecewise_polynomial(a, s, (0, 6), ((0,), (0, 1), (6,)))


def hard_sigmoid(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """u/6 + 1/2 clamped to [0, 1]."""
    return piecewise_polynomial(a, s, (-3, 3), ((0,), (1 / 2, 1 / 6), (1,)))


def hard_swish(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """u times hard_sigmoid(u)."""
    return piecewise_polynomial(a, s, (-3, 3), ((0,), (0, 1 / 2, 1 / 6), (0, 1)))


def piecewise_polynomial(
    a: Tensor, s: Tensor, breaks: Sequence[float], pieces: Sequence[Polynomial]
) -> tuple[Tensor, Tensor]:
    """φ is pieces[0] below breaks[0], pieces[1] between breaks[0] and breaks[1], and so on."""
    mean = _expectation(a, s, breaks, pieces)
    square = _expectation(a, s, breaks, [_multiply(p, p) for p in pieces])
    return mean, (square - mean * mean).clamp_min(0)


def _expectation(
    a: Tensor, s: Tensor, breaks: Sequence[float], pieces: Sequence[Polynomial]
) -> Tensor:
    """The first piece everywhere, then beyond each break what the next piece adds to the one before."""
    order = max(len(p) for p in pieces)
    total = _dot(pieces[0], _upper_moments(a, s, None, order))
    for edge, before, after in zip(breaks, pieces, pieces[1:]):
        width = max(len(before), len(after))
        before, after = (p + (0.0,) * (width - len(p)) for p in (before, after))
        total = total + _dot(
            [q - p for p, q in zip(before, after)], _upper_moments(a, s, edge, order)
        )
    return total


def _upper_moments(a: Tensor, s: Tensor, edge: float | None, order: int) -> list[Tensor]:
    """E[uᵏ; u > edge] for k < order, by integration by parts; of all u where edge is None."""
    if edge is None:
        tail, density = torch.ones_like(a), torch.zeros_like(a)
    else:
        tail, density = standardized(a - edge, s)
    moments = [tail, a * tail + s * density]
    for k in range(2, order):
        moments.append(
            a * moments[k - 1]
            + (k - 1) * s * s * moments[k - 2]
            + s * (edge or 0.0) ** (k - 1) * density
        )
    return moments[:order]


def _dot(coefficients: Sequence[float], moments: Sequence[Tensor]) -> Tensor:
    return sum((c * m for c, m in zip(coefficients, moments) if c), torch.zeros_like(moments[0]))


def _multiply(p: Polynomial, q: Polynomial) -> Polynomial:
    product = [0.0] * (len(p) + len(q) - 1)
    for i, x in enumerate(p):
        for j, y in enumerate(q):
            product[i + j] += x * y
    return tuple(product)


def elu(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """u above 0, α(exp(u) − 1) below."""
    return _exponential_tail(a, s, getattr(module, "alpha", 1.0), 1.0, 1.0)


def celu(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """u above 0, α(exp(u/α) − 1) below."""
    return _exponential_tail(a, s, module.alpha, 1 / module.alpha, 1.0)


def selu(a: Tensor, s: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """ELU with the constants of Klambauer et al. 2017."""
    return _exponential_tail(a, s, 1.6732632423543772, 1.0, 1.0507009873554805)


def _exponential_tail(
    a: Tensor, s: Tensor, alpha: float, rate: float, factor: float
) -> tuple[Tensor, Tensor]:
    """φ = factor·(u above 0, alpha·(exp(rate·u) − 1) below)."""
    s = s.clamp_min(1e-10)  # the parts' slopes are 1/s and cancel; costs 1e-10 in the mean
    above, density = standardized(a, s)
    below = 1 - above
    first, second = _exponential_moment(a, s, rate), _exponential_moment(a, s, 2 * rate)
    mean = a * above + s * density + alpha * (first - below)
    square = (
        (a * a + s * s) * above + a * s * density + alpha * alpha * (second - 2 * first + below)
    )
    return factor * mean, factor * factor * (square - mean * mean).clamp_min(0)


def _exponential_moment(a: Tensor, s: Tensor, k: float) -> Tensor:
    """E[exp(ku); u < 0] = exp(ka + k²s²/2)·Φ(t), t = −a/s − ks. Where t < 0 the first factor may overflow and the
    second underflow: there it is exp(−(a/s)²/2)·erfcx(−t/√2)/2."""
    q = (a / s).clamp(-38, 38)
    t = -q - k * s
    scaled = 0.5 * torch.exp(-0.5 * q * q) * torch.special.erfcx(-t.clamp(max=0) * math.sqrt(0.5))
    plain = torch.exp((k * a + 0.5 * (k * s).square()).clamp(max=0)) * torch.special.ndtr(
        t.clamp(min=0)
    )
    return torch.where(t < 0, scaled, plain)
