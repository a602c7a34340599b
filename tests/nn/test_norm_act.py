"""NormAct2d: the paper's formula, the fast paths against it, precision, formats, refusals."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from proxynorm.models import create_model
from proxynorm.nn import (
    ACTIVATIONS,
    NORMS,
    NormAct2d,
    batch_normalize,
    group_normalize,
    norm_spec,
    pn_act,
    proxy_moments,
)
from proxynorm.nn.norms import affine


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(
    norm: str = "ln_pn", features: int = 12, dtype: torch.dtype = torch.float64, **options
) -> NormAct2d:
    """A layer with random parameters; norm is a full name."""
    spec = norm_spec(norm)
    groups = 4 if spec.kind == "gn" else None
    made = NormAct2d(
        features, spec.kind, spec.proxy, **{"groups": groups, "dtype": dtype, **options}
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for name, b in made.named_buffers():
            if b.is_floating_point():
                made.register_buffer(name, (b + torch.rand_like(b) * 0.3).to(dtype))
    return made


def maps(
    shape=(5, 12, 4, 3), dtype=torch.float64, memory_format=torch.contiguous_format
) -> torch.Tensor:
    return (
        (torch.randn(shape, dtype=torch.float64) * 1.5 + 0.4)
        .to(dtype)
        .contiguous(memory_format=memory_format)
    )


def test_formula():
    """The formula written out, with nothing from the package except the moments."""
    x, act = maps(), layer("ln_pn")
    y = (x - x.mean((1, 2, 3), keepdim=True)) * (
        x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5
    ).rsqrt()
    w, b, pw, pb = (p.detach() for p in (act.weight, act.bias, act.proxy_weight, act.proxy_bias))
    m, v = proxy_moments(w, b, pw, pb)
    samples = F.relu(w * (pb + (1 + pw) * torch.randn(100_000, 12, dtype=torch.float64)) + b)
    torch.testing.assert_close(m, samples.mean(0), atol=2e-2, rtol=0)
    torch.testing.assert_close(v, samples.var(0), atol=6e-2, rtol=0)
    view = (1, -1, 1, 1)
    z = (F.relu(w.view(view) * y + b.view(view)) - m.view(view)) * (v.view(view) + 0.03).rsqrt()
    torch.testing.assert_close(act(x), z)


CASES = list(
    itertools.product(
        ("ln", "ln_pn", "gn_pn", "in_pn", "bn", "bn_pn", "none"),
        ("relu", "silu", "gelu", "leaky_relu", "hard_swish"),
        (torch.contiguous_format, torch.channels_last),
    )
)


@pytest.mark.parametrize(("norm", "activation", "memory_format"), CASES)
def test_fused_equals_reference(norm, activation, memory_format):
    for training, apply_act, scale, method, chunk in (
        (True, True, True, "auto", None),
        (True, True, False, "grid", 2),
        (False, True, True, "auto", None),
        (True, False, True, "auto", 2),
        (False, True, False, "auto", None),
    ):
        options = {
            "apply_act": apply_act,
            "proxy_scale": scale,
            "moments": method,
            "norm_batch": chunk,
        }
        fused = layer(norm, act_layer=activation, **options).train(training)
        plain = copy.deepcopy(fused)
        x = maps(memory_format=memory_format).requires_grad_()
        z, reference = fused(x), plain.activate(plain.normalize(x))
        torch.testing.assert_close(z, reference)
        assert z.is_contiguous(memory_format=memory_format)
        grad = torch.randn_like(z)
        ours = torch.autograd.grad(z, (x, *fused.parameters()), grad)
        theirs = torch.autograd.grad(reference, (x, *plain.parameters()), grad)
        torch.testing.assert_close(ours, theirs)
        for one, other in zip(fused.buffers(), plain.buffers()):
            torch.testing.assert_close(one, other)


TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}


def formula(act: NormAct2d, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64: the norm, then PN-Act or Act as the paper writes it."""
    wide = copy.deepcopy(act).double()
    y = wide.normalize(x.double())
    if wide.proxied:
        parameters = wide.four_parameters()
        moments = partial(proxy_moments, activation=wide.act)
        return pn_act(y, *parameters, wide.act, moments, wide.proxy_eps)
    return wide.act(affine(y, wide.weight, wide.bias))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "_ws" not in norm])
def test_formula_and_fast_path_agree(norm, dtype, memory_format):
    """For every activation: outputs, and gradients by the input."""
    for activation in ACTIVATIONS:
        act = layer(norm, dtype=torch.promote_types(dtype, torch.float32), act_layer=activation)
        x = maps(dtype=dtype, memory_format=memory_format).requires_grad_()
        expected = formula(act, x)
        z = act(x)
        assert z.dtype == dtype and z.is_contiguous(memory_format=memory_format), activation
        assert (z - expected).norm() <= TOLERANCE[dtype] * expected.norm(), activation
        grad = torch.randn_like(z)
        ours = torch.autograd.grad(z, x, grad)[0]
        theirs = torch.autograd.grad(expected, x, grad.double())[0]
        # rounding moves single elements across a kink, where the gradient jumps
        off = (ours - theirs).abs() > 2 * TOLERANCE[dtype] * theirs.abs().max() + 1e-6
        assert off.double().mean() < 0.02, activation


@pytest.mark.parametrize("norm", ["ln_pn", "gn_pn", "in_pn", "bn_pn"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradients_and_gradients_of_gradients(norm, activation):
    act = layer(norm, features=4, act_layer=activation, groups=2 if norm == "gn_pn" else None)
    names = list(dict(act.named_parameters()))

    def function(x, *parameters):
        return torch.func.functional_call(act, dict(zip(names, parameters)), (x,))

    inputs = (
        maps((2, 4, 2, 2)).requires_grad_(),
        *(p.detach().requires_grad_() for p in act.parameters()),
    )
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_transforms(activation):
    """torch.func.grad, vmap, jvp and forward-mode AD agree with backward."""
    act = layer("ln_pn", act_layer=activation)
    x, tangent = maps(), torch.randn(5, 12, 4, 3, dtype=torch.float64)
    expected = torch.autograd.grad(act(x.requires_grad_()).square().sum(), x)[0]
    x = x.detach()

    def loss(x):
        return act(x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(
        torch.func.jvp(loss, (x,), (tangent,))[1], (expected * tangent).sum()
    )
    per_sample = torch.func.vmap(torch.func.grad(lambda one: loss(one[None])))(x)
    torch.testing.assert_close(per_sample, expected)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(out, (expected * tangent).sum())


def test_a_class_of_a_known_name_is_taken_for_what_it_computes():
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(3 * x)

    class ReLU(nn.ReLU):
        def forward(self, x):
            return super().forward(x).square()

    for own in (Swish(), ReLU()):
        act, x = layer("ln_pn", act_layer=own), maps()
        assert act.act_name == "callable"
        torch.testing.assert_close(act(x), act.activate(act.normalize(x)))
        one, zero = torch.ones(1), torch.zeros(1)
        samples = own(torch.randn(1_000_000, dtype=torch.float64)).float()
        torch.testing.assert_close(
            proxy_moments(one, zero, zero, zero, own)[0],
            samples.mean(0, True),
            rtol=0.01,
            atol=0.01,
        )


def test_the_activation_may_be_changed_later():
    act, x = layer("ln_pn"), maps()
    act.act = nn.SiLU()
    torch.testing.assert_close(act(x), act.activate(act.normalize(x)))


@pytest.mark.parametrize("checkpointed", ["reentrant", "not reentrant"])
def test_gradient_checkpointing(checkpointed):
    from torch.utils.checkpoint import checkpoint

    act, x = layer("gn_pn"), maps().requires_grad_()
    inputs = (x, *act.parameters())
    expected = torch.autograd.grad(act(x).square().sum(), inputs)
    z = checkpoint(act, x, use_reentrant=checkpointed == "reentrant")
    z.square().sum().backward()
    torch.testing.assert_close(tuple(t.grad for t in inputs), expected)


def results(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients, and running statistics after it."""
    z = net(x)
    gradients = torch.autograd.grad(z.float().square().sum(), (x, *net.parameters()))
    return [z.detach(), *gradients, *net.buffers()]


def assert_equal_to_rounding(ours, theirs, dtype: torch.dtype) -> None:
    bound = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        error, size = (one.double() - other.double()).norm(), other.double().norm()
        assert error <= bound * size + 1e-4, (error, size, one.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "_ws" not in norm])
def test_what_is_compiled_equals_eager(norm, dtype, monkeypatch):
    """The operations that torch.compile sees, for every norm and activation."""
    x = maps((4, 12, 5, 4), dtype, torch.channels_last).requires_grad_()
    # Behind the identity PN takes β out, and its gradient is rounding alone. Half precision moves
    # elements across kinks off 0, where the gradient jumps.
    kinked = {"hard_tanh", "hard_sigmoid", "hard_swish", "relu6"}
    activations = set(ACTIVATIONS) - {"identity"} - (kinked if dtype.itemsize == 2 else set())
    for activation, norm_batch in itertools.product(sorted(activations), (None, 3)):
        net = layer(norm, act_layer=activation, dtype=torch.float32, norm_batch=norm_batch)
        eager = results(copy.deepcopy(net), x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "_is_compiling_flag", True)
            assert_equal_to_rounding(results(net, x), eager, dtype)


class SideBySide(nn.ModuleList):
    """Layers on the same input. In a sequence, rounding in one would flip ReLUs of the next."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_equals_eager(dtype):
    """inductor's code, for the kinds of layers in which it differs."""
    kinds = [("ln", "relu"), ("gn_pn", "relu"), ("ln_pn", "silu"), ("bn_pn", "relu")]
    net = SideBySide(
        layer(norm, dtype=torch.float32, act_layer=activation) for norm, activation in kinds
    )
    compiled = copy.deepcopy(net)
    compiled.compile(fullgraph=True)
    x = maps((4, 12, 5, 4), dtype, torch.channels_last).requires_grad_()
    assert_equal_to_rounding(results(compiled, x), results(net, x), dtype)


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("norm", ["ln", "gn", "in", "bn"])
def test_a_mean_of_a_thousand_deviations(norm, transformed, monkeypatch):
    """Statistics in float32 lose nothing to cancellation."""
    act = layer(norm, dtype=torch.float32, act_layer=None)
    x = maps((4, 12, 16, 16)) + 1500
    if transformed:
        monkeypatch.setattr("proxynorm.nn.norms.needs_plain_operations", lambda: True)
    y = act.normalize(x.float())
    # the input itself is rounded to 6e-5 here
    torch.testing.assert_close(y.double(), act.double().normalize(x), atol=5e-4, rtol=0)


@pytest.mark.parametrize("norm", ["bn", "bn_pn", "gn_pn"])
def test_jit_trace_equals_eager(norm):
    act, x = layer(norm).eval(), maps()
    torch.testing.assert_close(
        torch.jit.trace(act, x)(2 * x), act(2 * x)
    )  # its checks look at the graph, too


@pytest.mark.slow
def test_compiled_for_any_size():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), NormAct2d(8, "ln_pn"), nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(net, dynamic=True)(x), net(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("norm", "activation"),
    [("ln_pn", "relu"), ("gn_pn", "silu"), ("bn_pn", "relu"), ("ln", "relu")],
)
def test_half_precision(norm, activation, dtype, memory_format):
    """Maps stay in half precision, statistics do not: a mean of 60 adds only rounding errors."""
    act = layer(norm, dtype=torch.float32, act_layer=activation)
    double = copy.deepcopy(act).double()
    x = (
        (maps(dtype=torch.float32) + 60)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    with torch.autocast("cpu", torch.bfloat16):
        z = act(x)
    assert z.dtype == dtype and z.is_contiguous(memory_format=memory_format)
    reference = double(x.double())
    torch.testing.assert_close(z.double(), reference, atol=0.03, rtol=0.02)
    grad = torch.randn_like(z)
    ours = torch.autograd.grad(z, (x, *act.parameters()), grad)
    theirs = torch.autograd.grad(reference, (x, *double.parameters()), grad.double())
    assert ours[0].dtype == dtype and all(g.dtype == torch.float32 for g in ours[1:])
    for one, other in zip(
        ours, theirs
    ):  # in norm, since rounding moves single elements across ReLU's kink
        assert (one.double() - other).norm() <= 0.05 * other.norm() + 1e-3


@pytest.mark.parametrize("norm", ["ln_pn", "bn_pn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_of_relu_in_half_precision_is_as_good_as_the_formulas(norm, dtype):
    act = layer(norm, features=64, dtype=torch.float32)
    x = maps((8, 64, 14, 14), dtype=dtype)
    grad = torch.randn(x.shape).to(dtype)
    wide = copy.deepcopy(act).double()
    z = wide.activate(wide.normalize(x.double()))
    exact = torch.autograd.grad(z, wide.bias, grad.double())[0]

    def error(z):
        return (torch.autograd.grad(z, act.bias, grad)[0] - exact).norm()

    assert error(act(x)) <= error(act.activate(act.normalize(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("proxy", [True, False])
def test_batch_norm_cast_to_half_precision(proxy, chunk, dtype):
    """The whole layer is cast. Its running statistics are updated, and used in evaluation."""
    act = NormAct2d(12, "bn", proxy, act_layer="silu", norm_batch=chunk)
    cast, x = copy.deepcopy(act).to(dtype), maps(dtype=torch.float32).to(dtype)
    for training in (True, False):
        z = cast.train(training)(x)
        z.sum().backward()
        assert z.dtype == dtype and all(
            p.grad.dtype == dtype and p.grad.isfinite().all() for p in cast.parameters()
        )
        torch.testing.assert_close(z.float(), act.train(training)(x.float()), atol=0.05, rtol=0.02)
    assert (cast.running_mean != 0).any() and cast.running_var.dtype == dtype
    torch.testing.assert_close(cast.running_var.float(), act.running_var, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"), [("resnet20v2", {"depth": 8}), ("efficientnet_b0", {})]
)
def test_models_cast_to_half_precision(name, options):
    model = create_model(name, "bn_pn", num_classes=5, **options).bfloat16()
    for training in (True, False):
        z = model.train(training)(torch.randn(2, 3, 32, 32).bfloat16())
        z.sum().backward()
        assert z.dtype == torch.bfloat16 and z.isfinite().all()


def test_no_overflow_in_float16():
    act = layer("ln_pn", dtype=torch.float32)
    x = (
        (torch.randn(2, 12, 8, 8) * 1e4).half().requires_grad_()
    )  # squares and sums are far beyond 65504
    z = act(x)
    z.backward(torch.randn_like(z))
    assert torch.isfinite(z).all() and torch.isfinite(x.grad).all() and z.abs().max() > 0.5


def test_outputs_of_proxied_layers_are_normalized():
    for norm in ("ln_pn", "gn_pn", "in_pn", "bn_pn"):
        spec = norm_spec(norm)
        z = NormAct2d(64, spec.kind, spec.proxy)(torch.randn(8, 64, 16, 16))
        assert z.mean().abs() < 0.02
        assert z.std().item() == pytest.approx((0.340845 / 0.370845) ** 0.5, abs=0.02)


def test_placement_without_activation():
    """Without an activation there is no PN; with proxy=True, the shift is dropped."""
    assert set(dict(NormAct2d(8, "ln_pn", apply_act=False).named_parameters())) == {"weight"}
    assert set(dict(NormAct2d(8, "ln", False, apply_act=False).named_parameters())) == {
        "weight",
        "bias",
    }
    act, x = layer("ln_pn", apply_act=False), maps()
    torch.testing.assert_close(act(x), F.group_norm(x, 1) * act.weight.view(1, -1, 1, 1))


def test_centring_only_and_the_gate_s_factor():
    centred, x = layer("ln_pn", act_layer="silu", proxy_scale=False), maps()
    scaled = layer("ln_pn", act_layer="silu")
    scaled.load_state_dict(centred.state_dict())
    torch.testing.assert_close(centred(x) * centred.proxy_rescale().view(1, -1, 1, 1), scaled(x))


def test_state_dict_keys_are_frozen():
    four = ["weight", "bias", "proxy_weight", "proxy_bias"]
    running = ["running_mean", "running_var", "num_batches_tracked"]
    assert list(NormAct2d(8, "ln_pn").state_dict()) == four
    assert list(NormAct2d(8, "ln", proxy=False).state_dict()) == four[:2]
    assert list(NormAct2d(8, "bn_pn").state_dict()) == four + running
    assert list(NormAct2d(8, "bn", proxy=False).state_dict()) == four[:2] + running
    batch_norm = nn.BatchNorm2d(8)
    NormAct2d(8, "bn", proxy=False).load_state_dict(batch_norm.state_dict())


def test_initial_values():
    act = NormAct2d(8, "gn_pn")
    assert (act.weight == 1).all() and all(
        (p == 0).all() for p in (act.bias, act.proxy_weight, act.proxy_bias)
    )


def test_a_full_name_decides_about_proxy():
    assert NormAct2d(8, "ln").proxy and not NormAct2d(8, "ln", proxy=False).proxy
    assert NormAct2d(8, "ln_pn", proxy=False).proxy and not NormAct2d(8, "none").proxy
    for norm in NORMS:
        if "_ws" not in norm:  # of convolutions, see the refusals
            NormAct2d(8, norm)(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize(
    ("features", "groups"), [(64, 32), (48, 24), (40, 20), (24, 24), (7, 7), (22, 22), (37, 1)]
)
def test_default_groups(features, groups):
    """32 if it divides the channels, else the largest divisor below 32."""
    assert NormAct2d(features, "gn").groups == groups
    assert (NormAct2d(features, "ln").groups, NormAct2d(features, "in").groups) == (1, features)


def test_batch_norm_is_torch_s():
    ours, theirs = NormAct2d(12, "bn", proxy=False), nn.Sequential(nn.BatchNorm2d(12), nn.ReLU())
    for momentum in (0.1, None):
        ours.momentum = theirs[0].momentum = momentum
        for _ in range(3):
            x = maps(dtype=torch.float32)
            torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs[0].state_dict()))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_normalization_batch(size):
    """Each chunk of `size` images has its own statistics; the last chunk may be smaller."""
    x, act = maps(), layer("bn", norm_batch=size)
    chunks = [F.batch_norm(c, None, None, training=True) for c in x.split(size)]
    torch.testing.assert_close(act.normalize(x), torch.cat(chunks))
    mean = torch.stack([c.mean((0, 2, 3)) for c in x.split(size)]).mean(0)
    fresh = torch.zeros(12, dtype=torch.float64)
    batch_normalize(x, fresh, torch.ones_like(fresh), True, 0.1, norm_batch=size)
    torch.testing.assert_close(fresh, 0.1 * mean)
    last = x.contiguous(memory_format=torch.channels_last)
    out = act.normalize(last)
    torch.testing.assert_close(out, torch.cat(chunks))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_sensible_at_the_edges():
    for norm in ("ln_pn", "gn_pn", "bn_pn"):
        act = layer(norm)
        assert act.eval()(maps((0, 12, 4, 4))).shape == (0, 12, 4, 4)
        act.train()
        x = maps((4, 12, 6, 8)).requires_grad_()
        sliced = x[:, :, ::2, 1::2]  # neither format
        torch.testing.assert_close(act(sliced), copy.deepcopy(act)(sliced.contiguous()))
        act(maps((3, 12, 1, 1)).requires_grad_()).sum().backward()
        expanded = maps((1, 12, 4, 4)).expand(3, -1, -1, -1)
        assert torch.isfinite(act(expanded)).all()
        frozen = layer(norm).requires_grad_(False)
        frozen(x).sum().backward()
        out = layer(norm)(x.detach())
        out.mean((2, 3)).sum().backward()  # an expanded gradient


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("norm", ["ln_pn", "in_pn", "bn_pn", "ln", "bn"])
@pytest.mark.parametrize("images", [1, 3])
def test_any_memory_format_of_the_gradient(norm, activation, images):
    act = layer(norm, act_layer=activation)
    x, grad = maps((images, 12, 4, 5)), maps((images, 12, 4, 5))
    reference = copy.deepcopy(act)
    expected = torch.autograd.grad(
        reference.activate(reference.normalize(x.requires_grad_())), x, grad
    )[0]
    formats = (torch.contiguous_format, torch.channels_last)
    for of_x, of_grad in itertools.product(formats, formats):
        one = x.detach().contiguous(memory_format=of_x).requires_grad_()
        ours = torch.autograd.grad(act(one), one, grad.contiguous(memory_format=of_grad))[0]
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "_ws" not in norm])
def test_shapes_on_the_meta_device(norm, activation, momentum):
    act = NormAct2d(
        12, norm, norm_spec(norm).proxy, act_layer=activation, momentum=momentum, device="meta"
    )
    x = maps(dtype=torch.bfloat16).to("meta").requires_grad_()
    for training in (True, False):
        z = act.train(training)(x)
        z.sum().backward()
        assert z.is_meta and (z.shape, z.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)


@pytest.mark.parametrize("norm", ["ln_pn", "bn_pn", "gn_ws"])
def test_shapes_of_a_model_on_the_meta_device(norm):
    with torch.device("meta"):
        model = create_model("resnet20v2", norm, num_classes=7, depth=8)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_plain_options():
    x = maps(dtype=torch.float32)
    no_affine = NormAct2d(12, "ln_pn", affine=False)
    assert set(dict(no_affine.named_parameters())) == {"proxy_weight", "proxy_bias"}
    torch.testing.assert_close(no_affine(x), NormAct2d(12, "ln_pn")(x))
    dropped = NormAct2d(12, "ln_pn", drop_layer=lambda: nn.Dropout(0.0))
    torch.testing.assert_close(dropped(x), NormAct2d(12, "ln_pn")(x))
    timm_like = NormAct2d(12, "ln_pn", act_layer=nn.ReLU, inplace=True, act_kwargs={}, device="cpu")
    assert isinstance(timm_like.act, nn.ReLU) and isinstance(timm_like.drop, nn.Identity)
    assert timm_like.act_name == "relu" and "ln" in repr(timm_like)
    before = x.clone()
    NormAct2d(12, "none", affine=False)(x)
    torch.testing.assert_close(x, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormAct2d(8, "ln_pm"), "unknown norm 'ln_pm'. Did you mean 'ln_pn'"),
        (lambda: NormAct2d(8, "gn", groups=3), "groups=3 does not divide num_features=8"),
        (
            lambda: NormAct2d(8, "gn", groups=0),
            "groups=0: it must be a whole number from 1 up that divides",
        ),
        (lambda: NormAct2d(8, "gn", groups=-4), "groups=-4: it must be a whole number from 1 up"),
        (lambda: NormAct2d(8, "gn", groups="4"), "groups='4': it must be a whole number from 1 up"),
        (lambda: NormAct2d(8, "ln", groups=True), "groups=True: it must be a whole number"),
        (lambda: NormAct2d(8, eps=-1e-5), "eps=-1e-05: .* a finite number from 0 up"),
        (lambda: NormAct2d(8, eps=float("nan")), "eps=nan: .* a finite number from 0 up"),
        (lambda: NormAct2d(8, eps="1e-5"), "eps='1e-5': .* a finite number from 0 up"),
        (
            lambda: NormAct2d(8, proxy_eps=float("nan")),
            "proxy_eps=nan: .* a finite number from 0 up",
        ),
        (lambda: NormAct2d(8, proxy_eps=-0.03), "proxy_eps=-0.03: .* a finite number from 0 up"),
        (lambda: NormAct2d(8, nodes="9"), "nodes='9'"),
        (lambda: NormAct2d(8, norm_batch="globl"), "norm_batch"),
        (lambda: NormAct2d(8, norm_batch=0), "norm_batch"),
        (lambda: NormAct2d(8, norm_batch=True), "norm_batch"),
        (lambda: NormAct2d(0), "num_features=0: it must be a whole number from 1 up"),
        (lambda: NormAct2d(8, "ln_ws"), r"standardize_weights\(model\)"),
        (lambda: NormAct2d(8, nodes=0), "nodes=0: it must be a whole number from 1 up"),
        (lambda: NormAct2d(8, moments="exat"), "Did you mean 'exact'"),
        (lambda: NormAct2d(8, act_layer="rleu"), "Did you mean 'relu'"),
        (lambda: NormAct2d(8, "in")(torch.randn(2, 8, 1, 1)), "no variance"),
        (lambda: NormAct2d(8, "bn")(torch.randn(1, 8, 1, 1)), "more than 1 value per channel"),
        (lambda: NormAct2d(8)(torch.randn(2, 8)), "expected an input of shape"),
        (lambda: NormAct2d(8)(torch.randn(2, 6, 3, 3)), "expected an input of shape"),
        (lambda: NormAct2d(8, "ln", False).proxy_statistics(), "no proxy"),
    ],
)
def test_refusals_are_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_group_normalize_is_group_norm():
    x = maps()
    for groups in (1, 3, 12):
        torch.testing.assert_close(group_normalize(x, groups), F.group_norm(x, groups))
