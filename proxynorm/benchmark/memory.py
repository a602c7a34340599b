"""Bytes that a forward pass keeps alive for the backward pass, counted tensor by tensor, on any device."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Allocations(TorchDispatchMode):
    """Remembers, weakly, every storage that an operation returns, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, excluded: set[int]) -> int:
        """Bytes of the storages that still exist, the excluded ones left out."""
        return sum(size for reference, size in self.storages.values()
                   if not reference.expired() and reference.cdata not in excluded)


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
