"""Turns a trained model into one for inference: PN's moments become constants, and what can be merged is merged.

With s = 1/sqrt(v + ε), PN-Act(y) = s·φ(γy + β) − s·m:

- where the value goes into 1×1 convolutions without padding, or through average pooling into a classifier, s and −s·m
  can be merged into their weights and biases, exactly, and a plain φ remains;
- ReLU otherwise: max(sγ·y + s(β − m), −s·m), so that scale and shift fold into the norm's affine and a floor replaces
  the zero;
- other activations before padded convolutions: s is merged, −m is not (zero padding commutes with a scale, not a shift),
  but a single one may take it over with a correction of its border (shifted_conv.py);
- batch norm is folded into the convolution before it.

PyTorch adds a convolution's bias in a pass of its own, on GPUs and partly on CPUs (ResNet-50 at batch 8 on one core:
5 % of the time), so merging a shift pays only sometimes; other runtimes fuse it. Hence the two ways to merge.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from proxynorm.conversion.elementwise import has_set_forward
from proxynorm.conversion.neighbours import Neighbours, find_neighbours, has_hooks, idles
from proxynorm.conversion.places import hand_on_copy
from proxynorm.conversion.shifted_conv import ShiftedConv2d
from proxynorm.nn.fast.shared import SharedMoments
from proxynorm.nn.norm_act import NormAct2d


class FrozenNormAct2d(nn.Module):
    """Norm with affine, φ, then a constant affine per channel; what a NormAct2d becomes for inference.

    Args:
        layer: the layer to replace; its norm, groups, eps and activation are taken.
        folded: batch norm only: the norm with its affine is already in the convolution before.
    """

    def __init__(self, layer: NormAct2d, folded: bool) -> None:
        super().__init__()
        self.kind = "folded" if folded else layer.kind
        self.groups, self.eps = layer.groups, layer.eps
        self.drop = nn.Identity() if idles(layer.drop) else layer.drop
        self.act = copy.deepcopy(layer.act)
        if hasattr(self.act, "inplace"):
            self.act.inplace = True
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name) if self.kind == "bn" else None)
        for name in ("weight", "bias", "floor", "gain", "offset"):
            self.register_buffer(name, None)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → the same shape. May overwrite x where batch norm was folded into the convolution before."""
        y = self.drop(self._normalize(x))
        if y.requires_grad:
            y = y.clone()  # what follows works in place
        if self.floor is not None:
            y = y.clamp_(min=self.floor)
        else:
            y = self.act(y)
        if self.gain is not None:
            y = y.mul_(self.gain)
        return y if self.offset is None else y.add_(self.offset)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """γ·norm(x) + β with what was folded into γ and β."""
        if self.kind == "folded":
            return x
        if self.kind == "bn":
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.kind == "none":
            return (x * self.weight.view(1, -1, 1, 1)).add_(self.bias.view(1, -1, 1, 1))
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Kind, and what is left of PN."""
        rest = [name for name in ("floor", "gain", "offset") if getattr(self, name) is not None]
        return ", ".join([self.kind, *rest])


def freeze(model: nn.Module, merge: str = "fast") -> nn.Module:
    """A copy of the model for inference: evaluation mode, no gradients, constants folded; exportable to ONNX.

    The copy computes what the model's forward computes in evaluation mode with its default arguments, to rounding. What
    lies between two layers may hold other values where something was merged: for other ways into the model (timm's
    forward_features and forward_intermediates) and for hooks put on afterwards use merge="none". Weight standardization
    becomes plain weights. Where the model's data flow cannot be traced, layers are frozen one by one and nothing is merged.

    Args:
        model: a model with NormAct2d layers; it is not changed.
        merge: "fast" merges a shift where that is quickest in PyTorch; "full" wherever it is exact, for export to
            runtimes that add a convolution's bias for nothing; "none" leaves every layer's output what it was.

    Raises:
        ValueError: the model has no NormAct2d, one without running statistics, a weight that a hook computes
            (torch.nn.utils.weight_norm), or is frozen already; or merge is none of the three.
    """
    if merge not in ("fast", "full", "none"):
        raise ValueError(f"merge={merge!r} is none of 'fast', 'full' and 'none'")
    _check(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.eval()
    _remove_own_hooks(frozen)
    for module in list(frozen.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
    neighbours = {} if merge == "none" else find_neighbours(frozen)
    with torch.no_grad():
        for name, module in list(frozen.named_modules()):
            if isinstance(module, NormAct2d):
                replacement = _freeze_layer(
                    frozen, module, neighbours.get(name, Neighbours()), merge == "full"
                )
                if module is frozen:
                    return replacement
                for alias, other in list(frozen.named_modules(remove_duplicate=False)):
                    if other is module:
                        frozen.set_submodule(alias, replacement)
    return frozen.requires_grad_(False)


def _check(model: nn.Module) -> None:
    """Raises ValueError, naming the module, for what freeze cannot make constants of."""
    kind = type(model).__name__
    if any(isinstance(module, FrozenNormAct2d) for module in model.modules()):
        raise ValueError(f"this {kind} is frozen already: freeze the model that it was made from")
    if not any(isinstance(module, NormAct2d) for module in model.modules()):
        raise ValueError(f"nothing to freeze: this {kind} has no NormAct2d; see proxynorm.convert")
    for name, module in model.named_modules():
        if isinstance(module, NormAct2d) and module.kind == "bn" and module.running_mean is None:
            raise ValueError(
                f"cannot freeze {name or kind}: it has no running statistics (track_running_stats=False), "
                "so its output depends on the batch in evaluation too"
            )
        if isinstance(module, NormAct2d) and has_set_forward(module):
            raise ValueError(
                f"cannot freeze {name or kind}: a forward was set on this object, which would be lost"
            )
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                raise ValueError(
                    f"cannot freeze {name or kind}: a hook computes its {attribute} anew at each call. "
                    "Make it a plain one (torch.nn.utils.remove_weight_norm, remove_spectral_norm, "
                    "prune.remove) or use torch.nn.utils.parametrizations"
                )


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _remove_own_hooks(model: nn.Module) -> None:
    """Takes off what share_moments and convert put on for training: there are no moments left to share, and nothing
    is kept for backward."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if (
                    isinstance(getattr(hook, "__self__", None), SharedMoments)
                    or hook is hand_on_copy
                ):
                    del hooks[key]


def _unparametrize(module: nn.Module) -> None:
    """Makes computed weights plain ones. torch's remove_parametrizations would change the class, and with it the
    model that this module was copied from."""
    weights = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__mro__[1]
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))


def _freeze_layer(model: nn.Module, layer: NormAct2d, around: Neighbours, full: bool) -> nn.Module:
    """The layer's replacement, with its hooks; merges into the layers around it."""
    folded = layer.kind == "bn" and around.before is not None
    result = FrozenNormAct2d(layer, folded)
    for hooks in _HOOKS:
        setattr(result, hooks, getattr(layer, hooks))
    weight, bias, dtype = _affine(layer)
    if layer.proxied:
        mean, var = layer.proxy_statistics()
        scale = torch.rsqrt(var + layer.proxy_eps) if layer.proxy_scale else torch.ones_like(var)
        weight, bias = _place_proxy(model, result, around, full, weight, bias, mean, scale)
    if folded:
        gain = weight * torch.rsqrt(layer.running_var.to(weight.dtype) + layer.eps)
        _scale_output(around.before, gain, bias - layer.running_mean * gain)
    else:
        result.weight, result.bias = weight, bias
    for name in ("weight", "bias", "floor", "gain", "offset"):
        if (constant := getattr(result, name)) is not None:
            setattr(result, name, constant.to(dtype))
    idle = folded and isinstance(result.act, nn.Identity) and isinstance(result.drop, nn.Identity)
    return nn.Identity() if idle and not has_hooks(result) else result


def _affine(layer: NormAct2d) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """γ and β as new tensors in float32 or better, 1 and 0 where the layer has none, and the dtype to store them in:
    torch's batch norm wants that of the running statistics."""
    tensors = [
        t.detach() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    ]
    tensors = [t for t in tensors if t.is_floating_point()] or [torch.empty(layer.num_features)]
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    exact = torch.promote_types(dtype, torch.float32)
    weight = (
        torch.ones_like(tensors[0], dtype=exact)
        if layer.weight is None
        else layer.weight.detach().to(exact)
    )
    bias = (
        torch.zeros_like(tensors[0], dtype=exact)
        if layer.bias is None
        else layer.bias.detach().to(exact)
    )
    return weight.clone(), bias.clone(), dtype


def _place_proxy(
    model: nn.Module,
    layer: FrozenNormAct2d,
    around: Neighbours,
    full: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts s and −s·m where they cost least; returns the norm's affine."""
    shape, takers = (1, -1, 1, 1), around.after or []
    has_floor = type(layer.act) is nn.ReLU and isinstance(layer.drop, nn.Identity)
    if around.gate is not None:
        gate = model.get_submodule(around.gate)
        frozen = gate.frozen(mean, gate.scale())
        model.set_submodule(around.gate, frozen.to(next(gate.parameters()).dtype))
    elif takers and all(
        not _pads(m) and (full or _takes_shift_cheaply(m, has_floor)) for m in takers
    ):
        for module in takers:
            _scale_input(module, scale, -scale * mean)
    elif has_floor:
        layer.floor = (-scale * mean).view(shape)
        return scale * weight, scale * (bias - mean)
    elif takers:
        for module in takers:
            _scale_input(module, scale, torch.zeros_like(scale))
        if (
            full
            or len(takers) > 1
            or isinstance(takers[0], nn.Linear)
            or isinstance(takers[0].padding, str)
        ):
            layer.offset = -mean.view(shape)
        else:
            ShiftedConv2d.take_over(takers[0], -mean)
    else:
        layer.gain, layer.offset = scale.view(shape), (-scale * mean).view(shape)
    return weight, bias


def _pads(module: nn.Conv2d | nn.Linear) -> bool:
    """Whether zeros, rather than values of the map, may enter the layer."""
    return isinstance(module, nn.Conv2d) and module.padding not in ((0, 0), "valid")


def _takes_shift_cheaply(module: nn.Conv2d | nn.Linear, has_floor: bool) -> bool:
    """Whether a shift costs less in the layer's bias than before the layer. A floor costs nothing before it."""
    if module.bias is not None:
        return True
    return not has_floor and module.weight.shape[0] <= module.weight.shape[1] * getattr(
        module, "groups", 1
    )


def _scale_input(module: nn.Conv2d | nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Makes module(z) what module(scale·z + shift) was; scale and shift have a value per input channel."""
    groups = getattr(module, "groups", 1)
    repeats = module.weight.shape[0] // groups
    tail = (1,) * (module.weight.ndim - 2)
    spread_scale, spread_shift = (
        v.to(module.weight.dtype)
        .view(groups, -1)
        .repeat_interleave(repeats, 0)
        .view(*module.weight.shape[:2], *tail)
        for v in (scale, shift)
    )
    added = (module.weight * spread_shift).flatten(1).sum(1)
    _set_bias(module, added if module.bias is None else module.bias + added)
    module.weight = nn.Parameter(module.weight * spread_scale)


def _scale_output(module: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Makes module(x) what scale·module(x) + shift was; scale and shift have a value per output channel."""
    scale, shift = scale.to(module.weight.dtype), shift.to(module.weight.dtype)
    _set_bias(module, shift if module.bias is None else module.bias * scale + shift)
    module.weight = nn.Parameter(module.weight * scale.view(-1, 1, 1, 1))


def _set_bias(module: nn.Conv2d | nn.Linear, bias: torch.Tensor) -> None:
    """Sets the bias, unless there was none and it is zero."""
    if module.bias is not None or bool(bias.any()):
        module.bias = nn.Parameter(bias)
