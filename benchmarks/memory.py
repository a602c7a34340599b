"""Bytes that a forward pass keeps alive for the backward pass, counted tensor by tensor, for every norm.

  python scripts/benchmark.py memory model=resnet50 batch=8 size=224 json=results/memory/NAME.json

The last column is relative to batch norm and activation as torch's own modules, as timm has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.variants import TORCH_BN, Variant, build, check_norm
from proxynorm.cli import option
from proxynorm.files import write_json
from proxynorm.train.distributed import choose_device
from proxynorm.train.run_folder import environment


class _Allocations(TorchDispatchMode):
    """Remembers, weakly, every storage that an operation returns, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, excluded: set[int]) -> int:
        """Bytes of the storages that still exist, the excluded ones left out."""
        return sum(
            size
            for reference, size in self.storages.values()
            if not reference.expired() and reference.cdata not in excluded
        )


def bytes_kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes alive between forward (loss included) and backward beside parameters, buffers and the batch itself.

    Counts what hooks, handles and closures hold as well as autograd's own saved tensors.
    """
    with _Allocations() as allocations:
        loss = nn.functional.cross_entropy(model(images), labels)
        given = [*model.parameters(), *model.buffers(), images, labels, loss]
        kept = allocations.alive({t.untyped_storage()._cdata for t in given})
    loss.backward()
    model.zero_grad(set_to_none=True)
    return kept


@dataclass
class Options:
    model: str = option("resnet50", "a model of proxynorm.create_model")
    batch: int = option(8, "images")
    size: int = option(224, "side of the images, pixels")
    norms: list[str] = option(
        ["torch bn", "torch ln", "bn", "bn_pn", "ln", "ln_pn", "ln_pn+recompute", "gn_pn", "in_pn"],
        "norms; with +recompute: outputs rebuilt in backward; torch bn and torch ln: torch's own",
    )
    device: str = option("auto", "auto, cpu, cuda")
    json: str | None = option(None, "file for the figures, with the machine's description")


def main(options: Options) -> None:
    """Print one row a norm. Raises ConfigError."""
    for norm in options.norms:
        check_norm(norm)
    device = choose_device(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    labels = torch.zeros(options.batch, dtype=torch.long, device=device)
    norms = [TORCH_BN, *(norm for norm in options.norms if norm != TORCH_BN)]
    kept = {}
    print(f"{'norm':<18}{'MB kept':>10}{'of torch bn':>14}")
    for norm in norms:
        kept[norm] = bytes_kept(build(Variant(norm, "nchw"), options.model, device), images, labels)
        print(
            f"{norm:<18}{kept[norm] / 1e6:>10.1f}{kept[norm] / kept[TORCH_BN]:>14.4f}", flush=True
        )
    if options.json:
        write_json(
            Path(options.json),
            {"options": asdict(options), "bytes_kept": kept, "environment": environment()},
        )
