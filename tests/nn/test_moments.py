"""Moments of the proxy: reference values, the documented errors, gradients, safety at the ends."""

import math
from functools import partial

import mpmath
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proxynorm.nn import ACTIVATIONS, NormAct2d, closed_forms, proxy_moments
from proxynorm.nn.activations import activation_name, make_activation
from proxynorm.nn.fast.folding import evaluate_constants, folded

ZERO, ONE = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("activation", "method", "nodes", "mean", "var", "scale"),
    [
        ("relu", "grid", 200, 0.398451, 0.338035, 1.648373),
        ("relu", "grid", 256, 0.398565, 0.338637, 1.647026),
        ("relu", "exact", 256, 0.398942, 0.340845, 1.642116),
        ("silu", "grid", 200, 0.206048, 0.310004, 1.714977),
        ("silu", "grid", 256, 0.206184, 0.310665, 1.713312),
        ("silu", "exact", 256, 0.206621, 0.313083, 1.707262),
    ],
)
def test_reference_values(activation, method, nodes, mean, var, scale):
    m, v = proxy_moments(ONE, ZERO, ZERO, ZERO, activation, method, nodes)
    assert m.dtype == v.dtype == torch.float32
    assert m.item() == pytest.approx(mean, abs=1e-5)
    assert v.item() == pytest.approx(var, abs=1e-5)
    assert (v + 0.03).rsqrt().item() == pytest.approx(scale, abs=1e-5)


# the table in moments.py: mean, variance
CLOSED = (1e-12, 1e-11)
ERRORS = {
    **dict.fromkeys(
        (
            "relu",
            "leaky_relu",
            "relu6",
            "hard_tanh",
            "hard_sigmoid",
            "hard_swish",
            "elu",
            "celu",
            "selu",
            "gelu",
            "identity",
        ),
        CLOSED,
    ),
    **dict.fromkeys(("silu", "sigmoid", "tanh"), (2e-8, 5e-7)),
    **dict.fromkeys(("mish", "gelu_tanh", "softplus"), (5e-8, 1e-6)),
}


def integrated(activation: nn.Module, weight: float, bias: float) -> tuple[float, float]:
    """Mean and variance by composite Gauss–Legendre in float64, split at every kink."""
    limits = {-9.5, 9.5, *torch.linspace(-9.5, 9.5, 77).tolist()}
    kinks = [*torch.linspace(-12, 12, 49).tolist(), 20.0]  # -3, -1, 0, 1, 3, 6 among them
    limits |= {(k - bias) / weight for k in kinks if abs((k - bias) / weight) < 9.5}
    edges = torch.tensor(sorted(limits), dtype=torch.float64)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    g = (middle[:, None] + half[:, None] * NODES).flatten()
    w = (half[:, None] * WEIGHTS).flatten() * torch.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    z = activation(weight * g + bias)
    mean = (w * z).sum()
    return mean.item(), (w * (z - mean).square()).sum().item()


def _legendre(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(1, count, dtype=torch.float64)
    side = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return nodes, 2 * vectors[0].square()


NODES, WEIGHTS = _legendre()
WEIGHT, BIAS = (
    t.flatten()
    for t in torch.meshgrid(
        torch.tensor([0.01, 0.1, 0.5, 1, 2, 4, 10], dtype=torch.float64),
        torch.tensor([-5, -2, -0.3, 0, 0.4, 1.5, 5], dtype=torch.float64),
        indexing="ij",
    )
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_has_the_documented_error(activation):
    module = make_activation(activation)
    pairs = [integrated(module, w, b) for w, b in zip(WEIGHT.tolist(), BIAS.tolist())]
    mean, var = torch.tensor(pairs, dtype=torch.float64).T
    zero = torch.zeros_like(WEIGHT)
    m, v = proxy_moments(WEIGHT, BIAS, zero, zero, activation)
    assert (m - mean).abs().max() < ERRORS[activation][0]
    assert (v - var).abs().max() < ERRORS[activation][1]
    if activation == "relu":
        grid_mean, grid_var = proxy_moments(WEIGHT, BIAS, zero, zero, activation, "grid")
        assert (grid_mean - mean).abs().max() > 100 * (m - mean).abs().max()
        assert (grid_var - var).abs().max() > 100 * (v - var).abs().max()


@pytest.mark.parametrize("weight", [100.0, -1000.0])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_saturating_activations_are_as_exact_at_any_scale(activation, weight):
    """They are nearly steps there; a rule with fixed nodes would have an error of 1e-2."""
    one = torch.ones(1, dtype=torch.float64)
    for bias in (-40.0, 0.3, 5.0):
        mean, var = integrated(make_activation(activation), abs(weight), bias)
        m, v = proxy_moments(weight * one, bias * one, 0 * one, 0 * one, activation)
        assert m.item() == pytest.approx(mean, abs=2e-8)
        assert v.item() == pytest.approx(var, abs=5e-7)


@pytest.mark.parametrize(("weight", "bias"), [(0.01, 5), (10, -5), (1.3, 0.2)])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_exact_against_high_precision(activation, weight, bias):
    phi = {
        "relu": lambda u: max(u, mpmath.mpf(0)),
        "silu": lambda u: u / (1 + mpmath.exp(-u)),
        "gelu": lambda u: u * mpmath.ncdf(u),
    }[activation]
    split = [-12, max(-12, min(12, -bias / weight)), 12]
    mean = mpmath.quad(lambda g: phi(weight * g + bias) * mpmath.npdf(g), split)
    var = mpmath.quad(lambda g: (phi(weight * g + bias) - mean) ** 2 * mpmath.npdf(g), split)
    one = torch.ones(1, dtype=torch.float64)
    m, v = proxy_moments(weight * one, bias * one, 0 * one, 0 * one, activation)
    assert m.item() == pytest.approx(float(mean), abs=2e-8)
    assert v.item() == pytest.approx(float(var), abs=5e-7)


@pytest.mark.parametrize("activation", ["relu", "gelu", "hard_swish"])
def test_grid_is_the_formula_to_the_bit(activation):
    w, b, pw, pb = torch.randn(4, 7, dtype=torch.float64)
    k = torch.arange(200, dtype=torch.float64)
    g = (math.sqrt(2) * torch.erfinv(2 * (k + 0.5) / 200 - 1))[:, None]
    z = make_activation(activation)(w * (pb + (1 + pw) * g) + b)
    m, v = proxy_moments(w, b, pw, pb, activation, "grid", 200)
    assert torch.equal(m, z.mean(0))
    torch.testing.assert_close(v, z.var(0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "silu", "tanh", "gelu", "hard_swish", "elu", "mish"]
)
def test_derivatives(activation):
    torch.manual_seed(0)
    parameters = tuple(p.requires_grad_() for p in torch.randn(4, 3, dtype=torch.float64))

    def moments(*p):
        return proxy_moments(*p, activation)

    assert torch.autograd.gradcheck(moments, parameters)
    assert torch.autograd.gradgradcheck(moments, parameters)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("method", ["exact", "grid"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_constants_have_the_slopes_of_the_formula(activation, method, scale):
    """A layer's constants and their jacobian against the differentiable formula."""
    torch.manual_seed(0)
    layer = NormAct2d(3, act_layer=activation, moments=method, proxy_scale=scale).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5)
    parameters, rule = layer.four_parameters(), layer.proxy_rule()
    values, jacobian = evaluate_constants(parameters, rule)
    for row, value, slopes in zip(folded(parameters, rule), values, jacobian):
        torch.testing.assert_close(value, row.detach(), atol=1e-12, rtol=1e-10)
        expected = [torch.zeros(3, dtype=torch.float64)] * 4
        if row.requires_grad:
            expected = torch.autograd.grad(
                row.sum(), parameters, retain_graph=True, materialize_grads=True
            )
        torch.testing.assert_close(slopes, torch.stack(expected), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "silu", "tanh", "gelu", "hard_swish", "elu", "mish"]
)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e4, 1e8])
def test_safe_at_the_ends(activation, size):
    for bias in (-3.0, 0.0, 3.0):
        p = [torch.tensor([v], requires_grad=True) for v in (size, bias, 0.0, 0.0)]
        m, v = proxy_moments(*p, activation)
        first = torch.autograd.grad((m + v).sum(), p, create_graph=True)
        second = torch.autograd.grad(sum(f.sum() for f in first), p, allow_unused=True)
        assert all(torch.isfinite(t).all() for t in (m, v, *first))
        if activation != "mish":  # torch's own second derivative of mish is NaN beyond u = 709
            assert not any(
                t.isnan().any() for t in second if t is not None
            )  # at a kink they do grow without bound
        if size < 1e-7:
            phi = make_activation(activation)(torch.tensor(bias))
            assert m.item() == pytest.approx(phi.item(), abs=1e-6)
            assert v.item() == pytest.approx(0, abs=1e-6)


def test_any_callable_module_or_class():
    parameters = (torch.rand(5) + 0.5, torch.randn(5), torch.zeros(5), torch.zeros(5))
    expected = proxy_moments(*parameters, "relu")
    for activation in (
        nn.ReLU,
        nn.ReLU(inplace=True),
        torch.relu,
        F.relu,
        torch.relu_,
        F.relu_,
        partial(nn.ReLU, False),
    ):
        torch.testing.assert_close(proxy_moments(*parameters, activation), expected)
    close = proxy_moments(*parameters, lambda u: u.clamp(min=0))
    torch.testing.assert_close(close, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        proxy_moments(*parameters, nn.PReLU(5, 0.0)), expected, atol=2e-3, rtol=0
    )


def test_partials_of_classes_and_functions():
    parameters = torch.rand(4, 5)
    for ours, theirs in (
        (partial(F.leaky_relu, negative_slope=0.2), nn.LeakyReLU(0.2)),
        (partial(nn.LeakyReLU, 0.2), nn.LeakyReLU(0.2)),
        (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (partial(F.relu, inplace=True), "relu"),
        (partial(F.hardtanh, min_val=0.0, max_val=6.0), "relu6"),
    ):
        assert activation_name(make_activation(ours)) != "callable"
        torch.testing.assert_close(
            proxy_moments(*parameters, ours), proxy_moments(*parameters, theirs)
        )
    clamp = partial(torch.clamp, min=0, max=6)
    x = torch.randn(2, 5, 3, 3) * 4
    torch.testing.assert_close(make_activation(clamp)(x), F.relu6(x))
    torch.testing.assert_close(make_activation(torch.clamp, min=0, max=6)(x), F.relu6(x))


def hinge(below: float):
    """Slope 1 above 0, `below` below: as an unknown callable, and with a closed form."""
    return lambda u: torch.where(u > 0, u, below * u), nn.LeakyReLU(below)


@pytest.mark.parametrize("below", [0.0, 0.25, -1.0, 3.0])
@pytest.mark.parametrize("weight", [0.01, 1.0, 3.0, 10.0])
def test_documented_error_of_kinks(below, weight):
    bias = torch.linspace(-2, 2, 2001, dtype=torch.float64) * weight
    zero, one = torch.zeros_like(bias), torch.ones_like(bias)
    ours, exact = (
        [*proxy_moments(weight * one, b, zero, zero, phi), b]
        for phi in hinge(below)
        for b in [bias.clone().requires_grad_()]
    )
    slopes = [
        torch.autograd.grad(mean.sum(), b, retain_graph=True)[0] for mean, _, b in (ours, exact)
    ]
    step, steepest = abs(1 - below), max(1.0, abs(below))
    errors = [
        (one - other).abs().max().item()
        for one, other in ((ours[0], exact[0]), (ours[1], exact[1]), slopes)
    ]
    for error, bound in zip(
        errors, (2.2e-4 * weight * step, 3.6e-4 * weight**2 * step * steepest, 1.7e-2 * step)
    ):
        assert 0.6 * bound < error < bound  # the bound holds, and is tight


@pytest.mark.parametrize(
    ("module", "mean_error", "var_error"),
    [
        (nn.PReLU(1, 0.25), 1.7e-3, 1.7e-2),
        (nn.Softsign(), 6e-4, 5.5e-4),
        (nn.Softplus(beta=3), 7e-6, 9e-5),
        (nn.Tanhshrink(), 1e-5, 5e-5),
        (nn.LogSigmoid(), 5e-8, 1e-6),
    ],
)
def test_documented_errors_of_unlisted_activations(module, mean_error, var_error):
    module = module.double()
    pairs = [integrated(module, w, b) for w, b in zip(WEIGHT.tolist(), BIAS.tolist())]
    mean, var = torch.tensor(pairs, dtype=torch.float64).T
    m, v = proxy_moments(WEIGHT, BIAS, torch.zeros_like(WEIGHT), torch.zeros_like(WEIGHT), module)
    assert (m - mean).abs().max() < mean_error and (v - var).abs().max() < var_error


def test_documented_error_of_a_jump():
    bias = torch.linspace(-2, 2, 2001, dtype=torch.float64)
    for weight in (1.0, 3.0):
        mean, _ = proxy_moments(
            torch.full_like(bias, weight), bias, *torch.zeros(2, 2001), nn.Threshold(0.5, 0.0)
        )
        shifted = torch.special.ndtr((bias - 0.5) / weight)
        rectified = proxy_moments(
            torch.full_like(bias, weight), bias - 0.5, *torch.zeros(2, 2001).double()
        )[0]
        error = (mean - rectified - 0.5 * shifted).abs().max()
        assert error < 1.7e-2 * 0.5 + 2.2e-4 * weight


def test_float32_under_autocast():
    parameters = torch.rand(4, 5)
    expected = proxy_moments(*parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(proxy_moments(*parameters), expected))
    assert proxy_moments(*parameters.bfloat16())[0].dtype == torch.float32


def test_wrong_names_are_one_line_with_the_nearest():
    with pytest.raises(ValueError, match="'rleu'.*'relu'.*silu"):
        proxy_moments(ONE, ZERO, ZERO, ZERO, "rleu")
    with pytest.raises(ValueError, match="'exat'.*'exact'.*grid"):
        proxy_moments(ONE, ZERO, ZERO, ZERO, "relu", "exat")
    with pytest.raises(ValueError, match="nodes=0"):
        proxy_moments(ONE, ZERO, ZERO, ZERO, "relu", "grid", 0)
    with pytest.raises(TypeError, match="an activation is"):
        proxy_moments(ONE, ZERO, ZERO, ZERO, 3)


@pytest.mark.parametrize("method", ["auto", "grid"])
def test_an_activation_with_parameters_in_half_precision(method):
    half = [torch.full((2,), v).bfloat16() for v in (1.0, 0.5, 0.0, 0.0)]
    found = proxy_moments(*half, nn.PReLU().bfloat16(), method)
    wanted = proxy_moments(*(p.float() for p in half), nn.PReLU(), method)
    torch.testing.assert_close(found, wanted)
    assert (
        NormAct2d(4, act_layer=nn.PReLU).bfloat16()(torch.randn(2, 4, 3, 3).bfloat16()).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("method", ["auto", "grid"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_alone_in_inference_mode(activation, method):
    layer, x = NormAct2d(4, act_layer=activation, moments=method), torch.randn(2, 4, 3, 3)
    with torch.inference_mode():
        found = layer(x)
    torch.testing.assert_close(found, layer(x).detach())


def test_a_grid_of_any_size_is_exact_in_float64():
    layer = NormAct2d(1, moments="grid", nodes=200).double()
    scale, _, _, floor, _ = layer.constants().values
    mean, _ = layer.proxy_statistics()
    torch.testing.assert_close(floor, -scale * mean, atol=1e-15, rtol=0)


def test_the_slopes_of_silu_are_those_of_autograd():
    a = torch.linspace(-9, 9, 61, dtype=torch.float64).repeat_interleave(40).requires_grad_()
    s = torch.logspace(-2, 1.5, 40, dtype=torch.float64).repeat(61).requires_grad_()
    values, slopes = closed_forms.silu_with_derivatives(a.detach(), s.detach())
    for value, *by, moment in zip(values, *slopes, closed_forms.silu(a, s), strict=True):
        torch.testing.assert_close(value, moment.detach(), rtol=0, atol=0)
        kept = value > 1e-8  # below, the variance is clamped at 0
        for slope, exact in zip(by, torch.autograd.grad(moment.sum(), (a, s), retain_graph=True)):
            torch.testing.assert_close(slope[kept], exact[kept], rtol=1e-9, atol=1e-9)
