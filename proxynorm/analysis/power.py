"""The power decomposition of the paper's Fig. 2: it splits the unit power of a norm's output.

For y, the output of a norm before γ and β, let μ(x, c) and σ(x, c) be the mean and (population)
standard deviation over the positions of sample x and channel c:

    P1 = mean over c of (E_x μ)²      the channel-wise constant part; near 1: channel collapse
    P2 = mean over c of Var_x μ       variability of the instance mean
    P3 = mean over c of (E_x σ)²
    P4 = mean over c of Var_x σ       variability of the instance standard deviation

They sum to 1 up to the norm's ε.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from proxynorm.nn import NormAct2d

TERMS = ("p1", "p2", "p3", "p4")


@dataclass(frozen=True)
class PowerRow:
    """The four terms of a norm. depth: its position in the forward pass, from 1."""

    name: str
    depth: int
    p1: float
    p2: float
    p3: float
    p4: float


class PowerSums:
    """Sums over samples of μ, μ², σ and σ² of each channel, in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        # MPS has no float64, so its sums are kept on the CPU.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.sums = torch.zeros(4, channels, dtype=torch.float64, device=self.device)
        self.count = 0

    def add(self, y: Tensor) -> None:
        """Add the samples of y, (N, C, H, W)."""
        moments = torch.var_mean(y.float().flatten(2), dim=2, correction=0)
        var, mean = (moment.to(self.device, torch.float64) for moment in moments)
        self.sums += torch.stack([mean.sum(0), mean.square().sum(0), var.sqrt().sum(0), var.sum(0)])
        self.count += len(y)

    def terms(self) -> tuple[float, float, float, float]:
        """Return P1, P2, P3, P4."""
        mean, mean_square, std, std_square = self.sums / self.count
        p1, p3 = mean.square(), std.square()
        # Rounding can leave a variance of 0 slightly negative.
        p2, p4 = (mean_square - p1).clamp_min(0), (std_square - p3).clamp_min(0)
        return tuple(term.mean().item() for term in (p1, p2, p3, p4))


@torch.no_grad()
def power_decomposition(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> list[PowerRow]:
    """Compute P1 … P4 of every NormAct2d with a norm, in the order of the forward pass.

    Memory does not grow with the number of images. BN normalizes by the statistics of each batch,
    as in training.

    Args:
        model: a model with NormAct2d layers; a copy is measured.
        batches: preprocessed images (N, C, H, W), or tuples that begin with them.

    Raises:
        ValueError: the model has no NormAct2d with a norm, or there are no images.
    """
    model = copy.deepcopy(model).eval()
    modules = model.named_modules()
    norms = {name: m for name, m in modules if isinstance(m, NormAct2d) and m.kind != "none"}
    if not norms:
        raise ValueError(
            f"no norm to decompose: this {type(model).__name__} has no NormAct2d; "
            "see proxynorm.convert"
        )
    sums: dict[str, PowerSums] = {}  # ordered by first call

    def collect(name: str, module: NormAct2d, inputs: tuple[Tensor, ...]) -> None:
        # Normalize separately: the layer's forward fuses the norm with the next steps.
        y = module.normalize(inputs[0])
        sums.setdefault(name, PowerSums(y.shape[1], y.device)).add(y)

    for name, norm in norms.items():
        norm.register_forward_pre_hook(partial(collect, name))
        if getattr(norm, "running_mean", None) is not None:
            # Without running statistics, Batch Norm uses those of the batch.
            norm.running_mean = norm.running_var = None  # type: ignore[assignment]
    device = next(model.parameters()).device
    # A compiled model would not call the hooks.
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
    if not sums:
        raise ValueError("no images to decompose the power on")
    return [
        PowerRow(name, depth, *item.terms()) for depth, (name, item) in enumerate(sums.items(), 1)
    ]
