"""Mean and variance of φ(u), u ~ N(a, s²), in closed form, by activation.

Smooth φ and ReLU's kin come with their slopes by a and s; piecewise polynomials, ELU and its kin
are differentiated by autograd. With M(a, s) = E[φ(a + sG)]: ∂M/∂s = s·∂²M/∂a² (heat equation) and
E[u f] = a·E[f] + s²·E[f'] (Stein). All operations act elementwise on float64 tensors of one shape;
moments.py makes a and s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SQRT_2PI = math.sqrt(2 * math.pi)


def _legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gauss–Legendre nodes and weights on (0, 1), from the Jacobi matrix (Golub and Welsch)."""
    k = torch.arange(1, count, dtype=torch.float64)
    side = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return tuple(((nodes + 1) / 2).tolist()), tuple(vectors[0].square().tolist())


_LEGENDRE = _legendre(12)


class Moments(NamedTuple):
    """Mean and variance, and their derivatives by a and by s."""

    mean: Tensor
    var: Tensor
    mean_a: Tensor
    mean_s: Tensor
    var_a: Tensor
    var_s: Tensor


def from_raw(
    mean: Tensor, square: Tensor, mean_a: Tensor, mean_s: Tensor, square_a: Tensor, square_s: Tensor
) -> Moments:
    """From E[φ], E[φ²] and their slopes."""
    return Moments(
        mean,
        (square - mean * mean).clamp_min(0),
        mean_a,
        mean_s,
        square_a - 2 * mean * mean_a,
        square_s - 2 * mean * mean_s,
    )


def vector(values: Sequence[float], like: Tensor) -> Tensor:
    """The values on like's device; torch.tensor would copy them there, and wait for a GPU."""
    return torch.stack([like.new_full((), value) for value in values])


def standardized(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Φ(a/s) and the normal density at a/s; finite, with their derivatives, down to s = 0."""
    # beyond 38 both are 0 or 1 in float64, and only their derivatives could still overflow
    t = (a / s.clamp_min(1e-30)).clamp(-38, 38)
    return torch.special.ndtr(t), torch.exp(-0.5 * t * t) / _SQRT_2PI


def leaky_relu(a: Tensor, s: Tensor, slope: float = 0.0) -> Moments:
    """φ = max(u, 0) + slope·min(u, 0); ReLU for slope 0, the identity for slope 1."""
    cdf, density = standardized(a, s)
    mean, square = _rectified(a, s, cdf, density)
    if slope == 0:
        return from_raw(mean, square, cdf, density, 2 * mean, 2 * s * cdf)
    k, k2 = 1 - slope, 1 - slope * slope
    slope2 = slope * slope
    return from_raw(
        k * mean + slope * a,
        k2 * square + slope2 * (a * a + s * s),
        k * cdf + slope,
        k * density,
        2 * (k2 * mean + slope2 * a),
        2 * s * (k2 * cdf + slope2),
    )


def relu_moments(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ReLU alone, at half the operations."""
    mean, square = _rectified(a, s, *standardized(a, s))
    return mean, (square - mean * mean).clamp_min(0)


def _rectified(a: Tensor, s: Tensor, cdf: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """E[max(u, 0)] = aΦ + s·pdf and E[max(u, 0)²] = a·E[max(u, 0)] + s²Φ, both at a/s."""
    mean = torch.addcmul(s * density, a, cdf)
    return mean, torch.addcmul(a * mean, s * s, cdf)


# The logistic distribution as a scale mixture of eight normals, σ(u) ≈ Σ p·Φ(λu), in the manner of
# Monahan and Stefanski. Its largest error is 2.1e-9 (measured).
_P = (
    0.003246343272134,
    0.051517477033972,
    0.195077912673858,
    0.315569823632818,
    0.274149576158423,
    0.131076880695470,
    0.027912418727972,
    0.001449567805354,
)
_LAMBDA = (
    1.365340806296348,
    1.059523971016916,
    0.830791313765644,
    0.650732166639391,
    0.508135425366489,
    0.396313345166341,
    0.308904252267995,
    0.238212616409306,
)


def silu(a: Tensor, s: Tensor) -> Moments:
    """φ = u·σ(u), through σ² = σ − σ' and the normal mixture for σ. Errors: see moments.py."""
    d = _sigmoid_derivatives(a, s)
    return _self_gated(a, s, d[:4], [d[k] - d[k + 1] for k in range(5)])


def sigmoid(a: Tensor, s: Tensor) -> Moments:
    """φ = σ(u), through the same two, so that the error stays as small for any s."""
    d = _sigmoid_derivatives(a, s)
    return from_raw(d[0], d[0] - d[1], d[1], s * d[2], d[1] - d[2], s * (d[2] - d[3]))


def tanh(a: Tensor, s: Tensor) -> Moments:
    """φ = tanh(u) = 2σ(2u) − 1."""
    mean, var, mean_a, mean_s, var_a, var_s = sigmoid(2 * a, 2 * s)
    return Moments(2 * mean - 1, 4 * var, 4 * mean_a, 4 * mean_s, 8 * var_a, 8 * var_s)


def gelu(a: Tensor, s: Tensor) -> Moments:
    """φ = u·Φ(u); E[Φ(u)²] = Φ(h) − 2·T(h, r) with Owen's T.

    h = a/sqrt(1 + s²), r = 1/sqrt(1 + 2s²).
    """
    v = s * s
    c, r = torch.rsqrt(1 + v), torch.rsqrt(1 + 2 * v)
    h = c * a
    cdf, density = torch.special.ndtr(h), torch.exp(-0.5 * h * h) / _SQRT_2PI
    d = c * density
    gates = [cdf, d, -h * c * d, (h * h - 1) * c * c * d]
    hr = h * r
    p = 2 * d * torch.special.ndtr(hr)  # d/da of E[Φ²]; p' = −hc·p + q, q' = −hc(1 + r²)·q
    q = 2 * c * r * d * torch.exp(-0.5 * hr * hr) / _SQRT_2PI
    k, hc, h2, c2 = 2 + r * r, h * c, h * h, c * c
    squares = [
        cdf - 2 * _owens_t(h, r),
        p,
        q - hc * p,
        c2 * (h2 - 1) * p - hc * k * q,
        hc * c2 * (3 - h2) * p + c2 * (h2 - 1 - k + h2 * k * (1 + r * r)) * q,
    ]
    return _self_gated(a, s, gates, squares)


def _self_gated(a: Tensor, s: Tensor, gate: list[Tensor], squared_gate: list[Tensor]) -> Moments:
    """Moments of u·g(u) from E[g⁽ᵏ⁾], k = 0 … 3, and E[(g²)⁽ᵏ⁾], k = 0 … 4, by Stein's identity."""
    v, (g0, g1, g2, g3), (t0, t1, t2, t3, t4) = s * s, gate, squared_gate
    mean_aa = 2 * g1 + a * g2 + v * g3
    square = (a * a + v) * t0 + 2 * a * v * t1 + v * v * t2
    square_a = 2 * a * t0 + (a * a + 3 * v) * t1 + 2 * a * v * t2 + v * v * t3
    square_aa = 2 * t0 + 4 * a * t1 + (a * a + 5 * v) * t2 + 2 * a * v * t3 + v * v * t4
    return from_raw(
        a * g0 + v * g1, square, g0 + a * g1 + v * g2, s * mean_aa, square_a, s * square_aa
    )


def _owens_t(h: Tensor, r: Tensor) -> Tensor:
    """Owen's T(h, r) for 0 < r ≤ 1, its defining integral by Gauss–Legendre."""
    nodes, weights = (vector(v, h).view(-1, *[1] * h.ndim) for v in _LEGENDRE)
    x2 = (r * nodes).square() + 1
    return (torch.exp(-0.5 * h.square() * x2) / x2 * weights).sum(0) * r / (2 * math.pi)


def _sigmoid_derivatives(a: Tensor, s: Tensor) -> list[Tensor]:
    """E[σ⁽ᵏ⁾(u)], k = 0 … 5: the a-derivatives of Σ p·Φ(h), h = λa / sqrt(1 + λ²s²).

    With dh/da = c, h·c = c²a.
    """
    shape, a, s = a.shape, a.flatten(), s.flatten()
    scale, share = vector(_LAMBDA, a), vector(_P, a)
    c2 = (scale.square().reciprocal()[:, None] + s * s).reciprocal()
    c, a2 = c2.sqrt(), a * a
    d = torch.exp(c2 * (-0.5 * a2)) * c
    # the Hermite polynomials in h are sums of these
    k0, k1, k2, k3, k4 = _weighted_powers(share / _SQRT_2PI, d, c2)
    # Φ(h) = ½ + ½·erf(h/√2), and Σ p = 1
    mean = 0.5 + 0.5 * (share @ torch.erf(c * (a * math.sqrt(0.5))))
    derivatives = [
        mean,
        k0,
        -a * k1,
        a2 * k2 - k1,
        a * (3 * k2 - a2 * k3),
        a2 * (a2 * k4 - 6 * k3) + 3 * k2,
    ]
    return [derivative.view(shape) for derivative in derivatives]


def _weighted_powers(weights: Tensor, d: Tensor, c2: Tensor) -> list[Tensor]:
    """Σ weights·d·c²ʲ over the rows of d and c2, j = 0 … 4."""
    sums = [weights @ d]
    for _ in range(4):
        d = d * c2
        sums.append(weights @ d)
    return sums


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
    """E[φ]: the first piece everywhere, plus the change of piece beyond each break."""
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
    alpha = getattr(module, "alpha", 1.0)
    return _exponential_tail(a, s, alpha, 1 / alpha, 1.0)


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
    """E[exp(ku); u < 0] = exp(ka + k²s²/2)·Φ(t), t = −a/s − ks.

    Where t < 0 the first factor may overflow and the second underflow; the product is computed as
    exp(−(a/s)²/2)·erfcx(−t/√2)/2 there.
    """
    q = (a / s).clamp(-38, 38)
    t = -q - k * s
    scaled = 0.5 * torch.exp(-0.5 * q * q) * torch.special.erfcx(-t.clamp(max=0) * math.sqrt(0.5))
    plain = torch.exp((k * a + 0.5 * (k * s).square()).clamp(max=0)) * torch.special.ndtr(
        t.clamp(min=0)
    )
    return torch.where(t < 0, scaled, plain)
