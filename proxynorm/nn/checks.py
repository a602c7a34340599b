"""The options that no layer can have: each is refused in one line that names it, its value and what is allowed."""

from __future__ import annotations

import math
import numbers

from proxynorm.nn.names import NORMS, norm_spec, unknown_name
from proxynorm.nn.norms import NormBatch


def check_features(num_features: int) -> None:
    """Raises ValueError for a layer without channels."""
    if num_features < 1:
        raise ValueError(f"num_features={num_features}: a norm needs at least one channel")


def check_norm(norm: str) -> None:
    """Raises ValueError for a name that is no norm layer's."""
    if norm not in NORMS:
        raise ValueError(unknown_name("norm", norm, NORMS))
    if norm_spec(norm).weight_standardization:
        raise ValueError(
            f"norm={norm!r} standardizes the weights of convolutions, which a norm layer cannot: use "
            f"norm={norm.split('_')[0]!r} with proxy=False, and standardize_weights(model) once it is built"
        )


def check_options(
    groups: int | None, eps: float | None, proxy_eps: float, norm_batch: NormBatch
) -> None:
    """Raises ValueError for what no layer of any width can have; eps None stands for one that is known later."""
    if not (norm_batch in (None, "global") or (type(norm_batch) is int and norm_batch >= 1)):
        raise ValueError(f"norm_batch is a number of images, None or 'global', not {norm_batch!r}")
    if groups is not None:
        check_whole("groups", groups, 1, " that divides the channels, or None")
    for name, value in (("eps", 0.0 if eps is None else eps), ("proxy_eps", proxy_eps)):
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(
                f"{name}={value!r}: it is added to a variance and must be a finite number from 0 up"
            )


def check_whole(name: str, value: object, least: int, further: str = "") -> None:
    """Raises ValueError for what is no whole number from `least` up."""
    if not (isinstance(value, numbers.Integral) and _is_number(value) and value >= least):
        raise ValueError(f"{name}={value!r}: it must be a whole number from {least} up{further}")


def check_rate(name: str, value: object) -> None:
    """Raises ValueError for what is no probability of dropping that leaves something."""
    if not (_is_number(value) and 0 <= value < 1):
        raise ValueError(
            f"{name}={value!r}: it must be a number from 0 up to, but not including, 1"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
