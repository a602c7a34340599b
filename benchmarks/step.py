"""The time of a training step (forward, loss, backward) and of inference, for every norm.

  python scripts/benchmark.py step model=resnet50 batch=8 size=224 json=results/step/NAME.json
  python scripts/benchmark.py step formats=[channels_last] 'norms=[torch ln,ln_pn]'

Norms take turns, and a ratio is the median over rounds of the ratio within a round. Ratios are to
torch's norms in the same format and mode: "torch ln" is torch's group_norm with one group, followed
by the activation in place; "torch bn" is torch's batch norm likewise. Our norms are frozen for
inference. For the bytes kept for backward, see the memory benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from benchmarks.networks import (
    ALL_NORMS,
    FORMATS,
    TORCH_BN,
    TORCH_LN,
    build,
    for_inference,
    random_images,
)
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.nn import NormAct2d, proxy_moments
from proxynorm.train.distributed import choose_device
from proxynorm.train.memory import keep_freed_memory

NORMS = [TORCH_BN, TORCH_LN, "bn", "bn_pn", "ln", "ln_pn", "ln_pn+recompute"]
NORMS += ["gn", "gn_pn", "in", "in_pn"]
Variant = tuple[str, str, str]  # norm, format, mode
Key = tuple[Variant, str]  # a variant, and "train", "inference" or "moments"


@dataclass
class Options(common.ModelOptions):
    norms: list[str] = option(
        NORMS, "norms; also NORM+recompute; torch bn, torch ln: torch's own", choices=ALL_NORMS
    )
    formats: list[str] = option(
        list(FORMATS), "memory formats: nchw, channels_last", choices=FORMATS
    )
    modes: list[str] = option(["eager"], "eager, compiled", choices=("eager", "compiled"))
    rounds: int = option(9, "steps of each norm, interleaved", "at least 1")
    keep_memory: bool = option(True, "CPU: malloc keeps freed memory, as in training")


def main(options: Options) -> None:
    device = choose_device(options.device)
    # Otherwise glibc returns large blocks to the system, and every step faults the pages in again.
    if options.keep_memory:
        keep_freed_memory(device)
    variants = list(product(options.norms, options.formats, options.modes))
    # Every variant compiles the same forward twice. Beyond the limit, torch silently runs eagerly.
    torch._dynamo.config.recompile_limit = 2 * len(variants)
    actions: dict[Key, Callable[[], None]] = {}
    for variant in variants:
        norm, memory_format, mode = variant
        net = build(norm, options.model, memory_format, device)
        images = random_images(options.batch, options.size, memory_format, device)
        run = torch.compile if mode == "compiled" else lambda module: module
        actions[variant, "train"] = partial(train, run(net), images)
        actions[variant, "inference"] = partial(infer, run(for_inference(net)), images)
        if "_pn" in norm:
            actions[variant, "moments"] = partial(moments, net)
    try:
        times = common.take_turns(actions, options.rounds)
    except ValueError as error:  # a map too small for a norm
        raise ConfigError(
            f"model={options.model} batch={options.batch} size={options.size}: {error} "
            "(use a larger size or leave this norm out of norms=)"
        ) from error
    rows = [row(variant, times) for variant in variants]
    common.show(rows)
    common.write_results(options, {"rows": rows, "threads": torch.get_num_threads()})


def train(net: nn.Module, images: Tensor) -> None:
    """Forward, loss, backward."""
    net.zero_grad(set_to_none=True)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
    cross_entropy(net(images), targets).backward()


@torch.inference_mode()
def infer(net: nn.Module, images: Tensor) -> None:
    net(images)


def moments(net: nn.Module) -> None:
    """The proxy moments of all layers, forward and backward."""
    layers = [m for m in net.modules() if isinstance(m, NormAct2d) and m.proxied]
    # All channels side by side, as share_moments evaluates them.
    parameters = [torch.cat(row) for row in zip(*(layer.four_parameters() for layer in layers))]
    mean, var = proxy_moments(*parameters, activation=layers[0].act)
    torch.autograd.grad((mean + var).sum(), parameters)


def row(variant: Variant, times: dict[Key, list[float]]) -> dict[str, Any]:
    """The figures of a variant, and their ratios to torch's norms in the same format and mode."""
    norm, memory_format, mode = variant
    step, inference = times[variant, "train"], times[variant, "inference"]
    share = times.get((variant, "moments"))

    def ratio(figures: list[float], base: str, key: str) -> float | None:
        theirs = times.get(((base, memory_format, mode), key))
        return theirs and common.ratio(figures, theirs)

    return {
        **{"norm": norm, "format": memory_format, "mode": mode},
        "step ms": median(step) * 1e3,
        "/ torch ln": ratio(step, TORCH_LN, "train"),
        "/ torch bn": ratio(step, TORCH_BN, "train"),
        "inference ms": median(inference) * 1e3,
        "/ torch ln (inf.)": ratio(inference, TORCH_LN, "inference"),
        "moments %": share and 100 * common.ratio(share, step),
    }
