"""NormOptions: the options of norm layers, with their defaults and the checks of their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxynorm.nn.checks import check_number, check_whole
from proxynorm.nn.moments import check_method
from proxynorm.nn.norms import NormBatch, NormSpec, norm_spec

DEFAULT_EPS = 1e-5  # if eps is None and there is no original norm to take it from


@dataclass(frozen=True)
class NormOptions:
    """The options that all norm layers of a network share.

    Raises:
        ValueError: an option has an invalid value.
    """

    norm: str = "ln_pn"  # a name of NORMS
    groups: int | None = None  # of gn; None: the largest divisor of C that is at most 32
    eps: float | None = None  # the norm's ε; None: the original norm's, or DEFAULT_EPS
    proxy_eps: float = 0.03  # PN's ε, added to the proxy variance
    # images that share bn's statistics; None: the micro-batch; "global": the micro-batches of all
    # processes together
    norm_batch: NormBatch = None
    # how PN's moments are integrated: "auto", "exact" or "grid" (the paper's)
    moments: str = "auto"
    nodes: int = 256  # nodes of the grid

    def __post_init__(self) -> None:
        norm_spec(self.norm)
        if self.groups is not None:
            check_whole("groups", self.groups, 1, " that divides the channels, or None")
        if self.eps is not None:
            check_number("eps", self.eps)
        check_number("proxy_eps", self.proxy_eps)
        if self.norm_batch not in (None, "global"):
            check_whole("norm_batch", self.norm_batch, 1, ", None or 'global'")
        check_method(self.moments, self.nodes)

    @property
    def spec(self) -> NormSpec:
        """The norm's entry in the registry."""
        return norm_spec(self.norm)

    def layer_arguments(self) -> dict[str, Any]:
        """The keyword arguments of NormAct2d for a layer with these options."""
        return {**vars(self), "norm": self.spec.kind, "proxy": self.spec.proxy}
