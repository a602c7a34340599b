"""PN-Act as the paper writes it, and NormAct2d: a norm followed by Act or PN-Act."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from proxynorm.nn.activations import (
    Activation,
    activate,
    activation_name,
    make_activation,
    out_of_place,
)
from proxynorm.nn.checks import check_whole
from proxynorm.nn.fast.folding import Constants, Rescale, Rule, evaluate_constants, folded
from proxynorm.nn.fast.fused import NormAct, per_channel
from proxynorm.nn.fast.precision import needs_plain_operations, stored, without_autocast
from proxynorm.nn.interop import refuse_plain_norm, warn_if_skipped
from proxynorm.nn.moments import proxy_moments
from proxynorm.nn.norms import NormBatch, NormSpec, affine, norm_spec
from proxynorm.nn.options import DEFAULT_EPS, NormOptions

Moments = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def pn_act(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    proxy_weight: Tensor,
    proxy_bias: Tensor,
    phi: Callable[[Tensor], Tensor] = torch.relu,
    moments: Moments = proxy_moments,
    proxy_eps: float = NormOptions.proxy_eps,
    scale: bool = True,
) -> Tensor:
    """PN-Act(y) = (φ(γy + β) − m) / sqrt(v + ε), the paper's formula, in plain torch.

    y (N, C, H, W) is the output of the norm; γ = weight, β = bias, γ̃ = proxy_weight and
    β̃ = proxy_bias, each (C,). The proxy of a channel's y is Y ~ N(β̃, (1 + γ̃)²). If scale is False,
    only m is subtracted. Source: Labatie et al., NeurIPS 2021, arXiv 2106.03743.
    """
    z = phi(affine(y, weight, bias))
    # m and v, the mean and variance of φ(γY + β), depend on the four parameters alone
    mean, var = moments(weight, bias, proxy_weight, proxy_bias)
    z = z - per_channel(mean)
    return z * per_channel(torch.rsqrt(var + proxy_eps)) if scale else z


class _DefaultName(str):
    """The default of act_layer, to tell an omitted act_layer from an explicit "relu"."""

    __slots__ = ()


_RELU = _DefaultName("relu")


class NormAct2d(nn.Module):
    """A norm, then Act(y) = φ(γy + β) or PN-Act(y) (see pn_act); a timm norm_act layer.

    Input and output have shape (N, C, H, W).

    Args:
        num_features: C.
        norm: a name of NORMS without weight standardization (ws). A full name such as "ln_pn"
            overrides proxy.
        proxy: apply PN after the activation, if norm is "bn", "ln", "gn" or "in".
        act_layer: φ: a name, a module, its class or an elementwise callable; None: no activation.
        apply_act: False leaves out φ and PN.
        proxy_scale: False subtracts m only; a later gate applies 1/sqrt(v + ε).
        groups, eps, proxy_eps, norm_batch, moments, nodes: see NormOptions.
        momentum, affine, track_running_stats: as in nn.BatchNorm2d.
        inplace, act_kwargs, drop_layer: as in timm's layers, but inplace has no effect.

    Raises:
        ValueError: an option is invalid, or an input has the wrong shape.
    """

    # Declared for type checkers, as in torch's layers. A parameter that a layer lacks is None.
    weight: nn.Parameter
    bias: nn.Parameter
    proxy_weight: nn.Parameter
    proxy_bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        norm: str = "ln",
        proxy: bool = True,
        act_layer: Activation = _RELU,
        apply_act: bool = True,
        groups: int | None = NormOptions.groups,
        eps: float = DEFAULT_EPS,
        proxy_eps: float = NormOptions.proxy_eps,
        norm_batch: NormBatch = NormOptions.norm_batch,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        inplace: bool = False,
        act_kwargs: dict[str, Any] | None = None,
        drop_layer: Callable[[], nn.Module] | None = None,
        proxy_scale: bool = True,
        moments: str = NormOptions.moments,
        nodes: int = NormOptions.nodes,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if act_layer is _RELU and apply_act:
            # Models that take a norm+act layer pass act_layer; the others add their own activation.
            refuse_plain_norm(sys._getframe(1).f_globals.get("__name__", ""))
        check_whole("num_features", num_features, 1)
        spec = NormOptions(norm, groups, eps, proxy_eps, norm_batch, moments, nodes).spec
        if spec.weight_standardization:
            raise ValueError(
                f"norm={norm!r} standardizes the weights of convolutions, which a norm layer "
                f"cannot: use norm={spec.kind!r} with proxy=False, and standardize_weights(model) "
                "once it is built"
            )
        if "_" in norm:
            proxy = spec.proxy
        self.num_features, self.momentum = num_features, momentum
        self.eps = DEFAULT_EPS if eps is None else eps
        self.proxy_eps, self.proxy_scale = proxy_eps, proxy_scale
        self.moments, self.nodes = moments, nodes
        self.norm_batch = norm_batch
        self.kind = spec.kind
        self.apply_act = apply_act and act_layer is not None
        self.proxy = bool(proxy) and spec.kind != "none"
        self.groups = self._number_of_groups(groups)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        # In place, it would overwrite maps that backward needs.
        self.act = out_of_place(
            make_activation(act_layer if self.apply_act else None, **(act_kwargs or {}))
        )
        # set by share_moments during a network's forward pass: the constants, and the rule and
        # versions of the parameters that they were evaluated from
        self.shared_constants: tuple[Constants, object] | None = None
        self._make_tensors(affine, track_running_stats, device, dtype)
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        # a copy must not take over the constants of this forward pass
        return {**self.__dict__, "shared_constants": None}

    def _number_of_groups(self, groups: int | None) -> int | None:
        """The number of groups that the norm uses; None if it has none. Raises ValueError."""
        if self.spec.groups is None:
            return None
        chosen = self.spec.groups(self.num_features, groups)
        if self.num_features % chosen:
            raise ValueError(
                f"groups={chosen} does not divide num_features={self.num_features}: "
                "choose a divisor"
            )
        return chosen

    def _make_tensors(
        self,
        affine: bool,
        tracked: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register the parameters and running statistics that this layer has; None for the rest."""
        size = self.num_features
        wanted = {
            "weight": affine,
            # With PN on, a norm without activation drops its shift (the authors' rule).
            "bias": affine and (self.proxied or not self.proxy),
            "proxy_weight": self.proxied,
            "proxy_bias": self.proxied,
        }
        for name, is_wanted in wanted.items():
            value = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, value if is_wanted else None)
        if self.spec.batch_statistics:
            # Not in `dtype`: running statistics stay float32 in a half-precision layer.
            for name in ("running_mean", "running_var"):
                self.register_buffer(name, torch.empty(size, device=device) if tracked else None)
            count = torch.tensor(0, device=device) if tracked else None
            self.register_buffer("num_batches_tracked", count)

    def reset_parameters(self) -> None:
        """Set γ = 1; β, γ̃ and β̃ = 0; running mean 0 and variance 1."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
        if self.spec.batch_statistics and self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    @property
    def spec(self) -> NormSpec:
        """The registry entry of the norm, without proxy."""
        return norm_spec(self.kind)

    @property
    def act_name(self) -> str:
        """The canonical name of the activation; "callable" if it has none."""
        return activation_name(self.act)

    @property
    def proxied(self) -> bool:
        """True if the output is proxy-normalized: PN is on, and there is an activation."""
        return self.proxy and self.apply_act

    @property
    def folds(self) -> bool:
        """True if γ, β, m and v can be folded into constants per channel."""
        # A callable may have parameters, which would get no gradient from the fused Function.
        plain = self.act_name != "callable" and isinstance(self.drop, nn.Identity)
        return self.proxied and plain

    def proxy_statistics(self) -> tuple[Tensor, Tensor]:
        """m and v, shape (C,)."""
        if not self.proxied:
            raise ValueError("this layer has no proxy normalization, hence no proxy statistics")
        return self.proxy_rule().moments(*self.four_parameters())

    def proxy_rescale(self) -> Tensor:
        """1 / sqrt(v + proxy_eps), shape (C,). If proxy_scale is False, a gate applies it."""
        if self.folds and not needs_plain_operations():
            return Rescale.apply(self.constants(), self.proxy_rule(), *self.four_parameters())
        return stored(torch.rsqrt(self.proxy_statistics()[1] + self.proxy_eps))

    def proxy_rule(self) -> Rule:
        """The rule by which this layer computes and applies its moments."""
        return Rule(self.act, self.moments, self.nodes, self.proxy_eps, self.proxy_scale)

    def four_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """γ, β, γ̃, β̃ of a proxied layer; a missing γ is ones, a missing β zeros."""
        weight, bias = self.weight, self.bias
        weight = torch.ones_like(self.proxy_weight) if weight is None else weight
        bias = torch.zeros_like(self.proxy_weight) if bias is None else bias
        return weight, bias, self.proxy_weight, self.proxy_bias

    def normalize(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """weight · norm(x) + bias, in x's dtype. In training, updates BN's running statistics."""
        return self.spec.normalize(x, **self._norm_options(), weight=weight, bias=bias)

    def _norm_options(self) -> dict[str, Any]:
        """The options of the norm. In training, counts the batch for BN's running statistics."""
        if not self.spec.batch_statistics:
            return {"groups": self.groups, "eps": self.eps}
        mean = self.running_mean
        # A float even if it is unused, because the kernels' signatures require one.
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and mean is not None:
            count = self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 if count.is_meta else 1.0 / float(count)
        return {
            "running_mean": mean,
            "running_var": self.running_var,
            "training": self.training or mean is None,
            "momentum": momentum,
            "eps": self.eps,
            "norm_batch": self.norm_batch,
        }

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), in its dtype and memory format."""
        x = input  # the name in torch's norms too: a network may pass it by keyword
        if isinstance(x, fx.Proxy):  # every tracer treats the layer as a leaf, like torch's norms
            is_root = x.tracer.root is self
            path = "itself" if is_root else x.tracer.path_of_module(self)
            return x.tracer.create_proxy("call_module", path, (x,), {})
        self._check(x)
        if self.folds:  # PN behind an activation that is known by name
            return self._folded(x)
        if self.proxied or self.kind == "none":  # the formula as written
            return self.activate(self.normalize(x))
        if needs_plain_operations():
            # One cast, at the end: if it rounded before φ, a compiler would store another map.
            with without_autocast(x.device):
                wide = x.to(torch.promote_types(x.dtype, torch.float32))
                u = self.drop(self.normalize(wide, self.weight, self.bias))
                return activate(self.act, u).to(x.dtype)
        u = self.drop(self.normalize(x, self.weight, self.bias))
        # In place: u is a new map, which no backward pass needs.
        return torch.relu_(u) if self.act_name == "relu" else self.act(u)

    def _folded(self, x: Tensor) -> Tensor:
        """PN-Act with γ, β, m and v folded into constants per channel.

        This saves two passes over the map. As a single autograd Function, it also keeps one map
        fewer for backward. Compilers and torch.func get plain operations.
        """
        spec, rule, options = self.spec, self.proxy_rule(), self._norm_options()
        kernel = None
        has_kernels = x.device.type in ("cpu", "cuda") and x.numel() > 0
        if has_kernels and spec.kernel is not None and not needs_plain_operations():
            kernel = spec.kernel(x, **options)
        with without_autocast(x.device):
            if kernel is not None:
                folding = self.constants(), rule, *self.four_parameters()
                return NormAct.apply(x, kernel, self.act, *folding)
            constants = folded(self.four_parameters(), rule)
            scale, shift, gain, offset = map(stored, constants[:4])
            dtype = torch.promote_types(x.dtype, scale.dtype)
            scale, shift = scale.to(dtype), shift.to(dtype)
            z = self.act(spec.normalize(x.to(dtype), **options, weight=scale, bias=shift))
            # With one value per image and channel, the gradients of gain and offset are sums over
            # the same cells as the norm's. A compiler computes them all in one pass.
            gain, offset = (
                t.to(dtype).expand(x.shape[:2])[..., None, None] for t in (gain, offset)
            )
            return ((z * gain if rule.has_gain else z) + offset).to(x.dtype)

    def activate(self, y: Tensor) -> Tensor:
        """Act or PN-Act of y by the formula, in float32 or better; the result is in y's dtype."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))

        def phi(u: Tensor) -> Tensor:
            return activate(self.act, self.drop(u))

        with without_autocast(y.device):
            if self.proxied:
                moments, parameters = self.proxy_rule().moments, self.four_parameters()
                z = pn_act(wide, *parameters, phi, moments, self.proxy_eps, self.proxy_scale)
            else:
                z = phi(affine(wide, self.weight, self.bias))
            return z.to(y.dtype)

    def _check(self, x: Tensor) -> None:
        """Raise ValueError for an input of the wrong shape."""
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"expected an input of shape (N, {self.num_features}, H, W), got {tuple(x.shape)}"
            )
        if self.groups is not None and x.shape[1] * x.shape[2] * x.shape[3] == self.groups:
            raise ValueError(
                f"{self.kind} over a {x.shape[2]}×{x.shape[3]} map has one value per group of "
                "channels and so no variance: use fewer groups or a larger input"
            )

    def constants(self) -> Constants:
        """The constants, taken from share_moments if they are still valid."""
        shared = self.shared_constants
        # Ctrl-C may have ended the forward pass before share_moments withdrew its constants.
        if shared is None or shared[1] != self._rule_and_versions():
            return evaluate_constants(self.four_parameters(), self.proxy_rule())
        return shared[0]

    def share_constants(self, constants: Constants) -> None:
        """Set the constants, which must have been evaluated from the current parameters."""
        self.shared_constants = constants, self._rule_and_versions()

    def _rule_and_versions(self) -> tuple[Rule, list[tuple[int, int]]]:
        """The rule, and each parameter's address and version (0 for inference tensors)."""
        # An in-place change raises the version, and assigning to .data changes the address.
        own = (p for p in self._parameters.values() if p is not None)
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in own]
        return self.proxy_rule(), versions

    @property
    def itself(self) -> NormAct2d:
        """The layer itself: the target of the call in a graph traced from this layer alone."""
        return self

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in nn.Module. Warns if the caller is a tool that would skip this batch norm."""
        if self.spec.batch_statistics:
            warn_if_skipped()
        return super().named_children()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in nn.Module. Warns if the caller is a tool that would skip this batch norm."""
        if self.spec.batch_statistics:
            warn_if_skipped()
        return super().named_modules(*args, **kwargs)

    def extra_repr(self) -> str:
        parts = [str(self.num_features), f"norm={self.kind}", f"proxy={self.proxy}"]
        parts += [f"groups={self.groups}"] if self.kind == "gn" else []
        parts += [f"norm_batch={self.norm_batch}"] if self.norm_batch is not None else []
        parts += [f"eps={self.eps}", f"apply_act={self.apply_act}"]
        return ", ".join(parts)
