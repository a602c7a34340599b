"""What runs would take, before they are started: steps, images, hours, disk, memory; and whether their limits allow it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from omegaconf import DictConfig, OmegaConf

from proxynorm.data.ffcv.beton import read_beton
from proxynorm.doctor import OPTIMIZER_COPIES, existing
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.launch import slurm
from proxynorm.launch.cost import relative_cost
from proxynorm.launch.runs import Run
from proxynorm.launch.slurm import SlurmOptions
from proxynorm.launch.sweep import Entry, Say
from proxynorm.launch.throughput import Measured, in_archives, in_folders, kind, processor_here
from proxynorm.paper.table import Table
from proxynorm.train.build import build_model
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import Settings

_weight_bytes: dict[str, int] = {}

FASHION_IMAGES = 60000
PROBE_STEPS = 20
SCALED = "scaled by epochs, network and image size"
START_SECONDS = 60.0  # allowed for starting a run: queueing the step, imports, opening the data


@dataclass(frozen=True)
class Estimate:
    """Of one run. images: of training, over all epochs; seconds: training and start-up, with their origin; disk: bytes
    of its checkpoints; memory: peak GPU memory in GiB. None: not known before data or a measurement is at hand."""

    steps: int | None
    images: int | None
    seconds: float | None
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


def planned_config(arguments: Sequence[str]) -> DictConfig:
    """The configuration of a run whose data.root need not be given yet."""
    config = compose_config(arguments)
    if OmegaConf.is_missing(config.data, "root"):
        config.data.root = None
    return config


def planned_settings(arguments: Sequence[str]) -> Settings:
    return settings_from(planned_config(arguments))


def total_steps(settings: Settings) -> int | None:
    images = train_images(settings)
    if images is None:
        return settings.max_steps
    steps = settings.epochs * (images // settings.batch)
    return min(steps, settings.max_steps or steps)


def weight_bytes(settings: Settings) -> int:
    """What a run's weights and buffers take; runs that differ in other things share it. Raises ConfigError if the network
    cannot be built."""
    key = repr((settings.data.name, settings.model, settings.norm, settings.norm_batch))
    if key not in _weight_bytes:
        classes, channels = (10, 1) if settings.data.name == "fashion_mnist" else (1000, 3)
        model = build_model(settings, classes, channels)
        _weight_bytes[key] = sum(
            value.numel() * value.element_size() for value in model.state_dict().values()
        )
    return _weight_bytes[key]


def checkpoint_bytes(settings: Settings) -> int:
    """What a run's checkpoints take at most: last.pt, previous.pt and the one being written hold everything, best.pt the
    weights."""
    copies = (
        1
        + OPTIMIZER_COPIES.get(settings.optim.name, 2)
        + (settings.regularization.ema_decay is not None)
    )
    return (3 * copies + 1) * weight_bytes(settings)


class Estimator:
    """Estimates runs from what was measured of their kind: in the folder of the runs and its probes, else in the archives of
    kept runs; else from the mean of the kinds that the folder tells of; else from the table's own words, by each cell's epochs,
    network and image size.

    A run counts if as many processes trained it, an archive also on this machine's processor or for this table. Raises
    ConfigError naming the cell, or the run, that cannot be built.
    """

    def __init__(
        self, runs_dir: Path, results: Path, table: Table | None = None, processes: int = 1
    ) -> None:
        self.table = table
        self.folders = by_kind(
            found for found in in_folders(runs_dir) if found.processes == processes
        )
        kept = [found for found in in_archives(results) if found.processes == processes]
        here, own = processor_here(), table.name if table else ""
        self.archives = by_kind(found for found in kept if found.table == own)
        self.archives |= by_kind(found for found in kept if found.processor == here)
        self.known: dict[str, Estimate] = {}
        self.first: Settings | None = None  # of the table's first cell

    def __call__(self, entry: Entry) -> Estimate:
        """The estimate of a run; its cell's other seeds share it."""
        name = entry.cell or entry.name
        if name not in self.known:
            try:
                self.known[name] = self._estimate(planned_config(entry.arguments))
            except ProxynormError as error:
                raise ConfigError(f"{'cell ' if entry.cell else ''}{name}: {error}") from error
        return self.known[name]

    def _estimate(self, config: DictConfig) -> Estimate:
        settings, what = settings_from(config), kind(OmegaConf.to_container(config, resolve=True))
        steps = total_steps(settings)
        images = None if steps is None else steps * settings.batch
        found = self.folders.get(what) or self.archives.get(what, [])
        memory = max((item.memory for item in found), default=0.0) or None
        seconds, origin = self._seconds(what, found, images, settings)
        return Estimate(steps, images, seconds, origin, checkpoint_bytes(settings), memory)

    def _seconds(
        self, what: str, found: Sequence[Measured], images: int | None, settings: Settings
    ) -> tuple[float | None, str]:
        if images is not None and (found or self.folders):
            speed = (
                mean_speed(found)
                if found
                else mean(mean_speed(group) for group in self.folders.values())
            )
            origin = f"mean of {len(self.folders)} measured kinds of runs"
            if found:
                origin = (
                    "measured" if what in self.folders else f"kept runs on {found[0].processor}"
                )
            return images / speed + START_SECONDS, origin
        if self.table is None:
            return None, "nothing like it was measured"
        if self.first is None:
            self.first = planned_settings(self.table.expand()[0].overrides)
        seconds = self.table.minutes * 60 * relative_cost(self.table, self.first, settings)
        return seconds, f"estimate for {self.table.hardware}; {SCALED}"


def by_kind(measured: Iterable[Measured]) -> dict[str, list[Measured]]:
    groups: dict[str, list[Measured]] = defaultdict(list)
    for found in measured:
        groups[found.kind].append(found)
    return dict(groups)


def mean_speed(group: Iterable[Measured]) -> float:
    return mean(item.images_per_second for item in group)


SHORT = (f"max_steps={PROBE_STEPS}", "log_every=5", "logger=none")


def probe_runs(runs: Sequence[Run]) -> list[Run]:
    """For each cell a run of a few steps, in the folder probe/ beside the cells' own."""
    cells = {run.cell.name: run for run in runs}
    return [
        replace(
            run,
            seed=0,
            folder=run.folder.parent / "probe" / run.cell.name,
            cell=replace(run.cell, overrides=(*run.cell.overrides, *SHORT)),
        )
        for run in cells.values()
    ]


def duration(seconds: float) -> str:
    """In the unit that suits: 40 s, 25 min, 7.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def describe(entries: Sequence[Entry], estimate: Callable[[Entry], Estimate]) -> str:
    """Steps, images, time, disk and memory of the runs together, and where the time comes from."""
    estimates = [estimate(entry) for entry in entries]
    origins = sorted({item.origin for item in estimates})
    unknown = sum(item.steps is None for item in estimates)
    steps = f"{sum(item.steps or 0 for item in estimates):,} steps, {sum(item.images or 0 for item in estimates):,} images"
    memory = max((item.memory for item in estimates if item.memory), default=None)
    parts = [
        f"{len(entries)} runs to do",
        steps if not unknown else "steps unknown without data.root",
    ]
    parts += [f"{total_time(estimates)} ({'; '.join(origins)})"] if estimates else []
    parts += [f"{sum(item.disk for item in estimates) / 1e9:.2f} GB of checkpoints"]
    parts += [f"up to {memory:.1f} GiB of GPU memory" if memory else "memory not measured"]
    return ", ".join(parts)


def total_time(estimates: Sequence[Estimate]) -> str:
    """The sum over the runs whose time is known, and how many it leaves out."""
    known = [item.seconds for item in estimates if item.seconds is not None]
    if not known:
        return "time unknown"
    left_out = len(estimates) - len(known)
    return duration(sum(known)) + (f" and {left_out} runs of unknown time" if left_out else "")


def check(
    entries: Sequence[Entry],
    estimate: Callable[[Entry], Estimate],
    options: SlurmOptions,
    force: bool,
    say: Say,
) -> None:
    """Say what the runs would take, before they are submitted. Raises ConfigError, unless `force`, for what cannot end."""
    say(describe(entries, estimate))
    if not force:
        refuse_impossible(entries, estimate, options)


def refuse_impossible(
    entries: Sequence[Entry], estimate: Callable[[Entry], Estimate], options: SlurmOptions
) -> None:
    """Raises ConfigError if a run cannot end within its time limits, or the checkpoints do not fit on the disk."""
    needed = sum(estimate(entry).disk for entry in entries)
    folder = entries[0].folder.parent
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise ConfigError(
            f"{folder}: {free / 1e9:.1f} GB free, the checkpoints of {len(entries)} runs take {needed / 1e9:.1f} GB; "
            "choose another disk, or force=true"
        )
    limit, warning = slurm.time_limit(options), slurm.warning_seconds(options)
    useful = limit - warning - START_SECONDS
    longest = max(entries, key=lambda entry: estimate(entry).seconds or 0)
    seconds = (estimate(longest).seconds or 0) - START_SECONDS
    if useful <= 0 or seconds > useful * (1 + options.requeues):
        limits = f"{1 + options.requeues} time limits" if options.requeues else "its time limit"
        enough = -(-seconds // useful) - 1 if useful > 0 else None
        remedy = f", or requeues={enough:.0f} to spread it over several" if enough else ""
        raise ConfigError(
            f"{longest.name} takes about {duration(seconds + START_SECONDS)} ({estimate(longest).origin}) and cannot end "
            f"within {limits} of {duration(limit)}, of which the last {duration(warning)} are for saving; "
            f"give a longer time={remedy}, or force=true"
        )
