"""What runs would take, before they are started: steps, images, hours, disk, memory; and whether their limits allow it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from omegaconf import OmegaConf

from proxynorm.config import compose_config, settings_from
from proxynorm.data.beton import read_beton
from proxynorm.doctor import OPTIMIZER_COPIES, existing
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.reproduce import slurm
from proxynorm.reproduce.runs import Run
from proxynorm.reproduce.slurm import SlurmOptions
from proxynorm.reproduce.table import Cell, Table
from proxynorm.train.build import build_model
from proxynorm.train.run_folder import read_metrics
from proxynorm.train.settings import Settings

FASHION_IMAGES = 60000
PROBE_STEPS = 20
START_SECONDS = 60.0  # allowed for starting a run: queueing the step, imports, opening the data


@dataclass(frozen=True)
class Estimate:
    """Of one run. images: of training, over all epochs; hours: training and start-up, with their origin; disk: bytes
    of its checkpoints; memory: peak GPU memory in GiB. None: not known before data or a measurement is at hand."""

    steps: int | None
    images: int | None
    hours: float
    origin: str
    disk: int
    memory: float | None = None


def train_images(settings: Settings) -> int | None:
    """Training images of an epoch's order; None where the data cannot be read here."""
    spec = settings.data
    if spec.name == "fashion_mnist":
        total = FASHION_IMAGES
    elif spec.name == "beton" and spec.root is not None:
        try:
            total = len(read_beton(Path(spec.root).expanduser() / "train.beton"))
        except ProxynormError:
            return spec.limit
    else:
        return spec.limit
    rest = total - spec.holdout
    return min(spec.limit or rest, rest)


def planned_settings(arguments: Sequence[str]) -> Settings:
    """The settings of a run whose data.root need not be given yet."""
    config = compose_config(arguments)
    if OmegaConf.is_missing(config.data, "root"):
        config.data.root = None
    return settings_from(config)


def total_steps(settings: Settings) -> int | None:
    images = train_images(settings)
    if images is None:
        return settings.max_steps
    steps = settings.epochs * (images // settings.batch)
    return min(steps, settings.max_steps or steps)


def checkpoint_bytes(settings: Settings) -> int:
    """What a run's checkpoints take at most: last.pt, previous.pt and the one being written hold everything, best.pt the
    weights."""
    classes, channels = (10, 1) if settings.data.name == "fashion_mnist" else (1000, 3)
    model = build_model(settings, classes, channels)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    copies = 1 + OPTIMIZER_COPIES.get(settings.optim.name, 2) + (settings.regularization.ema_decay is not None)
    return (3 * copies + 1) * weights


def last_training_row(folder: Path) -> dict | None:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "train"]
    return rows[-1] if rows else None


class Estimator:
    """Estimates a table's runs from what was measured of it: each cell's own runs or probe, else all the others' mean."""

    def __init__(self, table: Table, runs: Sequence[Run], overrides: Sequence[str] = ()) -> None:
        self.table, self.overrides = table, list(overrides)
        rows: dict[str, list[dict]] = defaultdict(list)
        for run in [*runs, *probe_runs(runs)]:
            if row := last_training_row(run.folder):
                rows[run.cell.name].append(row)
        self.speed = {cell: mean(row["images_per_second"] for row in group) for cell, group in rows.items()}
        self.memory = {cell: max(row.get("gpu_memory_gib", 0.0) for row in group) for cell, group in rows.items()}
        self.known: dict[str, Estimate] = {}

    def __call__(self, run: Run) -> Estimate:
        """The estimate of a run; its cell's other seeds share it."""
        name = run.cell.name
        if name not in self.known:
            self.known[name] = self._estimate(run.cell, planned_settings([*run.arguments(), *self.overrides]))
        return self.known[name]

    def _estimate(self, cell: Cell, settings: Settings) -> Estimate:
        steps = total_steps(settings)
        images = None if steps is None else steps * settings.batch
        memory = self.memory.get(cell.name) or None
        hours, origin = self._hours(cell, images)
        return Estimate(steps, images, hours, origin, checkpoint_bytes(settings), memory)

    def _hours(self, cell: Cell, images: int | None) -> tuple[float, str]:
        if images is not None and self.speed:
            own = cell.name in self.speed
            speed = self.speed[cell.name] if own else mean(self.speed.values())
            origin = "measured" if own else f"mean of {len(self.speed)} measured cells"
            return (images / speed + START_SECONDS) / 3600, origin
        return self.table.minutes / 60, f"estimate for {self.table.hardware}"


def probe_runs(runs: Sequence[Run]) -> list[Run]:
    """For each cell a run of a few steps, in the folder probe/ beside the cells' own."""
    cells = {run.cell.name: run for run in runs}
    short = (f"max_steps={PROBE_STEPS}", "log_every=5", "logger=none")
    return [
        replace(
            run,
            seed=0,
            folder=run.folder.parent / "probe" / run.cell.name,
            cell=replace(run.cell, overrides=(*run.cell.overrides, *short)),
        )
        for run in cells.values()
    ]


def describe(runs: Sequence[Run], estimate: Callable[[Run], Estimate]) -> str:
    """Steps, images, hours, disk and memory of the runs together, and where the hours come from."""
    estimates = [estimate(run) for run in runs]
    origins = sorted({item.origin for item in estimates})
    unknown = sum(item.steps is None for item in estimates)
    steps = (
        f"{sum(item.steps or 0 for item in estimates):,} steps, {sum(item.images or 0 for item in estimates):,} images"
    )
    memory = max((item.memory for item in estimates if item.memory), default=None)
    parts = [f"{len(runs)} runs to do", steps if not unknown else "steps unknown without data.root"]
    parts += [f"{sum(item.hours for item in estimates):.1f} h ({'; '.join(origins)})"]
    parts += [f"{sum(item.disk for item in estimates) / 1e9:.2f} GB of checkpoints"]
    parts += [f"up to {memory:.1f} GiB of GPU memory" if memory else "memory not measured"]
    return ", ".join(parts)


def refuse_impossible(runs: Sequence[Run], estimate: Callable[[Run], Estimate], options: SlurmOptions) -> None:
    """Raises ConfigError if a run cannot end within its time limits, or the checkpoints do not fit on the disk."""
    needed = sum(estimate(run).disk for run in runs)
    folder = runs[0].folder.parent
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise ConfigError(
            f"{folder}: {free / 1e9:.1f} GB free, the checkpoints of {len(runs)} runs take {needed / 1e9:.1f} GB; "
            "choose root= on a larger disk, or force=true"
        )
    if options.time is None:
        return
    useful = slurm.seconds(options.time) - slurm.WARNING_SECONDS - START_SECONDS
    longest = max(runs, key=lambda run: estimate(run).hours)
    seconds = estimate(longest).hours * 3600 - START_SECONDS
    if useful <= 0 or seconds > useful * (1 + options.requeues):
        limits = f"{1 + options.requeues} time limits" if options.requeues else "its time limit"
        enough = -(-seconds // useful) - 1 if useful > 0 else None
        remedy = f", or requeues={enough:.0f} to spread it over several" if enough else ""
        raise ConfigError(
            f"{longest.name} takes about {estimate(longest).hours:.2f} h ({estimate(longest).origin}) and cannot end within {limits} of "
            f"{options.time}, of which the last {slurm.WARNING_SECONDS} s are for saving; give a longer time={remedy}, or force=true"
        )
