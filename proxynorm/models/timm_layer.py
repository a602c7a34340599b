"""NormAct2d for the argument norm_layer= of timm's constructors.

Importing this module adds the class to timm's lists of norm+act layers. timm passes act_layer and
apply_act only to layers in these lists. proxynorm.NormAct2d is imported from here;
proxynorm.nn.NormAct2d is the same class, without timm.
"""

from __future__ import annotations

from timm.layers import create_norm_act, register_notrace_module

from proxynorm.nn import NormAct2d

__all__ = ["NormAct2d"]

create_norm_act._NORM_ACT_TYPES.add(NormAct2d)
create_norm_act._NORM_ACT_REQUIRES_ARG.add(NormAct2d)  # it takes act_layer
register_notrace_module(NormAct2d)
