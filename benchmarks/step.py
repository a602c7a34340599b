"""Time of a training step (forward, loss, backward) and of inference for every norm, in turns.

  python scripts/benchmark.py step model=resnet50 batch=8 size=224 json=results/step/NAME.json
  python scripts/benchmark.py step processes=5 formats=[channels_last] 'norms=[torch ln,ln_pn]'

Ratios are medians over rounds of the ratio within a round. "torch ln" is torch's group_norm with
one group and the activation in place, "torch bn" torch's batch norm likewise. Proxied norms are
frozen for inference. On CUDA the peak memory of a step is shown as well; precision=bf16 or fp16
runs under autocast.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median
from typing import Any

import torch
import torch._dynamo
from torch import nn

from benchmarks import common, variants
from benchmarks.common import ratio, seconds
from benchmarks.memory import bytes_kept
from benchmarks.variants import FORMATS, RECOMPUTE, TORCH_BN, TORCH_LN, Variant
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.nn import NormAct2d
from proxynorm.nn.fast.folding import pull_back
from proxynorm.nn.fast.shared import SharedMoments
from proxynorm.train.distributed import choose_device
from proxynorm.train.memory import keep_freed_memory

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LN_PN = "ln_pn"
NORMS = [TORCH_BN, TORCH_LN, "bn", "bn_pn", "ln", LN_PN, LN_PN + RECOMPUTE]
NORMS += ["gn", "gn_pn", "in", "in_pn"]


@dataclass
class Options(common.ModelOptions):
    norms: list[str] = option(NORMS, "norms; also NORM+recompute; torch bn, torch ln: torch's own")
    formats: list[str] = option(list(FORMATS), "memory formats: nchw, channels_last")
    modes: list[str] = option(["eager"], "eager, compiled")
    precision: str = option("float32", "float32, bf16, fp16 (the last two under autocast)")
    rounds: int = option(9, "steps of each, taken in turns")
    inference: bool = option(True, "time inference as well")
    processes: int = option(1, "repeat all in so many processes; median, least and greatest")
    threads: int | None = option(None, "CPU threads; torch's default if left out")
    keep_memory: bool = option(True, "CPU: malloc keeps freed memory, as in training")


@dataclass
class Contender:
    """A variant ready to run, and its figures: seconds of each round, bytes."""

    variant: Variant
    net: nn.Module
    frozen: nn.Module | None
    images: torch.Tensor
    labels: torch.Tensor
    kept: int
    train: list[float] = field(default_factory=list)
    infer: list[float] = field(default_factory=list)
    peak: int | None = None


def main(options: Options) -> None:
    check(options)
    if options.processes == 1:
        content = measure(options)
    else:
        content = measure_in_processes(options)
    common.write_figures(options, content)


def check(options: Options) -> None:
    """Raise ConfigError for a value that is not among the choices, or below 1."""
    variants.check_norms(options.norms)
    choices = {"formats": FORMATS, "modes": ("eager", "compiled"), "precision": PRECISIONS}
    for name, known in choices.items():
        given = getattr(options, name)
        given = [given] if isinstance(given, str) else given
        if not given or not set(given) <= set(known):
            raise ConfigError(f"{name}={','.join(given)}: choose of {', '.join(known)}")
    common.require_positive(options, "batch", "size", "rounds", "processes", "threads")


def measure_in_processes(options: Options) -> dict[str, Any]:
    """Repeat the measurement in processes, one after another, and print their figures' spread."""
    parts = []
    for number in range(options.processes):
        print(f"process {number + 1} of {options.processes}", flush=True)
        with common.new_process() as pool:
            parts.append(pool.submit(measure, options).result())
    figures = {
        name: sorted(part["figures"][name] for part in parts) for name in parts[0]["figures"]
    }
    spread = [
        [name, *(f"{value:.4f}" for value in (median(values), values[0], values[-1]))]
        for name, values in figures.items()
    ]
    print(text_table(("over the processes", "median", "least", "greatest"), spread))
    return {"processes": parts, "figures": figures}


def measure(options: Options) -> dict[str, Any]:
    """Measure in this process, print the table; returns rows and figures. Raises ConfigError."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    # Otherwise glibc returns large blocks to the system, and every step faults the pages in again.
    if options.keep_memory:
        keep_freed_memory(device)
    compared = [
        Variant(norm, memory_format, mode)
        for mode, memory_format, norm in product(options.modes, options.formats, options.norms)
    ]
    # Every variant compiles the same forward twice. Beyond the limit torch silently runs eagerly.
    torch._dynamo.config.recompile_limit = 2 * len(compared)
    try:
        contenders = {variant: prepare(variant, options, device) for variant in compared}
    except ValueError as error:  # a map too small for a norm
        raise ConfigError(
            f"model={options.model} batch={options.batch} size={options.size}: {error} "
            "(use a larger size or leave this norm out of norms=)"
        ) from error
    for _ in range(options.rounds):
        for contender in contenders.values():
            run(contender, options)
    moments = {
        variant: moments_seconds(contender.net) / median(contender.train)
        for variant, contender in contenders.items()
        if variant.norm.endswith("_pn") and variant.mode == "eager"
    }
    rows = [row(contender, contenders, moments) for contender in contenders.values()]
    print(text_table(list(rows[0]), [list(map(cell, item, item.values())) for item in rows]))
    figures = compare(contenders, moments)
    for name, value in figures.items():
        print(f"{name:<72}{value:>8.4f}", flush=True)
    return {"rows": rows, "figures": figures, "threads": torch.get_num_threads()}


def prepare(variant: Variant, options: Options, device: torch.device) -> Contender:
    """Build the network, count its bytes, run it once."""
    net = variants.build(variant, options.model, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    images = images.to(device).contiguous(memory_format=FORMATS[variant.memory_format])
    labels = torch.zeros(options.batch, dtype=torch.long, device=device)
    with autocast(options, device):
        kept = bytes_kept(net, images, labels)
    frozen = variants.for_inference(variant, net) if options.inference else None
    if variant.mode == "compiled":
        net, frozen = torch.compile(net), frozen and torch.compile(frozen)
    contender = Contender(variant, net, frozen, images, labels, kept)
    run(contender, options)
    contender.train.clear()
    contender.infer.clear()
    print(f"ready: {variant.norm}, {variant.memory_format}, {variant.mode}", flush=True)
    return contender


def autocast(options: Options, device: torch.device) -> AbstractContextManager:
    dtype = PRECISIONS[options.precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def run(contender: Contender, options: Options) -> None:
    """Time one training step and one inference of a contender."""
    device = contender.images.device

    def train() -> None:
        with autocast(options, device):
            loss = nn.functional.cross_entropy(contender.net(contender.images), contender.labels)
        loss.backward()

    def infer() -> None:
        with autocast(options, device), torch.inference_mode():
            contender.frozen(contender.images)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    gc.collect()  # a collection within the step would be timed
    contender.train.append(seconds(train, device))
    if device.type == "cuda":
        contender.peak = torch.cuda.max_memory_allocated(device)
    contender.net.zero_grad(set_to_none=True)
    if contender.frozen is not None:
        gc.collect()
        contender.infer.append(seconds(infer, device))


def moments_seconds(net: nn.Module, repeats: int = 5) -> float:
    """Seconds of a step that the proxy moments take: all layers' constants and their backward."""
    layers = [m for m in net.modules() if isinstance(m, NormAct2d) and m.proxied]
    # Any gradient of the constants costs the same; ones will do.
    ones = [[torch.ones_like(row) for row in layer.folded_constants()] for layer in layers]
    unscaled = [layer for layer in layers if not layer.proxy_scale]
    parameters = [p for layer in unscaled for p in layer.four_parameters() if p.requires_grad]
    owners = [getattr(hook, "__self__", None) for hook in net._forward_pre_hooks.values()]
    shared = [owner for owner in owners if isinstance(owner, SharedMoments)]

    def once() -> None:
        for moments in shared:
            moments.evaluated.clear()  # as after an update of the parameters
            moments.distribute(net, ())
        for layer, grads in zip(layers, ones):
            pull_back(layer.constants().jacobian, grads)
        if unscaled:
            scales = [layer.proxy_rescale() for layer in unscaled]
            torch.autograd.grad(scales, parameters, [torch.ones_like(scale) for scale in scales])
        for layer in layers:
            layer.shared_constants = None

    once()
    device = layers[0].proxy_weight.device
    return median(seconds(once, device) for _ in range(repeats))


def row(
    contender: Contender, contenders: dict[Variant, Contender], moments: dict[Variant, float]
) -> dict[str, Any]:
    """The figures of a variant, beside those of torch's norms in the same format and mode."""
    variant, train, infer = contender.variant, contender.train, contender.infer
    torch_ln = contenders.get(replace(variant, norm=TORCH_LN))
    torch_bn = contenders.get(replace(variant, norm=TORCH_BN))
    share = moments.get(variant)
    figures = {
        "norm": variant.norm,
        "format": variant.memory_format,
        "mode": variant.mode,
        "step ms": median(train) * 1e3,
        "/ torch ln": ratio(train, torch_ln.train) if torch_ln else None,
        "inference ms": median(infer) * 1e3 if infer else None,
        "/ torch ln (inf.)": ratio(infer, torch_ln.infer) if torch_ln and infer else None,
        "MB kept": contender.kept / 1e6,
        "/ torch bn": contender.kept / torch_bn.kept if torch_bn else None,
        "moments %": None if share is None else 100 * share,
    }
    return figures if contender.peak is None else {**figures, "peak MB": contender.peak / 1e6}


def cell(name: str, value: str | float | None) -> str:
    """A value as text: three decimals for ratios, one for the rest."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.3f}" if "/" in name or "%" in name else f"{value:.1f}"


def compare(
    contenders: dict[Variant, Contender], moments: dict[Variant, float]
) -> dict[str, float]:
    """LN+PN over torch's norms, in eager mode, each in its fastest memory format."""
    best: dict[str, Contender] = {}
    for variant, contender in contenders.items():
        fastest = best.get(variant.norm, contender)
        if variant.mode == "eager" and median(contender.train) <= median(fastest.train):
            best[variant.norm] = contender
    figures = {}
    for ours, base in product((LN_PN, LN_PN + RECOMPUTE), (TORCH_LN, TORCH_BN)):
        if ours not in best or base not in best:
            continue
        name = f"step, {ours} / {base}, each in its best format"
        figures[name] = ratio(best[ours].train, best[base].train)
        figures[f"bytes kept, {ours} / {base}"] = best[ours].kept / best[base].kept
        if base == TORCH_LN and best[ours].infer:
            name = f"inference, {ours} frozen / {base}"
            figures[name] = ratio(best[ours].infer, best[base].infer)
    for variant, share in moments.items():
        if variant.norm == LN_PN:
            figures[f"moments' share of a step, ln_pn, {variant.memory_format}"] = share
    return figures
