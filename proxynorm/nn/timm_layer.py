"""NormAct2d in the shape that timm's constructors take as norm_layer=."""

from __future__ import annotations

from collections.abc import Callable

from proxynorm.nn.activations import Activation
from proxynorm.nn.names import norm_spec
from proxynorm.nn.norm_act import NormAct2d


def norm_act_layer(norm: str = "ln_pn", act_layer: Activation = "relu", **options: object) -> Callable[..., NormAct2d]:
    """A function for norm_layer= of timm's models that take norm+act layers: resnetv2, efficientnet, regnet, densenet …

    timm hands its own act_layer to its own layers only, so it must be given here (EfficientNet: "silu"). Models with
    separate norm and activation modules, such as timm's resnet, need proxynorm.convert instead.

    Args:
        norm: one of proxynorm.nn.NORMS but the two with weight standardization.
        act_layer: the activation behind every norm that has one.
        options: further arguments of NormAct2d.
    """

    spec = norm_spec(norm)

    def layer(num_features: int, **kwargs: object) -> NormAct2d:
        return NormAct2d(num_features, norm=spec.kind, **{"proxy": spec.proxy, "act_layer": act_layer, **options, **kwargs})

    return layer
