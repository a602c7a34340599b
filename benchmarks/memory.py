"""Bytes that a forward pass keeps for the backward pass, for every norm.

  python scripts/benchmark.py memory model=resnet50 batch=8 size=224 json=results/memory/NAME.json

Every tensor's storage is counted. The last column compares with torch's own batch norm and
activation, as timm has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import ModelOptions, require_positive, write_figures
from benchmarks.variants import TORCH_BN, TORCH_LN, Variant, build, check_norms
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.train.distributed import choose_device

NORMS = [TORCH_BN, TORCH_LN, "bn", "bn_pn", "ln", "ln_pn", "ln_pn+recompute", "gn_pn", "in_pn"]


@dataclass
class Options(ModelOptions):
    norms: list[str] = option(
        NORMS, "norms; +recompute: outputs rebuilt in backward; torch bn, torch ln: torch's own"
    )


class Allocations(TorchDispatchMode):
    """Remembers, weakly, the storage of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                # Per storage, since views share one; weakly, so that counting keeps nothing alive.
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, excluded: set[int]) -> int:
        """Bytes of the storages that still exist and are not excluded."""
        return sum(
            size
            for reference, size in self.storages.values()
            if not reference.expired() and reference.cdata not in excluded
        )


def bytes_kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes alive between forward and backward beside parameters, buffers and the batch.

    Counts what hooks, handles and closures hold as well as autograd's saved tensors.
    """
    with Allocations() as allocations:
        loss = nn.functional.cross_entropy(model(images), labels)
        given = [*model.parameters(), *model.buffers(), images, labels, loss]
        kept = allocations.alive({tensor.untyped_storage()._cdata for tensor in given})
    loss.backward()
    model.zero_grad(set_to_none=True)
    return kept


def main(options: Options) -> None:
    check_norms(options.norms)
    require_positive(options, "batch", "size")
    device = choose_device(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    labels = torch.zeros(options.batch, dtype=torch.long, device=device)
    kept = {}
    for norm in dict.fromkeys([TORCH_BN, *options.norms]):
        kept[norm] = bytes_kept(build(Variant(norm, "nchw"), options.model, device), images, labels)
    rows = [
        [norm, f"{size / 1e6:.1f}", f"{size / kept[TORCH_BN]:.4f}"] for norm, size in kept.items()
    ]
    print(text_table(("norm", "MB kept", "of torch bn"), rows))
    write_figures(options, {"bytes_kept": kept})
