"""Bytes that a forward pass keeps for the backward pass, for every norm.

  python scripts/benchmark.py memory model=resnet50 batch=8 size=224 json=results/memory/NAME.json

The last column is relative to torch's own batch norm and activation, as timm uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.networks import ALL_NORMS, TORCH_BN, TORCH_LN, build, random_images
from proxynorm.cli import option
from proxynorm.train.distributed import choose_device

NORMS = [TORCH_BN, TORCH_LN, "bn", "bn_pn", "ln", "ln_pn", "ln_pn+recompute", "gn_pn", "in_pn"]


@dataclass
class Options(common.ModelOptions):
    norms: list[str] = option(
        NORMS,
        "norms; +recompute: outputs rebuilt in backward; torch bn, torch ln: torch's own",
        choices=ALL_NORMS,
    )


def main(options: Options) -> None:
    device = choose_device(options.device)
    images = random_images(options.batch, options.size, "nchw", device)
    labels = torch.zeros(options.batch, dtype=torch.long, device=device)
    kept = {
        norm: bytes_kept(build(norm, options.model, device=device), images, labels)
        for norm in dict.fromkeys([TORCH_BN, *options.norms])
    }
    common.show(
        [
            {"norm": norm, "MB kept": size / 1e6, "of torch bn": size / kept[TORCH_BN]}
            for norm, size in kept.items()
        ]
    )
    common.write_results(options, {"bytes_kept": kept})


def bytes_kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that a forward pass with loss allocates and does not free before the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    model.zero_grad(set_to_none=True)
    events = profiler.key_averages()
    return sum(event.self_cpu_memory_usage + event.self_device_memory_usage for event in events)
