"""Shared by the benchmarks: options, interleaved timing, tables and files."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.files import write_json
from proxynorm.train.run_folder import environment

Name = TypeVar("Name", bound=Hashable)


@dataclass
class Options:
    """The option of every benchmark."""

    json: str | None = option(None, "file for the results, with the machine's description")


@dataclass
class ModelOptions(Options):
    """The options of the benchmarks that run a model on random images."""

    model: str = option("resnet50", "a model of proxynorm.create_model")
    batch: int = option(8, "images a step", "at least 1")
    size: int = option(224, "side of the images, pixels", "at least 1")
    device: str = option("auto", "auto, cpu, cuda")


def now() -> float:
    """The time in seconds, after a GPU, if there is one, has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def take_turns(
    actions: Mapping[Name, Callable[[], object]], rounds: int
) -> dict[Name, list[float]]:
    """Seconds of each action in each round, after a warm-up round.

    Each action runs once in each round, so a slow period of the machine affects all of them.
    Compare them with `ratio`.
    """
    times: dict[Name, list[float]] = {name: [] for name in actions}
    gc.collect()
    gc.freeze()  # makes the collections below fast
    for _ in range(rounds + 1):
        gc.collect()  # so that no collection is due within a timed action
        for name, action in actions.items():
            start = now()
            action()
            times[name].append(now() - start)
    gc.unfreeze()
    return {name: figures[1:] for name, figures in times.items()}


def ratio(figures: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return median(a / b for a, b in zip(figures, base, strict=True))


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows as a table. The keys of the first row are the header."""
    print(text_table([[*rows[0]], *(list(map(_cell, row.values())) for row in rows)]), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def write_results(options: Options, content: Mapping[str, Any]) -> None:
    """Write the results, the options and the machine's description to options.json, if given."""
    if options.json:
        machine = {"environment": environment(), "load_average": os.getloadavg()}
        write_json(Path(options.json), {"options": asdict(options), **machine, **content})
