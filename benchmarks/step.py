"""Time of a training step (forward, loss, backward) and of inference, for every norm, in interleaved rounds.

  python scripts/benchmark.py step model=resnet50 batch=8 size=224 json=results/step/NAME.json
  python scripts/benchmark.py step processes=5 formats=[channels_last] 'norms=[torch bn,torch ln,ln_pn]'

Ratios are medians over rounds of the ratio within a round. "torch ln" is torch's group_norm with one group and the
activation in place, "torch bn" torch's batch norm likewise. Proxied norms are frozen for inference. On CUDA the same
command adds the peak memory of a step; precision=bf16 or fp16 runs under autocast.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
from torch import nn

from benchmarks.memory import bytes_kept
from benchmarks.variants import (
    FORMATS,
    RECOMPUTE,
    TORCH_BN,
    TORCH_LN,
    Variant,
    build,
    check_norm,
    for_inference,
)
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.nn import NormAct2d
from proxynorm.nn.fast.folding import pull_back
from proxynorm.nn.fast.shared import SharedMoments
from proxynorm.train.distributed import choose_device
from proxynorm.train.memory import keep_freed_memory
from proxynorm.train.run_folder import environment

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Options:
    model: str = option("resnet50", "a model of proxynorm.create_model")
    batch: int = option(8, "images a step")
    size: int = option(224, "side of the images, pixels")
    norms: list[str] = option(
        [
            TORCH_BN,
            TORCH_LN,
            "bn",
            "bn_pn",
            "ln",
            "ln_pn",
            f"ln_pn{RECOMPUTE}",
            "gn",
            "gn_pn",
            "in",
            "in_pn",
        ],
        "norms; with +recompute; torch bn and torch ln: torch's own",
    )
    formats: list[str] = option(list(FORMATS), "memory formats: nchw, channels_last")
    modes: list[str] = option(["eager"], "eager, compiled")
    precision: str = option("float32", "float32, bf16, fp16 (the last two under autocast)")
    rounds: int = option(9, "steps of each, taken in turns")
    inference: bool = option(True, "time inference as well")
    processes: int = option(
        1,
        "do it all in so many processes, one after another: medians of medians, least and greatest",
    )
    threads: int | None = option(None, "CPU threads; torch's default if left out")
    keep_memory: bool = option(
        True, "on a CPU, malloc keeps freed memory, as in training; false: malloc's own ways"
    )
    device: str = option("auto", "auto, cpu, cuda")
    json: str | None = option(None, "file for the figures, with the machine's description")


@dataclass
class Contender:
    """A variant ready to run, and what was measured of it: seconds a step, bytes."""

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
    """Measure, print the tables and the figures, write the file. Raises ConfigError."""
    _check(options)
    if options.processes == 1:
        content = measure(options)
    else:
        parts = list(_measure_apart(options))
        figures = {
            name: sorted(part["figures"][name] for part in parts) for name in parts[0]["figures"]
        }
        print(f"{'median of the processes, least and greatest':<72}")
        for name, values in figures.items():
            print(f"{name:<72}{median(values):>8.4f}{values[0]:>8.4f}{values[-1]:>8.4f}")
        content = {"options": asdict(options), "processes": parts, "figures": figures}
    if options.json:
        write_json(Path(options.json), content)


def _measure_apart(options: Options) -> Iterator[dict[str, Any]]:
    """What each process measured, one after another."""
    for number in range(options.processes):
        print(f"process {number + 1} of {options.processes}", flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(measure, replace(options, processes=1, json=None)).result()


def measure(options: Options) -> dict[str, Any]:
    """One process's measurement, printed and as the file holds it. Raises ConfigError."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    if options.keep_memory:
        keep_freed_memory(device)
    variants = [
        Variant(norm, memory_format, mode == "compiled")
        for mode in options.modes
        for memory_format in options.formats
        for norm in options.norms
    ]
    # every variant compiles the same forward twice; past the limit, 8, torch would silently go on uncompiled
    torch._dynamo.config.recompile_limit = 2 * len(variants)
    try:
        contenders = [_prepare(variant, options, device) for variant in variants]
    except ValueError as error:  # a map too small for a norm
        raise ConfigError(
            f"model={options.model} batch={options.batch} size={options.size}: {error} (use a larger size or "
            "leave this norm out of norms=)"
        ) from error
    for _ in range(options.rounds):
        for contender in contenders:
            _measure(contender, options)
    share = {
        c.variant: moments_seconds(c.net) / median(c.train)
        for c in contenders
        if c.variant.norm.endswith("_pn") and not c.variant.compiled
    }
    rows = [_row(c, contenders, share.get(c.variant)) for c in contenders]
    print_table(rows)
    figures = _figures(contenders, share)
    for name, value in figures.items():
        print(f"{name:<72}{value:>8.4f}", flush=True)
    return {
        "options": asdict(options),
        "rows": rows,
        "figures": figures,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _check(options: Options) -> None:
    for norm in options.norms:
        check_norm(norm)
    for name, given, legal in (
        ("formats", options.formats, FORMATS),
        ("modes", options.modes, ("eager", "compiled")),
        ("precision", [options.precision], PRECISIONS),
    ):
        for value in given:
            if value not in legal:
                raise ConfigError(f"{name}={value}: choose of {', '.join(legal)}")
    counts = (options.batch, options.size, options.rounds, options.processes, options.threads or 1)
    if min(counts) < 1 or options.threads == 0:
        raise ConfigError("batch, size, rounds, processes and threads must be at least 1")
    if not (options.norms and options.formats and options.modes):
        raise ConfigError("norms, formats and modes need one entry at least")


def _prepare(variant: Variant, options: Options, device: torch.device) -> Contender:
    """Build, count bytes, warm up."""
    net = build(variant, options.model, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    images = images.to(device).contiguous(memory_format=FORMATS[variant.memory_format])
    labels = torch.zeros(options.batch, dtype=torch.long, device=device)
    with _autocast(options, device):
        kept = bytes_kept(net, images, labels)
    frozen = for_inference(variant, net) if options.inference else None
    if variant.compiled:
        net, frozen = torch.compile(net), frozen and torch.compile(frozen)
    contender = Contender(variant, net, frozen, images, labels, kept)
    _measure(contender, options)
    contender.train.clear()
    contender.infer.clear()
    print(f"ready: {variant.norm}, {variant.memory_format}, {variant.mode}", flush=True)
    return contender


def _autocast(options: Options, device: torch.device) -> contextlib.AbstractContextManager:
    dtype = PRECISIONS[options.precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _measure(contender: Contender, options: Options) -> None:
    device = contender.images.device

    def train() -> None:
        with _autocast(options, device):
            loss = nn.functional.cross_entropy(contender.net(contender.images), contender.labels)
        loss.backward()

    def infer() -> None:
        with _autocast(options, device), torch.inference_mode():
            contender.frozen(contender.images)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    contender.train.append(timed(train, device))
    if device.type == "cuda":
        contender.peak = torch.cuda.max_memory_allocated()
    contender.net.zero_grad(set_to_none=True)
    if contender.frozen is not None:
        gc.collect()
        contender.infer.append(timed(infer, device))


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run of `action`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def moments_seconds(net: nn.Module, repeats: int = 5) -> float:
    """What the moments cost in a step: the folding of all layers, and from the constants' gradients the parameters'."""
    layers = [m for m in net.modules() if isinstance(m, NormAct2d) and m.proxied]
    device = layers[0].proxy_weight.device
    ones = [[torch.ones_like(row) for row in layer.folded_constants()] for layer in layers]
    gated = [layer for layer in layers if not layer.proxy_scale]
    for_gates = [p for layer in gated for p in layer.four_parameters() if p.requires_grad]
    owners = [getattr(hook, "__self__", None) for hook in net._forward_pre_hooks.values()]
    shared = [owner for owner in owners if isinstance(owner, SharedMoments)]

    def once() -> None:
        for moments in shared:
            moments.evaluated.clear()  # as after an update of the parameters
            moments.distribute(net, ())
        for layer, grads in zip(layers, ones):
            pull_back(layer.constants().jacobian, grads)
        if gated:
            scales = [layer.proxy_rescale() for layer in gated]
            torch.autograd.grad(scales, for_gates, [torch.ones_like(scale) for scale in scales])
        for layer in layers:
            layer.shared_constants = None

    once()
    return median(timed(once, device) for _ in range(repeats))


def ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within the round."""
    return median(a / b for a, b in zip(times, base))


def _find(
    contenders: list[Contender], norm: str, memory_format: str, mode: str
) -> Contender | None:
    wanted = (norm, memory_format, mode)
    return next(
        (
            c
            for c in contenders
            if (c.variant.norm, c.variant.memory_format, c.variant.mode) == wanted
        ),
        None,
    )


def _row(c: Contender, contenders: list[Contender], share: float | None) -> dict[str, object]:
    v = c.variant
    torch_ln = _find(contenders, TORCH_LN, v.memory_format, v.mode)
    torch_bn = _find(contenders, TORCH_BN, v.memory_format, v.mode)
    return {
        "norm": v.norm,
        "format": v.memory_format,
        "mode": v.mode,
        "step ms": median(c.train) * 1e3,
        "/ torch ln": torch_ln and ratio(c.train, torch_ln.train),
        "inference ms": median(c.infer) * 1e3 if c.infer else None,
        "/ torch ln (inf.)": (torch_ln and c.infer and ratio(c.infer, torch_ln.infer)) or None,
        "MB kept": c.kept / 1e6,
        "/ torch bn": torch_bn and c.kept / torch_bn.kept,
        "moments %": None if share is None else share * 100,
        **({"peak MB": c.peak / 1e6} if c.peak else {}),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    """One aligned table; three decimals for ratios, one for the rest."""

    def cell(name: str, value: object) -> str:
        if value is None:
            return "–"
        return (
            value
            if isinstance(value, str)
            else f"{value:.3f}"
            if "/" in name or "%" in name
            else f"{value:.1f}"
        )

    table = [list(rows[0]), *([cell(name, value) for name, value in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print(
            "  ".join(
                text.ljust(w) if i < 3 else text.rjust(w)
                for i, (text, w) in enumerate(zip(line, widths))
            )
        )


def _figures(contenders: list[Contender], share: dict[Variant, float]) -> dict[str, float]:
    """LN+PN against the two it is measured by, eager, each in the format given or in its own best one."""
    eager = [c for c in contenders if not c.variant.compiled]
    best: dict[str, Contender] = {}
    for c in eager:
        if c.variant.norm not in best or median(c.train) < median(best[c.variant.norm].train):
            best[c.variant.norm] = c
    figures = {}
    for ours in ("ln_pn", f"ln_pn{RECOMPUTE}"):
        for base in (TORCH_LN, TORCH_BN):
            if ours in best and base in best:
                figures[f"step, {ours} / {base}, each in its best format"] = ratio(
                    best[ours].train, best[base].train
                )
                figures[f"bytes kept, {ours} / {base}"] = best[ours].kept / best[base].kept
        if ours in best and TORCH_LN in best and best[ours].infer:
            figures[f"inference, {ours} frozen / {TORCH_LN}"] = ratio(
                best[ours].infer, best[TORCH_LN].infer
            )
    for variant, value in share.items():
        if variant.norm == "ln_pn":
            figures[f"moments' share of a step, ln_pn, {variant.memory_format}"] = value
    return figures
