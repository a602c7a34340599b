"""Exact evaluation: every image counts once, for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from proxynorm.data import Batch
from proxynorm.data.loaders import on_device
from proxynorm.errors import DataError
from proxynorm.train.distributed import Process


@dataclass(frozen=True)
class Result:
    """Accuracies in percent, mean cross-entropy (without smoothing), number of images."""

    top1: float
    top5: float
    loss: float
    count: int


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context of a forward pass computed in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def batch_sums(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Return the sums of top-1 hits, top-5 hits and loss over the valid rows of (N, K) logits.

    They are float64 (3,), so that they do not depend on how images are batched.
    """
    # Masked, not selected: selecting would make the host wait for the number of valid rows.
    logits = logits.float()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    hits &= valid[:, None]
    loss = cross_entropy(logits, targets, reduction="none").double().where(valid, 0.0).sum()
    return torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss])


@torch.inference_mode()
def forward(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch, as `prepare` moves and normalizes it, and the logits (N, K) in eval mode.

    `model` returns to its former mode after the last batch.
    """
    training = model.training
    model.eval()
    try:
        for batch in on_device(batches, device):
            batch = prepare(batch)
            with autocast(device, dtype):
                logits = model(batch.images)
            yield batch, logits
    finally:
        model.train(training)


@torch.inference_mode()
def evaluate(
    outputs: Iterable[tuple[Batch, Tensor]],
    process: Process,
    expected: int | None = None,
    damaged: Mapping[str, str] | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> Result:
    """Compare the `outputs` of `forward` with their targets, over all processes.

    damaged: name → reason of the images left out so far. Raises DataError if all processes
    together saw no image, or not `expected` ones.
    """
    device, count = process.device, 0
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch, logits in outputs:
        each_batch()
        count += int(batch.valid.sum())  # on the host, as `valid` is
        valid = batch.valid.to(device, non_blocking=True)
        sums += batch_sums(logits, batch.targets, valid)
    sums = torch.cat([sums, torch.full((1,), count, dtype=sums.dtype, device=device)])
    top1, top5, loss, count = process.sum(sums).tolist()  # the only wait for the device
    if expected is not None and count != expected:
        raise DataError(f"evaluation saw {int(count)} images, the data set has {expected}")
    if not count:
        named = [f"{name}: {reason}; " for name, reason in (damaged or {}).items()][-1:]
        raise DataError("".join(named) + "every evaluation image is damaged; repair them")
    return Result(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
