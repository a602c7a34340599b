"""create_model: every model by name, with every norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import timm
from torch import nn

from proxynorm.conversion.convert import convert
from proxynorm.errors import ConfigError
from proxynorm.models.efficientnet import centre_squeeze_excite, efficientnet_g16
from proxynorm.models.small_resnet import SmallResNetV2
from proxynorm.nn.checks import check_number, check_whole, unknown_name
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weights import standardize_weights


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and its defaults."""

    build: Callable[..., nn.Module]  # with Batch Norm, or with norm_layer= if it takes one
    eps: float | None = 1e-5  # of the norm; None: the network's own
    groups: int | None = None  # of gn; None: the largest divisor of C up to 32
    takes_norm_layer: bool = False  # build has an argument norm_layer; convert is not called
    has_se: bool = False  # the placement of squeeze-excite can be chosen (se=)
    pretrained: bool = True  # timm may have pretrained weights


def _from_timm(timm_name: str, drop_path_rate: float = 0.0, **kwargs: object) -> nn.Module:
    """Build the timm model of that name. Raises TypeError for arguments that it does not take.

    A drop_path_rate of 0 is allowed for models without stochastic depth, too.
    """
    try:
        return timm.create_model(timm_name, drop_path_rate=drop_path_rate, **kwargs)
    except TypeError as error:
        if drop_path_rate != 0 or "drop_path_rate" not in str(error):
            raise
        return timm.create_model(timm_name, **kwargs)


_EFFICIENTNETS = [f"efficientnet_b{size}" for size in range(6)]
_ARCHITECTURES: dict[str, Architecture] = {
    "resnet20v2": Architecture(SmallResNetV2, groups=4, takes_norm_layer=True, pretrained=False),
    "resnet50": Architecture(partial(_from_timm, "resnet50")),
    "resnet101": Architecture(partial(_from_timm, "resnet101")),
    "resnet50v2": Architecture(partial(_from_timm, "resnetv2_50")),
    "resnext50": Architecture(partial(_from_timm, "resnext50_32x4d")),
    **{
        name: Architecture(partial(_from_timm, name), 1e-3, groups=4, has_se=True)
        for name in _EFFICIENTNETS
    },
    **{
        f"{name}_g16": Architecture(
            partial(efficientnet_g16, name[-2:]), 1e-3, groups=4, has_se=True, pretrained=False
        )
        for name in _EFFICIENTNETS
    },
}

MODELS: tuple[str, ...] = tuple(_ARCHITECTURES)
_NORM_OPTIONS = [field.name for field in fields(NormOptions) if field.name != "norm"]


def create_model(
    name: str,
    norm: str = "bn",
    num_classes: int = 1000,
    *,
    in_chans: int = 3,
    se: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name, with any norm of proxynorm.nn.NORMS in place of batch norm.

    Args:
        name: one of MODELS, or any timm model ("timm/NAME", or NAME if it is not in MODELS).
        norm: one of proxynorm.nn.NORMS.
        num_classes: length of the logits.
        in_chans: channels of the images.
        se: for EfficientNet with PN. "centred" (default) is the authors' placement: SE pools the
            centred, unscaled map, the gate applies PN's scale, and the last map before pooling is
            only centred. "plain" is the paper's formula everywhere. Without PN they are the same.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        pretrained: load timm's pretrained weights.
        kwargs: the options of NormOptions (groups, norm_batch, eps, proxy_eps, moments, nodes) and
            the model's own arguments; for resnet20v2: depth, width, stem_stride. The default of
            groups is 4 in resnet20v2 and EfficientNet. The default of eps is 1e-3 in EfficientNet
            (the authors' value), 1e-5 in the other MODELS, and timm's own value for other timm
            models and for pretrained weights.

    Raises:
        ConfigError: an unknown name, norm or argument, a wrong value, or a timm model whose norms
            cannot be placed.
    """
    architecture = _architecture(name)
    options = {key: kwargs.pop(key) for key in _NORM_OPTIONS if key in kwargs}
    options = {key: value for key, value in options.items() if value is not None}
    arguments = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": drop_rate}
    arguments |= {"drop_path_rate": drop_path_rate, **kwargs}
    try:
        # Pretrained weights keep the ε that they were trained with.
        eps = None if pretrained else architecture.eps
        chosen = NormOptions(norm, **{"groups": architecture.groups, "eps": eps, **options})
        _check_arguments(architecture, arguments, se, pretrained)
        model = _build(architecture, chosen, arguments, pretrained)
        if not architecture.takes_norm_layer:
            # For MODELS, tests compare the converted networks with the originals.
            convert(model, **vars(chosen), verify=name not in _ARCHITECTURES)
    except ValueError as error:
        raise ConfigError(f"model {name} with norm {norm}: {error}") from error
    if architecture.has_se and chosen.spec.proxy and se != "plain":
        centre_squeeze_excite(model)
    return model


def _build(
    architecture: Architecture, options: NormOptions, arguments: dict, pretrained: bool
) -> nn.Module:
    """Build the network, with Batch Norm if it is converted later. Raises ValueError."""
    if architecture.takes_norm_layer:
        arguments["norm_layer"] = partial(NormAct2d, **options.layer_arguments())
    if pretrained:
        arguments["pretrained"] = True
    try:
        model = architecture.build(**arguments)
    except (TypeError, RuntimeError) as error:
        # timm raises these for unknown arguments and missing pretrained weights.
        raise ValueError(str(error)) from error
    if architecture.takes_norm_layer and options.spec.weight_standardization:
        standardize_weights(model)
    if architecture.takes_norm_layer and options.spec.proxy:
        share_moments(model)
    return model


def _check_arguments(
    architecture: Architecture, arguments: dict[str, Any], se: str | None, pretrained: bool
) -> None:
    """Raise ValueError for wrong values and for options that the architecture does not have."""
    check_whole("num_classes", arguments["num_classes"], 0)
    check_whole("in_chans", arguments["in_chans"], 1)
    for name, value in arguments.items():
        if name.endswith("_rate") and "drop" in name and value is not None:
            check_number(name, value, below=1)
    if se not in (None, "centred", "plain"):
        raise ValueError(f"se={se!r} is neither 'centred' nor 'plain'")
    if se is not None and not architecture.has_se:
        raise ValueError("se is for EfficientNet only")
    if pretrained and not architecture.pretrained:
        raise ValueError("pretrained=True: no weights of this model are published; train it")


def _architecture(name: str) -> Architecture:
    """Return the architecture of that name, or timm's. Raises ConfigError for an unknown name."""
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    timm_name = str(name).removeprefix("timm/")
    if timm.is_model(timm_name):
        return Architecture(partial(_from_timm, timm_name), eps=None)
    names = unknown_name("model", name, MODELS, also=timm.list_models())
    raise ConfigError(f"{names}, or any timm model")
