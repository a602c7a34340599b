"""Turn a trained model into one for inference: PN's moments become constants of each layer.

With s = 1/sqrt(v + ε), PN-Act(y) = s·φ(γy + β) − s·m. For ReLU this is max(sγ·y + s(β − m), −s·m):
scale and shift fold into the norm's affine, and a floor replaces the zero. For other activations, a
gain s and an offset −s·m follow φ. For batch norm, the running statistics also fold into scale and
shift. Nothing around a layer changes and nothing is traced, so forwards keep their Python code.
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

from proxynorm.nn.fast.folding import folded
from proxynorm.nn.fast.recompute import RECOMPUTE_HOOKS
from proxynorm.nn.fast.shared import SharedMoments
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.norms import affine, batch_normalize, group_normalize

PARAMETERS = ("weight", "bias", "proxy_weight", "proxy_bias")


class FrozenNormAct2d(nn.Module):
    """A NormAct2d for inference: norm with affine, φ, then gain and offset per channel.

    All constants are buffers of shape (C,). The layer works under torch.jit.script, torch.export
    and torch.fx. Its forward stores nothing, so threads may share it.

    Args:
        layer: the layer to replace. Its norm, activation and forward hooks are taken over.
    """

    __constants__ = ("has_floor", "has_gain")  # so that torch.jit.script drops unused branches
    if TYPE_CHECKING:  # torch.jit.script would expect tensors where offset or gain is None
        scale: torch.Tensor
        shift: torch.Tensor
        gain: torch.Tensor
        offset: torch.Tensor

    def __init__(self, layer: NormAct2d) -> None:
        super().__init__()
        # 0 groups: batch norm, whose statistics are constants, or no norm
        self.groups = 0 if layer.groups is None else layer.groups
        self.eps, self.drop = layer.eps, layer.drop
        self.has_floor = type(layer.act) is nn.ReLU and isinstance(layer.drop, nn.Identity)
        self.has_gain = layer.proxied and not self.has_floor
        scale, shift, gain, offset = _constants(layer, self.has_floor)
        self.act = nn.Identity() if self.has_floor else copy.deepcopy(layer.act)
        if hasattr(self.act, "inplace"):
            # the norm's output is a map of its own
            self.act.inplace = True  # type: ignore[assignment]
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("gain", gain if self.has_gain else None)
        self.register_buffer("offset", offset if self.has_floor or self.has_gain else None)
        for name, hooks in vars(layer).items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                setattr(self, name, hooks)
        self.eval()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → the same shape and dtype."""
        x = input
        if self.groups > 0:
            y = F.group_norm(x, self.groups, self.scale, self.shift, self.eps)
        else:
            shift, scale = self.shift.view(-1, 1, 1), self.scale.view(-1, 1, 1)
            y = torch.addcmul(shift, x, scale).to(x.dtype)
        y = self.drop(y)
        # In place, a pass allocates no map; but with gradients, φ may have kept y for backward.
        in_place = not torch.is_grad_enabled()
        if self.has_floor:
            floor = self.offset.view(-1, 1, 1).to(y.dtype)
            return y.clamp_(min=floor) if in_place else torch.maximum(y, floor)
        y = self.act(y)
        if self.has_gain:
            offset, gain = self.offset.view(-1, 1, 1), self.gain.view(-1, 1, 1)
            if in_place and y.dtype == gain.dtype:
                return torch.addcmul(offset, y, gain, out=y)
            y = torch.addcmul(offset, y, gain).to(y.dtype)
        return y

    def extra_repr(self) -> str:
        return f"{len(self.scale)}, groups={self.groups}, has_gain={self.has_gain}"


def freeze(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: evaluation mode, no gradients, constants folded.

    Every layer computes the same as in evaluation mode, up to rounding. Standardized and otherwise
    parametrized weights become plain ones. A norm that you added to the registry stays as it is.

    Args:
        model: a model with NormAct2d layers; it is not changed.

    Raises:
        ValueError: the model has no NormAct2d, or one without running statistics, with a forward
            set on the object, or with a parameter that a hook computes.
    """
    _check(model)
    frozen = deep_copy(model).requires_grad_(False)
    frozen.eval()  # not chained, because a user's train() may return None
    modules: list[Any] = list(frozen.modules())
    for module in modules:
        _remove_own_hooks(module)
        if parametrize.is_parametrized(module):
            _unparametrize(module)
    with torch.no_grad():
        # A gate after a PN that only centres reads constants from a NormAct2d, and so has to be
        # frozen before that is replaced.
        for module in modules:
            if hasattr(module, "freeze_proxy_scale"):
                module.freeze_proxy_scale()
        layers = (m for m in modules if isinstance(m, NormAct2d) and _can_fold(m))
        replacements: dict[nn.Module, nn.Module] = {m: FrozenNormAct2d(m) for m in layers}
    if frozen in replacements:
        return replacements[frozen]
    replace_modules(frozen, replacements)
    return frozen


def deep_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network with weights that hooks compute (pruning, weight_norm)."""
    # deepcopy refuses such tensors, which are results of operations.
    tensors = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules of a model, in place, under all their names."""
    for alias, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(alias, replacements[module])


def _check(model: nn.Module) -> None:
    """Raise ValueError, with the module's name, if freeze would change a layer's output."""
    kind = type(model).__name__
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NormAct2d)}
    if not layers:
        raise ValueError(
            f"nothing to freeze: this {kind} has no NormAct2d; it is frozen already, or was not "
            "made by proxynorm.convert or create_model"
        )
    for name, layer in layers.items():
        prefix = f"cannot freeze {name or kind}"
        if layer.spec.batch_statistics and layer.running_mean is None:
            raise ValueError(
                f"{prefix}: it has no running statistics (track_running_stats=False), so its "
                "output depends on the batch in evaluation too"
            )
        if "forward" in vars(layer):
            raise ValueError(f"{prefix}: a forward was set on this object, which would be lost")
        if computed := [key for key in PARAMETERS if key in vars(layer)]:
            raise ValueError(
                f"{prefix}: a hook computes its {computed[0]} at each forward; make it permanent "
                f"first, as torch.nn.utils.prune.remove(layer, {computed[0]!r}) does"
            )


def _can_fold(layer: NormAct2d) -> bool:
    """True for the norms that FrozenNormAct2d knows; a user's own norm stays a NormAct2d."""
    return layer.spec.normalize in (batch_normalize, group_normalize, affine)


def _remove_own_hooks(module: nn.Module) -> None:
    """Remove the hooks of share_moments, recompute and convert: only training needs them."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            is_shared = isinstance(getattr(hook, "__self__", None), SharedMoments)
            if is_shared or hook in (clone_output, *RECOMPUTE_HOOKS):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def clone_output(
    layer: nn.Module, inputs: tuple[object, ...], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook, set by convert, for a layer whose output the network changes in place.

    The layer itself needs the unchanged output for backward.
    """
    return output.clone() if output.requires_grad else output


def _unparametrize(module: Any) -> None:
    """Turn a module's parametrized weights into plain ones.

    torch's remove_parametrizations would change the module's class, which the original model shares
    with this copy.
    """
    weights = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__mro__[1]  # torch's parametrized class is a subclass of it
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _constants(layer: NormAct2d, has_floor: bool) -> list[torch.Tensor]:
    """scale, shift, gain and offset in the layer's dtype, with BN's statistics folded in."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    tensors = [t for t in tensors if t.is_floating_point()] or [torch.empty(layer.num_features)]
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    exact = torch.promote_types(dtype, torch.float32)
    one = torch.ones_like(tensors[0], dtype=exact)
    if layer.proxied:
        constants = folded(layer.four_parameters(), layer.proxy_rule())[:4]
    else:
        weight = one if layer.weight is None else layer.weight
        constants = weight, one * 0 if layer.bias is None else layer.bias, one, one * 0
    scale, shift, gain, offset = (constant.detach().to(exact) for constant in constants)
    if layer.spec.batch_statistics:
        scale = scale * torch.rsqrt(layer.running_var.to(exact) + layer.eps)
        shift = shift - layer.running_mean.to(exact) * scale
    if has_floor:  # max(u, 0) + offset = max(u + offset, offset)
        shift = shift + offset
    return [constant.to(dtype, copy=True) for constant in (scale, shift, gain, offset)]
