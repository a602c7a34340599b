"""The table of what convert did with each module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from proxynorm.conversion.kinds import is_other_norm
from proxynorm.conversion.match import Plan
from proxynorm.nn.norm_act import NormAct2d


@dataclass(frozen=True)
class ConversionRow:
    """The action that convert took on one module.

    Attributes:
        module: its qualified name.
        kind: its class before the conversion.
        action: what became of it, or why it was left.
    """

    module: str
    kind: str
    action: str


class ConversionReport(list[ConversionRow]):
    """A list of ConversionRow that prints as an aligned table."""

    def __str__(self) -> str:
        rows = [("module", "kind", "action"), *((row.module, row.kind, row.action) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{m:<{widths[0]}}  {k:<{widths[1]}}  {a}" for m, k, a in rows)


def report_of(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> ConversionReport:
    """List what the plan does with each module, in the network's order; made before it is done."""
    actions = {name: f"left as it is: {why}" for name, why in plan.left.items()}
    for name in plan.edits:
        count = sum(site.owner == name for site in plan.sites)
        calls = "1 activation call" if count == 1 else f"{count} activation calls"
        actions[name] = f"{calls} of its forward joined with norms"
    for name, layer in layers.items():
        actions[name] = _describe(model.get_submodule(name), layer)
    identities = {model.get_submodule(name) for name in plan.identities}
    rows = ConversionReport()
    for name, module in model.named_modules(remove_duplicate=False):
        action = actions.get(name)
        if module in identities:
            action = "joined with its norm; the identity stands here"
        elif action is None and is_other_norm(module):
            action = "left as it is: no norm over maps (N, C, H, W)"
        if action is not None:
            rows.append(ConversionRow(name, type(module).__name__, action))
    return rows


def _describe(norm: nn.Module, layer: nn.Module) -> str:
    """The action of a norm's row."""
    assert isinstance(layer, NormAct2d)
    kind = layer.kind.upper()
    if not layer.apply_act:
        dropped = layer.bias is None and getattr(norm, "bias", None) is not None
        return f"{kind}, no activation behind it{': scale kept, shift dropped' if dropped else ''}"
    inside = type(layer.drop).__name__
    inside = f" with {inside} inside" if inside != "Identity" else ""
    copied = ", a copy of it handed on, as it is changed in place" if layer._forward_hooks else ""
    # a wrapper of a function goes by the function's name
    activation = type(getattr(layer.act, "function", layer.act)).__name__
    return f"{kind} + {activation}{' + PN' if layer.proxy else ''}{inside}{copied}"
