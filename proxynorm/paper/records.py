"""Runs that have ended: read, kept as archives in results/TABLE/runs, and held to their recipe."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from proxynorm.errors import ConfigError, DataError
from proxynorm.files import write_atomic
from proxynorm.launch.status import KEPT, check_files, finished_files, reading, run_status
from proxynorm.paper.table import TableRun
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import identity

FAILURE = "failure.txt"  # replaces the summary of a failed run: the reason


@dataclass(frozen=True)
class Record:
    """A run that has ended: its files, by name, from `place`, its folder or its archive."""

    run: TableRun
    place: Path
    files: dict[str, bytes]

    @property
    def cell(self) -> str:
        return self.run.cell.name

    @property
    def failure(self) -> str:
        """Why the run failed; "" if it finished."""
        return self.files.get(FAILURE, b"").decode().strip()

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.files["summary.json"])

    @cached_property
    def environment(self) -> dict[str, Any]:
        return json.loads(self.files["environment.json"])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files["metrics.jsonl"].splitlines()]


def read_record(run: TableRun, results: str | Path) -> Record | None:
    """The record of a run, from its folder, else from its archive; None if it has not ended.

    Raises DataError for damaged files.
    """
    return folder_record(run) or kept_record(run, results)


def folder_record(run: TableRun) -> Record | None:
    """The record of a run that its folder holds, or the log beside it."""
    files = finished_files(run.folder)
    if files is None:
        now = run_status(run)
        if now.state == "damaged":
            raise DataError(now.error)
        if now.state != "failed":
            return None
        paths = [run.folder / name for name in KEPT if name != "summary.json"]
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        files[FAILURE] = f"{now.error}\n".encode()
    if "config.yaml" in files:  # the path of the runs on this machine is nobody else's
        line = f"runs_dir: runs/{run.table}".encode()
        files["config.yaml"] = re.sub(rb"(?m)^runs_dir: .*$", line, files["config.yaml"])
    return Record(run, run.folder, files)


def archive_path(run: TableRun, results: str | Path) -> Path:
    """Where the run is kept: a tar archive that unpacks to its folder."""
    return Path(results) / run.table / "runs" / f"{run.name}.tar.xz"


def kept_record(run: TableRun, results: str | Path) -> Record | None:
    """The record of a run that its archive holds."""
    path = archive_path(run, results)
    if not path.exists():
        return None
    with reading(path):
        with tarfile.open(path, "r:xz") as archive:
            members = [member for member in archive if member.isfile()]
            files = {Path(item.name).name: archive.extractfile(item).read() for item in members}
        if FAILURE not in files:
            check_files(files)
    return Record(run, path, files)


def collect(run: TableRun, results: str | Path) -> bool:
    """Keep a finished or failed run as an archive; False if there is nothing new to keep."""
    record, kept = folder_record(run), kept_record(run, results)
    if record is None or (kept and kept.files == record.files):
        return False
    path = archive_path(run, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda stream: write_archive(stream, run.name, record.files))
    return True


def write_archive(stream: io.BufferedIOBase, folder: str, files: dict[str, bytes]) -> None:
    """Write a tar of folder/name, without dates and owners: equal runs give equal archives."""
    with tarfile.open(fileobj=stream, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))


class Mismatch(NamedTuple):
    """A finished run, where it lies, and the first key in which it differs from its table."""

    run: TableRun
    place: Path
    key: str
    trained: Any
    stated: Any

    def __str__(self) -> str:
        return f"trained with {self.key}={self.trained}, the table says {self.stated}"


def refuse_other_recipes(runs: Sequence[TableRun], results: str | Path) -> None:
    """Raises ConfigError naming the finished runs of another recipe, and the remedy."""
    if others := other_recipes(runs, results):
        first, places = others[0], ", ".join(str(other.place) for other in others)
        remedy = f"remove {places}, or state their recipe, as train=[{first.key}={first.trained}]"
        raise ConfigError(f"{first.run.name} was {first}; {remedy}")


def other_recipes(runs: Sequence[TableRun], results: str | Path) -> list[Mismatch]:
    """The finished runs whose recipe differs from the table's. Raises DataError, ConfigError."""

    @cache  # composing is slow; a cell's seeds share it
    def stated(arguments: Sequence[str]) -> dict[str, Any]:
        config = compose_config(arguments)
        if OmegaConf.is_missing(config.data, "root"):
            config.data.root = None
        return recipe(config)

    others = []
    for run in runs:
        record = read_record(run, results)
        if record is None or record.failure:
            continue
        now = {**stated(run.kind), "seed": run.seed}
        with reading(record.place):  # keys that an old file lacks have defaults
            was = recipe(OmegaConf.create(yaml.safe_load(record.files["config.yaml"])))
        differing = (k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k))
        if key := next(differing, None):
            others.append(Mismatch(run, record.place, key, was.get(key), now.get(key)))
    return others


def recipe(config: DictConfig) -> dict[str, Any]:
    """The keys that decide the training."""
    settings = settings_from(config)
    return {**identity(settings), "max_steps": settings.max_steps}
