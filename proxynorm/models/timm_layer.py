"""NormAct2d as timm's constructors take it for norm_layer=.

Importing this module enters the class into timm's lists of norm+act layers. timm passes act_layer,
and says which norms get no activation, only to layers that it knows. proxynorm.NormAct2d comes from
here; proxynorm.nn.NormAct2d is the same class without timm.
"""

from __future__ import annotations

from timm.layers import create_norm_act, register_notrace_module

from proxynorm.nn import NormAct2d

__all__ = ["NormAct2d"]

create_norm_act._NORM_ACT_TYPES.add(NormAct2d)
create_norm_act._NORM_ACT_REQUIRES_ARG.add(NormAct2d)  # it takes act_layer
register_notrace_module(NormAct2d)
