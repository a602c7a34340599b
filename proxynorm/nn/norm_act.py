"""NormAct2d: a norm without affine, followed by Act or PN-Act."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from proxynorm.nn.activations import (
    Activation,
    activate,
    activation_name,
    make_activation,
    out_of_place,
)
from proxynorm.nn.fast.folding import Constants, Rule, fold, fold_reference
from proxynorm.nn.fast.fused import (
    FlooredReLU,
    FoldedConstants,
    GainedActivation,
    Head,
    floored_relu_,
    gained_activation_,
    is_transformed,
    per_channel,
)
from proxynorm.nn.fast.one_step import GroupNormAct, Step, takes_one_step
from proxynorm.nn.fast.precision import without_autocast
from proxynorm.nn.fast.recompute import Recipe, is_recomputing
from proxynorm.nn.moments import proxy_moments
from proxynorm.nn.norms import NormBatch, batch_normalize, group_normalize
from proxynorm.nn.options import DEFAULT_EPS, NormOptions


def default_groups(num_features: int, most: int = 32) -> int:
    """GN's number of groups where none is given: the largest divisor of num_features that is at most 32."""
    return max(g for g in range(1, min(most, num_features) + 1) if num_features % g == 0)


class _Unsaid(str):
    """An argument's default, told from the same word when it is given."""

    __slots__ = ()


_RELU = _Unsaid("relu")


class SharedConstants(NamedTuple):
    """A layer's constants, and what they are of: how its moments are used, and its parameters' versions."""

    constants: Constants
    rule: Rule
    versions: list[tuple[int, int]]


class NormAct2d(nn.Module):
    """Norm, then Act(y) = φ(γy + β) or PN-Act(y) = (φ(γy + β) − m) / sqrt(v + proxy_eps); a timm norm_act layer.

    m and v are the moments of φ(γY + β), Y ~ N(β̃, (1 + γ̃)²). Input and output have shape (N, C, H, W).
    """

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
        act_kwargs: dict | None = None,
        drop_layer: Callable[[], nn.Module] | None = None,
        proxy_scale: bool = True,
        moments: str = NormOptions.moments,
        nodes: int = NormOptions.nodes,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if act_layer is _RELU and apply_act:
            _check_caller(sys._getframe(1).f_globals.get("__name__", ""))
        if num_features < 1:
            raise ValueError(f"num_features={num_features}: a norm needs at least one channel")
        spec = NormOptions(norm, groups, eps, proxy_eps, norm_batch, moments, nodes).spec
        if spec.weight_standardization:
            raise ValueError(
                f"norm={norm!r} standardizes the weights of convolutions, which a norm layer cannot: "
                f"use norm={spec.kind!r} with proxy=False, and standardize_weights(model) once it is built"
            )
        if "_" in norm:
            proxy = spec.proxy
        self.num_features, self.eps, self.proxy_eps, self.momentum = (
            num_features,
            eps,
            proxy_eps,
            momentum,
        )
        self.kind = spec.kind
        self.apply_act = apply_act and act_layer is not None
        self.proxy = bool(proxy) and self.kind != "none"
        self.norm_batch, self.proxy_scale, self.moments, self.nodes = (
            norm_batch,
            proxy_scale,
            moments,
            nodes,
        )
        self.groups = self._number_of_groups(groups)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        self.act = out_of_place(
            make_activation(act_layer if self.apply_act else None, **(act_kwargs or {}))
        )
        self.shared_constants: SharedConstants | None = (
            None  # set for the time of a forward pass by shared.py
        )
        self._make_parameters(affine, {"device": device, "dtype": dtype})
        self._make_buffers(track_running_stats, device)
        self.reset_parameters()

    def __getstate__(self) -> dict:
        return {
            **self.__dict__,
            "shared_constants": None,
        }  # they are of this forward pass, not of a copy

    def _number_of_groups(self, groups: int | None) -> int | None:
        if self.kind in ("bn", "none"):
            return None
        groups = default_groups(self.num_features) if groups is None else groups
        chosen = {"ln": 1, "in": self.num_features}.get(self.kind, groups)
        if chosen < 1 or self.num_features % chosen:
            raise ValueError(
                f"groups={chosen} does not divide num_features={self.num_features}: choose a divisor"
            )
        return chosen

    def _make_parameters(self, affine: bool, factory: dict) -> None:
        proxied = self.proxy and self.apply_act
        present = {
            "weight": affine,
            "bias": affine and (proxied or not self.proxy),
            "proxy_weight": proxied,
            "proxy_bias": proxied,
        }
        for name, wanted in present.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(self.num_features, **factory)) if wanted else None
            )

    def _make_buffers(self, track_running_stats: bool, device: torch.device | str | None) -> None:
        if self.kind != "bn":
            return
        tracked = track_running_stats
        self.register_buffer(
            "running_mean", torch.zeros(self.num_features, device=device) if tracked else None
        )
        self.register_buffer(
            "running_var", torch.ones(self.num_features, device=device) if tracked else None
        )
        self.register_buffer(
            "num_batches_tracked",
            torch.tensor(0, dtype=torch.long, device=device) if tracked else None,
        )

    def reset_parameters(self) -> None:
        """γ = 1; β, γ̃ (the deviation from 1) and β̃ = 0; running mean 0 and variance 1."""
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("proxy_weight", 0.0),
            ("proxy_bias", 0.0),
        ):
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.constant_(parameter, value)
        if self.kind == "bn" and self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    @property
    def act_name(self) -> str:
        """The canonical name of the activation; "callable" if it has none."""
        return activation_name(self.act)

    @property
    def proxied(self) -> bool:
        """Whether the output is proxy-normalized: proxy was asked for and an activation follows."""
        return self.proxy and self.apply_act

    def proxy_statistics(self) -> tuple[Tensor, Tensor]:
        """m and v, shape (C,), of this layer's activation; functions of the four parameters alone."""
        if not self.proxied:
            raise ValueError("this layer has no proxy normalization, hence no proxy statistics")
        return proxy_moments(*self.four_parameters(), self.act, self.moments, self.nodes)

    def proxy_rescale(self) -> Tensor:
        """1 / sqrt(v + proxy_eps), shape (C,): what a layer with proxy_scale=False leaves to a later gate."""
        if (
            self.proxied
            and not self.proxy_scale
            and self.act_name != "callable"
            and not is_transformed()
        ):
            return self.folded_constants()[-1]
        return torch.rsqrt(self.proxy_statistics()[1] + self.proxy_eps)

    def proxy_rule(self) -> Rule:
        """How this layer integrates and uses its moments."""
        return Rule(self.act, self.moments, self.nodes, self.proxy_eps, self.proxy_scale)

    def four_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """γ, β, γ̃, β̃ of a proxied layer; ones and zeros stand for γ and β where there are none."""
        weight, bias = self.weight, self.bias
        weight = torch.ones_like(self.proxy_weight) if weight is None else weight
        bias = torch.zeros_like(self.proxy_weight) if bias is None else bias
        return weight, bias, self.proxy_weight, self.proxy_bias

    def normalize(self, x: Tensor) -> Tensor:
        """y, the norm of x before γ and β; same shape and dtype. In training, BN's running statistics move."""
        return self._norm(x, None, None)

    def _norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        bound: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The norm with the given affine; in training, BN's running statistics move. bound: _bound_norm's, if made."""
        if self.kind == "bn" and self.training and self.running_mean is not None:
            return batch_normalize(
                x,
                self.running_mean,
                self.running_var,
                True,
                self._momentum(),
                self.eps,
                self.norm_batch,
                weight,
                bias,
            )
        return (bound or self._bound_norm())(x, weight=weight, bias=bias)

    def _bound_norm(self) -> Callable[..., Tensor]:
        """The norm of (x, weight=, bias=) as it is now, for backward passes too: whatever becomes of this module's
        mode, options and running statistics, which it does not move."""
        if self.kind == "none":
            return _affine
        if self.kind != "bn":
            return partial(group_normalize, groups=self.groups, eps=self.eps)
        mean, var = (None, None) if self.training else (self.running_mean, self.running_var)
        if mean is not None and torch.is_grad_enabled() and not is_transformed():
            mean, var = mean.clone(), var.clone()
        return partial(
            batch_normalize,
            running_mean=mean,
            running_var=var,
            training=mean is None,
            eps=self.eps,
            norm_batch=self.norm_batch,
        )

    def _momentum(self) -> float:
        """Counts the batch and gives the share it gets in the running statistics."""
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / (1.0 if self.num_batches_tracked.is_meta else float(self.num_batches_tracked))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), in x's dtype and memory format."""
        self._check(x)
        if self.proxied and self._folds(x):
            return self._plain(x) if is_transformed() else self._fused(x)
        if self.proxied or self.kind == "none":
            return self.activate(self.normalize(x))
        u = self.drop(self._norm(x, self.weight, self.bias))
        return torch.relu_(u) if self.act_name == "relu" else self.act(u)

    def activate(self, y: Tensor) -> Tensor:
        """Act or PN-Act of y, written as the paper's formula, in float32 or better; the result has y's dtype."""
        with without_autocast(y.device):
            u = self.drop(
                _affine(y.to(torch.promote_types(y.dtype, torch.float32)), self.weight, self.bias)
            )
            z = activate(self.act, u)
            if self.proxied:
                mean, var = self.proxy_statistics()
                z = z - per_channel(mean)
                z = z * per_channel(torch.rsqrt(var + self.proxy_eps)) if self.proxy_scale else z
            return z.to(y.dtype)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"expected an input of shape (N, {self.num_features}, H, W), got {tuple(x.shape)}"
            )
        if self.groups is not None and x.shape[1] * x.shape[2] * x.shape[3] == self.groups:
            raise ValueError(
                f"{self.kind} over a {x.shape[2]}×{x.shape[3]} map has one value per group of channels "
                "and so no variance: use fewer groups or a larger input"
            )

    def _folds(self, x: Tensor) -> bool:
        """Whether affine and proxy normalization fold into constants per channel here; else activate must serve."""
        # the fused step calls the norm again in backward, where collective operations might meet others out of order
        unusual = (
            self.kind == "none"
            or self.norm_batch == "global"
            or not isinstance(self.drop, nn.Identity)
        )
        return not (unusual or self.act_name == "callable" or x.numel() == 0)

    def _plain(self, x: Tensor) -> Tensor:
        """The folded step in plain operations, which torch.compile fuses by itself and torch.func can transform."""
        with without_autocast(x.device):
            constants = fold_reference(self.four_parameters(), self.proxy_rule())
            wide = torch.promote_types(x.dtype, constants[0].dtype)
            scale, shift, *head = (
                t.to(wide) for t in (constants if self.proxy_scale else constants[:-1])
            )
            # the norm takes the affine: its bare output is a view, which inductor fails to keep where sizes are symbolic
            z = self.act(self._norm(x.to(wide), scale, shift))
            gain, offset = (
                (per_channel(t) for t in head) if len(head) == 2 else (None, per_channel(*head))
            )
            return ((z if gain is None else z * gain) + offset).to(x.dtype)

    def _fused(self, x: Tensor) -> Tensor:
        head, constants = Head(self.act_name, self.act), self.constants()
        if self.kind != "bn" and takes_one_step(x, constants):
            step = Step(head, self.proxy_rule(), self.groups, self.eps)
            with without_autocast(x.device):
                return GroupNormAct.apply(
                    x, *self.four_parameters(), constants, step, is_recomputing()
                )
        folded = self.folded_constants(constants)
        folded = folded if self.proxy_scale else folded[:-1]
        norm = self._bound_norm()
        with without_autocast(x.device):
            if head.name == "relu":
                scale, shift, floor = folded
                shift = shift + floor.detach()
                recipe = _recipe(norm, floored_relu_, x, scale, shift, floor)
                return FlooredReLU.apply(self._norm(x, scale, shift, norm), floor, recipe)
            scale, shift, gain, offset = folded
            gain = gain if self.proxy_scale else None  # spares passes over the map
            recipe = _recipe(
                norm, partial(gained_activation_, head=head), x, scale, shift, gain, offset
            )
            return GainedActivation.apply(
                self._norm(x, scale, shift, norm), gain, offset, x, scale, shift, head, norm, recipe
            )

    def folded_constants(self, constants: Constants | None = None) -> tuple[Tensor, ...]:
        """What folding.fold makes of this layer's parameters, each (C,), as a differentiable function of them."""
        constants = self.constants() if constants is None else constants
        return FoldedConstants.apply(
            *self.four_parameters(), constants, partial(fold_reference, rule=self.proxy_rule())
        )

    def constants(self) -> Constants:
        """The same, not differentiable: those of the network's one evaluation while its forward pass runs."""
        shared, rule = self.shared_constants, self.proxy_rule()
        # changed since: Ctrl-C may have ended that forward
        if shared is None or shared.rule != rule or shared.versions != self._versions():
            return fold(self.four_parameters(), rule)
        return shared.constants

    def share_constants(self, constants: Constants) -> None:
        """Takes constants that somebody else evaluated from the parameters as they are now."""
        self.shared_constants = SharedConstants(constants, self.proxy_rule(), self._versions())

    def _versions(self) -> list[tuple[int, int]]:
        """Of each parameter, its memory and how often it was changed in place; inference tensors do not count it."""
        own = (p for p in self._parameters.values() if p is not None)
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in own]

    def extra_repr(self) -> str:
        parts = [str(self.num_features), f"norm={self.kind}", f"proxy={self.proxy}"]
        parts += [f"groups={self.groups}"] if self.kind == "gn" else []
        parts += [f"norm_batch={self.norm_batch}"] if self.norm_batch is not None else []
        parts += [f"eps={self.eps}", f"apply_act={self.apply_act}"]
        return ", ".join(parts)


def _check_caller(module: str) -> None:
    """Refuses timm's and torchvision's models that want a norm alone: timm tells norm+act layers their activation."""
    if module.startswith(("timm.", "torchvision.")):
        raise ValueError(
            f"{module} has an activation of its own behind norm_layer=, and NormAct2d would add another: "
            "build the model with batch norm, then call proxynorm.convert"
        )


def _recipe(
    norm: Callable[..., Tensor],
    head: Callable[..., Tensor],
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *constants: Tensor | None,
) -> Callable[[Tensor], None] | None:
    """What recompute.py needs to rebuild the output, head(norm(x)); None where nothing is recomputed."""
    if not is_recomputing() or not any(
        t is not None and t.requires_grad for t in (x, scale, shift, *constants)
    ):
        return None
    scale, shift, *constants = (t if t is None else t.detach() for t in (scale, shift, *constants))
    return Recipe(lambda x: head(norm(x, weight=scale, bias=shift), *constants), x).watch


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * per_channel(weight)
    return x if bias is None else x + per_channel(bias)
