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

Nothing is merged into or across a module with hooks, nor into one that is called twice, registered under two names or
whose weight the model reads elsewhere.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from proxynorm.nn.dataflow import Part, traced_parts
from proxynorm.nn.elementwise import called_function, has_set_forward
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.places import hand_on_copy
from proxynorm.nn.shared import SharedMoments
from proxynorm.nn.shifted_conv import ShiftedConv2d


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
        self.drop = nn.Identity() if _idles(layer.drop) else layer.drop
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
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.kind == "none":
            return (x * self.weight.view(1, -1, 1, 1)).add_(self.bias.view(1, -1, 1, 1))
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Kind, and what is left of PN."""
        rest = [name for name in ("floor", "gain", "offset") if getattr(self, name) is not None]
        return ", ".join([self.kind, *rest])


@dataclass
class Neighbours:
    """What stands around one norm in the data flow.

    Attributes:
        before: the convolution whose value goes into this norm alone; None if there is none such.
        after: the layers, each called once, that take the norm's value (pooled or not); None if others do too.
        gate: the only one that takes it, if it is a module that can apply PN's constants itself.
    """

    before: nn.Conv2d | None = None
    after: list[nn.Conv2d | nn.Linear] | None = None
    gate: str | None = None


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
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    _remove_own_hooks(frozen)
    for module in list(frozen.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
    neighbours = {} if merge == "none" else _neighbours(frozen)
    with torch.no_grad():
        for name, module in list(frozen.named_modules()):
            if isinstance(module, NormAct2d):
                replacement = _freeze_layer(frozen, module, neighbours.get(name, Neighbours()), merge == "full")
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
            raise ValueError(f"cannot freeze {name or kind}: it has no running statistics (track_running_stats=False), "
                             "so its output depends on the batch in evaluation too")  # fmt: skip
        if isinstance(module, NormAct2d) and has_set_forward(module):
            raise ValueError(f"cannot freeze {name or kind}: a forward was set on this object, which would be lost")
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                raise ValueError(f"cannot freeze {name or kind}: a hook computes its {attribute} anew at each call. "
                                 "Make it a plain one (torch.nn.utils.remove_weight_norm, remove_spectral_norm, "
                                 "prune.remove) or use torch.nn.utils.parametrizations")  # fmt: skip


_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called")  # fmt: skip


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: hooks, or a forward set on the object."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or has_set_forward(module)


def _remove_own_hooks(model: nn.Module) -> None:
    """Takes off what share_moments and convert put on for training: there are no moments left to share, and nothing
    is kept for backward."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), SharedMoments) or hook is hand_on_copy:
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
    return nn.Identity() if idle and not _has_hooks(result) else result


def _affine(layer: NormAct2d) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """γ and β as new tensors in float32 or better, 1 and 0 where the layer has none, and the dtype to store them in:
    torch's batch norm wants that of the running statistics."""
    tensors = [t.detach() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    tensors = [t for t in tensors if t.is_floating_point()] or [torch.empty(layer.num_features)]
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    exact = torch.promote_types(dtype, torch.float32)
    weight = torch.ones_like(tensors[0], dtype=exact) if layer.weight is None else layer.weight.detach().to(exact)
    bias = torch.zeros_like(tensors[0], dtype=exact) if layer.bias is None else layer.bias.detach().to(exact)
    return weight.clone(), bias.clone(), dtype


def _place_proxy(
    model: nn.Module, layer: FrozenNormAct2d, around: Neighbours, full: bool, weight: torch.Tensor,
    bias: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Puts s and −s·m where they cost least; returns the norm's affine."""
    shape, takers = (1, -1, 1, 1), around.after or []
    has_floor = type(layer.act) is nn.ReLU and isinstance(layer.drop, nn.Identity)
    if around.gate is not None:
        gate = model.get_submodule(around.gate)
        frozen = gate.frozen(mean, gate.scale())
        model.set_submodule(around.gate, frozen.to(next(gate.parameters()).dtype))
    elif takers and all(not _pads(m) and (full or _takes_shift_cheaply(m, has_floor)) for m in takers):
        for module in takers:
            _scale_input(module, scale, -scale * mean)
    elif has_floor:
        layer.floor = (-scale * mean).view(shape)
        return scale * weight, scale * (bias - mean)
    elif takers:
        for module in takers:
            _scale_input(module, scale, torch.zeros_like(scale))
        if full or len(takers) > 1 or isinstance(takers[0], nn.Linear) or isinstance(takers[0].padding, str):
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
    return not has_floor and module.weight.shape[0] <= module.weight.shape[1] * getattr(module, "groups", 1)


def _scale_input(module: nn.Conv2d | nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Makes module(z) what module(scale·z + shift) was; scale and shift have a value per input channel."""
    groups = getattr(module, "groups", 1)
    repeats = module.weight.shape[0] // groups
    tail = (1,) * (module.weight.ndim - 2)
    spread_scale, spread_shift = (
        v.to(module.weight.dtype).view(groups, -1).repeat_interleave(repeats, 0).view(*module.weight.shape[:2], *tail)
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


def _neighbours(model: nn.Module) -> dict[str, Neighbours]:
    """What stands around each norm that is used once and has no hooks, by the norm's qualified name."""
    parts = list(traced_parts(model))
    uses, found = _uses(model, parts), {}
    for part in parts:
        if part.prefix:  # a forward around it that cannot be read may call its layers one by one
            continue
        for node in part.graph.nodes:
            module = _called_module(node, part.root)
            if isinstance(module, NormAct2d) and uses[module] == 1:
                found[part.prefix + str(node.target)] = _around(node, part.root, uses, part.prefix)
    return found


def _uses(model: nn.Module, parts: list[Part]) -> Counter:
    """How often each module is called or one of its parameters read; more than once too for a module that has
    several names or hooks."""
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    uses = Counter({module: count - 1 + _has_hooks(module) for module, count in names.items()})
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    for part in parts:
        parameters = dict(part.root.named_parameters(remove_duplicate=False))
        for node in part.graph.nodes:
            if node.op == "get_attr":
                uses.update(owners.get(parameters.get(str(node.target)), ()))
            elif node.op == "call_module":
                uses[part.root.get_submodule(str(node.target))] += 1
    return uses


def _called_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls; None for other nodes."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _around(node: fx.Node, root: nn.Module, uses: Counter, prefix: str) -> Neighbours:
    """The neighbours of the norm that `node` calls."""
    around = Neighbours(after=_takers(node, root, uses))
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and len(source.users) == 1:
        module = _called_module(source, root)
        around.before = module if type(module) is nn.Conv2d and uses[module] == 1 else None
    gate = _single_user(node, root)
    if gate is not None and hasattr(root.get_submodule(gate), "frozen") and uses[root.get_submodule(gate)] == 1:
        around.gate = prefix + gate
    return around


def _single_user(node: fx.Node, root: nn.Module) -> str | None:
    """Name of the module that alone takes the node's value, identities left out; None if there is none such."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = _called_module(node, root)
        if module is None or _has_hooks(module):
            return None
        if not isinstance(module, nn.Identity):
            return str(node.target)
    return None


def _takers(node: fx.Node, root: nn.Module, uses: Counter) -> list[nn.Conv2d | nn.Linear] | None:
    """The convolutions and linear layers that take a norm's value, directly or pooled; None if anything else does."""
    channels = root.get_submodule(str(node.target)).num_features
    takers, todo = [], [(user, False) for user in node.users]
    while todo:
        user, is_flat = todo.pop()  # flat: (N, C), no map any more
        module = _called_module(user, root)
        if module is not None and _has_hooks(module):
            return None
        if _flattens(user, module) and not is_flat:
            todo += [(further, True) for further in user.users]
        elif _hands_on(user, module, is_flat):
            todo += [(further, is_flat) for further in user.users]
        elif _takes(module, channels, is_flat) and uses[module] == 1 and len(user.all_input_nodes) == 1:
            takers.append(module)
        else:
            return None
    return takers or None


def _takes(module: nn.Module | None, channels: int, is_flat: bool) -> bool:
    """Whether a layer is linear in each of that many input channels. A subclass may do more than its class."""
    if type(module) is nn.Conv2d:
        return not is_flat and module.in_channels == channels and module.padding_mode == "zeros"
    return is_flat and type(module) is nn.Linear and module.in_features == channels


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node makes (N, C) of a map of one position, or the mean of a map's positions."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    name, given = called_function(node), dict(zip(("input", "a", "b"), node.args)) | dict(node.kwargs)
    if name == "flatten":
        return (given.get("a", given.get("start_dim", 0)), given.get("b", given.get("end_dim", -1))) == (1, -1)
    return name == "mean" and _averages_positions(node) and not given.get("b", given.get("keepdim", False))


def _averages_positions(node: fx.Node) -> bool:
    """Whether a mean is one over height and width."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]


def _hands_on(node: fx.Node, module: nn.Module | None, is_flat: bool) -> bool:
    """Whether a node commutes with a constant affine (of positive scale) per channel: average and max pooling.
    A subclass may do more than its class: timm's average pools that pad do."""
    name = called_function(node)
    if _idles(module) or (name == "dropout" and not node.kwargs.get("training", True)):
        return True
    if is_flat:
        return False
    if type(module) is nn.AvgPool2d:
        return module.divisor_override is None and (module.padding in (0, (0, 0)) or not module.count_include_pad)
    if module is not None:
        return type(module) in (nn.AdaptiveAvgPool2d, nn.MaxPool2d)
    return name == "adaptive_avg_pool2d" or (name == "mean" and _averages_positions(node))


def _idles(module: nn.Module | None) -> bool:
    """Whether a module does nothing in evaluation. A subclass may: Monte Carlo dropout is one."""
    kind = type(module)
    is_timms = kind.__module__.startswith("timm.") and "DropBlock" in kind.__name__
    return kind in (nn.Identity, nn.Dropout, nn.Dropout2d) or is_timms
