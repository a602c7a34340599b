"""Where LN+PN's time goes: the operators of a training step, compared with torch's LN.

  python scripts/benchmark.py passes model=resnet50 batch=8 size=224 json=results/passes/NAME.json

The figures are torch.profiler's self time of every operator, forward and backward: medians over
steps, which alternate between the networks. The largest differences come first: passes over the map
and constants that only LN+PN has, and torch's norm, which it replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import profile

from benchmarks import common
from benchmarks.networks import FORMATS, TORCH_LN, build, random_images
from proxynorm.cli import option
from proxynorm.train.distributed import choose_device
from proxynorm.train.memory import keep_freed_memory

STEP = "all operators"
SHOWN = 20
Operators = dict[str, float]


@dataclass
class Options(common.ModelOptions):
    format: str = option("channels_last", "memory format: nchw, channels_last", choices=FORMATS)
    rounds: int = option(15, "steps of each network, interleaved", "at least 1")


def main(options: Options) -> None:
    device = choose_device(options.device)
    keep_freed_memory(device)  # as in training
    images = random_images(options.batch, options.size, options.format, device)
    nets = [build(norm, options.model, options.format, device) for norm in ("ln_pn", TORCH_LN)]
    # The first round warms up.
    turns = [[operators(net, images) for net in nets] for _ in range(options.rounds + 1)][1:]
    rows = compare(*zip(*turns))
    common.show(rows[:SHOWN])
    common.write_results(options, {"rows": rows, "threads": torch.get_num_threads()})


def operators(net: nn.Module, images: Tensor) -> Operators:
    """Milliseconds of every operator in a training step, and of all together."""
    with profile() as profiler:
        net(images).sum().backward()
    net.zero_grad(set_to_none=True)
    time = "self_device_time_total" if images.is_cuda else "self_cpu_time_total"
    found = {event.key: getattr(event, time) / 1e3 for event in profiler.key_averages()}
    return {STEP: sum(found.values()), **found}


def compare(ours: Sequence[Operators], theirs: Sequence[Operators]) -> list[dict]:
    """A row per operator: milliseconds, and the difference in % of torch LN's step.

    The largest differences come first.
    """
    step = median(turn[STEP] for turn in theirs)
    rows = []
    for name in {name: None for turn in (*ours, *theirs) for name in turn}:
        pair = [median(turn.get(name, 0.0) for turn in turns) for turns in (ours, theirs)]
        share = 100 * (pair[0] - pair[1]) / step
        rows.append({"what": name, "LN+PN ms": pair[0], "torch LN ms": pair[1], "% more": share})
    return sorted(rows, key=lambda row: abs(row["% more"]), reverse=True)
