"""Turn a trained model into one for inference: PN's moments become constants of each layer.

With s = 1/sqrt(v + ε), PN-Act(y) = s·φ(γy + β) − s·m. For ReLU this is max(sγ·y + s(β − m), −s·m):
scale and shift fold into the norm's affine, and a floor replaces the zero. For other activations a
gain s and an offset −s·m follow φ. In batch norm the running statistics fold into scale and shift
too. Nothing around a layer is touched and nothing is traced, so a forward stays the Python that it
was.
"""

# No `from __future__ import annotations` here: torch.jit.script resolves annotations itself.
import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from proxynorm.nn.fast.shared import SharedMoments
from proxynorm.nn.norm_act import NormAct2d


class FrozenNormAct2d(nn.Module):
    """A NormAct2d for inference: norm with affine, φ, then gain and offset per channel.

    All constants are buffers of shape (C,). It works under torch.jit.script, torch.export and
    torch.fx, and keeps no state, so that threads may share it.

    Args:
        layer: the layer to replace; its norm, activation and constants are taken.
    """

    __constants__ = ("has_floor", "has_gain")  # torch.jit.script leaves out the other branch
    if TYPE_CHECKING:  # torch.jit.script would take offset and gain for tensors where they are None
        scale: torch.Tensor
        shift: torch.Tensor
        gain: torch.Tensor
        offset: torch.Tensor

    def __init__(self, layer: NormAct2d) -> None:
        super().__init__()
        # groups 0: the statistics are constants, or there is no norm
        self.groups = 0 if layer.groups is None else layer.groups
        self.eps = layer.eps
        self.drop = layer.drop
        scale, shift, dtype = _affine(layer)
        gain, offset = torch.ones_like(scale), torch.zeros_like(scale)
        if layer.proxied:
            mean, var = (t.to(scale.dtype) for t in layer.proxy_statistics())
            gain = torch.rsqrt(var + layer.proxy_eps) if layer.proxy_scale else gain
            offset = -gain * mean
        self.has_floor = type(layer.act) is nn.ReLU and isinstance(layer.drop, nn.Identity)
        self.has_gain = layer.proxied and not self.has_floor
        if self.has_floor:  # φ(0) = 0 moves to the offset, and a scale commutes with ReLU
            scale, shift = gain * scale, gain * shift + offset
        self.act = nn.Identity() if self.has_floor else copy.deepcopy(layer.act)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("shift", shift.to(dtype))
        self.register_buffer("gain", gain.to(dtype) if self.has_gain else None)
        has_offset = self.has_floor or self.has_gain
        self.register_buffer("offset", offset.to(dtype) if has_offset else None)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → the same shape and dtype."""
        if self.groups > 0:
            y = F.group_norm(x, self.groups, self.scale, self.shift, self.eps)
        else:
            shift, scale = self.shift.view(-1, 1, 1), self.scale.view(-1, 1, 1)
            y = torch.addcmul(shift, x, scale).to(x.dtype)
        y = self.drop(y)
        if self.has_floor:
            return torch.maximum(y, self.offset.view(-1, 1, 1).to(y.dtype))
        y = self.act(y)
        if self.has_gain:
            offset, gain = self.offset.view(-1, 1, 1), self.gain.view(-1, 1, 1)
            y = torch.addcmul(offset, y, gain).to(y.dtype)
        return y

    def extra_repr(self) -> str:
        return f"{len(self.scale)}, groups={self.groups}, has_gain={self.has_gain}"


def freeze(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: evaluation mode, no gradients, constants folded.

    Every layer computes what it did in evaluation mode, to rounding. Weight standardization becomes
    plain weights.

    Args:
        model: a model with NormAct2d layers; it is not changed.

    Raises:
        ValueError: the model has no NormAct2d, one without running statistics, a weight that a hook
            computes (torch.nn.utils.weight_norm), or is frozen already.
    """
    _check(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.eval()
    _remove_own_hooks(frozen)
    for module in list(frozen.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
    with torch.no_grad():
        # a module with `frozen` keeps constants of a NormAct2d: it must read them before that is
        # replaced
        modules: list[Any] = list(frozen.modules())
        replacements = {m: m.frozen() for m in modules if hasattr(m, "frozen")}
        replacements |= {m: _freeze(m) for m in modules if isinstance(m, NormAct2d)}
    if frozen in replacements:
        return replacements[frozen]
    replace_modules(frozen, replacements)
    frozen.requires_grad_(False)
    frozen.eval()  # a user's train() may return nothing
    return frozen


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules in place, under every name that they have."""
    for alias, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(alias, replacements[module])


def _freeze(layer: NormAct2d) -> FrozenNormAct2d:
    frozen = FrozenNormAct2d(layer)
    for name, hooks in vars(layer).items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            setattr(frozen, name, hooks)
    return frozen


def _check(model: nn.Module) -> None:
    """Raise ValueError, naming the module, for what freeze cannot make constants of."""
    kind = type(model).__name__
    if any(isinstance(module, FrozenNormAct2d) for module in model.modules()):
        raise ValueError(f"this {kind} is frozen already: freeze the model that it was made from")
    if not any(isinstance(module, NormAct2d) for module in model.modules()):
        raise ValueError(f"nothing to freeze: this {kind} has no NormAct2d; see proxynorm.convert")
    for name, module in model.named_modules():
        told = f"cannot freeze {name or kind}"
        if isinstance(module, NormAct2d):
            if module.spec.batch_statistics and module.running_mean is None:
                raise ValueError(
                    f"{told}: it has no running statistics (track_running_stats=False), so its "
                    "output depends on the batch in evaluation too"
                )
            if "forward" in vars(module):
                raise ValueError(f"{told}: a forward was set on this object, which would be lost")
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                raise ValueError(
                    f"{told}: a hook computes its {attribute} anew at each call. Make it a plain "
                    "one (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove) "
                    "or use torch.nn.utils.parametrizations"
                )


def _remove_own_hooks(model: nn.Module) -> None:
    """Remove the hooks of share_moments and convert, which serve training alone."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                is_shared = isinstance(getattr(hook, "__self__", None), SharedMoments)
                if is_shared or hook is hand_on_copy:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def hand_on_copy(
    layer: nn.Module, inputs: tuple[object, ...], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook of a layer whose output the network changes in place, while the layer keeps it
    for backward.
    """
    return output.clone() if output.requires_grad else output


def _unparametrize(module: Any) -> None:
    """Make computed weights plain ones.

    torch's remove_parametrizations would change the class, and with it the model that this module
    was copied from.
    """
    weights = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__mro__[1]
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))


def _affine(layer: NormAct2d) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """γ and β with batch norm's statistics folded in, float32 or better; the dtype to store."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    tensors = [t for t in tensors if t.is_floating_point()] or [torch.empty(layer.num_features)]
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    exact = torch.promote_types(dtype, torch.float32)
    one = torch.ones_like(tensors[0], dtype=exact)
    scale = one if layer.weight is None else layer.weight.detach().to(exact)
    shift = one * 0 if layer.bias is None else layer.bias.detach().to(exact)
    if layer.spec.batch_statistics:
        scale = scale * torch.rsqrt(layer.running_var.to(exact) + layer.eps)
        shift = shift - layer.running_mean.to(exact) * scale
    return scale.clone(), shift.clone(), dtype
