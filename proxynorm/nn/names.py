"""The legal norm names and what each one stands for."""

from __future__ import annotations

from dataclasses import dataclass

from proxynorm.nn.checks import unknown_name

KINDS = ("bn", "ln", "gn", "in", "none")


@dataclass(frozen=True)
class NormSpec:
    """A norm name taken apart.

    kind: one of KINDS; proxy: a proxy normalization follows the activation; weight_standardization: the
    convolutions that feed the norm use standardized weights.
    """

    kind: str
    proxy: bool
    weight_standardization: bool


_SPECS = {
    **{kind: NormSpec(kind, False, False) for kind in ("bn", "ln", "gn", "in")},
    **{f"{kind}_pn": NormSpec(kind, True, False) for kind in ("bn", "ln", "gn", "in")},
    **{f"{kind}_ws": NormSpec(kind, False, True) for kind in ("ln", "gn")},
    "none": NormSpec("none", False, False),
}
NORMS: tuple[str, ...] = tuple(_SPECS)


def norm_spec(name: str) -> NormSpec:
    """The parts of a norm name. Raises ValueError, naming the nearest legal name and all of them."""
    try:
        return _SPECS[name]
    except (KeyError, TypeError):
        raise ValueError(unknown_name("norm", name, NORMS)) from None
