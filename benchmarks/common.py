"""Shared by the benchmarks: options, timing in turns, separate processes, the file of figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.train.run_folder import environment


@dataclass
class Options:
    """The option of every benchmark."""

    json: str | None = option(None, "file for the figures, with the machine's description")


@dataclass
class ModelOptions(Options):
    """The options of the benchmarks that run a model on random images."""

    model: str = option("resnet50", "a model of proxynorm.create_model")
    batch: int = option(8, "images a step")
    size: int = option(224, "side of the images, pixels")
    device: str = option("auto", "auto, cpu, cuda")


def require_positive(options: Options, *names: str) -> None:
    """Raise ConfigError for the first of these options that is below 1; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: give at least 1")


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that `action` takes; on a GPU, until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each action, one figure a round, after a warm-up round.

    Turns spread a slow spell of the machine over all of them; compare with `ratio`.
    """
    times = [
        {name: seconds(action, device) for name, action in actions.items()}
        for _ in range(rounds + 1)
    ][1:]
    return {name: [turn[name] for turn in times] for name in actions}


def ratio(figures: list[float], base: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(figures, base, strict=True))


def new_process() -> ProcessPoolExecutor:
    """A fresh Python process, to which functions are submitted. Use it in a with statement."""
    # spawn, not fork: the child must not inherit torch's threads or memory.
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def write_figures(options: Options, content: Mapping[str, Any]) -> None:
    """Write the figures to options.json, if given, beside the options and the machine."""
    if options.json:
        machine = {"environment": environment(), "load_average": os.getloadavg()}
        write_json(Path(options.json), {"options": asdict(options), **machine, **content})
