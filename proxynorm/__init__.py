"""Proxy Normalization in PyTorch: batch norm's accuracy without its dependence on the batch.

The names below are imported when first used, so `import proxynorm` is quick and proxynorm.nn needs
only torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ imports them
    from proxynorm import nn as nn
    from proxynorm.analysis.power import power_decomposition as power_decomposition
    from proxynorm.conversion.convert import conversion_report as conversion_report
    from proxynorm.conversion.convert import convert as convert
    from proxynorm.loading import load as load
    from proxynorm.models import create_model as create_model
    from proxynorm.models.timm_layer import NormAct2d as NormAct2d
    from proxynorm.nn import parameter_groups as parameter_groups
    from proxynorm.nn import proxy_moments as proxy_moments
    from proxynorm.nn.freeze import freeze as freeze
    from proxynorm.nn.interop import update_bn as update_bn

__version__ = "0.1.0"

_HOMES = {
    "NormAct2d": "proxynorm.models.timm_layer",
    "conversion_report": "proxynorm.conversion.convert",
    "convert": "proxynorm.conversion.convert",
    "create_model": "proxynorm.models",
    "freeze": "proxynorm.nn.freeze",
    "load": "proxynorm.loading",
    "parameter_groups": "proxynorm.nn",
    "power_decomposition": "proxynorm.analysis.power",
    "proxy_moments": "proxynorm.nn",
    "update_bn": "proxynorm.nn.interop",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name from its home module, or the package nn (PEP 562)."""
    if name == "nn":
        return importlib.import_module("proxynorm.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'proxynorm' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "proxynorm").partition(".")[0]
        if package == "proxynorm":
            raise
        if name == "NormAct2d":  # its home registers it with timm; without timm, use nn's
            return importlib.import_module("proxynorm.nn").NormAct2d
        message = f"proxynorm.{name} needs {package}: install proxynorm's extra [train]"
        raise ModuleNotFoundError(message, name=error.name) from None


def __dir__() -> list[str]:
    return sorted([*__all__, "nn"])
